"""On GPUs too, every plugin computes what plain PyTorch computes: on one alone, and on two over NCCL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from equality_matrix import Cell, cells, complaints, pairwise_cells, run_cells
from rank_pool import RankPool

from albireo.distributed import World, join_world, leave_world

pytestmark = pytest.mark.gpu


@pytest.fixture
def alone() -> Iterator[World]:
    """A world of one with a process group, which torch's own sharding needs."""
    threads = torch.get_num_threads()
    yield join_world(single=True, always_group=True)
    leave_world()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[RankPool]:
    """Two ranks, each with a GPU."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pool = RankPool(2, gpus=True)
    yield pool
    pool.close()


def _sample() -> list[Cell]:
    """Return a sample without what torch 2.11's FSDP cannot do, which `test_quantise` sees refused."""
    is_old = torch.__version__.startswith("2.11.")
    return [c for c in pairwise_cells() if not (is_old and c["plugin"] == "fsdp" and c["model"] == "quantised")]


@pytest.mark.timeout(300)
def test_a_sample_of_cells_on_one_gpu(alone: World) -> None:
    chosen = _sample()
    assert complaints(chosen, [run_cells(alone, chosen, on_gpu=True)]) == []


@pytest.mark.timeout(300)
def test_a_sample_of_cells_on_two_gpus(two_gpus: RankPool) -> None:
    chosen = _sample()
    assert complaints(chosen, two_gpus.run(run_cells, cells=chosen, on_gpu=True)) == []


def _sharded() -> list[Cell]:
    return [cell for cell in cells() if cell["plugin"] not in ("ddp", "fsdp")]


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_every_sharded_cell_on_two_gpus(two_gpus: RankPool) -> None:
    chosen = _sharded()
    assert complaints(chosen, two_gpus.run(run_cells, cells=chosen, on_gpu=True)) == []
