"""The bytes of a placement, on a step small enough to add up by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from albireo.memory.budget import (
    ChunkBytes,
    Use,
    chunks_present,
    device_bytes_taken,
    first_gradients,
    host_bytes_taken,
    traffic_bytes,
)

ROOT = ChunkBytes(1000, 1000, 6000, 1000, 1000, trained=True, is_root=True)
BLOCK = ChunkBytes(200, 200, 1200, 200, 200, trained=True, is_root=False)
FROZEN = ChunkBytes(70, 70, 0, 0, 0, trained=False, is_root=False)
CHUNKS = [ROOT, BLOCK, BLOCK, FROZEN]


def use(chunks: set[int], other_bytes: int = 0, phase: str = "forward") -> Use:
    return Use(frozenset(chunks), other_bytes, phase)  # type: ignore[arg-type]


FORWARD = (use({0, 1}, 10), use({0, 2, 3}, 20))
BACKWARD = (use({0, 2, 3}, 30, "backward"), use({0, 1}, 20, "backward"))
STEP = use(set(), 5, "step")
TRACE = (*FORWARD, *BACKWARD, STEP)
NOTHING: list[tuple[int, ...]] = [()] * 5


def test_a_chunk_is_there_in_use_kept_or_fetched_ahead() -> None:
    assert chunks_present(TRACE, (), (), NOTHING) == [{0, 1}, {0, 2, 3}, {0, 2, 3}, {0, 1}, set()]
    assert chunks_present(TRACE, {0}, {(0, 1)}, NOTHING) == [{1}, {1, 2, 3}, {1, 2, 3}, {1}, set()]
    ahead = chunks_present(TRACE, {0}, (), [(2,), (), (1,), (), ()])
    assert ahead == [{1, 2}, {2, 3}, {1, 2, 3}, {1}, set()]


def test_gradients_begin_with_the_last_backward_or_the_first_of_several_micro_batches() -> None:
    assert first_gradients(TRACE, CHUNKS) == {0: 3, 1: 3, 2: 2}
    assert first_gradients((*FORWARD, *BACKWARD, *FORWARD, *BACKWARD, STEP), CHUNKS) == {0: 2, 1: 3, 2: 2}
    assert first_gradients((*FORWARD, STEP), CHUNKS) == {}


def test_device_bytes_are_what_is_there_and_all_else() -> None:
    present = chunks_present(TRACE, (), (), NOTHING)
    taken = device_bytes_taken(TRACE, CHUNKS, states_on_device=(), resident=(), present=present)
    assert taken == [1210, 1290, 1300, 1220, 5]
    # The root stays; block 2 is stepped here, so its states are there and its gradient from its backward on.
    present = chunks_present(TRACE, {0, 2}, {(0, 1)}, NOTHING)
    taken = device_bytes_taken(TRACE, CHUNKS, states_on_device={2}, resident={0, 2}, present=present)
    assert taken == [2610, 2690, 2900, 2820, 2605]


def test_new_weights_on_their_way_home_are_counted_at_the_step() -> None:
    present = chunks_present(TRACE, {0}, (), NOTHING)
    taken = device_bytes_taken(TRACE, CHUNKS, states_on_device={1, 2}, resident={0}, present=present)
    assert taken[-1] == 1000 + 2 * (1200 + 200) + 200 + 5


def test_host_bytes_are_states_gradients_homes_and_output_buffers() -> None:
    assert host_bytes_taken(CHUNKS, states_on_device=(), resident=()) == (6000 + 2000) + 2 * (1200 + 400) + 70
    # New weights of a chunk that is stepped on the host lie there whether it is resident or not.
    assert host_bytes_taken(CHUNKS, states_on_device=(), resident={0, 3}) == (6000 + 2000) + 2 * (1200 + 400)
    assert host_bytes_taken(CHUNKS, states_on_device={0, 1}, resident={0, 3}) == 200 + (1200 + 400)
    assert host_bytes_taken(CHUNKS, states_on_device={0, 1, 2}, resident={0, 1, 2, 3}) == 0


def traffic(states: set[int], resident: set[int], keeps: Collection[tuple[int, int]] = (), repeat: int = 1) -> int:
    trace = (*(FORWARD + BACKWARD) * repeat, STEP)
    present = chunks_present(trace, resident, keeps, [()] * len(trace))
    return traffic_bytes(trace, CHUNKS, states_on_device=states, resident=resident, present=present)


def test_traffic_is_fetches_gradients_and_new_weights() -> None:
    assert traffic({0, 1, 2}, {0, 1, 2, 3}) == 0
    # Block 1 is stepped on the host: its gradient goes out, its weights come in.
    assert traffic({0, 2}, {0, 1, 2, 3}) == 200 + 200
    # It also travels: in before forward, and once more before backward.
    assert traffic({0, 2}, {0, 2, 3}) == 200 + 2 * 200
    assert traffic({0, 2}, {0, 2, 3}, {(0, 1)}) == 200 + 200
    # It travels and is stepped on the device: no gradient leaves, and new weights do.
    assert traffic({0, 1, 2}, {0, 2, 3}, {(0, 1)}) == 200 + 200
    # What is frozen is fetched and dropped.
    assert traffic({0, 1, 2}, {0, 1, 2}) == 70
    # Gradients of each micro-batch leave.
    assert traffic({0, 2}, {0, 1, 2, 3}, repeat=3) == 3 * 200 + 200


def test_what_several_ranks_share_is_at_home_where_it_is_stepped() -> None:
    halves = [dataclasses.replace(chunk, shard=chunk.weights // 2, ranks=2) for chunk in CHUNKS]
    present = chunks_present(TRACE, {0}, (), NOTHING)
    taken = device_bytes_taken(TRACE, halves, states_on_device={1}, resident={0}, present=present)
    assert taken[0] == 1000 + 1200 + 100 + 200 + 10  # the root, states and home of block 1, and its weights
    assert taken[-1] == 1000 + 1200 + 100 + 200 + 5
    assert host_bytes_taken(halves, states_on_device={0, 1, 2}, resident={0}) == 35
    moved = traffic_bytes(TRACE, halves, states_on_device={0, 1, 2}, resident={0}, present=present)
    assert moved == 35


def test_a_chunk_without_a_backward_is_not_stepped() -> None:
    trace = (use({0, 1}), use({0}, 0, "backward"), STEP)
    present = chunks_present(trace, {0, 1}, (), [()] * 3)
    assert traffic_bytes(trace, CHUNKS[:2], states_on_device={0}, resident={0, 1}, present=present) == 0
