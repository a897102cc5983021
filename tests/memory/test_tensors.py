"""The manager: who reads a chunk has waited for all that writes it, and what is let go of is not in use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from albireo.device.lanes import Arrival, ImmediateLane
from albireo.device.pool import SimulatedPool
from albireo.distributed import World
from albireo.errors import OutOfMemoryError
from albireo.memory.chunk import Chunk
from albireo.memory.host_steps import HostSteps, SentGradient
from albireo.memory.placement import Placement
from albireo.memory.sizes import ChunkSizes
from albireo.memory.tensors import StatefulTensorManager, places_of
from albireo.optim import HostStepper, HybridAdam
from albireo.sharding import FlatLayout, Fragment
from albireo.sharding.weight_source import ParameterValues

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
NUMEL = 64


def manager_of(
    count: int = 3, *, resident: Sequence[int] = (), on_device: Sequence[int] = (), dtype: torch.dtype = torch.bfloat16,
    budget: int | None = None,
) -> StatefulTensorManager:  # fmt: skip
    """Chunks of one weight each, full of their numbers."""
    pool = SimulatedPool(CPU, budget)
    chunks = []
    for number in range(count):
        sizes = ChunkSizes(FlatLayout.of([(NUMEL,)], 1).numel, 1, dtype, trained=True, is_root=False)
        states, home = places_of(sizes, resident=number in resident, on_device=number in on_device)
        weight = nn.Parameter(torch.full((NUMEL,), float(number + 1)))
        chunk = Chunk(number, [weight], sizes, ALONE, pool, ParameterValues(), states=states, home=home)
        chunk.resident = number in resident
        if chunk.resident:
            pool.take_back(chunk.compute)
        chunks.append(chunk)
    return StatefulTensorManager(chunks, pool)


def weight_of(chunk: Chunk) -> torch.Tensor:
    return chunk.parameters[0].detach()


def test_what_is_used_can_be_read_and_what_is_dropped_cannot() -> None:
    manager = manager_of()
    for chunk in manager.chunks:
        assert torch.isnan(weight_of(chunk)).all()
        manager.use(chunk)
        assert torch.equal(weight_of(chunk), torch.full((NUMEL,), chunk.number + 1.0, dtype=torch.bfloat16))
        manager.drop(chunk)
        assert torch.isnan(weight_of(chunk)).all()
        assert not chunk.is_here
    assert manager._pool.owned_bytes == 0


def test_a_fetch_that_has_begun_is_waited_for_by_its_use() -> None:
    manager = manager_of()
    first = manager.chunks[0]
    manager.begin(first)
    assert first.is_here
    assert torch.isnan(first.compute[:NUMEL]).all()  # the lane has not run
    manager.begin(first)  # nothing more
    manager.use(first)
    assert not torch.isnan(weight_of(first)).any()


def test_what_was_fetched_and_not_used_can_be_dropped() -> None:
    manager = manager_of()
    manager.begin(manager.chunks[1])
    manager.drop(manager.chunks[1])
    assert manager._pool.owned_bytes == 0
    manager.use(manager.chunks[1])
    assert float(weight_of(manager.chunks[1])[0]) == 2.0


def test_resident_chunks_stay() -> None:
    manager = manager_of(resident=[0], on_device=[0])
    for chunk in manager.chunks:
        manager.use(chunk)
        manager.drop(chunk)
    assert [chunk.is_here for chunk in manager.chunks] == [True, False, False]
    assert float(weight_of(manager.chunks[0])[0]) == 1.0


def test_a_chunk_that_has_no_room_stays_away_and_says_so() -> None:
    manager = manager_of(budget=2 * NUMEL * 2)
    for number in (0, 1):
        manager.use(manager.chunks[number])
    with pytest.raises(OutOfMemoryError, match="budget"):
        manager.use(manager.chunks[2])
    assert not manager.chunks[2].is_here
    assert not manager.chunks[2].is_current
    manager.drop(manager.chunks[0])
    manager.use(manager.chunks[2])
    assert float(weight_of(manager.chunks[2])[0]) == 3.0


def test_it_says_when_the_memory_of_chunks_is_about_to_change() -> None:
    manager = manager_of()
    seen: list[int] = []
    manager.before_change = lambda: seen.append(manager._pool.owned_bytes)
    manager.use(manager.chunks[0])
    manager.use(manager.chunks[0])
    manager.use(manager.chunks[1])
    manager.drop(manager.chunks[0])
    manager.drop(manager.chunks[0])
    size = NUMEL * 2
    assert seen == [0, size, 2 * size]


def stepped(manager: StatefulTensorManager, chunk: Chunk) -> None:
    """Step a chunk's masters where they are: to 9."""
    with torch.no_grad():
        for fragment in chunk.fragments:
            fragment.master.fill_(9.0)
    chunk.publish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("is_here", [False, True])
def test_new_weights_that_are_made_on_the_device_are_what_is_used_next(
    dtype: torch.dtype, resident: bool, is_here: bool
) -> None:
    manager = manager_of(1, resident=[0] if resident else [], on_device=[0], dtype=dtype)
    chunk = manager.chunks[0]
    if is_here:
        manager.use(chunk)
    for _ in range(3):
        stepped(manager, chunk)
        manager.use(chunk)
        assert (weight_of(chunk) == 9.0).all()
        manager.drop(chunk)
        manager.use(chunk)
        assert (weight_of(chunk) == 9.0).all()
    stepped(manager, chunk)
    manager.flush()
    assert (chunk.home[:NUMEL] == 9.0).all()


def test_new_weights_on_their_way_home_are_waited_for_by_the_next() -> None:
    manager = manager_of(1, on_device=[0])
    chunk = manager.chunks[0]
    assert chunk.writes_back
    with torch.no_grad():
        chunk.fragments[0].master.fill_(5.0)
    chunk.publish()
    assert torch.isnan(chunk.home[:NUMEL]).all()  # under way
    stepped(manager, chunk)
    manager.flush()
    assert (chunk.home[:NUMEL] == 9.0).all()


def placement_of(resident: Sequence[int], on_device: Sequence[int]) -> Placement:
    return Placement(frozenset(on_device), frozenset(resident), frozenset(), (), 0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_placement_is_made_and_says_whose_states_came(dtype: torch.dtype) -> None:
    manager = manager_of(4, resident=[0], dtype=dtype)
    optimizer = HybridAdam([chunk.fragments[0].master for chunk in manager.chunks], lr=0.0)
    for placement, came in [
        (placement_of([0, 1], [0, 1, 2]), {0, 1, 2}),
        (placement_of([], []), set()),
        (placement_of([0, 1, 2, 3], [3]), {3}),
        (placement_of([0, 1, 2, 3], [0, 1, 2, 3]), {0, 1, 2}),
        (placement_of([0], [3]), set()),
    ]:
        assert {chunk.number for chunk in manager.apply(placement, optimizer)} == came
        for chunk in manager.chunks:
            assert chunk.resident == (chunk.number in placement.resident)
            assert (chunk.states_place == "device") == (chunk.number in placement.states_on_device)
            assert chunk.is_here == chunk.resident
            manager.use(chunk)
            assert (weight_of(chunk) == chunk.number + 1.0).all()
            manager.drop(chunk)


def test_what_leaves_goes_before_what_comes() -> None:
    size = NUMEL * (4 + 2)
    manager = manager_of(2, resident=[1], on_device=[1], budget=size)
    manager.apply(placement_of([0], [0]), None)
    assert manager._pool.peak_bytes <= size
    assert [chunk.states_place for chunk in manager.chunks] == ["device", "host"]


@pytest.mark.parametrize(
    ("trained", "resident", "on_device", "ranks", "dtype", "wanted"),
    [
        (True, True, True, 1, torch.float32, ("device", "storage")),
        (True, True, True, 2, torch.bfloat16, ("device", "storage")),
        (True, False, True, 1, torch.float32, ("device", "host")),
        (True, False, True, 2, torch.float32, ("device", "device")),
        (True, True, False, 1, torch.bfloat16, ("host", "host")),
        (True, False, False, 4, torch.float32, ("host", "host")),
        (False, True, False, 1, torch.float32, ("device", "storage")),
        (False, True, False, 1, torch.bfloat16, ("host", "storage")),
        (False, False, False, 2, torch.float32, ("host", "host")),
    ],
)
def test_where_parts_are_to_be(
    trained: bool, resident: bool, on_device: bool, ranks: int, dtype: torch.dtype, wanted: tuple[str, str]
) -> None:
    sizes = ChunkSizes(64, ranks, dtype, trained, is_root=False)
    assert places_of(sizes, resident=resident, on_device=on_device) == wanted


class Told(Arrival):
    """Comes when it is waited for."""

    def __init__(self, ready: Callable[[], object]) -> None:
        self.ready = ready

    def wait(self) -> None:
        self.ready()

    def synchronize(self) -> None:
        self.ready()

    @property
    def has_run(self) -> bool:
        return False


class Stepping:
    """Chunks whose states are on the host, and what steps them beside."""

    def __init__(self, *, resident: Sequence[int] = (), dtype: torch.dtype = torch.bfloat16) -> None:
        self.manager = manager_of(3, resident=resident, dtype=dtype)
        self.optimizer = HybridAdam([chunk.fragments[0].master for chunk in self.manager.chunks], lr=0.5)
        self.stepper = HostStepper(self.optimizer, threads=1, compiled=False)
        self.manager.host_steps = HostSteps(self.stepper, self.manager._pool.to_device)

    def begin(self, ready: Callable[[], object] = lambda: None, without: Sequence[int] = ()) -> None:
        def gradient(fragment: Fragment) -> SentGradient | None:
            numbers = [c.number for c in self.manager.chunks if fragment in c.fragments]
            return None if numbers[0] in without else (torch.ones(NUMEL), Told(ready))

        assert self.manager.host_steps is not None
        self.manager.host_steps.open(1.0, fenced=True)
        for chunk in self.manager.chunks:
            self.manager.host_steps.hand_over(chunk, gradient, self.manager.stale)
        self.manager.host_steps.seal()


@pytest.fixture
def stepping() -> Stepping:
    return Stepping()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resident", [[], [0, 1, 2]], ids=["away", "resident"])
def test_a_chunk_is_used_once_it_is_stepped(dtype: torch.dtype, resident: list[int]) -> None:
    stepping = Stepping(resident=resident, dtype=dtype)
    manager = stepping.manager
    manager.use(manager.chunks[0])
    before = weight_of(manager.chunks[0]).clone()
    for _ in range(3):
        stepping.begin()
        for chunk in manager.chunks:
            assert not chunk.is_current or chunk.resident
        for chunk in manager.chunks:
            manager.use(chunk)
            master = chunk.fragments[0].master
            assert torch.equal(weight_of(chunk), master.detach().to(dtype))
        assert not torch.equal(weight_of(manager.chunks[0]), before)
    stepping.stepper.close()


def test_new_weights_go_to_what_is_resident_once_the_whole_chunk_is_stepped() -> None:
    """On a lane that copies at once: the simulated one copies so late that too early does not show."""
    pool = SimulatedPool(CPU, None)
    weights = [nn.Parameter(torch.full((NUMEL,), float(number))) for number in range(4)]
    numel = FlatLayout.of([(NUMEL,)] * 4, 1).numel
    sizes = ChunkSizes(numel, 1, torch.bfloat16, trained=True, is_root=False)
    chunk = Chunk(0, weights, sizes, ALONE, pool, ParameterValues(), states="host", home="host")
    chunk.resident = True
    pool.take_back(chunk.compute)
    manager = StatefulTensorManager([chunk], pool)
    optimizer = HybridAdam([fragment.master for fragment in chunk.fragments], lr=0.5)
    stepper = HostStepper(optimizer, threads=1, compiled=False)
    manager.host_steps = HostSteps(stepper, ImmediateLane())
    for _ in range(2):
        manager.host_steps.open(1.0, fenced=True)
        manager.host_steps.hand_over(chunk, lambda _: (torch.ones(NUMEL), Told(lambda: None)), manager.stale)
        manager.host_steps.seal()
        manager.flush()
        for fragment, weight in zip(chunk.fragments, chunk.parameters, strict=True):
            assert torch.equal(weight.detach(), fragment.master.detach().to(torch.bfloat16))
    stepper.close()


def test_a_chunk_without_a_gradient_is_not_stepped(stepping: Stepping) -> None:
    stepping.begin(without=[1])
    stepping.manager.flush()
    values = [float(chunk.fragments[0].master.detach()[0]) for chunk in stepping.manager.chunks]
    assert values[1] == 2.0
    assert values[0] < 1.0 < values[2] < 3.0
    stepping.stepper.close()


def test_what_was_fetched_and_is_stepped_is_old(stepping: Stepping) -> None:
    manager = stepping.manager
    manager.begin(manager.chunks[0])  # and not used
    stepping.begin()
    manager.use(manager.chunks[0])
    assert torch.equal(weight_of(manager.chunks[0]), manager.chunks[0].home[:NUMEL])
    assert float(weight_of(manager.chunks[0])[0]) < 1.0
    stepping.stepper.close()


@pytest.mark.parametrize("then", ["begin", "use", "flush"])
def test_what_stops_the_stepper_is_raised_where_it_is_waited_for(then: str) -> None:
    stepping = Stepping()

    go = threading.Event()

    def fail() -> None:
        go.wait()
        raise ValueError("planted")

    stepping.begin(fail)
    go.set()
    manager = stepping.manager
    with pytest.raises(ValueError, match="planted"):
        {"begin": lambda: manager.begin(manager.chunks[0]), "use": lambda: manager.use(manager.chunks[2]), "flush": manager.flush}[then]()  # fmt: skip
    # Nor does another step begin.
    with pytest.raises((ValueError, RuntimeError), match=r"planted|half stepped"):
        stepping.begin()
    stepping.stepper.close()
