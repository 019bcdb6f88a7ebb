"""Python's cyclic garbage collector, as a process that serves wants it."""

import gc

# With 700 objects, Python's default, passes come so often that they find requests in flight, which
# are no garbage, and look at each of their objects several times.
_YOUNG_OBJECTS = 10_000


def collect_seldom() -> None:
    """From now on looks at what is new seldom, and never at what there is now.

    For when all that lives as long as the process has been loaded.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])
