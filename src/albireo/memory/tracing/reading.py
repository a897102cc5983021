"""A timeline in words: what was waited for, how long, by whom, and what kept it. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

from albireo.memory.tracing.timeline import Timeline, Wait, Work

__all__ = ["busy_seconds", "describe_trace"]

_Key = TypeVar("_Key", bound=Hashable)

_UNITS_SHOWN = 8
_LANE_OF = {
    "weights in": "to device",
    "weights home": "to host",
    "gradient out": "to host",
    "host step": "host step",
    # The pipeline's pace is that of the bus.
    "streamed step": "stream in",
}


def describe_trace(timeline: Timeline) -> list[str]:
    """Return lines: the step, its phases, sums of waits by cause and by unit, and what each lane did.

    Args:
        timeline: a step's.
    """
    where = f"{timeline.device}, simulated" if timeline.is_simulated else timeline.device
    phases = _sums(timeline.spans, lambda span: span.phase, lambda span: span.end_seconds - span.begin_seconds)
    lines = [
        f"step {timeline.step}: {_seconds(timeline.seconds)} on {where}, of which "
        + ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in phases.items()),
        *_waits(timeline),
        "beside the computing:",
        *(f"  {line}" for line in _lanes(timeline)),
        *_memory(timeline),
    ]
    if timeline.is_simulated:
        lines.append(
            "a simulated device copies when somebody waits: here every copy is waited for, which on a GPU is not so"
        )
    return lines


def busy_seconds(works: Iterable[Work], begin: float, end: float) -> float:
    """Return how long at least one of some works ran between two moments.

    Args:
        works: in any order; one without an end runs to the last moment.
        begin: seconds.
        end: seconds.
    """
    spans = sorted(
        (max(work.begin_seconds, begin), min(end if work.end_seconds is None else work.end_seconds, end))
        for work in works
    )
    busy, reached = 0.0, begin
    for first, last in spans:
        if last > max(first, reached):
            busy += last - max(first, reached)
            reached = last
    return busy


def _waits(timeline: Timeline) -> Iterator[str]:
    total = sum(wait.seconds for wait in timeline.waits)
    if total == 0:
        yield "the computing waited for nothing"
        return
    yield f"the computing waited {_seconds(total)} ({total / timeline.seconds:.1%}):"
    by_kind = _sums(timeline.waits, lambda wait: wait.kind, lambda wait: wait.seconds)
    for kind, seconds in by_kind.items():
        yield f"  for {kind}: {_seconds(seconds)} ({seconds / timeline.seconds:.1%}){_bound_by(timeline, kind)}"
        of_kind = [wait for wait in timeline.waits if wait.kind == kind]
        by_unit = _sums(of_kind, lambda wait: (wait.phase, wait.unit), lambda wait: wait.seconds)
        shown = [pair for pair in by_unit.items() if pair[1] > 0][:_UNITS_SHOWN]
        for (phase, unit), part in shown:
            yield f"    {_seconds(part):>10}  in {_where(phase, unit)}"
        left = sum(by_unit.values()) - sum(part for _, part in shown)
        if len(by_unit) > len(shown) and left > 0:
            yield f"    {_seconds(left):>10}  in {len(by_unit) - len(shown)} others"


def _bound_by(timeline: Timeline, kind: str) -> str:
    """Return whether what should have brought it was busy meanwhile: then it is that lane's pace that binds."""
    lane = _LANE_OF.get(kind)
    waits: list[Wait] = [wait for wait in timeline.waits if wait.kind == kind]
    total = sum(wait.seconds for wait in waits)
    if lane is None or total <= 0:
        return ""
    works = [work for work in timeline.works if work.lane == lane]
    busy = sum(busy_seconds(works, wait.begin_seconds, wait.end_seconds) for wait in waits)
    return f"; {lane} was busy {busy / total:.0%} of that"


def _lanes(timeline: Timeline) -> Iterator[str]:
    lanes: dict[str, list[Work]] = defaultdict(list)
    for work in timeline.works:
        lanes[work.lane].append(work)
    if not lanes:
        yield "nothing"
    for lane, works in lanes.items():
        busy = busy_seconds(works, 0.0, timeline.seconds)
        line = f"{lane}: busy {_seconds(busy)} ({busy / timeline.seconds:.1%}) with {len(works):,}"
        moved = sum(work.size_bytes for work in works)
        if lane != "host step" and busy > 0:
            line += f", {moved / 2**30:.3g} GB, {moved / busy / 1e9:.3g} GB/s while busy"
        yield line


def _memory(timeline: Timeline) -> Iterator[str]:
    if timeline.memory:
        device = max(reading.device_peak_bytes for reading in timeline.memory)
        host = max(reading.host_bytes for reading in timeline.memory)
        yield f"memory: at most {device / 2**30:.3g} GB on the device, {host / 2**30:.3g} GB of the process on the host"


_Item = TypeVar("_Item")


def _sums(items: Iterable[_Item], key: Callable[[_Item], _Key], value: Callable[[_Item], float]) -> dict[_Key, float]:
    """Return sums by key, the largest first."""
    sums: dict[_Key, float] = defaultdict(float)
    for item in items:
        sums[key(item)] += value(item)
    return dict(sorted(sums.items(), key=lambda pair: -pair[1]))


def _where(phase: str, unit: str) -> str:
    if phase == "step":
        return "the step"
    return f"{phase} of {unit or 'the root'}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
