"""Which chunks to keep between two uses, so that the fewest bytes are fetched again. Pure.

Between two uses a chunk is either kept, for room in every moment in between, or dropped, for one more fetch. Which gaps
to keep under a room that differs from moment to moment is a knapsack over time; where all chunks are equal and the room
is constant, dropping the one whose next use is furthest is best (Belady, "A study of replacement algorithms", 1966).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import accumulate, islice

__all__ = ["Gap", "choose_gaps"]

# Where never more than this many gaps are open at a time, the search is exhaustive: all sets of them fit in the beam.
_EXHAUSTIVE_GAPS = 8
_EXHAUSTIVE_WIDTH = 2**_EXHAUSTIVE_GAPS
# Elsewhere a beam as wide as a second allows: so many states in all, and at least so many at a moment.
_STATES = 20_000
_NARROWEST = 8
# Among more gaps than can be tried in all ways, this many of the cheapest are, those of equal bytes counted once.
_TRIED_GROUPS = 6
_TRIED_WAYS = 16
# The states whose dropped gaps are looked through once more at the end.
_FINALISTS = 8


@dataclass(frozen=True)
class Gap:
    """The time between two uses of a chunk.

    Attributes:
        chunk: its number.
        use: the use before.
        next_use: the use after; at least two later, so that there is a moment in between.
        size_bytes: what the chunk takes in the moments in between if it is kept.
        fetch_bytes: what is fetched before the next use if it is not.
    """

    chunk: int
    use: int
    next_use: int
    size_bytes: int
    fetch_bytes: int


# What has been dropped, as a list that grows at its head and shares its tail.
_Trail = tuple["_Trail", Gap] | None


@dataclass(frozen=True, slots=True)
class _State:
    """One way to have come to a moment.

    Attributes:
        fetch_bytes: of all gaps dropped.
        kept: a bit for each chunk that is kept over the moment.
        size_bytes: of those chunks.
        dropped: all gaps dropped.
    """

    fetch_bytes: int
    kept: int
    size_bytes: int
    dropped: _Trail

    def without(self, gaps: Sequence[Gap]) -> _State:
        """Return the state after some gaps have been dropped."""
        fetch_bytes, kept, size_bytes, dropped = self.fetch_bytes, self.kept, self.size_bytes, self.dropped
        for gap in gaps:
            fetch_bytes += gap.fetch_bytes
            kept &= ~(1 << gap.chunk)
            size_bytes -= gap.size_bytes
            dropped = (dropped, gap)
        return _State(fetch_bytes, kept, size_bytes, dropped)

    def all_dropped(self) -> Iterator[Gap]:
        """Yield the gaps dropped, the last first."""
        dropped = self.dropped
        while dropped is not None:
            dropped, gap = dropped
            yield gap


def choose_gaps(gaps: Sequence[Gap], room_bytes: Sequence[int]) -> frozenset[Gap]:
    """Return the gaps over which to keep their chunks.

    A sweep over the moments with a beam of states. A chunk is dropped only where the room does not suffice, and then in
    every smallest way while there are few gaps, else in the cheapest ones; dropping the furthest is always among them,
    and the state that comes of always doing so is never lost. So the result is never worse than Belady's; it is the
    best where at most 8 chunks can be kept at a time, or where all are equal.

    Args:
        gaps: of one chunk none that overlap.
        room_bytes: by moment, for chunks that are kept over it; at least 0.
    """
    possible = [gap for gap in gaps if min(room_bytes[gap.use + 1 : gap.next_use]) >= gap.size_bytes]
    ways = (_filled(possible, dropped, room_bytes) for dropped in _sweep(possible, room_bytes))
    return frozenset(max(ways, key=lambda kept: sum(gap.fetch_bytes for gap in kept)))


def _sweep(gaps: Sequence[Gap], room_bytes: Sequence[int]) -> Iterator[set[Gap]]:
    """Yield the gaps that were dropped on the best ways to the end, the best first."""
    moments = len(room_bytes)
    starting: list[list[Gap]] = [[] for _ in range(moments)]
    for gap in gaps:
        starting[gap.use + 1].append(gap)
    exhaustive = _most_open(starting) <= _EXHAUSTIVE_GAPS
    width = _EXHAUSTIVE_WIDTH if exhaustive else max(_NARROWEST, min(_EXHAUSTIVE_WIDTH, _STATES // moments))
    furthest = _State(0, 0, 0, None)
    states = [furthest]
    open_gaps: list[Gap] = []
    for moment, room in enumerate(room_bytes):
        ended = [gap for gap in open_gaps if gap.next_use == moment]
        started = starting[moment]
        if ended or started:
            open_gaps = [gap for gap in open_gaps if gap.next_use > moment] + started
            open_gaps.sort(key=lambda gap: (-gap.next_use, gap.fetch_bytes, -gap.size_bytes, gap.chunk))
            states = [_moved(state, ended, started) for state in states]
            furthest = _moved(furthest, ended, started)
        reached: dict[int, _State] = {}
        for state in states:
            for gaps_dropped in _drops(state, open_gaps, state.size_bytes - room, None if exhaustive else moment):
                _reach(reached, state.without(gaps_dropped))
        furthest = _reach(reached, _furthest_dropped(furthest, open_gaps, room))
        states = list(reached.values())
        if len(states) > width:
            states = nsmallest(width - 1, states, key=lambda state: (state.fetch_bytes, state.size_bytes, state.kept))
            states.append(furthest)
    best = nsmallest(_FINALISTS, states, key=lambda state: (state.fetch_bytes, state.kept))
    for state in (*best, furthest):
        yield set(state.all_dropped())


def _most_open(starting: Sequence[Sequence[Gap]]) -> int:
    """Return how many gaps are open at a time, at most."""
    changes = [len(gaps) for gaps in starting]
    for gaps in starting:
        for gap in gaps:
            changes[gap.next_use] -= 1
    return max(accumulate(changes), default=0)


def _reach(reached: dict[int, _State], state: _State) -> _State:
    """Add a state, and return it, or the one that keeps the same chunks for less."""
    before = reached.get(state.kept)
    if before is None or state.fetch_bytes < before.fetch_bytes:
        reached[state.kept] = state
        return state
    return before


def _moved(state: _State, ended: Sequence[Gap], started: Sequence[Gap]) -> _State:
    """Return the state at the next moment, before anything is dropped."""
    kept, size_bytes = state.kept, state.size_bytes
    for gap in ended:
        if kept >> gap.chunk & 1:
            kept &= ~(1 << gap.chunk)
            size_bytes -= gap.size_bytes
    for gap in started:
        kept |= 1 << gap.chunk
        size_bytes += gap.size_bytes
    return _State(state.fetch_bytes, kept, size_bytes, state.dropped)


def _drops(state: _State, open_gaps: Sequence[Gap], excess: int, moment: int | None) -> Iterable[tuple[Gap, ...]]:
    """Return the ways to drop no more than must be: all of them, or at a given moment those worth trying."""
    if excess <= 0:
        return ((),)
    kept = [gap for gap in open_gaps if state.kept >> gap.chunk & 1]
    if moment is None:
        return _smallest_drops(_alike(kept), excess)
    return _cheap_drops(kept, excess, moment)


def _cheap_drops(kept: Sequence[Gap], excess: int, moment: int) -> list[tuple[Gap, ...]]:
    """Return ways to drop enough of the gaps that are cheapest for the room they leave, and how long they do."""
    cheapest = sorted(kept, key=lambda gap: gap.fetch_bytes / (max(1, gap.size_bytes) * (gap.next_use - moment)))
    # What is far too much is dropped in one way: there are too many.
    largest = max(gap.size_bytes for gap in kept)
    certain: list[Gap] = []
    while excess > 2 * largest:
        certain.append(cheapest[len(certain)])
        excess -= certain[-1].size_bytes
    tried: list[list[Gap]] = []
    others = _alike(cheapest[len(certain) :])
    while others and (len(tried) < _TRIED_GROUPS or sum(gap.size_bytes for group in tried for gap in group) < excess):
        tried.append(others.pop(0))
    alone = [group for group in others if group[0].size_bytes >= excess]
    if alone:
        tried.append(min(alone, key=lambda group: (group[0].fetch_bytes, -group[0].next_use)))
    return [(*certain, *gaps) for gaps in islice(_smallest_drops(tried, excess), _TRIED_WAYS)]


def _alike(gaps: Iterable[Gap]) -> list[list[Gap]]:
    """Return gaps of equal bytes together: the furthest of them is always as good to drop as another."""
    alike: dict[tuple[int, int], list[Gap]] = {}
    for gap in gaps:
        alike.setdefault((gap.size_bytes, gap.fetch_bytes), []).append(gap)
    return list(alike.values())


def _smallest_drops(groups: Sequence[Sequence[Gap]], excess: int) -> Iterator[tuple[Gap, ...]]:
    """Yield the sets of gaps that leave enough room, and would not without any one of them; of a group its first ones.

    From large to small, what is added last is the smallest, and without it there was not enough.
    """
    largest_first = sorted(groups, key=lambda group: -group[0].size_bytes)
    rest_bytes = [0]
    for group in reversed(largest_first):
        rest_bytes.append(rest_bytes[-1] + sum(gap.size_bytes for gap in group))
    rest_bytes.reverse()

    def ways(number: int, excess: int) -> Iterator[tuple[Gap, ...]]:
        if excess <= 0:
            yield ()
            return
        if rest_bytes[number] < excess:
            return
        group = largest_first[number]
        for count in range(len(group) + 1):
            for others in ways(number + 1, excess - count * group[0].size_bytes):
                yield (*group[:count], *others)
            if count * group[0].size_bytes >= excess:
                return

    return ways(0, excess)


def _furthest_dropped(state: _State, open_gaps: Sequence[Gap], room_bytes: int) -> _State:
    """Return the state that comes of dropping the furthest, as far as must be."""
    excess = state.size_bytes - room_bytes
    drops: list[Gap] = []
    for gap in open_gaps:
        if excess <= 0:
            break
        if state.kept >> gap.chunk & 1:
            drops.append(gap)
            excess -= gap.size_bytes
    needed = []
    for gap in drops:  # a small one that came before a large one may stay after all
        if excess + gap.size_bytes <= 0:
            excess += gap.size_bytes
        else:
            needed.append(gap)
    return state.without(needed)


def _filled(gaps: Sequence[Gap], dropped: set[Gap], room_bytes: Sequence[int]) -> list[Gap]:
    """Return the gaps not dropped, and of the dropped ones those that fit after all beside what was dropped later."""
    left = list(room_bytes)
    kept: list[Gap] = []
    again = sorted(dropped, key=lambda gap: (-gap.fetch_bytes, gap.next_use - gap.use, gap.use, gap.chunk))
    for gap in (*(gap for gap in gaps if gap not in dropped), *again):
        between = range(gap.use + 1, gap.next_use)
        if min(left[moment] for moment in between) >= gap.size_bytes:
            kept.append(gap)
            for moment in between:
                left[moment] -= gap.size_bytes
    return kept
