"""A placement as data, for people and tools: what is where, in bytes and predicted seconds. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from albireo.memory.budget import ChunkBytes
from albireo.memory.placement import Placement
from albireo.memory.rates import Rates
from albireo.memory.sizes import ChunkSizes
from albireo.memory.stepping_places import stepping_seconds

__all__ = ["plan_data"]


def plan_data(
    placement: Placement,
    sizes: Sequence[ChunkSizes],
    chunks: Sequence[ChunkBytes],
    units: Sequence[Sequence[str]],
    *,
    kind: str,
    rates: Rates,
) -> dict[str, Any]:
    """Return a placement as JSON values.

    Args:
        placement: which.
        sizes: by chunk.
        chunks: the bytes of each chunk's parts.
        units: by chunk, the names of its units; the root's is empty.
        kind: "auto" or "static".
        rates: what seconds are predicted with.
    """
    rows: list[dict[str, Any]] = [
        {
            "chunk": number,
            "units": list(units[number]),
            "parameters": size.numel // size.ranks,
            "weights": "stay" if number in placement.resident else "travel",
            "states": _states(placement, number, trained=size.trained),
            "weight_bytes": chunk.weights,
            "state_bytes": chunk.states,
        }
        for number, (size, chunk) in enumerate(zip(sizes, chunks, strict=True))
    ]
    stepped = {
        place: sum(row["parameters"] for row in rows if row["states"] == place)
        for place in ("device", "host", "streamed")
    }
    return {
        "kind": kind,
        "device_bytes": placement.device_bytes,
        "host_bytes": placement.host_bytes,
        "traffic_bytes": placement.traffic_bytes,
        "parameters_stepped": stepped,
        "predicted_seconds": {
            "steps_on_device": stepped["device"] / rates.device_steps,
            # Stepped on the host and streamed, side by side.
            "steps_beside": stepping_seconds(
                [row["chunk"] for row in rows if row["states"] in ("host", "streamed")],
                [row["parameters"] for row in rows],
                placement.streamed,
                rates,
            ),
            # Both ways are used at once, and about evenly.
            "traffic": placement.traffic_bytes / 2 / rates.bus_bytes,
        },
        "rates": {
            "host_parameters_per_second": rates.host_steps,
            "streamed_parameters_per_second": rates.streamed_steps,
            "host_parameters_per_second_beside": rates.host_steps_beside,
            "streamed_parameters_per_second_beside": rates.streamed_steps_beside,
            "device_parameters_per_second": rates.device_steps,
            "bus_bytes_per_second": rates.bus_bytes,
        },
        "chunks": rows,
    }


def _states(placement: Placement, number: int, *, trained: bool) -> str | None:
    if not trained:
        return None
    if number in placement.streamed:
        return "streamed"
    return "device" if number in placement.states_on_device else "host"
