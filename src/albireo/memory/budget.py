"""The bytes that a placement takes, at each moment and in all, and those that it moves. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "ChunkBytes",
    "Phase",
    "Trace",
    "Use",
    "chunks_present",
    "device_bytes_taken",
    "first_gradients",
    "host_bytes_taken",
    "traffic_bytes",
]

Phase = Literal["forward", "backward", "step"]


@dataclass(frozen=True)
class ChunkBytes:
    """What the parts of one chunk take, on one rank.

    Attributes:
        weights: its whole buffer, on the device while it is there.
        shard: this rank's partition of that: what crosses the bus when it is fetched, what its home on the host takes,
            and what its gradient takes on the way to the host.
        states: this rank's fp32 masters and optimizer states, wherever they are; 0 for a frozen chunk.
        gradients: what it keeps on the device from its backward to the step, if it is stepped there.
        host_gradients: what it keeps on the host until the step, if it is stepped there.
        trained: whether it is stepped at all.
        is_root: whether it belongs to the unit that is in use throughout.
        ranks: how many share it. Over several, a chunk that is stepped on the device while its weights travel has its
            home there, and a fetch gathers it from the other ranks; nothing of it crosses the bus.
    """

    weights: int
    shard: int
    states: int
    gradients: int
    host_gradients: int
    trained: bool
    is_root: bool
    ranks: int = 1


@dataclass(frozen=True)
class Use:
    """One moment: a unit begins forward or backward, up to the next such event; or the optimizer's step.

    Attributes:
        chunks: all in use, those of the root included. They have to be on the device throughout the moment.
        other_bytes: the moment's peak of device memory that is not model data; over ranks the maximum.
        phase: what goes on. Forward that is recomputed inside backward is backward.
    """

    chunks: frozenset[int]
    other_bytes: int
    phase: Phase


# One optimizer step: the moments of all its micro-batches, then that of the step.
Trace = tuple[Use, ...]


def chunks_present(
    trace: Trace,
    resident: Collection[int],
    keeps: Collection[tuple[int, int]],
    fetches: Sequence[Sequence[int]],
) -> list[set[int]]:
    """Return the chunks that are on the device at each moment, but those that never leave.

    When a use begins, what the one before it used leaves unless it is kept or used again; what this one uses, and what
    it fetches ahead, comes.

    Args:
        trace: the step.
        resident: chunks that never leave.
        keeps: (use, chunk): after this use the chunk stays until its next one.
        fetches: by use, the chunks whose fetch begins with it, ahead of their own.
    """
    moments: list[set[int]] = []
    present: set[int] = set()
    for number, use in enumerate(trace):
        if number > 0:
            present = {
                chunk for chunk in present if chunk not in trace[number - 1].chunks or (number - 1, chunk) in keeps
            }
        present = (present | use.chunks | set(fetches[number])) - set(resident)
        moments.append(present)
    return moments


def first_gradients(trace: Trace, chunks: Sequence[ChunkBytes]) -> dict[int, int]:
    """Return the use at which each trained chunk begins to hold a gradient until the step; none where it never does.

    With one micro-batch that is its last use in backward, at whose end its gradient is complete. Where more follow,
    it is the first: the gradients of one are added to those of the one before.
    """
    accumulates = len(_backwards(trace)) > 1
    begins: dict[int, int] = {}
    for number, use in enumerate(trace):
        if use.phase != "backward":
            continue
        for chunk in use.chunks:
            if chunks[chunk].trained and not (accumulates and chunk in begins):
                begins[chunk] = number
    return begins


def device_bytes_taken(
    trace: Trace,
    chunks: Sequence[ChunkBytes],
    *,
    states_on_device: Collection[int],
    resident: Collection[int],
    present: Sequence[Collection[int]],
) -> list[int]:
    """Return what is taken of the device's memory at each moment, model data or not.

    At the step, a chunk that is stepped on the device and has its home on the host takes its new weights on the device
    too, on their way: one such chunk at a time.

    Args:
        trace: the step.
        chunks: by number.
        states_on_device: chunks that are stepped on the device.
        resident: chunks whose weights never leave it.
        present: what `chunks_present` returns.
    """
    begins = first_gradients(trace, chunks)
    homes = _homes_on_device(chunks, states_on_device, resident)
    constant = sum(chunks[chunk].weights for chunk in resident) + sum(chunks[chunk].shard for chunk in homes)
    constant += sum(chunks[chunk].states for chunk in states_on_device)
    written_home = set(states_on_device) - set(resident) - homes
    passing = max((chunks[chunk].shard for chunk in written_home), default=0)
    new_gradients = [0] * len(trace)
    for chunk in states_on_device:
        if chunk in begins:
            new_gradients[begins[chunk]] += chunks[chunk].gradients
    taken = []
    gradients = 0
    for number, use in enumerate(trace):
        gradients += new_gradients[number]
        weights = sum(chunks[chunk].weights for chunk in present[number])
        scratch = passing if use.phase == "step" else 0
        taken.append(constant + gradients + weights + use.other_bytes + scratch)
    return taken


def host_bytes_taken(
    chunks: Sequence[ChunkBytes], *, states_on_device: Collection[int], resident: Collection[int]
) -> int:
    """Return what is taken of the host's memory: states, gradients, homes, and new weights on their way to the device.

    Args:
        chunks: by number.
        states_on_device: chunks that are stepped on the device.
        resident: chunks whose weights never leave it.
    """
    homes = _homes_on_device(chunks, states_on_device, resident)
    taken = 0
    for number, chunk in enumerate(chunks):
        on_host = chunk.trained and number not in states_on_device
        if on_host:
            taken += chunk.states + chunk.host_gradients
        if on_host or (number not in resident and number not in homes):
            taken += chunk.shard
    return taken


def traffic_bytes(
    trace: Trace,
    chunks: Sequence[ChunkBytes],
    *,
    states_on_device: Collection[int],
    resident: Collection[int],
    present: Sequence[Collection[int]],
) -> int:
    """Return what crosses the bus in one step, both ways.

    A fetch moves the shard in, unless its home is on the device. A chunk that is stepped on the host moves its gradient
    out once a micro-batch, and its new weights in at the step if it is resident (else its next fetch does). One that is
    stepped on the device and has its home on the host moves its new weights out. What leaves the device otherwise is
    only let go of.

    Args:
        trace: the step.
        chunks: by number.
        states_on_device: chunks that are stepped on the device.
        resident: chunks whose weights never leave it.
        present: what `chunks_present` returns.
    """
    homes = _homes_on_device(chunks, states_on_device, resident)
    moved = 0
    before: Collection[int] = ()
    for now in present:
        moved += sum(chunks[chunk].shard for chunk in now if chunk not in before and chunk not in homes)
        before = now
    backwards = _backwards(trace)
    for number, chunk in enumerate(chunks):
        gradients = sum(number in used for used in backwards) if chunk.trained else 0
        if number not in states_on_device:
            moved += gradients * chunk.shard
        if gradients and (number in states_on_device) != (number in resident) and number not in homes:
            moved += chunk.shard
    return moved


def _homes_on_device(
    chunks: Sequence[ChunkBytes], states_on_device: Collection[int], resident: Collection[int]
) -> set[int]:
    """Return the chunks whose weights travel between ranks alone."""
    return {chunk for chunk in states_on_device if chunks[chunk].ranks > 1 and chunk not in resident}


def _backwards(trace: Trace) -> list[set[int]]:
    """Return the chunks used in the backward of each micro-batch."""
    used: list[set[int]] = []
    before: Phase | None = None
    for use in trace:
        if use.phase == "backward":
            if before != "backward":
                used.append(set())
            used[-1] |= use.chunks
        before = use.phase
    return used
