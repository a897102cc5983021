"""The collector does not go through what was there before the first step."""

import gc
import weakref

import pytest

from albireo.training.garbage import sparing_collector


class _Knot:
    """Has itself, so that the collector alone can free it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_was_there_is_left_out_and_what_comes_is_collected() -> None:
    # Not what a module makes when it is loaded: the collector goes through it everywhere.
    before = gc.get_freeze_count()
    old = _Knot()
    seen = weakref.ref(old)
    with sparing_collector():
        assert gc.get_freeze_count() > before
        del old
        new = weakref.ref(_Knot())
        gc.collect()
        assert new() is None
        assert seen() is not None
    assert gc.get_freeze_count() == before
    gc.collect()
    assert seen() is None


def test_it_ends_with_an_error_too() -> None:
    before = gc.get_freeze_count()
    with pytest.raises(ValueError, match="planned"), sparing_collector():
        raise ValueError("planned")
    assert gc.get_freeze_count() == before
