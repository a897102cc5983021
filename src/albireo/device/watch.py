"""What somebody who traces a step sees of a lane; nobody looks unless a trace is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

__all__ = ["LaneWatch", "WaitWatch", "WorkLabel", "at_work", "waiting"]

# Has no state, so it may be entered by any number of threads at once.
_NOTHING: AbstractContextManager[None] = nullcontext()


class WorkLabel(NamedTuple):
    """What something on a lane is, and for whom.

    Attributes:
        kind: in a word or two, such as "weights in".
        owner: whose; None: nobody's in particular.
        size_bytes: what it moves.
    """

    kind: str
    owner: object = None
    size_bytes: int = 0


class WaitWatch(ABC):
    """Is told of waits. Any thread may call; nothing here may wait for the device."""

    @abstractmethod
    def waiting(self, label: WorkLabel) -> AbstractContextManager[None]:
        """Return a context around a wait: of the current stream, or of the host that feeds it.

        Args:
            label: what is waited for.
        """


class LaneWatch(WaitWatch):
    """Is told of a lane's works, and of waits for them."""

    @abstractmethod
    def work(self, label: WorkLabel) -> AbstractContextManager[None]:
        """Return a context around something that runs on the lane; on a GPU around its launch, on the lane's stream.

        Args:
            label: what it is.
        """


def at_work(watch: LaneWatch | None, label: WorkLabel | None) -> AbstractContextManager[None]:
    """Return a context around something that runs on a lane, which does nothing where nobody looks.

    Args:
        watch: who looks; None: nobody.
        label: what it is; None: nothing that is worth a look.
    """
    return _NOTHING if watch is None or label is None else watch.work(label)


def waiting(watch: WaitWatch | None, label: WorkLabel | None) -> AbstractContextManager[None]:
    """Return a context around a wait, which does nothing where nobody looks.

    Args:
        watch: who looks; None: nobody.
        label: what is waited for; None: nothing that is worth a look.
    """
    return _NOTHING if watch is None or label is None else watch.waiting(label)
