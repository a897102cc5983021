"""Ctrl-C asks for a stop at the end of a step; a second one stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["StopRequest"]


class StopRequest:
    """Listens for SIGINT and SIGTERM while it is entered; in the main thread alone, since no other may.

    A signal that was ignored stays so, as a shell wants it of what runs in the background.

    Attributes:
        requested: True once either has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        # Whoever asks twice does not want to wait: the next signal does what it did before.
        self._restore()

    def _restore(self) -> None:
        # Taken away first: a signal that comes between two of these calls restores too.
        before, self._before = self._before, {}
        for number, handler in before.items():
            # A handler that is not Python's is told as None, and cannot be put back; the usual one can.
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual if handler is None else handler)
