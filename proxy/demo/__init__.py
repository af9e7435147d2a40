"""`uniroute demo`: real models on this machine, measured and routed by a server of its own."""
