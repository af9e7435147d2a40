"""Import and read all that every server needs, whatever its settings. Workers are forked from a process that did so.

None of it is garbage: collections would only look through it again and again, a tenth of the time, and later ones would
write to pages that workers share.
"""

import gc
from contextlib import suppress

gc.disable()
try:
    import proxy.app  # noqa: F401  it stays in sys.modules
    from proxy.server.startup import return_freed_memory
    from proxy.storage.price_map import bundled_price_map
    from router_core.artifact import builtin_map
    from router_core.errors import RouterCoreError

    with suppress(RouterCoreError, OSError):  # the start meets the same failure, and logs it
        bundled_price_map()
        builtin_map()
finally:
    gc.enable()
gc.freeze()
return_freed_memory()
