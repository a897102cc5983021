"""Lines for the user. They go to standard error, so that standard output stays for results."""

from __future__ import annotations

import sys
from typing import TextIO

__all__ = ["Log"]


class Log:
    """Prints plain lines, from the main rank only.

    Args:
        enabled: False on every rank but the main one.
        stream: where lines go; standard error as it is at the time of the call if None.
    """

    def __init__(self, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        self.enabled = enabled
        self._stream = stream

    def line(self, text: str = "") -> None:
        """Print one line."""
        if self.enabled:
            stream = self._stream if self._stream is not None else sys.stderr
            stream.write(text + "\n")
            stream.flush()

    def warn(self, text: str) -> None:
        """Print one line that asks for attention."""
        self.line(f"warning: {text}")
