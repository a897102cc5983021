"""A chunk: whatever moves, masters, states and weights keep every bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from albireo.device.pool import SimulatedPool
from albireo.distributed import World
from albireo.memory.chunk import Chunk, Home, States
from albireo.memory.sizes import ChunkSizes
from albireo.memory.tensors import StatefulTensorManager
from albireo.optim import HybridAdam
from albireo.sharding import FlatLayout
from albireo.sharding.weight_source import ParameterValues

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
SHAPES = [(5, 3), (), (7,), (64, 2)]
# Where states and home may be together, on one rank: see `places_of`.
PLACES: list[tuple[States, Home]] = [
    ("host", "host"), ("device", "host"), ("device", "storage"), ("device", "device"), ("host", "storage"),
]  # fmt: skip


def parameters(seed: int = 0, *, trained: bool = True) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw), requires_grad=trained) for shape in SHAPES]


def chunk_of(
    states: States = "host",
    home: Home = "host",
    *,
    dtype: torch.dtype = torch.float32,
    trained: bool = True,
    world: World = ALONE,
    budget: int | None = None,
) -> tuple[Chunk, StatefulTensorManager, list[torch.Tensor]]:
    """Return a chunk, what moves it, and its first weights."""
    members = parameters(trained=trained)
    values = [member.detach().clone() for member in members]
    pool = SimulatedPool(CPU, budget)
    numel = FlatLayout.of([member.shape for member in members], world.world_size).numel
    sizes = ChunkSizes(numel, world.world_size, dtype, trained, is_root=False)
    chunk = Chunk(0, members, sizes, world, pool, ParameterValues(), states=states, home=home)
    return chunk, StatefulTensorManager([chunk], pool), values


def optimizer_of(chunk: Chunk) -> HybridAdam:
    """An optimizer of its masters, that has stepped once, so that there are states."""
    optimizer = HybridAdam([fragment.master for fragment in chunk.fragments], lr=0.1)
    for number, fragment in enumerate(chunk.fragments):
        fragment.master.grad = torch.full_like(fragment.master, 0.1 * (number + 1))
    optimizer.step()
    optimizer.zero_grad()
    chunk.publish()
    return optimizer


def everything(chunk: Chunk, manager: StatefulTensorManager, optimizer: torch.optim.Optimizer) -> list[list[Any]]:
    manager.flush()
    found: list[list[Any]] = []
    for fragment in chunk.fragments:
        state = optimizer.state[fragment.master]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        found += [fragment.master.tolist(), *(state[key].tolist() for key in ("step", "exp_avg", "exp_avg_sq"))]
    manager.use(chunk)
    return [*found, *(parameter.tolist() for parameter in chunk.parameters)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(PLACES, 2)))
@pytest.mark.parametrize("is_here", [False, True], ids=["away", "here"])
def test_every_move_keeps_every_bit(
    before: tuple[States, Home], after: tuple[States, Home], dtype: torch.dtype, is_here: bool
) -> None:
    chunk, manager, values = chunk_of(*before, dtype=dtype)
    optimizer = optimizer_of(chunk)
    wanted = everything(chunk, manager, optimizer)
    assert wanted[-1] != values[-1].tolist()
    for member, value in zip(chunk.parameters, wanted[-len(SHAPES) :], strict=True):
        assert member.dtype == dtype
        assert member.tolist() == value
    chunk.resident = False
    if not is_here and before[1] != "storage":
        manager.drop(chunk)
        assert all(torch.isnan(member).all() for member in chunk.parameters)
    chunk.place(*after, optimizer)
    chunk.resident = after[1] == "storage"
    assert (chunk.states_place, chunk.home_place) == after
    if not chunk.resident:
        manager.drop(chunk)
    assert everything(chunk, manager, optimizer) == wanted
    # What is stepped is the master in the group, and its next step is where it lies now.
    for fragment in chunk.fragments:
        assert any(fragment.master is p for p in optimizer.param_groups[0]["params"])
        assert fragment.master.untyped_storage() is chunk.master.untyped_storage()
    for fragment in chunk.fragments:
        fragment.master.grad = torch.ones_like(fragment.master)
    optimizer.step()
    chunk.publish()
    after_step = everything(chunk, manager, optimizer)
    assert all(one != other for one, other in zip(after_step[::4], wanted[::4], strict=False))
    for fragment, member in zip(chunk.fragments, chunk.parameters, strict=True):
        assert torch.equal(fragment.master.to(dtype).view(member.shape), member)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", PLACES)
def test_it_begins_with_the_weights_that_it_was_given(places: tuple[States, Home], dtype: torch.dtype) -> None:
    chunk, manager, values = chunk_of(*places, dtype=dtype)
    assert not chunk.is_current
    assert all(torch.isnan(member).all() for member in chunk.parameters)
    assert [member.shape for member in chunk.parameters] == [torch.Size(shape) for shape in SHAPES]
    manager.use(chunk)
    for member, value in zip(chunk.parameters, values, strict=True):
        assert torch.equal(member, value.to(dtype))
    for fragment, value in zip(chunk.fragments, values, strict=True):
        assert torch.equal(fragment.master, value.view(-1))
    # In fp32 one memory holds both, where both are in one.
    together = dtype == torch.float32 and (places[0] == "host") == (places[1] == "host")
    assert (chunk.home is chunk.master) == together


@pytest.mark.parametrize("home", ["host", "storage"])
def test_a_frozen_chunk_is_not_stepped_and_moves_all_the_same(home: Home) -> None:
    chunk, manager, values = chunk_of("host", home, dtype=torch.bfloat16, trained=False)
    for place in ("storage", "host", "storage"):
        chunk.place("host", place, None)  # type: ignore[arg-type]
        chunk.resident = place == "storage"
        manager.drop(chunk)
        manager.use(chunk)
        for member, value in zip(chunk.parameters, values, strict=True):
            assert torch.equal(member, value.to(torch.bfloat16))
            assert not member.requires_grad


def test_what_several_ranks_share_is_cut() -> None:
    parts = []
    for rank in range(2):
        chunk, _, values = chunk_of("host", "host", dtype=torch.bfloat16, world=World(rank, 2, rank, CPU))
        assert chunk.ranks == 2
        assert chunk.master.numel() * 2 == chunk.compute.numel() == chunk.layout.numel
        assert chunk.shard_bytes * 2 == chunk.weight_bytes
        parts.append({(f.cut.segment, f.cut.start): f.master.clone() for f in chunk.fragments})
    for segment, value in enumerate(values):
        pieces = sorted((start, data) for part in parts for (s, start), data in part.items() if s == segment)
        assert torch.equal(torch.cat([data for _, data in pieces]), value.view(-1))


def test_the_parameters_stay_the_same_objects_with_or_without_memory() -> None:
    with torch.device("meta"):
        meta = [nn.Parameter(torch.empty(shape)) for shape in SHAPES]
    real = parameters()

    class Source:
        def fill(self, parameter: nn.Parameter, start: int, out: torch.Tensor) -> None:
            place = next(n for n, p in enumerate(meta) if p is parameter)
            out.copy_(real[place].detach().view(-1)[start : start + out.numel()])

        def close(self) -> None:
            """Nothing."""

    kept = list(meta)
    pool = SimulatedPool(CPU, None)
    sizes = ChunkSizes(FlatLayout.of(SHAPES, 1).numel, 1, torch.float32, trained=True, is_root=False)
    chunk = Chunk(0, meta, sizes, ALONE, pool, Source(), states="host", home="host")
    manager = StatefulTensorManager([chunk], pool)
    manager.use(chunk)
    for member, before, value in zip(chunk.parameters, kept, real, strict=True):
        assert member is before
        assert not member.is_meta
        assert torch.equal(member, value)


def test_a_step_is_a_change_and_a_fetch_is_none() -> None:
    chunk, manager, _ = chunk_of("host", "host")
    optimizer = optimizer_of(chunk)
    manager.use(chunk)
    before = [member._version for member in chunk.parameters]
    for _ in range(3):
        manager.drop(chunk)
        manager.use(chunk)
    assert [member._version for member in chunk.parameters] == before
    chunk.check_untouched()
    chunk.publish()
    assert all(member._version > old for member, old in zip(chunk.parameters, before, strict=True))
    chunk.check_untouched()
    del optimizer


@pytest.mark.parametrize("is_here", [False, True], ids=["away", "here"])
def test_what_somebody_else_did_to_a_weight_is_seen(is_here: bool) -> None:
    def made() -> tuple[Chunk, nn.Parameter]:
        chunk, manager, _ = chunk_of("host", "host")
        if is_here:
            manager.use(chunk)
        return chunk, chunk.parameters[2]

    chunk, weight = made()
    weight.data = torch.zeros(7)
    with pytest.raises(RuntimeError, match=r"shape \(7,\) has left its place"):
        chunk.check_untouched()
    chunk, weight = made()
    weight.data = weight.data.double()
    with pytest.raises(RuntimeError, match="left its place"):
        chunk.check_untouched()
    if is_here:
        chunk, weight = made()
        with torch.no_grad():
            weight.add_(1)
        with pytest.raises(RuntimeError, match=r"shape \(7,\) was written to"):
            chunk.check_untouched()
    else:
        chunk, weight = made()
        weight.data = torch.zeros(7)
        with pytest.raises(RuntimeError, match="left its place"):
            chunk.attach()


def test_bytes_are_what_its_buffers_take() -> None:
    chunk, manager, _ = chunk_of("device", "device", dtype=torch.bfloat16)
    pool = manager._pool
    numel = chunk.layout.numel
    assert pool.owned_bytes == numel * (4 + 2)  # masters and home
    manager.use(chunk)
    assert pool.owned_bytes == numel * (4 + 2) + chunk.weight_bytes
    manager.drop(chunk)
    chunk.place("host", "host", None)
    assert pool.owned_bytes == 0
    chunk.place("device", "storage", None)
    assert pool.owned_bytes == numel * 4 + chunk.weight_bytes
