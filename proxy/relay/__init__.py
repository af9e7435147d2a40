"""The chosen models' answer on its way back: who is asked next, what the client is shown, how a stream ends."""
