"""How good routing is: recorded outcomes, deferral curves, what is read off them. Asks no model, draws no picture."""
