"""From sizes, limits and what the user says to a placement."""

from __future__ import annotations

import json
import re

import pytest
import torch

from albireo.errors import OutOfMemoryError
from albireo.memory.budget import Use
from albireo.memory.placement import least_device_bytes
from albireo.memory.planner import MemoryLimits, PlacementPolicy, Planner
from albireo.memory.sizes import ChunkSizes

MB = 2**20
# A root of 4 MB and four blocks of 8 MB in fp32.
SIZES = [ChunkSizes(MB, 1, torch.float32, trained=True, is_root=True)] + [
    ChunkSizes(2 * MB, 1, torch.float32, trained=True, is_root=False) for _ in range(4)
]
ORDERS = [[1], [2], [3], [4], [0]]
TRACE = (
    Use(frozenset({0}), 0, "forward"),
    *(Use(frozenset({0, block}), 3 * MB, "forward") for block in (1, 2, 3, 4)),
    Use(frozenset({0}), 0, "backward"),
    *(Use(frozenset({0, block}), 3 * MB, "backward") for block in (4, 3, 2, 1)),
    Use(frozenset(), 0, "step"),
)


def planner(
    device: int | None = None, host: int | None = None, sizes: list[ChunkSizes] = SIZES, **policy: object
) -> Planner:
    return Planner(sizes, ORDERS, PlacementPolicy(**policy), MemoryLimits(device, host))  # type: ignore[arg-type]


def test_a_first_step_has_the_root_here_and_all_states_on_the_host() -> None:
    placement = planner().initial()
    assert placement.resident == {0}
    assert placement.states_on_device == set()
    assert placement.fetches == ()


def test_a_first_step_that_fits_is_not_refused_and_one_byte_less_is() -> None:
    assert planner(12 * MB).initial().resident == {0}
    with pytest.raises(
        OutOfMemoryError, match=r"a first step takes at least 0\.02 GB of device memory.* raise --mem-cap"
    ):
        planner(12 * MB - 1).initial()


def test_a_host_without_room_for_states_has_them_on_the_device_or_refuses() -> None:
    # On the host a block takes 8 of weights, 16 of states, 8 of gradients; on the device 16 and 8, and its home is here.
    whole = 32 * 4 + 16
    assert planner(None, whole * MB).initial().states_on_device == set()
    some = planner(None, (whole - 30) * MB).initial()
    assert some.states_on_device == {0, 1}
    assert planner(12 * MB, whole * MB).initial()
    with pytest.raises(OutOfMemoryError, match=r"of device memory"):
        planner(12 * MB, (whole - 30) * MB).initial()
    with pytest.raises(OutOfMemoryError, match=r"at least 0\.04 GB of host memory.* raise --host-cap"):
        planner(None, 31 * MB).initial()


def test_static_is_decided_at_once_and_stays() -> None:
    plan = planner(kind="static", offload_optim_frac=0.5, offload_param_frac=1.0)
    first = plan.initial()
    assert first.resident == set()
    assert first.states_on_device in ({0, 1}, {0, 1, 2})
    later = plan.place(TRACE, accumulates=False)
    assert (later.resident, later.states_on_device) == (first.resident, first.states_on_device)


def test_one_rank_shards_nothing() -> None:
    for share in (0.0, 0.5, 1.0):
        assert planner(kind="static", shard_param_frac=share).initial().resident == {0, 1, 2, 3, 4}
    halves = [ChunkSizes(s.numel, 2, s.dtype, s.trained, s.is_root) for s in SIZES]
    assert planner(sizes=halves, kind="static", shard_param_frac=1.0).initial().resident == set()
    assert planner(sizes=halves, kind="static", shard_param_frac=0.0).initial().resident == {0, 1, 2, 3, 4}


def test_without_a_bound_everything_is_on_the_device() -> None:
    placement = planner().place(TRACE, accumulates=False)
    assert placement.resident == placement.states_on_device == {0, 1, 2, 3, 4}
    assert placement.traffic_bytes == 0


@pytest.mark.parametrize("device", [15, 20, 40, 80, 150])
@pytest.mark.parametrize("accumulates", [False, True])
def test_a_placement_keeps_to_the_limits(device: int, accumulates: bool) -> None:
    placement = planner(device * MB).place(TRACE, accumulates=accumulates)
    assert placement.device_bytes <= device * MB


def test_a_step_that_takes_more_than_there_is_is_refused_with_the_least() -> None:
    with pytest.raises(OutOfMemoryError) as refused:
        planner(15 * MB - 1).place(TRACE, accumulates=False)
    found = re.search(r"at least ([\d.]+) GB of device memory", str(refused.value))
    assert found is not None
    assert planner(int(float(found[1]) * 2**30)).place(TRACE, accumulates=False).device_bytes <= 0.02 * 2**30


def test_a_larger_batch_has_larger_activations() -> None:
    trace = planner().scaled((Use(frozenset({0}), 101, "forward"), Use(frozenset(), 10, "step")), 1.5)
    assert [use.other_bytes for use in trace] == [152, 15]
    assert [use.chunks for use in trace] == [{0}, set()]


def test_it_says_what_it_decided_in_a_line() -> None:
    plan = planner()
    line = plan.describe(plan.place(TRACE, accumulates=False))
    assert line.startswith("placement  auto: weights of 5 of 5 chunks stay on the device, states of 5 of 5; ")
    assert "\n" not in line
    frozen = [SIZES[0], *(ChunkSizes(2 * MB, 1, torch.float32, trained=False, is_root=False) for _ in range(4))]
    plan = planner(sizes=frozen, kind="static", offload_param_frac=1.0)
    assert "static: weights of 0 of 5 chunks stay on the device, states of 1 of 1;" in plan.describe(plan.initial())


def test_a_plan_as_data_says_what_is_where_and_how_long_it_takes() -> None:
    made = planner(80 * MB)
    placement = made.place(TRACE, accumulates=False)
    units = [[""], ["a"], ["b"], ["c"], ["d"]]
    data = made.data(placement, units, accumulates=False)
    assert json.loads(json.dumps(data)) == data
    assert {row["chunk"] for row in data["chunks"] if row["weights"] == "stay"} == placement.resident
    assert {row["chunk"] for row in data["chunks"] if row["states"] == "device"} == placement.states_on_device
    assert [row["units"] for row in data["chunks"]] == units
    assert [row["parameters"] for row in data["chunks"]] == [MB] + [2 * MB] * 4
    # Two moments of each; the masters are the weights themselves.
    assert [row["state_bytes"] for row in data["chunks"]] == [8 * MB] + [16 * MB] * 4
    stepped = data["parameters_stepped"]
    assert 0 < stepped["host"] < sum(stepped.values()) == 9 * MB
    assert data["predicted_seconds"]["steps_beside"] == stepped["host"] / data["rates"]["host_parameters_per_second"]
    assert data["predicted_seconds"]["traffic"] == pytest.approx(
        placement.traffic_bytes / 2 / data["rates"]["bus_bytes_per_second"]
    )


def test_a_plan_as_data_says_of_frozen_chunks_that_nothing_steps_them() -> None:
    frozen = [ChunkSizes(MB, 1, torch.bfloat16, trained=False, is_root=number == 0) for number in range(5)]
    made = planner(sizes=frozen)
    data = made.data(made.place(TRACE, accumulates=False), [[]] * 5, accumulates=False)
    assert [row["states"] for row in data["chunks"]] == [None] * 5
    assert data["parameters_stepped"] == {"device": 0, "host": 0, "streamed": 0}


def large(device_gb: float | None, **policy: object) -> Planner:
    """Return a planner of 2.6 G parameters in bf16, in 64 chunks and a root, that decides by itself what is streamed."""
    policy = {"stream_optim_frac": None, **policy}
    sizes = [ChunkSizes(128 * MB, 1, torch.bfloat16, trained=True, is_root=True)]
    sizes += [ChunkSizes(38 * MB, 1, torch.bfloat16, trained=True, is_root=False) for _ in range(64)]
    limit = None if device_gb is None else int(device_gb * 2**30)
    orders = [[number] for number in range(1, 65)] + [[0]]
    return Planner(sizes, orders, PlacementPolicy(**policy), MemoryLimits(limit, None))  # type: ignore[arg-type]


def test_states_are_streamed_where_steps_wait_for_backward_and_the_device_lacks_room() -> None:
    made = large(16)
    trace = made._expected()
    plain = made.place(trace, accumulates=False)
    placement = made.place(trace, accumulates=False, may_stream=True)
    assert plain.streamed == frozenset()
    on_host = set(range(65)) - placement.states_on_device
    assert placement.streamed < on_host
    # The ring's room is taken from states.
    assert len(placement.states_on_device) <= len(plain.states_on_device)
    assert placement.device_bytes <= 16 * 2**30
    assert placement.traffic_bytes > plain.traffic_bytes
    assert "more come to be stepped" in made.describe(placement)
    assert "more come" not in made.describe(plain)
    data = made.data(placement, [[]] * 65, accumulates=False)
    before = made.data(plain, [[]] * 65, accumulates=False)
    assert data["parameters_stepped"]["streamed"] > 0
    assert data["predicted_seconds"]["steps_beside"] < 0.9 * before["predicted_seconds"]["steps_beside"]


@pytest.mark.parametrize(
    ("device_gb", "policy"),
    [(None, {}), (60, {}), (16, {"kind": "static", "offload_optim_frac": 1.0}), (16, {"stream_optim_frac": 0.0})],
)
def test_where_all_fits_or_shares_are_given_or_nobody_asks_nothing_is_streamed(
    device_gb: float | None, policy: dict[str, object]
) -> None:
    made = large(device_gb, **policy)
    assert made.place(made._expected(), accumulates=False, may_stream=True).streamed == frozenset()


def test_a_ring_that_does_not_fit_is_done_without() -> None:
    made = large(None)
    trace = made._expected()
    # What the weights in use take, and a little.
    least = large(least_device_bytes(trace, made._bytes(accumulates=False)) / 2**30 + 0.1)
    assert least.place(trace, accumulates=False, may_stream=True).streamed == frozenset()
    with pytest.raises(OutOfMemoryError, match="--mem-cap"):
        large(least.limits.device / 2**30, stream_optim_frac=0.5).place(trace, accumulates=False)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_what_is_on_the_host_is_streamed(share: float) -> None:
    made = large(None, kind="static", offload_optim_frac=0.8, stream_optim_frac=share)
    placement = made.place(made._expected(), accumulates=False)
    on_host = set(range(65)) - placement.states_on_device
    assert placement.streamed <= on_host
    assert abs(len(placement.streamed) - share * len(on_host)) <= 1
