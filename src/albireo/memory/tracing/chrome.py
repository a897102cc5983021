"""A timeline in the form that chrome://tracing and Perfetto open. Pure."""

from __future__ import annotations

from typing import Any

from albireo.memory.tracing.timeline import Timeline

__all__ = ["to_chrome"]

_COMPUTING, _WAITS = "computing", "waits of the computing"


def to_chrome(timeline: Timeline) -> dict[str, Any]:
    """Return Chrome's Trace Event Format: a row for the computing, one for its waits, one a lane, and counters of memory.

    Args:
        timeline: a step's.
    """
    lanes = list(dict.fromkeys(work.lane for work in timeline.works))
    rows = {name: number for number, name in enumerate([_COMPUTING, _WAITS, *lanes])}
    names = [
        {"ph": "M", "pid": 0, "tid": row, "name": "thread_name", "args": {"name": name}} for name, row in rows.items()
    ]
    events: list[dict[str, Any]] = [
        _span(rows[_COMPUTING], f"{span.phase} {span.unit or 'root'}", span.begin_seconds, span.end_seconds)
        for span in timeline.spans
    ]
    for wait in timeline.waits:
        facts = {"chunk": wait.chunk, "unit": wait.unit or "root", "phase": wait.phase}
        events.append(_span(rows[_WAITS], wait.kind, wait.begin_seconds, wait.end_seconds, **facts))
    for work in timeline.works:
        end = timeline.seconds if work.end_seconds is None else work.end_seconds
        events.append(
            _span(rows[work.lane], work.kind, work.begin_seconds, end, chunk=work.chunk, bytes=work.size_bytes)
        )
    for reading in timeline.memory:
        sizes = {"device": reading.device_bytes, "host": reading.host_bytes}
        events += [
            {"ph": "C", "pid": 0, "ts": reading.seconds * 1e6, "name": f"{name} bytes", "args": {"bytes": size}}
            for name, size in sizes.items()
        ]
    return {"displayTimeUnit": "ms", "traceEvents": names + events}


def _span(row: int, name: str, begin: float, end: float, **facts: object) -> dict[str, Any]:
    # Microseconds, as the format has it.
    return {
        "ph": "X", "pid": 0, "tid": row, "name": name, "ts": begin * 1e6, "dur": max(end - begin, 0.0) * 1e6,
        "args": facts,
    }  # fmt: skip
