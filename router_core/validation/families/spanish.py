"""Several families in Spanish: sums, stories, dates, facts, reading, labels, a short message."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from random import Random

from router_core.validation.families.helpers import LONG, Draft, Section, by_levels
from router_core.validation.families.names import words
from router_core.validation.families.open_tables import facts
from router_core.validation.graders import (
    ContainsGrader,
    ExactGrader,
    Grader,
    NumericGrader,
    SequenceGrader,
    Terms,
    WritingGrader,
)

_NAMES = ("Lucía", "Mateo", "Carmen", "Javier", "Elena", "Pablo", "Marta", "Andrés")
_DAYS = ("lunes", "martes", "miércoles", "jueves", "viernes", "sábado", "domingo")
_MONTHS = words("enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre")

Task = tuple[str, Grader, str]


def _number(text: str, value: float) -> Task:
    return text, NumericGrader(value, 0.005), f"La respuesta es {value:g}."


def _easy_sum(rng: Random) -> Task:
    a, b = rng.randint(12, 80), rng.randint(3, 19)
    return rng.choice(
        [
            _number(f"¿Cuánto es {a} más {b}?", a + b),
            _number(
                f"{rng.choice(_NAMES)} tiene {a} canicas y pierde {b % 11 + 1}. ¿Cuántas le quedan?", a - b % 11 - 1
            ),
            _number(f"Calcula {a} por {b % 9 + 2}. Responde solo con el número.", a * (b % 9 + 2)),
        ]
    )


def _middling_sum(rng: Random) -> Task:
    price, count, hours = rng.randint(6, 18), rng.randint(3, 7), rng.randint(3, 8)
    return rng.choice(
        [
            _number(
                f"{rng.choice(_NAMES)} compra {count} cuadernos a {price} euros y paga con 150 euros. ¿Cuánto le"
                " devuelven?",
                150 - count * price,
            ),
            _number(
                f"Un autobús recorre {price * 5} km cada hora. ¿Cuántos metros recorre en {hours} horas?",
                price * 5000 * hours,
            ),
            _number(f"¿Cuántos minutos hay en {hours} horas y {price} minutos?", hours * 60 + price),
        ]
    )


def _hard_sum(rng: Random) -> Task:
    price, off, a, b = (
        rng.randrange(120, 800, 20),
        rng.choice([15, 20, 25, 35]),
        rng.randint(11, 40),
        rng.randint(11, 40),
    )
    return rng.choice(
        [
            _number(
                f"Un abrigo cuesta {price} euros. Primero lo rebajan un {off} % y luego le suman un 10 % de gastos"
                " sobre el precio rebajado. ¿Cuánto se paga al final?",
                price * (100 - off) * 11 / 1000,
            ),
            _number(
                f"En una granja hay conejos y gallinas: {a + b} cabezas y {4 * a + 2 * b} patas. ¿Cuántos conejos hay?",
                a,
            ),
            _number(
                f"La suma de dos números es {a + b} y su diferencia es {abs(a - b)}. ¿Cuál es el mayor?", max(a, b)
            ),
        ]
    )


def _later(rng: Random) -> Task:
    start = date(2025, rng.randint(1, 12), rng.randint(1, 28))
    days = rng.randint(20, 100)
    answer = _DAYS[(start + timedelta(days=days)).weekday()]
    told = f"El {start.day} de {_MONTHS[start.month - 1]} de 2025 es {_DAYS[start.weekday()]}."
    return (
        f"{told} ¿Qué día de la semana será {days} días después? Contesta con una palabra.",
        ExactGrader((answer,)),
        answer,
    )


def _order(rng: Random) -> Task:
    a, b, c = rng.sample(_NAMES, 3)
    return (
        (
            f"{a} es más alta que {b}, y {c} es más baja que {b}. Ordena los tres nombres de mayor a menor altura,"
            " separados por comas."
        ),
        SequenceGrader((a, b, c)),
        f"{a}, {b}, {c}",
    )


def _feeling(rng: Random) -> Task:
    text, label = rng.choice(
        [
            ("La habitación estaba sucia y nadie nos atendió.", "negativa"),
            ("Todo perfecto, volveremos el año que viene.", "positiva"),
            ("Qué bien, otra hora de cola bajo el sol. Un sueño.", "negativa"),
            ("No esperaba nada y me quedé encantado con el trato.", "positiva"),
        ]
    )
    prompt = f"Clasifica la opinión de {rng.choice(_NAMES)} como positiva o negativa. Una sola palabra.\n«{text}»"
    other = "positiv" if label == "negativa" else "negativ"
    terms = Terms(any=(label, label[:-1] + "o"), none=(f"{other}a", f"{other}o"))
    return prompt, ContainsGrader(terms), f"{label.capitalize()}."


def _message(rng: Random) -> Task:
    name, place = rng.choice(_NAMES), rng.choice(["la biblioteca", "el mercado", "la estación", "el museo"])
    prompt = (
        f"Escribe un mensaje de una sola frase para {name} en el que le pidas con amabilidad que te espere en {place}."
        f" Nombra a {name} y {place}. Solo el mensaje."
    )
    grader = WritingGrader(Terms(all=(name, place.split()[1])), sentences=(1, 2), words=(5, 27))
    return prompt, grader, f"{name}, ¿podrías esperarme en {place}, por favor?"


def _passage(rng: Random) -> Task:
    a, b = rng.sample(_NAMES, 2)
    town, year = rng.choice(["Sevilla", "Lima", "Bogotá", "Valencia"]), rng.randint(1970, 2005)
    text = (
        f"{a} abrió su taller de guitarras en {town} en {year}. Diez años más tarde contrató a {b}, que venía de una"
        f" familia de carpinteros. Cuando {a} se jubiló, {b} vendió el taller y se hizo profesor de música.\n\n¿Quién"
        " vendió el taller? Responde con el nombre."
    )
    return text, WritingGrader(Terms(all=(b,), none=(a,)), words=(1, 20)), b


_TASKS: tuple[tuple[Callable[[Random], Task], ...], ...] = (
    (_easy_sum, _feeling),
    (_middling_sum, _order, _message, _passage),
    (_hard_sum, _later),
)


def _draw(rng: Random, level: int) -> Draft:
    text, grader, reference = rng.choice(_TASKS[level - 1])(rng)
    return Draft(text, grader, reference, level, LONG, "es")


_FRAMES = ("{q}", "{q} Responde brevemente.", "Hola, una pregunta: {q}", "Pregunta de cultura general. {q}")

SECTIONS = (
    Section("spanish", 15, by_levels(_draw)),
    Section("spanish_facts", 9, facts("spanish_facts", _FRAMES, language="es"), family="spanish"),
)
