"""Where a step stands in the trace that its placement was made for."""

from __future__ import annotations

from albireo.memory.budget import Trace
from albireo.memory.placement import Placement

__all__ = ["Itinerary"]


class Itinerary:
    """Follows a step through a trace, use by use. A step that leaves it is lost until the next one begins.

    Args:
        trace: the uses that are expected.
        placement: what was decided for them.
    """

    def __init__(self, trace: Trace, placement: Placement) -> None:
        self._trace = trace
        self._placement = placement
        self._next = 0
        self._last_use: dict[int, int] = {}
        self._lost = False

    @property
    def is_lost(self) -> bool:
        """True if this step does what the trace does not say."""
        return self._lost

    def restart(self) -> None:
        """Begin a step."""
        self._next, self._lost = 0, False
        self._last_use.clear()

    def enter(self, chunks: frozenset[int], phase: str) -> tuple[int, ...]:
        """Go to the next use.

        Args:
            chunks: the numbers of all that are in use.
            phase: "forward" or "backward".

        Returns:
            The chunks whose fetch is to begin with it; none for a step that is lost.
        """
        if not self._lost:
            expected = self._trace[self._next]
            self._lost = (expected.chunks, expected.phase) != (chunks, phase)
        if self._lost:
            return ()
        use = self._next
        self._next += 1
        self._last_use.update(dict.fromkeys(chunks, use))
        return self._placement.fetches[use]

    def keeps(self, chunk: int) -> bool:
        """Return True if a chunk whose use ends is to stay until its next one.

        Args:
            chunk: its number.
        """
        return not self._lost and (self._last_use.get(chunk, -1), chunk) in self._placement.keeps
