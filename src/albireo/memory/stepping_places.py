"""Which of the chunks with states on the host are stepped there, and which are streamed through the device. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from albireo.memory.budget import ChunkBytes
from albireo.memory.rates import Rates

__all__ = ["share_of_host", "stepping_seconds", "streamed_by_time", "streamed_bytes"]

# A ring on the device, and a bus that others use, are not worth less.
_LEAST_SAVED_SECONDS = 0.02
_LEAST_SAVED_SHARE = 0.1


def stepping_seconds(order: Sequence[int], parameters: Sequence[int], streamed: frozenset[int], rates: Rates) -> float:
    """Return when the last chunk is stepped, if host and stream begin together, each with its chunks in order.

    As long as both work they have the memory's bandwidth together; when one is done the other has it alone.

    Args:
        order: the chunks whose states are on the host, those needed first first.
        parameters: by chunk.
        streamed: those that are streamed.
        rates: the paces.
    """
    through = float(sum(parameters[chunk] for chunk in order if chunk in streamed))
    host = float(sum(parameters[chunk] for chunk in order)) - through
    both = min(host / rates.host_steps_beside, through / rates.streamed_steps_beside)
    host -= both * rates.host_steps_beside
    through -= both * rates.streamed_steps_beside
    return both + max(host, 0.0) / rates.host_steps + max(through, 0.0) / rates.streamed_steps


def streamed_by_time(order: Sequence[int], parameters: Sequence[int], rates: Rates) -> frozenset[int]:
    """Deal chunks, in the order in which they are needed, to whichever of host and stream would be done first.

    Args:
        order: the chunks whose states are on the host, those needed first first.
        parameters: by chunk.
        rates: the paces.

    Returns:
        Those to be streamed; none where that saves too little.
    """
    host = stream = 0.0
    streamed = set()
    for chunk in order:
        by_host = host + parameters[chunk] / rates.host_steps_beside
        by_stream = stream + parameters[chunk] / rates.streamed_steps_beside
        if by_stream < by_host:
            streamed.add(chunk)
            stream = by_stream
        else:
            host = by_host
    chosen = frozenset(streamed)
    alone = stepping_seconds(order, parameters, frozenset(), rates)
    saved = alone - stepping_seconds(order, parameters, chosen, rates)
    return chosen if saved >= max(_LEAST_SAVED_SECONDS, _LEAST_SAVED_SHARE * alone) else frozenset()


def streamed_bytes(chunk: ChunkBytes, *, resident: bool, masters_at_home: bool) -> int:
    """Return what crosses the bus more in a step, both ways, if a chunk is streamed instead of stepped on the host.

    Args:
        chunk: the bytes of its parts.
        resident: its new weights would have to come to the device.
        masters_at_home: what computes is fp32, so that the home has the masters.
    """
    states = 2 * (chunk.states + (chunk.shard if masters_at_home else 0))
    # The gradient comes back; new weights go home, if they do not with the masters, and do not come in from there.
    return states + chunk.shard + (0 if masters_at_home else chunk.shard) - (chunk.shard if resident else 0)


def share_of_host(order: Sequence[int], parameters: Sequence[int], share: float) -> frozenset[int]:
    """Return chunks spread evenly over the order, with about a share of the parameters.

    Args:
        order: the chunks whose states are on the host.
        parameters: by chunk.
        share: from 0 to 1.
    """
    chosen = set()
    owed = 0.0
    for chunk in order:
        owed += share * parameters[chunk]
        # At least half of it is owed.
        if 2 * owed >= parameters[chunk] and share > 0:
            chosen.add(chunk)
            owed -= parameters[chunk]
    return frozenset(chosen)
