"""The searches of an automatic placement over whole chunks: what has to be on the device, what is best there. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from albireo.memory.budget import ChunkBytes, Trace, device_bytes_taken, host_bytes_taken, traffic_bytes
from albireo.memory.placement_draft import Draft

__all__ = ["fits_whole", "least_fetched", "relieve_host"]


def fits_whole(trace: Trace, chunks: Sequence[ChunkBytes], device_bytes: int) -> bool:
    """Return True if all weights fit on the device, and all states and gradients beside them.

    Args:
        trace: one step.
        chunks: by number.
        device_bytes: the device's memory.
    """
    trained = [number for number, chunk in enumerate(chunks) if chunk.trained]
    present: list[tuple[int, ...]] = [() for _ in trace]
    taken = device_bytes_taken(trace, chunks, states_on_device=trained, resident=range(len(chunks)), present=present)
    return max(taken, default=0) <= device_bytes


def relieve_host(draft: Draft, order: Sequence[int], chunks: Sequence[ChunkBytes], host_bytes: int) -> int:
    """Settle chunks on the device until the host can hold the others, or the device has room for no more.

    Args:
        draft: in which they are settled.
        order: the chunks, those to be settled first first.
        chunks: by number.
        host_bytes: the host's memory for model data.

    Returns:
        What the host has to hold then.
    """
    waiting = iter(order)
    while True:
        taken = host_bytes_taken(chunks, states_on_device=draft.states_on_device, resident=draft.resident)
        chunk = next(waiting, None)
        if taken <= host_bytes or chunk is None:
            return taken
        draft.settle(chunk)


def least_fetched(draft: Draft, order: Sequence[int], trace: Trace, chunks: Sequence[ChunkBytes]) -> Draft:
    """Return the draft with weights resident and kept between their uses so that the least is fetched.

    The root's are resident, and as many frozen ones as fit: first those that forward needs first, or the largest, or
    the smallest, whichever is best. What is left keeps others between uses.

    Args:
        draft: what has room already; the root may be added to it.
        order: the chunks as the next forward needs them.
        trace: one step.
        chunks: by number.
    """
    used = {chunk for use in trace for chunk in use.chunks}
    for chunk in order:
        if chunks[chunk].is_root:
            draft.make_resident([chunk])
    frozen = [chunk for chunk in order if chunk in used and not chunks[chunk].trained and chunk not in draft.resident]
    by_size = sorted(frozen, key=lambda chunk: chunks[chunk].weights)
    best: Draft | None = None
    best_bytes = 0
    seen = set()
    for first_to_last in (frozen, by_size[::-1], by_size):
        tried = draft.copy()
        for chunk in first_to_last:
            tried.make_resident([chunk])
        if frozenset(tried.resident) in seen:
            continue
        seen.add(frozenset(tried.resident))
        tried.keep_in_place()
        tried.keep_what_fits()
        moved = traffic_bytes(
            trace, chunks, states_on_device=tried.states_on_device, resident=tried.resident, present=tried.present
        )
        if best is None or moved < best_bytes:
            best, best_bytes = tried, moved
    return draft if best is None else best
