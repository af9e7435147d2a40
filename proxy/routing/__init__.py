"""From the caller's bytes to the choice of a model. Forwards nothing."""
