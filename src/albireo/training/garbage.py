"""Python's garbage collector while steps are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["sparing_collector"]


@contextmanager
def sparing_collector() -> Iterator[None]:
    """Keep what there is already out of the collector's rounds.

    The libraries alone are some 350,000 objects, and to go through them takes a fifth of a second: now and then a step of
    several times its length. What is made within is collected as ever.
    """
    was_frozen = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        # What somebody else has set aside before stays aside, and so does this with it.
        if not was_frozen:
            gc.unfreeze()
