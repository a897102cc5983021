"""Which parameters share a chunk: each in one, in order, kinds apart, sizes even, borders kept."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.errors import ConfigError
from albireo.memory.layout import ChunkPlan, ParameterFacts, UnitFacts, plan_chunks, waste
from albireo.sharding.flat import ALIGNMENT

KINDS = st.sampled_from([("bf16", True), ("bf16", False), ("fp32", True)])
PARAMETERS = st.builds(ParameterFacts, st.integers(0, 300), KINDS)
SHARES = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 1.0]), max_size=3)


@st.composite
def models(draw: st.DrawFn) -> tuple[list[ParameterFacts], list[UnitFacts], int]:
    """Parameters, units that hold them in any order, and which unit is the root."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=8))
    parameters = draw(st.lists(PARAMETERS, min_size=sum(sizes), max_size=sum(sizes)))
    numbers = iter(draw(st.permutations(range(sum(sizes)))))
    units = [UnitFacts(f"unit {place}", tuple(itertools.islice(numbers, size))) for place, size in enumerate(sizes)]
    return parameters, units, draw(st.integers(0, len(units) - 1))


def numel_of(parameters: Sequence[ParameterFacts], chunk: ChunkPlan) -> int:
    return sum(parameters[number].numel for number in chunk.parameters)


def plan_one_kind(
    sizes: Sequence[Sequence[int]], chunk_elements: int, borders: Sequence[float] = ()
) -> list[list[int]]:
    """Return by chunk the sizes of its parameters, for units without any in the root."""
    parameters = [ParameterFacts(size, "kind") for unit in sizes for size in unit]
    numbers = iter(range(len(parameters)))
    units = [UnitFacts("root", ())]
    units += [UnitFacts(f"{place}", tuple(itertools.islice(numbers, len(unit)))) for place, unit in enumerate(sizes)]
    chunks = plan_chunks(parameters, units, root=0, chunk_elements=chunk_elements, borders=borders)
    return [[parameters[number].numel for number in chunk.parameters] for chunk in chunks]


@given(models(), st.integers(1, 1500), SHARES)
def test_every_parameter_is_in_one_chunk_of_its_kind(
    model: tuple[list[ParameterFacts], list[UnitFacts], int], chunk_elements: int, borders: list[float]
) -> None:
    parameters, units, root = model
    chunks = plan_chunks(parameters, units, root=root, chunk_elements=chunk_elements, borders=borders)
    assert sorted(number for chunk in chunks for number in chunk.parameters) == list(range(len(parameters)))
    for chunk in chunks:
        assert chunk.parameters
        assert len({parameters[number].kind for number in chunk.parameters}) == 1
        assert list(chunk.units) == [
            place for place, unit in enumerate(units) if set(unit.parameters) & set(chunk.parameters)
        ]
        assert chunk.is_root == (root in chunk.units)
        if chunk.is_root:
            assert chunk.units == (root,)
    again = plan_chunks(parameters, units, root=root, chunk_elements=chunk_elements, borders=borders)
    assert again == chunks


@given(models(), st.integers(1, 1500), SHARES)
def test_the_order_is_kept_and_the_root_comes_first(
    model: tuple[list[ParameterFacts], list[UnitFacts], int], chunk_elements: int, borders: list[float]
) -> None:
    parameters, units, root = model
    chunks = plan_chunks(parameters, units, root=root, chunk_elements=chunk_elements, borders=borders)
    executed = [*units[root].parameters]
    executed += [number for place, unit in enumerate(units) if place != root for number in unit.parameters]
    for kind in {parameter.kind for parameter in parameters}:
        dealt = [number for chunk in chunks for number in chunk.parameters if parameters[number].kind == kind]
        assert dealt == [number for number in executed if parameters[number].kind == kind]
    assert sorted(chunks, key=lambda chunk: not chunk.is_root) == chunks


@given(models(), st.integers(1, 1500))
def test_only_small_neighbours_share_and_big_units_are_cut_evenly(
    model: tuple[list[ParameterFacts], list[UnitFacts], int], chunk_elements: int
) -> None:
    parameters, units, root = model
    chunks = plan_chunks(parameters, units, root=root, chunk_elements=chunk_elements)
    filled = [place for place, unit in enumerate(units) if unit.parameters and place != root]
    for chunk in chunks:
        if len(chunk.units) > 1:
            assert numel_of(parameters, chunk) <= chunk_elements
            shared = [number for place in chunk.units for number in units[place].parameters]
            assert sum(parameters[number].numel for number in shared) <= chunk_elements
            assert filled.index(chunk.units[-1]) - filled.index(chunk.units[0]) == len(chunk.units) - 1
    for place in (*filled, root):
        for kind in {parameters[number].kind for number in units[place].parameters}:
            run = [parameters[number].numel for number in units[place].parameters if parameters[number].kind == kind]
            pieces = [
                numel_of(parameters, chunk)
                for chunk in chunks
                if chunk.units == (place,) and parameters[chunk.parameters[0]].kind == kind
            ]
            if not pieces:
                continue
            wanted = max(1, -(-sum(run) // chunk_elements))
            assert len(pieces) <= wanted
            assert max(pieces) <= sum(run) / wanted + max(run)
            if max(run) <= sum(run) / wanted:
                assert max(pieces) <= 2 * sum(run) / wanted


@given(
    st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=6), min_size=1, max_size=6),
    st.integers(1, 3000),
    st.floats(0, 1),
)
def test_a_share_ends_within_half_a_parameter_whatever_the_chunks(
    sizes: list[list[int]], chunk_elements: int, border: float
) -> None:
    chunks = plan_one_kind(sizes, chunk_elements, [border])
    total = sum(map(sum, sizes))
    ends = [0, *itertools.accumulate(sum(chunk) for chunk in reversed(chunks))]
    largest = max(max(unit) for unit in sizes)
    assert min(abs(end - border * total) for end in ends) <= largest / 2 + 1e-6


@given(models(), st.integers(1, 3000), st.sampled_from([0.25, 0.5, 0.8]))
def test_a_share_of_the_trained_ends_too(
    model: tuple[list[ParameterFacts], list[UnitFacts], int], chunk_elements: int, border: float
) -> None:
    parameters, units, root = model
    chunks = plan_chunks(parameters, units, root=root, chunk_elements=chunk_elements, borders=[border])
    for kind in {parameter.kind for parameter in parameters}:
        sizes = [numel_of(parameters, chunk) for chunk in chunks if parameters[chunk.parameters[0]].kind == kind]
        ends = [0, *itertools.accumulate(reversed(sizes))]
        largest = max(parameter.numel for parameter in parameters if parameter.kind == kind)
        assert min(abs(end - border * ends[-1]) for end in ends) <= largest / 2 + 1e-6
    everything = [0, *itertools.accumulate(numel_of(parameters, chunk) for chunk in reversed(chunks))]
    largest = max((parameter.numel for parameter in parameters), default=0)
    assert min(abs(end - border * everything[-1]) for end in everything) <= largest / 2 + 1e-6


def test_small_neighbours_share_and_a_big_unit_does_not() -> None:
    assert plan_one_kind([[10, 10], [20], [50], [100, 100, 100], [5], [5]], 60) == [
        [10, 10, 20],
        [50],
        [100],
        [100],
        [100],
        [5, 5],
    ]


def test_neighbours_of_other_kinds_do_not_share_and_kinds_lie_apart() -> None:
    trained, frozen = ("bf16", True), ("bf16", False)
    parameters = [ParameterFacts(size, kind) for size, kind in [(8, frozen), (2, trained)] * 3 + [(8, frozen)]]
    units = [
        UnitFacts("first", (0, 1)),
        UnitFacts("second", (2, 3)),
        UnitFacts("root", (4, 5)),
        UnitFacts("third", (6,)),
    ]
    assert plan_chunks(parameters, units, root=2, chunk_elements=100) == [
        ChunkPlan((2,), (4,), is_root=True),
        ChunkPlan((2,), (5,), is_root=True),
        ChunkPlan((0, 1), (0, 2), is_root=False),
        ChunkPlan((0, 1), (1, 3), is_root=False),
        ChunkPlan((3,), (6,), is_root=False),
    ]


def test_what_lies_on_both_sides_of_the_root_are_neighbours() -> None:
    parameters = [ParameterFacts(1, "kind")] * 3
    units = [UnitFacts("first", (0,)), UnitFacts("root", (1,)), UnitFacts("second", (2,))]
    chunks = plan_chunks(parameters, units, root=1, chunk_elements=10)
    assert [chunk.units for chunk in chunks] == [(1,), (0, 2)]


def test_a_border_cuts_a_unit_and_a_shared_chunk() -> None:
    # From the end: half of 80 lies after the last 40.
    assert plan_one_kind([[10, 10, 10, 10, 10, 10, 10, 10]], 1000, [0.5]) == [[10] * 4, [10] * 4]
    assert plan_one_kind([[10, 10], [10, 10]], 1000, [0.25]) == [[10, 10, 10], [10]]
    assert plan_one_kind([[10, 10], [10, 10]], 1000, [0.0, 1.0]) == [[10, 10, 10, 10]]


def test_a_whole_large_parameter_is_a_chunk() -> None:
    assert plan_one_kind([[1000, 1, 1]], 10) == [[1000], [1, 1]]


@given(models(), st.integers(1, 1500), st.integers(1, 5))
def test_waste_is_what_alignment_adds(
    model: tuple[list[ParameterFacts], list[UnitFacts], int], chunk_elements: int, ranks: int
) -> None:
    parameters, units, root = model
    chunks = plan_chunks(parameters, units, root=root, chunk_elements=chunk_elements)
    expected = 0
    for chunk in chunks:
        aligned = sum(-(-parameters[number].numel // ALIGNMENT) * ALIGNMENT for number in chunk.parameters)
        buffer = -(-aligned // (ALIGNMENT * ranks)) * ALIGNMENT * ranks
        expected += buffer - numel_of(parameters, chunk)
    assert waste(parameters, chunks, ranks) == expected


def test_what_cannot_be_laid_out_is_refused() -> None:
    parameters = [ParameterFacts(1, "kind"), ParameterFacts(1, "kind")]
    both = [UnitFacts("a", (0,)), UnitFacts("b", (1,))]
    with pytest.raises(ConfigError, match="at least 1 element"):
        plan_chunks(parameters, both, root=0, chunk_elements=0)
    with pytest.raises(ConfigError, match="one of 2 units"):
        plan_chunks(parameters, both, root=2, chunk_elements=8)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        plan_chunks(parameters, both, root=0, chunk_elements=8, borders=[1.5])
    with pytest.raises(ConfigError, match="in no unit"):
        plan_chunks(parameters, both[:1], root=0, chunk_elements=8)
    with pytest.raises(ConfigError, match="in two units: a and a"):
        plan_chunks(parameters, [UnitFacts("a", (0, 0))], root=0, chunk_elements=8)
    with pytest.raises(ConfigError, match="parameter 2 of 2"):
        plan_chunks(parameters, [UnitFacts("a", (0, 1, 2))], root=0, chunk_elements=8)
