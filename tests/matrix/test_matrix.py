"""Every plugin computes what plain PyTorch computes: a pairwise sample of the matrix here, all of it in `.ci/full`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from equality_matrix import AXES, Cell, cells, complaints, pairwise_cells, run_cells

from albireo.distributed import World, join_world, leave_world

WORLD_SIZES = (1, 2, 4)


@pytest.fixture
def alone() -> Iterator[World]:
    """A world of one with a process group, which torch's own sharding needs."""
    threads = torch.get_num_threads()
    world = join_world(single=True, always_group=True)
    yield world
    leave_world()
    torch.set_num_threads(threads)


def verified(request: pytest.FixtureRequest, world_size: int, chosen: list[Cell]) -> list[str]:
    """Run cells, and return a line for each that did not pass."""
    if world_size == 1:
        results = [run_cells(request.getfixturevalue("alone"), chosen)]
    else:
        results = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world_size]).run(run_cells, cells=chosen)
    return complaints(chosen, results)


def test_the_sample_has_every_pair_of_values() -> None:
    chosen = pairwise_cells()
    for first in AXES:
        for second in AXES:
            if first < second:
                wanted = {(a, b) for a in AXES[first] for b in AXES[second]}
                assert {(cell[first], cell[second]) for cell in chosen} == wanted
    assert len(chosen) < len(cells()) / 8


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_sample_of_cells_is_plain_pytorch(request: pytest.FixtureRequest, world_size: int) -> None:
    assert verified(request, world_size, pairwise_cells()) == []


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_cell_is_plain_pytorch(request: pytest.FixtureRequest, world_size: int) -> None:
    assert verified(request, world_size, cells()) == []
