from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """Split a list of words that is written as one line."""
    return tuple(text.split())


PEOPLE = words(
    "Amara Bruno Chloe Diego Elif Farid Greta Hugo Ines Jonas Keiko Leila Marco Nadia Otto Priya Quentin Rosa Stefan"
    " Tara Umar Vera Wendell Ximena Yusuf Zoe Anton Bianca Carlos Daria"
)

SURNAMES = words(
    "Berg Castro Dietrich Evans Fontana Gupta Hansen Ito Jensen Kowalski Lindqvist Moreau Novak Okafor Petrov"
)

TOWNS = words("Ashford Brenville Corran Dunmore Eastwick Fallow Gresham Holt Ivybridge Keswick Larkhill Marlow")

COMPANIES = words(
    "Northwind Bluefin Halcyon Juniper Lattice Meridian Orchard Pinecrest Quarry Redwood Silverline Tidewater"
)

MONTHS = words("January February March April May June July August September October November December")
