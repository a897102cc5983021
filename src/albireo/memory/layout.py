"""Which parameters share a chunk, and which units a chunk serves. Pure numbers, the same on every rank."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from albireo.errors import ConfigError
from albireo.sharding.flat import FlatLayout

__all__ = ["ChunkPlan", "ParameterFacts", "UnitFacts", "plan_chunks", "waste"]


@dataclass(frozen=True)
class ParameterFacts:
    """What the layout has to know of a parameter.

    Attributes:
        numel: how many elements it has.
        kind: what has to be equal for parameters to share a chunk: dtype, and whether it is trained.
    """

    numel: int
    kind: Hashable


@dataclass(frozen=True)
class UnitFacts:
    """A module whose parameters are needed together.

    Attributes:
        name: the module's.
        parameters: their numbers, in the order of execution. No parameter is in two units.
    """

    name: str
    parameters: tuple[int, ...]


@dataclass(frozen=True)
class ChunkPlan:
    """One flat buffer.

    Attributes:
        units: the numbers of the units it serves: one, or several small neighbours; never empty.
        parameters: their numbers, in the order in which they lie in it; never empty, and all of one kind.
        is_root: whether it belongs to the unit that is in use throughout.
    """

    units: tuple[int, ...]
    parameters: tuple[int, ...]
    is_root: bool


def plan_chunks(
    parameters: Sequence[ParameterFacts],
    units: Sequence[UnitFacts],
    *,
    root: int,
    chunk_elements: int,
    borders: Sequence[float] = (),
) -> list[ChunkPlan]:
    """Deal parameters to chunks.

    The chunks come in the order in which the next forward needs them: the root's, then the others' in the order of
    their units; those of one unit (or of neighbours that share chunks) by kind, as kinds first occur.
    Chunks are offloaded from the end of this order. So that a share of the elements can be offloaded to within half a
    parameter, whatever the size of a chunk, one ends at each border: at the parameter boundary nearest to that share of
    all elements, counted from the end. A share may be one of the elements of some kinds alone (the trained ones have
    optimizer states): one ends at the same share of each kind's elements too.

    Args:
        parameters: all of them.
        units: in the order of execution. Together they hold each parameter once.
        root: the number of the unit that is in use throughout; it shares chunks with no other.
        chunk_elements: what consecutive small units share at most, all kinds together. A larger unit, or the root, gets
            for each kind as many chunks of about even size as make about this each; no parameter is cut.
        borders: shares from 0 to 1 at which a chunk has to end.

    Raises:
        ConfigError: a parameter is in no unit or in two, there is no such root, a chunk could hold nothing, or a border
            is no share.
    """
    _check(parameters, units, root, chunk_elements, borders)
    numels = [parameter.numel for parameter in parameters]
    runs = [run for group in _groups(parameters, units, root, chunk_elements) for run in _by_kind(parameters, group)]
    cuts = _border_cuts(parameters, [number for run in runs for number in run], borders)
    unit_of = {number: place for place, unit in enumerate(units) for number in unit.parameters}
    chunks = []
    for run in _cut(runs, cuts):
        pieces = -(-sum(numels[number] for number in run) // chunk_elements)
        for piece in _evenly(run, numels, pieces):
            serves = sorted({unit_of[number] for number in piece})
            chunks.append(ChunkPlan(tuple(serves), tuple(piece), serves == [root]))
    return chunks


def waste(parameters: Sequence[ParameterFacts], chunks: Sequence[ChunkPlan], ranks: int) -> int:
    """Return how many elements of all chunks' buffers belong to no parameter.

    Args:
        parameters: all of them.
        chunks: the layout.
        ranks: how many share each buffer.

    Raises:
        ConfigError: there is no rank.
    """
    shapes = ([(parameters[number].numel,) for number in chunk.parameters] for chunk in chunks)
    return sum(FlatLayout.of(buffer, ranks).waste for buffer in shapes)


def _check(
    parameters: Sequence[ParameterFacts],
    units: Sequence[UnitFacts],
    root: int,
    chunk_elements: int,
    borders: Sequence[float],
) -> None:
    if chunk_elements < 1:
        raise ConfigError(f"a chunk holds at least 1 element, not {chunk_elements}")
    if not 0 <= root < len(units):
        raise ConfigError(f"the root is one of {len(units)} units, not number {root}")
    for border in borders:
        if not 0 <= border <= 1:
            raise ConfigError(f"a share lies between 0 and 1, not at {border}")
    owner: dict[int, str] = {}
    for unit in units:
        for number in unit.parameters:
            if not 0 <= number < len(parameters):
                raise ConfigError(f"unit {unit.name} has parameter {number} of {len(parameters)}")
            if number in owner:
                raise ConfigError(f"parameter {number} is in two units: {owner[number]} and {unit.name}")
            owner[number] = unit.name
    for number in range(len(parameters)):
        if number not in owner:
            raise ConfigError(f"parameter {number} is in no unit")


def _groups(
    parameters: Sequence[ParameterFacts], units: Sequence[UnitFacts], root: int, chunk_elements: int
) -> Iterator[list[int]]:
    """Yield the parameters of the root, then of big units, and of small neighbours of equal kinds that share chunks."""
    yield list(units[root].parameters)
    shared: list[int] = []
    shared_kinds: set[Hashable] = set()
    room = 0
    for place, unit in enumerate(units):
        if place == root or not unit.parameters:
            continue
        kinds = {parameters[number].kind for number in unit.parameters}
        numel = sum(parameters[number].numel for number in unit.parameters)
        if kinds != shared_kinds or numel > room:
            yield shared
            shared, shared_kinds, room = [], kinds, chunk_elements
        shared.extend(unit.parameters)
        # None is left beside a unit that is larger by itself.
        room -= numel
    yield shared


def _by_kind(parameters: Sequence[ParameterFacts], numbers: Sequence[int]) -> list[list[int]]:
    runs: dict[Hashable, list[int]] = {}
    for number in numbers:
        runs.setdefault(parameters[number].kind, []).append(number)
    return list(runs.values())


def _border_cuts(parameters: Sequence[ParameterFacts], order: Sequence[int], borders: Sequence[float]) -> set[int]:
    """Return the parameters before which a chunk has to begin."""
    cuts = set()
    for counted in (order, *_by_kind(parameters, order)):
        ends = [0, *itertools.accumulate(parameters[number].numel for number in reversed(counted))]
        for border in borders:
            taken = _nearest(ends, border * ends[-1])
            if taken:
                cuts.add(counted[-taken])
    return cuts


def _cut(runs: Sequence[Sequence[int]], cuts: set[int]) -> Iterator[list[int]]:
    for run in runs:
        piece: list[int] = []
        for number in run:
            if number in cuts and piece:
                yield piece
                piece = []
            piece.append(number)
        yield piece


def _evenly(run: Sequence[int], numels: Sequence[int], pieces: int) -> Iterator[Sequence[int]]:
    """Yield at most so many pieces of a run, cut at the boundaries nearest to where even ones would end."""
    ends = [0, *itertools.accumulate(numels[number] for number in run)]
    first = 0
    for piece in range(1, pieces):
        stop = _nearest(ends, ends[-1] * piece / pieces)
        if ends[first] < ends[stop] < ends[-1]:
            yield run[first:stop]
            first = stop
    yield run[first:]


def _nearest(ends: Sequence[int], target: float) -> int:
    """Return the number of the end nearest to a target, the first of equally near ones; ends are in ascending order."""
    after = bisect.bisect_left(ends, target)
    if after == 0:
        return 0
    if after == len(ends):
        return bisect.bisect_left(ends, ends[-1])
    below, above = target - ends[after - 1], ends[after] - target
    return bisect.bisect_left(ends, ends[after - 1]) if below <= above else after
