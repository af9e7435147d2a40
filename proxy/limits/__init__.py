"""What a client key may use is set aside before a model is asked, and settled with what it took, over all processes.

No library does this: `limits` and `pyrate-limiter` count hits in windows, each limit by itself, and none reserves
several windows and money in one atomic step, to be settled later.
"""
