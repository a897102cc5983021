"""What lies where, what is kept, and what is fetched when: decided from a trace of uses and the room. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from albireo.errors import ConfigError, OutOfMemoryError
from albireo.memory.budget import (
    ChunkBytes,
    Trace,
    device_bytes_taken,
    host_bytes_taken,
    traffic_bytes,
)
from albireo.memory.placement_draft import Draft
from albireo.memory.placement_search import fits_whole, least_fetched, relieve_host

__all__ = [
    "Placement",
    "least_device_bytes",
    "least_host_bytes",
    "place_automatically",
    "place_for_warmup",
    "place_statically",
]

# More than any machine has.
_UNLIMITED_BYTES = 2**62


@dataclass(frozen=True)
class Placement:
    """What is done with each chunk in a step.

    Attributes:
        states_on_device: chunks whose masters and optimizer states are on the device, and which are stepped there.
        resident: chunks whose weights never leave the device.
        keeps: (use number, chunk): after this use the chunk stays on the device until its next use in the same step.
            Where the very next use needs it too, it is always here. No resident chunk is.
        fetches: per use, the chunks whose fetch begins when the use begins, ahead of their own, in the order of their
            uses. A chunk that is used, is away and has not been fetched ahead is fetched by its use.
        device_bytes: the most that is taken on the device at a time, model data or not.
        host_bytes: what is taken on the host.
        traffic_bytes: what crosses the bus in one step, both ways.
        streamed: chunks whose states are on the host, and come to the device to be stepped.
    """

    states_on_device: frozenset[int]
    resident: frozenset[int]
    keeps: frozenset[tuple[int, int]]
    fetches: tuple[tuple[int, ...], ...]
    device_bytes: int
    host_bytes: int
    traffic_bytes: int
    streamed: frozenset[int] = frozenset()


def place_automatically(
    trace: Trace, chunks: Sequence[ChunkBytes], *, device_bytes: int, host_bytes: int | None, prefetch: int
) -> Placement:
    """Place chunks so that the least is moved in the room that there is. Where everything fits, nothing moves.

    Room goes first to what the host cannot hold, then to weights, then to states; each to the chunks first that the
    next forward needs first, those of the root before all. A chunk of one rank that is stepped on the device is resident.
    Where not all weights can be, frozen ones are as far as they fit (each saves all its fetches), and trained ones are
    kept between their uses so that the fewest bytes are fetched. Several ranks have their parts of states and weights
    on the device before they keep whole weights there: a byte of a part saves more.

    Args:
        trace: one step as the warm-up saw it, agreed over ranks.
        chunks: by number, of the rank that holds most.
        device_bytes: the device's memory, all that is not model data included.
        host_bytes: the host's memory for model data, or None if it does not bind.
        prefetch: by how many uses a fetch may run ahead of the use that needs it.

    Raises:
        OutOfMemoryError: one of the two memories does not suffice; the message says the least that would.
    """
    least = least_device_bytes(trace, chunks)
    if least > device_bytes:
        raise _device_error("a step with everything on the host that is not in use takes", least, device_bytes)
    draft = Draft(trace, chunks, device_bytes)
    order = _need_order(trace, chunks)
    trained = [chunk for chunk in order if chunks[chunk].trained]
    if not fits_whole(trace, chunks, device_bytes):
        if host_bytes is not None:
            taken = relieve_host(draft, order, chunks, host_bytes)
            if taken > host_bytes:
                raise _host_error("what the device has no room for takes", taken, host_bytes)
        for chunk in trained:
            if chunks[chunk].ranks > 1:
                draft.settle(chunk)
    if not draft.make_resident(order):
        draft = least_fetched(draft, order, trace, chunks)
    for chunk in trained:
        draft.settle(chunk)
    draft.fetch_ahead(prefetch)
    return _placement(draft, trace, chunks)


def place_statically(
    trace: Trace,
    chunks: Sequence[ChunkBytes],
    *,
    offload_optim_frac: float,
    offload_param_frac: float,
    shard_param_frac: float = 0.0,
    prefetch: int,
    device_bytes: int | None,
    host_bytes: int | None,
) -> Placement:
    """Place the shares of states and of weights on the host that the user gives.

    Shares are by bytes, to the nearest end of a chunk. Chunks go to the host from the last one on (`plan_chunks`
    numbers them in the order in which the next forward needs them), those of the root last of all; so the weights that
    travel are first those of chunks whose states are on the host. With a cap on the device the room that is left keeps weights
    there between their uses; without one, they leave after each, unless they would be fetched ahead again at once.

    Args:
        trace: one step, as in `place_automatically`.
        chunks: by number.
        offload_optim_frac: the share, by bytes, of masters and optimizer states on the host, from 0 to 1.
        offload_param_frac: the share of weights that travel: between host and device, or between ranks where several
            share a chunk that is stepped on the device.
        shard_param_frac: over several ranks, the share of weights that travel in any case. One rank has no parts.
        prefetch: by how many uses a fetch may run ahead of the use that needs it.
        device_bytes: the device's memory, or None if it does not bind.
        host_bytes: the host's memory for model data, or None if it does not bind.

    Raises:
        ConfigError: a share is not between 0 and 1.
        OutOfMemoryError: one of the two memories does not suffice; the message says the least that would.
    """
    order = _layout_order(chunks)
    trained = [chunk for chunk in order if chunks[chunk].trained]
    states_on_host = _last_share(trained, [chunks[chunk].states for chunk in trained], offload_optim_frac)
    weights = [chunks[chunk].weights for chunk in order]
    away = _last_share(order, weights, offload_param_frac)
    away |= {chunk for chunk in _last_share(order, weights, shard_param_frac) if chunks[chunk].ranks > 1}
    draft = Draft(
        trace,
        chunks,
        _UNLIMITED_BYTES if device_bytes is None else device_bytes,
        states_on_device=set(trained) - states_on_host,
        resident=set(order) - away,
    )
    shares = f"--offload-optim-frac {offload_optim_frac:g} with --offload-param-frac {offload_param_frac:g} takes"
    if device_bytes is not None and min(draft.left_bytes, default=0) < 0:
        raise _device_error(shares, device_bytes - min(draft.left_bytes), device_bytes)
    taken = host_bytes_taken(chunks, states_on_device=draft.states_on_device, resident=draft.resident)
    if host_bytes is not None and taken > host_bytes:
        raise _host_error(shares, taken, host_bytes)
    draft.keep_in_place()
    if device_bytes is not None:
        draft.keep_what_fits()
    draft.fetch_ahead(prefetch)
    return _placement(draft, trace, chunks)


def place_for_warmup(
    chunks: Sequence[ChunkBytes], *, host_bytes: int | None, trace: Trace = (), device_bytes: int | None = None
) -> tuple[frozenset[int], frozenset[int]]:
    """Place states for the step that is watched, of which nothing is known yet: as many as can be are on the host.

    Args:
        chunks: by number.
        host_bytes: the host's memory for model data, or None if it does not bind.
        trace: the uses that are expected, with nothing beside model data.
        device_bytes: the device's memory, or None if it does not bind.

    Returns:
        The chunks whose states are on the device, because the host has no room for them: those that the next forward
        needs first. And the resident ones: the root's. All other weights travel.

    Raises:
        OutOfMemoryError: the host cannot hold the homes of weights, or the device what is in use and the states that the
            host has no room for; the message says the least that it has to hold.
    """
    root = frozenset(number for number, chunk in enumerate(chunks) if chunk.is_root)
    on_device = {number for number, chunk in enumerate(chunks) if chunk.trained}
    taken = host_bytes_taken(chunks, states_on_device=on_device, resident=root)
    if host_bytes is not None and taken > host_bytes:
        raise _host_error("what is not in use takes", taken, host_bytes)
    for chunk in reversed(_layout_order(chunks)):
        without = on_device - {chunk}
        if host_bytes is None or host_bytes_taken(chunks, states_on_device=without, resident=root) <= host_bytes:
            on_device = without
    present = [use.chunks - root for use in trace]
    taken = max(
        device_bytes_taken(trace, chunks, states_on_device=on_device, resident=root, present=present), default=0
    )
    if device_bytes is not None and taken > device_bytes:
        raise _device_error("a first step takes", taken, device_bytes)
    return frozenset(on_device), root


def least_device_bytes(trace: Trace, chunks: Sequence[ChunkBytes]) -> int:
    """Return what the device has to hold if everything is on the host that is not in use."""
    present = [use.chunks for use in trace]
    return max(device_bytes_taken(trace, chunks, states_on_device=(), resident=(), present=present), default=0)


def least_host_bytes(trace: Trace, chunks: Sequence[ChunkBytes], *, device_bytes: int) -> int:
    """Return what the host has to hold if the device holds as many chunks whole as it can.

    Args:
        trace: one step.
        chunks: by number.
        device_bytes: the device's memory, at least `least_device_bytes`.
    """
    if fits_whole(trace, chunks, device_bytes):
        return 0
    draft = Draft(trace, chunks, device_bytes)
    for chunk in _need_order(trace, chunks):
        draft.settle(chunk)
    return host_bytes_taken(chunks, states_on_device=draft.states_on_device, resident=draft.resident)


def _layout_order(chunks: Sequence[ChunkBytes]) -> list[int]:
    return sorted(range(len(chunks)), key=lambda chunk: (not chunks[chunk].is_root, chunk))


def _need_order(trace: Trace, chunks: Sequence[ChunkBytes]) -> list[int]:
    """Return chunks in the order in which the next forward needs them: the root's first, those never used last."""
    first_use: dict[int, int] = {}
    for number, use in enumerate(trace):
        for chunk in use.chunks:
            first_use.setdefault(chunk, number)
    return sorted(
        _layout_order(chunks), key=lambda chunk: (not chunks[chunk].is_root, first_use.get(chunk, len(trace)))
    )


def _last_share(order: Sequence[int], sizes: Sequence[int], share: float) -> set[int]:
    """Return so many of the last chunks that their bytes come nearest to a share of all."""
    if not 0 <= share <= 1:
        raise ConfigError(f"an offloaded share lies between 0 and 1, not at {share:g}")
    if share == 1:
        return set(order)
    target = share * sum(sizes)
    best, count, taken = target, 0, 0
    for number, size in enumerate(reversed(sizes), 1):
        taken += size
        if abs(target - taken) < best:
            best, count = abs(target - taken), number
    return set(order[len(order) - count :])


def _placement(draft: Draft, trace: Trace, chunks: Sequence[ChunkBytes]) -> Placement:
    states, resident, present = draft.states_on_device, draft.resident, draft.present
    taken = device_bytes_taken(trace, chunks, states_on_device=states, resident=resident, present=present)
    moved = traffic_bytes(trace, chunks, states_on_device=states, resident=resident, present=present)
    return Placement(
        states_on_device=frozenset(states),
        resident=frozenset(resident),
        keeps=frozenset(draft.keeps),
        fetches=tuple(map(tuple, draft.fetches)),
        device_bytes=max(taken, default=0),
        host_bytes=host_bytes_taken(chunks, states_on_device=states, resident=resident),
        traffic_bytes=moved,
    )


def _device_error(what: str, needed: int, available: int) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"{what} at least {_gb_at_least(needed)} of device memory, and there are {_gb_at_most(available)}: "
        f"raise --mem-cap, or take a smaller --batch-size"
    )


def _host_error(what: str, needed: int, available: int) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"{what} at least {_gb_at_least(needed)} of host memory, and there are {_gb_at_most(available)}: "
        f"raise --host-cap or --mem-cap, or take a smaller --model"
    )


def _gb_at_least(size: int) -> str:
    """Return a size that suffices when it is typed as it is printed."""
    return f"{math.ceil(size / 2**30 * 100) / 100:.2f} GB"


def _gb_at_most(size: int) -> str:
    return f"{math.floor(size / 2**30 * 100) / 100:.2f} GB"
