"""A step run by a placement, use by use, as Gemini runs it; and the best that any placement could do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from albireo.memory.budget import ChunkBytes, Trace, Use
from albireo.memory.placement import Placement


@dataclass(frozen=True)
class Ran:
    """What a step took, and moved."""

    device_bytes: list[int]
    fetches: int
    fetched_bytes: int
    moved_bytes: int


def run_step(trace: Trace, chunks: Sequence[ChunkBytes], placement: Placement, *, prefetch: int) -> Ran:
    """Run a step, and fail where a placement says what cannot be done."""
    stepped_here = placement.states_on_device
    gathered = {c for c in stepped_here if chunks[c].ranks > 1 and c not in placement.resident}
    here: set[int] = set()
    taken, fetches, fetched, moved = [], 0, 0, 0
    gradients_from = {c: gradient_begins(trace, c) for c in stepped_here}
    for number, use in enumerate(trace):
        if number > 0:
            for chunk in trace[number - 1].chunks - placement.resident:
                assert chunk in here, "a chunk was used that is away"
                if (number - 1, chunk) not in placement.keeps:
                    here.remove(chunk)
                else:
                    assert any(chunk in later.chunks for later in trace[number:]), "kept for nothing"
        coming = sorted(use.chunks - placement.resident - here)
        for chunk in placement.fetches[number]:
            assert chunk not in here, "fetched though it is there"
            assert chunk not in placement.resident
            assert chunk not in use.chunks, "a use fetches its own chunks"
            next_use = number + 1 + next(i for i, later in enumerate(trace[number + 1 :]) if chunk in later.chunks)
            assert next_use - number <= prefetch, "fetched too early"
        next_uses = [_next_use(trace, number, chunk) for chunk in placement.fetches[number]]
        assert next_uses == sorted(next_uses), "fetched out of order"
        for chunk in (*coming, *placement.fetches[number]):
            here.add(chunk)
            fetches += 1
            fetched += chunks[chunk].shard
            moved += 0 if chunk in gathered else chunks[chunk].shard
        if use.phase == "step":
            assert here == set(use.chunks) - placement.resident, "weights that the step makes stale are kept"
        total = use.other_bytes + sum(chunks[c].weights for c in (*here, *placement.resident))
        total += sum(chunks[c].states for c in stepped_here) + sum(chunks[c].shard for c in gathered)
        total += sum(chunks[c].gradients for c in stepped_here if gradients_from[c] <= number)
        if use.phase == "step":
            away = stepped_here - placement.resident - gathered
            total += max((chunks[c].shard for c in away), default=0)
        taken.append(total)
    moved += sum(_moved_by_step(trace, chunks, placement, chunk) for chunk in range(len(chunks)))
    return Ran(taken, fetches, fetched, moved)


def gradient_begins(trace: Trace, chunk: int) -> int:
    """Return the use from which on a chunk has a gradient until the step, by a second reading of the rule."""
    uses = [number for number, use in enumerate(trace) if use.phase == "backward" and chunk in use.chunks]
    if not uses:
        return len(trace)
    return uses[0] if len(micro_batches(trace)) > 1 else uses[-1]


def micro_batches(trace: Trace) -> list[list[Use]]:
    """Return the backward uses of each micro-batch."""
    batches: list[list[Use]] = []
    before = ""
    for use in trace:
        if use.phase == "backward":
            if before != "backward":
                batches.append([])
            batches[-1].append(use)
        before = use.phase
    return batches


def gradient_bytes(trace: Trace, chunks: Sequence[ChunkBytes], chunk: int) -> int:
    """Return what a chunk's gradients move to the host in a step."""
    batches = [batch for batch in micro_batches(trace) if any(chunk in use.chunks for use in batch)]
    return len(batches) * chunks[chunk].shard if chunks[chunk].trained else 0


def _moved_by_step(trace: Trace, chunks: Sequence[ChunkBytes], placement: Placement, chunk: int) -> int:
    sizes = chunks[chunk]
    gradients = gradient_bytes(trace, chunks, chunk)
    here, resident = chunk in placement.states_on_device, chunk in placement.resident
    if gradients == 0 or (here and resident):
        return 0
    if here:
        return 0 if sizes.ranks > 1 else sizes.shard
    return gradients + (sizes.shard if resident else 0)


def fewest_fetched_bytes(uses: Sequence[frozenset[int]], sizes: Sequence[int], room: Sequence[int]) -> int:
    """Return the fewest bytes that any choice of what stays can fetch, by trying all of them.

    Args:
        uses: the chunks used, by moment.
        sizes: bytes by chunk, which it takes while it is there and moves when it is fetched.
        room: bytes by moment for all chunks that are there.
    """
    sets = range(2 ** len(sizes))
    bytes_of = [sum(size for chunk, size in enumerate(sizes) if held >> chunk & 1) for held in sets]
    never = sum(sizes) * (len(uses) + 1)
    cost = [0 if held == 0 else never for held in sets]
    for used, limit in zip(uses, room, strict=True):
        for chunk, _ in enumerate(sizes):  # whatever is there may go
            for held in sets:
                if held >> chunk & 1:
                    cost[held ^ 1 << chunk] = min(cost[held ^ 1 << chunk], cost[held])
        need = sum(1 << chunk for chunk in used)
        after = [never] * len(sets)
        for held in sets:
            now = held | need
            if bytes_of[now] <= limit:
                after[now] = min(after[now], cost[held] + bytes_of[need & ~held])
        cost = after
    return min(cost)


def fetches_of_min(uses: Sequence[int], places: int) -> int:
    """Return how often Belady's MIN fetches, for chunks of one size used one at a time."""
    here: set[int] = set()
    fetches = 0
    for number, chunk in enumerate(uses):
        if chunk in here:
            continue
        fetches += 1
        if len(here) == places:
            later = list(uses[number + 1 :])
            here.remove(max(here, key=lambda other: later.index(other) if other in later else len(uses)))
        here.add(chunk)
    return fetches


def _next_use(trace: Trace, number: int, chunk: int) -> int:
    return next(later for later in range(number + 1, len(trace)) if chunk in trace[later].chunks)
