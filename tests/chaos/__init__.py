"""Two workers under load while everything around them breaks, and the books afterwards: who got what, what it cost."""
