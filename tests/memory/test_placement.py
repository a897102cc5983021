"""Placements, run use by use: never over budget, never a chunk used that is away, and little moved."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from placed_step import fetches_of_min, fewest_fetched_bytes, gradient_bytes, run_step

from albireo.errors import ConfigError, OutOfMemoryError
from albireo.memory.budget import ChunkBytes, Trace, Use, host_bytes_taken
from albireo.memory.placement import (
    Placement,
    least_device_bytes,
    least_host_bytes,
    place_automatically,
    place_for_warmup,
    place_statically,
)

GB = 2**30
MOST = 2**60


def chunk_of(
    weights: int, *, trained: bool = True, is_root: bool = False, ranks: int = 1, wide: bool = False
) -> ChunkBytes:
    """Return what a 16-bit chunk takes, in units of its weights' bytes."""
    shard = weights // ranks
    gradients = shard * (2 if wide else 1) if trained else 0
    return ChunkBytes(weights, shard, 6 * shard if trained else 0, gradients, gradients, trained, is_root, ranks)


def transformer(units: int, *, micro_batches: int = 1, other: int = 0, activation: int = 0, step: int = 0) -> Trace:
    """Return the uses of a model whose chunk 0 is the root's and whose unit n has chunk n; activations pile up."""
    forward = [Use(frozenset({0, n}), other + n * activation, "forward") for n in range(1, units + 1)]
    backward = [Use(frozenset({0, n}), other + n * activation, "backward") for n in range(units, 0, -1)]
    return (*(forward + backward) * micro_batches, Use(frozenset(), step, "step"))


@st.composite
def traces(draw: st.DrawFn, count: int, *, has_root: bool, most_together: int = 2) -> Trace:
    """Uses in any order, of several micro-batches, with anything beside them."""
    root = {0} if has_root else set()
    chunks = st.frozensets(st.integers(0, count - 1), max_size=most_together).map(lambda some: some | root)
    others = st.integers(0, 500)
    uses: list[Use] = []
    for _ in range(draw(st.integers(1, 3))):
        for phase in ("forward", "backward"):
            part = draw(st.lists(st.tuples(chunks, others), min_size=1, max_size=8))
            uses += [Use(frozenset(some), other, phase) for some, other in part]  # type: ignore[arg-type]
    return (*uses, Use(frozenset(), draw(others), "step"))


@st.composite
def steps(draw: st.DrawFn) -> tuple[Trace, list[ChunkBytes]]:
    """A trace and its chunks."""
    count = draw(st.integers(1, 8))
    has_root, ranks, wide = draw(st.booleans()), draw(st.sampled_from([1, 1, 2, 4])), draw(st.booleans())
    chunks = []
    for number in range(count):
        weights = draw(st.integers(0, 250)) * 4
        chunks.append(
            chunk_of(weights, trained=draw(st.booleans()), is_root=has_root and number == 0, ranks=ranks, wide=wide)
        )
    return draw(traces(count, has_root=has_root)), chunks


def check(
    trace: Trace, chunks: Sequence[ChunkBytes], placement: Placement, device_bytes: int | None, prefetch: int
) -> None:
    """Run a step, and compare what the placement says of itself."""
    ran = run_step(trace, chunks, placement, prefetch=prefetch)
    assert placement.device_bytes == max(ran.device_bytes)
    assert device_bytes is None or placement.device_bytes <= device_bytes
    assert placement.traffic_bytes == ran.moved_bytes
    host = 0
    for number, sizes in enumerate(chunks):
        here, resident = number in placement.states_on_device, number in placement.resident
        assert not here or sizes.trained
        if sizes.trained and not here:
            host += sizes.states + sizes.host_gradients + sizes.shard
        elif not resident and not (here and sizes.ranks > 1):
            host += sizes.shard
    assert placement.host_bytes == host
    assert not {chunk for _, chunk in placement.keeps} & placement.resident
    for number, (use, following) in enumerate(itertools.pairwise(trace)):
        for chunk in use.chunks & following.chunks - placement.resident:
            assert (number, chunk) in placement.keeps


def whole_bytes(trace: Trace, chunks: Sequence[ChunkBytes]) -> int:
    """Return a room in which everything fits."""
    return sum(c.weights + c.states + c.gradients for c in chunks) + max(use.other_bytes for use in trace)


# Never over budget, never a chunk used that is away.


@given(steps(), st.floats(0, 1), st.integers(0, 4))
def test_auto_stays_within_the_room(step: tuple[Trace, list[ChunkBytes]], share: float, prefetch: int) -> None:
    trace, chunks = step
    least = least_device_bytes(trace, chunks)
    room = least + int(share * max(0, whole_bytes(trace, chunks) - least))
    placement = place_automatically(trace, chunks, device_bytes=room, host_bytes=None, prefetch=prefetch)
    check(trace, chunks, placement, room, prefetch)
    assert placement == place_automatically(trace, chunks, device_bytes=room, host_bytes=None, prefetch=prefetch)


@given(steps(), st.floats(0, 1), st.floats(0, 1), st.integers(0, 3))
def test_auto_stays_within_both_memories(
    step: tuple[Trace, list[ChunkBytes]], device_share: float, host_share: float, prefetch: int
) -> None:
    trace, chunks = step
    least = least_device_bytes(trace, chunks)
    room = least + int(device_share * max(0, whole_bytes(trace, chunks) - least))
    least_host = least_host_bytes(trace, chunks, device_bytes=room)
    most_host = host_bytes_taken(chunks, states_on_device=(), resident=())
    host = least_host + int(host_share * (most_host - least_host))
    placement = place_automatically(trace, chunks, device_bytes=room, host_bytes=host, prefetch=prefetch)
    check(trace, chunks, placement, room, prefetch)
    assert placement.host_bytes <= host
    if least_host > 0:
        with pytest.raises(OutOfMemoryError, match=r"at least .* GB of host memory"):
            place_automatically(trace, chunks, device_bytes=room, host_bytes=least_host - 1, prefetch=prefetch)


@given(steps(), st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 4), st.floats(0, 1))
def test_static_stays_within_the_room(
    step: tuple[Trace, list[ChunkBytes]], optim: float, param: float, shard: float, prefetch: int, spare: float
) -> None:
    trace, chunks = step

    def place(device_bytes: int | None) -> Placement:
        return place_statically(
            trace,
            chunks,
            offload_optim_frac=optim,
            offload_param_frac=param,
            shard_param_frac=shard,
            prefetch=prefetch,
            device_bytes=device_bytes,
            host_bytes=None,
        )

    free = place(None)
    check(trace, chunks, free, None, prefetch)
    room = int(free.device_bytes * (0.5 + spare))
    try:
        capped = place(room)
    except OutOfMemoryError:
        # Without fetching ahead it would have fitted in no less.
        plain = place_statically(
            trace,
            chunks,
            offload_optim_frac=optim,
            offload_param_frac=param,
            shard_param_frac=shard,
            prefetch=0,
            device_bytes=None,
            host_bytes=None,
        )
        assert plain.device_bytes > room
        assert place(plain.device_bytes).device_bytes <= plain.device_bytes
        return
    check(trace, chunks, capped, room, prefetch)
    assert capped.resident == free.resident
    assert capped.states_on_device == free.states_on_device
    assert capped.traffic_bytes <= place(least_static(trace, chunks, capped)).traffic_bytes


def least_static(trace: Trace, chunks: Sequence[ChunkBytes], placement: Placement) -> int:
    """Return the room in which a placement's shares fit with nothing kept and nothing ahead."""
    keeps = frozenset(
        (number, chunk)
        for number, chunk in placement.keeps
        if number + 1 < len(trace) and chunk in trace[number + 1].chunks
    )
    bare = dataclasses.replace(placement, keeps=keeps, fetches=((),) * len(trace))
    return max(run_step(trace, chunks, bare, prefetch=0).device_bytes)


# Little is moved.


@given(
    st.integers(1, 8).flatmap(lambda count: st.lists(st.integers(0, count - 1), min_size=1, max_size=40)),
    st.integers(1, 8),
)
def test_evictions_are_belady_s_for_equal_chunks(uses: list[int], places: int) -> None:
    chunks = [chunk_of(100)] * 8
    trace = (*(Use(frozenset({c}), 50, "forward") for c in uses), Use(frozenset(), 0, "step"))
    placement = place_statically(
        trace,
        chunks,
        offload_optim_frac=1,
        offload_param_frac=1,
        prefetch=0,
        device_bytes=50 + 100 * places,
        host_bytes=None,
    )
    assert run_step(trace, chunks, placement, prefetch=0).fetches == fetches_of_min(uses, places)


@given(st.data(), st.integers(1, 8), st.floats(0, 1), st.integers(0, 2))
def test_fetches_are_near_the_optimum_s(data: st.DataObject, count: int, share: float, prefetch: int) -> None:
    chunks = [chunk_of(data.draw(st.integers(1, 500))) for _ in range(count)]
    trace = data.draw(traces(count, has_root=False))
    least = least_device_bytes(trace, chunks)
    room = least + int(share * sum(chunk.weights for chunk in chunks))
    placement = place_automatically(trace, chunks, device_bytes=room, host_bytes=None, prefetch=prefetch)
    sizes = [chunk.weights for chunk in chunks]
    free = [room - use.other_bytes for use in trace]
    best = fewest_fetched_bytes([use.chunks for use in trace], sizes, free)
    best += sum(gradient_bytes(trace, chunks, chunk) for chunk in range(count))
    assert placement.traffic_bytes <= 1.1 * best


@given(st.data(), st.integers(1, 8), st.floats(0, 1), st.integers(0, 2))
def test_static_fetches_are_near_the_optimum_s(data: st.DataObject, count: int, share: float, prefetch: int) -> None:
    chunks = [chunk_of(data.draw(st.integers(1, 500))) for _ in range(count)]
    trace = data.draw(traces(count, has_root=False))
    least = least_device_bytes(trace, chunks)
    room = least + int(share * sum(chunk.weights for chunk in chunks))
    placement = place_statically(
        trace,
        chunks,
        offload_optim_frac=1,
        offload_param_frac=1,
        prefetch=prefetch,
        device_bytes=room,
        host_bytes=None,
    )
    free = [room - use.other_bytes for use in trace]
    best = fewest_fetched_bytes([use.chunks for use in trace], [chunk.weights for chunk in chunks], free)
    fetched = run_step(trace, chunks, placement, prefetch=prefetch).fetched_bytes
    # Every chunk may be used several at a time: then more than the search tries in all ways may be open.
    assert best <= fetched <= 1.1 * best


@given(steps(), st.integers(0, 3))
def test_where_everything_fits_nothing_moves(step: tuple[Trace, list[ChunkBytes]], prefetch: int) -> None:
    trace, chunks = step
    room = whole_bytes(trace, chunks)
    placement = place_automatically(trace, chunks, device_bytes=room, host_bytes=0, prefetch=prefetch)
    assert placement.traffic_bytes == 0
    assert placement.host_bytes == 0
    assert placement.resident == frozenset(range(len(chunks)))
    assert placement.states_on_device == {number for number, chunk in enumerate(chunks) if chunk.trained}
    assert not placement.keeps
    assert not any(placement.fetches)


@given(steps())
def test_the_least_is_the_least(step: tuple[Trace, list[ChunkBytes]]) -> None:
    trace, chunks = step
    least = least_device_bytes(trace, chunks)
    place_automatically(trace, chunks, device_bytes=least, host_bytes=None, prefetch=2)
    with pytest.raises(OutOfMemoryError, match=r"at least .* GB of device memory"):
        place_automatically(trace, chunks, device_bytes=least - 1, host_bytes=None, prefetch=2)


# What goes where.

SIX = [chunk_of(1000, is_root=True), *[chunk_of(100)] * 6]


def auto(trace: Trace, chunks: Sequence[ChunkBytes], device_bytes: int, **others: int | None) -> Placement:
    given_ = {"host_bytes": None, "prefetch": 0, **others}
    placement = place_automatically(trace, chunks, device_bytes=device_bytes, **given_)  # type: ignore[arg-type]
    check(trace, chunks, placement, device_bytes, given_["prefetch"] or 0)
    return placement


def test_weights_come_first_then_the_states_that_forward_needs_first() -> None:
    trace = transformer(6, other=40, step=40)
    assert auto(trace, SIX, 1000 + 600 + 40).resident == frozenset(range(7))
    # 6,000 of states and 1,000 of gradients are the root's: blocks 1 and 2 have room where it has none.
    two = auto(trace, SIX, 1640 + 2 * 700)
    assert (two.resident, two.states_on_device) == (frozenset(range(7)), {1, 2})
    with_root = auto(trace, SIX, 1640 + 7000 + 700)
    assert with_root.states_on_device == {0, 1}
    assert with_root.traffic_bytes == 5 * 200


def test_where_weights_do_not_fit_the_last_units_stay_over_the_turn() -> None:
    trace = transformer(6)
    placement = auto(trace, SIX, 1000 + 300)
    assert placement.resident == {0}
    # The room for 3 blocks holds unit 6, which is used twice on end, and two more over the turn.
    gaps = {chunk for number, chunk in placement.keeps if chunk not in trace[number + 1].chunks}
    assert gaps == {4, 5}
    assert placement.traffic_bytes == 2 * 1000 + 6 * 100 + (6 + 3) * 100


def test_the_room_may_be_short_for_a_moment() -> None:
    # Activations pile up to the turn: what cannot stay over it stays elsewhere.
    trace = transformer(6, micro_batches=2, activation=100)
    placement = auto(trace, SIX, 1000 + 100 + 600)
    ran = run_step(trace, SIX, placement, prefetch=0)
    assert max(ran.device_bytes) == 1700
    # Kept from the backward of one micro-batch to the forward of the next, where there are few activations.
    assert (11, 1) in placement.keeps
    assert any(number == 10 and chunk == 2 for number, chunk in placement.keeps)


def test_frozen_chunks_stay_for_good() -> None:
    chunks = [chunk_of(50, is_root=True), *[chunk_of(100, trained=False)] * 6]
    placement = auto(transformer(6), chunks, 50 + 350 + 100)
    # Each of them saves two fetches in every step, and room for one in use is left.
    assert placement.resident == {0, 1, 2, 3}
    assert placement.host_bytes == 3 * 100 + 50 * 8


def test_with_frozen_chunks_little_more_is_fetched_than_must_be() -> None:
    chance = random.Random("frozen")
    ratios = []
    for _ in range(60):
        count = chance.randint(2, 6)
        chunks = [chunk_of(chance.randint(10, 300), trained=chance.random() < 0.3) for _ in range(count)]
        order = [*range(count), *reversed(range(count))]
        phases = ["forward"] * count + ["backward"] * count
        uses = [Use(frozenset({c}), chance.randint(0, 300), p) for c, p in zip(order, phases, strict=True)]  # type: ignore[arg-type]
        trace = (*uses * chance.randint(1, 2), Use(frozenset(), 0, "step"))
        room = least_device_bytes(trace, chunks) + int(chance.random() * sum(chunk.weights for chunk in chunks))
        placement = place_automatically(trace, chunks, device_bytes=room, host_bytes=None, prefetch=0)
        best = sum(gradient_bytes(trace, chunks, chunk) for chunk in range(count))
        best += fewest_fetched_with_residents(trace, chunks, room)
        ratios.append(placement.traffic_bytes / best if best else 1.0)
    assert max(ratios) < 1.4
    assert sum(ratios) / len(ratios) < 1.03


def fewest_fetched_with_residents(trace: Trace, chunks: Sequence[ChunkBytes], room: int) -> int:
    """Return the fewest bytes fetched, whichever frozen chunks never leave."""
    frozen = [number for number, chunk in enumerate(chunks) if not chunk.trained]
    found = []
    for resident in itertools.chain.from_iterable(itertools.combinations(frozen, n) for n in range(len(frozen) + 1)):
        uses = [use.chunks - set(resident) for use in trace]
        free = [room - use.other_bytes - sum(chunks[chunk].weights for chunk in resident) for use in trace]
        if all(sum(chunks[c].weights for c in used) <= limit for used, limit in zip(uses, free, strict=True)):
            found.append(fewest_fetched_bytes(uses, [chunk.weights for chunk in chunks], free))
    return min(found)


def test_the_host_s_cap_brings_states_to_the_device() -> None:
    trace = transformer(6)
    everything = 8 * 1000 + 6 * 800
    relaxed = auto(trace, SIX, 1300, host_bytes=everything)
    assert not relaxed.states_on_device
    # 1,600 less on the host: two blocks whole on the device, those needed first.
    tight = auto(trace, SIX, 1300 + 1600, host_bytes=everything - 1600)
    assert tight.states_on_device == {1, 2}
    assert tight.resident >= {0, 1, 2}
    with pytest.raises(OutOfMemoryError, match="what the device has no room for"):
        auto(trace, SIX, 1300, host_bytes=everything - 1600)


def test_several_ranks_have_their_parts_on_the_device_before_whole_weights() -> None:
    chunks = [chunk_of(400, is_root=True, ranks=4), *[chunk_of(400, ranks=4)] * 6]
    parts = 7 * (600 + 100)  # states and gradients of all
    placement = auto(transformer(6), chunks, 800 + parts + 7 * 100)
    assert placement.states_on_device == frozenset(range(7))
    assert placement.traffic_bytes == 0
    assert placement.host_bytes == 0
    assert len(placement.resident) < 7


def test_a_message_says_what_would_do_in_one_line() -> None:
    chunks = [chunk_of(2 * GB, is_root=True), *[chunk_of(GB)] * 3]
    trace = transformer(3, other=GB // 2)
    with pytest.raises(OutOfMemoryError) as raised:
        place_automatically(trace, chunks, device_bytes=3 * GB - 1, host_bytes=None, prefetch=0)
    assert str(raised.value) == (
        "a step with everything on the host that is not in use takes at least 3.50 GB of device memory, and there are "
        "2.99 GB: raise --mem-cap, or take a smaller --batch-size"
    )
    with pytest.raises(OutOfMemoryError) as raised:
        place_automatically(trace, chunks, device_bytes=4 * GB, host_bytes=30 * GB, prefetch=0)
    assert str(raised.value) == (
        "what the device has no room for takes at least 40.00 GB of host memory, and there are 30.00 GB: raise "
        "--host-cap or --mem-cap, or take a smaller --model"
    )


# Fetching ahead.


def test_fetches_begin_so_many_uses_ahead_where_there_is_room() -> None:
    trace = transformer(6)
    placement = static(trace, SIX, 1, 6 / 16, prefetch=2)
    # Forward 1 to 6, then backward 6 to 1. Unit 5 would be fetched again as it leaves, so it stays over the turn.
    assert placement.fetches == ((2, 3), (4,), (5,), (6,), (), (), (4,), (3,), (2,), (1,), (), (), ())
    assert placement.keeps == {(4, 5), (5, 6)}
    assert placement.device_bytes == 1000 + 300


def test_fetches_ahead_take_the_room_that_what_left_has_made() -> None:
    trace = transformer(6)
    # Room for two blocks: the one in use, and the next.
    placement = static(trace, SIX, 1, 6 / 16, prefetch=4, device_bytes=1200)
    assert placement.fetches[:6] == ((2,), (3,), (4,), (5,), (6,), ())
    assert placement.fetches[6:] == ((), (4,), (3,), (2,), (1,), (), ())
    # Room for one.
    assert not any(static(trace, SIX, 1, 6 / 16, prefetch=4, device_bytes=1100).fetches)


def test_nothing_is_fetched_ahead_over_a_moment_without_room() -> None:
    trace = list(transformer(6))
    trace[2] = dataclasses.replace(trace[2], other_bytes=200)
    placement = static(tuple(trace), SIX, 1, 6 / 16, prefetch=3, device_bytes=1300)
    # The third use has room for its own alone, so 4 is fetched no earlier than its own.
    assert placement.fetches[:4] == ((2, 3), (), (), (5, 6))


# Shares.


def static(trace: Trace, chunks: Sequence[ChunkBytes], optim: float, param: float, **others: int | None) -> Placement:
    given_ = {"prefetch": 0, "device_bytes": None, "host_bytes": None, **others}
    placement = place_statically(trace, chunks, offload_optim_frac=optim, offload_param_frac=param, **given_)  # type: ignore[arg-type]
    check(trace, chunks, placement, given_["device_bytes"], given_["prefetch"] or 0)
    return placement


EIGHT = [chunk_of(200, is_root=True), *[chunk_of(100)] * 8]


@pytest.mark.parametrize("optim", [0, 0.3, 0.5, 0.8, 1])
@pytest.mark.parametrize("param", [0, 0.3, 0.5, 0.8, 1])
def test_any_two_shares_are_honoured_from_the_end(optim: float, param: float) -> None:
    placement = static(transformer(8), EIGHT, optim, param)
    kept = {share: frozenset(range(9 - round(share * 10))) for share in (0, 0.3, 0.5, 0.8)} | {1: frozenset()}
    assert placement.states_on_device == kept[optim]
    assert placement.resident == kept[param]
    # By hand: gradients out and weights in where the host steps, weights out where the device steps what travels.
    expected = 0
    for number, sizes in enumerate(EIGHT):
        here, resident = number in kept[optim], number in kept[param]
        times_fetched = 0 if resident else 1 if number in (0, 8) else 2
        expected += sizes.shard * (times_fetched + (0 if here else 1) + (1 if here != resident else 0))
    assert placement.traffic_bytes == expected


@given(st.lists(st.integers(1, 400), min_size=1, max_size=12), st.floats(0, 1), st.floats(0, 1))
def test_shares_are_by_bytes_to_half_a_chunk(weights: list[int], optim: float, param: float) -> None:
    chunks = [chunk_of(size) for size in weights]
    placement = static(transformer(0), chunks, optim, param)
    on_host = sum(size for number, size in enumerate(weights) if number not in placement.states_on_device)
    away = sum(size for number, size in enumerate(weights) if number not in placement.resident)
    assert abs(on_host - optim * sum(weights)) <= max(weights) / 2 + 1e-6
    assert abs(away - param * sum(weights)) <= max(weights) / 2 + 1e-6


def test_frozen_weights_have_a_share_and_no_states() -> None:
    chunks = [chunk_of(100, is_root=True), *[chunk_of(100, trained=n % 2 == 0) for n in range(1, 10)]]
    placement = static(transformer(9), chunks, 0.4, 0.5)
    assert placement.states_on_device == {0, 2, 4}
    assert placement.resident == {0, 1, 2, 3, 4}


def test_several_ranks_share_what_the_user_says() -> None:
    chunks = [dataclasses.replace(chunk, shard=chunk.weights // 2, ranks=2) for chunk in EIGHT]
    placement = static(transformer(8), chunks, 0, 0, shard_param_frac=0.5)  # type: ignore[arg-type]
    assert placement.resident == {0, 1, 2, 3}
    assert placement.traffic_bytes == 0
    assert placement.host_bytes == 0
    # One rank has no parts.
    assert static(transformer(8), EIGHT, 0, 0, shard_param_frac=1).resident == frozenset(range(9))


def test_a_cap_that_shares_do_not_fit_is_refused() -> None:
    chunks = [chunk_of(2 * GB, is_root=True), *[chunk_of(GB)] * 2]
    trace = transformer(2)
    with pytest.raises(
        OutOfMemoryError, match=r"--offload-optim-frac 1 with --offload-param-frac 0 takes at least 4.00"
    ):
        static(trace, chunks, 1, 0, device_bytes=4 * GB - 1)
    assert static(trace, chunks, 1, 0, device_bytes=4 * GB).device_bytes == 4 * GB
    with pytest.raises(OutOfMemoryError, match=r"takes at least 32.00 GB of host memory, and there are 31.99 GB"):
        static(trace, chunks, 1, 0, host_bytes=32 * GB - 1)
    assert static(trace, chunks, 1, 0, host_bytes=32 * GB).host_bytes == 32 * GB
    with pytest.raises(ConfigError, match=r"between 0 and 1, not at 1\.5"):
        static(trace, chunks, 1.5, 0)


# The step that is watched.


def test_the_warm_up_has_on_the_host_what_it_can() -> None:
    everything = 8 * 1000 + 6 * 800
    assert place_for_warmup(SIX, host_bytes=None) == (frozenset(), {0})
    assert place_for_warmup(SIX, host_bytes=everything) == (frozenset(), {0})
    # The root's 8,000 do not fit any more: they are needed first.
    assert place_for_warmup(SIX, host_bytes=everything - 1) == ({0}, {0})
    # The homes of all blocks, and the states of the last two.
    assert place_for_warmup(SIX, host_bytes=600 + 2 * 700) == ({0, 1, 2, 3, 4}, {0})
    with pytest.raises(OutOfMemoryError, match="what is not in use takes at least"):
        place_for_warmup(SIX, host_bytes=599)


@given(steps(), st.floats(0, 1))
def test_the_warm_up_stays_within_the_host(step: tuple[Trace, list[ChunkBytes]], share: float) -> None:
    _, chunks = step
    root = frozenset(number for number, chunk in enumerate(chunks) if chunk.is_root)
    trained = frozenset(number for number, chunk in enumerate(chunks) if chunk.trained)
    least = host_bytes_taken(chunks, states_on_device=trained, resident=root)
    most = host_bytes_taken(chunks, states_on_device=(), resident=root)
    host = least + int(share * (most - least))
    on_device, resident = place_for_warmup(chunks, host_bytes=host)
    assert resident == root
    assert on_device <= trained
    assert host_bytes_taken(chunks, states_on_device=on_device, resident=resident) <= host


# Quick.


@pytest.mark.parametrize("equal", [True, False])
def test_a_hundred_units_and_four_micro_batches_are_placed_within_seconds(equal: bool) -> None:
    chunks = [chunk_of(4000, is_root=True)]
    chunks += [chunk_of(100 if equal else 100 + 7 * unit % 50 + unit, trained=unit % 5 > 0) for unit in range(100)]
    trace = transformer(100, micro_batches=4, activation=20)
    least = least_device_bytes(trace, chunks)
    for spare in (200, 4000, 12000, 60000):
        began = time.process_time()
        placement = place_automatically(trace, chunks, device_bytes=least + spare, host_bytes=None, prefetch=2)
        assert time.process_time() - began < 2.0
        check(trace, chunks, placement, least + spare, 2)
