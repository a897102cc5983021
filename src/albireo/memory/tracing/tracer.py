"""The tracer: waits for a step in which nothing is decided any more, has it recorded, and hands its timeline over."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from albireo.device import PeakMemory, describe_device
from albireo.device.clock import Moment
from albireo.device.pool import DevicePool
from albireo.memory.chunk import Chunk
from albireo.memory.conductor import Conductor
from albireo.memory.tensors import StatefulTensorManager
from albireo.memory.tracing.recorder import HostStep, Recorder, SeenWork
from albireo.memory.tracing.timeline import ChunkFacts, MemoryReading, Stay, Timeline, UnitSpan, Wait, Work

__all__ = ["STEPS_TO_TRACE", "Tracer", "TracingSetting"]

# Settled steps in a row: one that finds its pace, one that is recorded for what of it lasts into the next, and that one.
_SETTLED = 3
# With the warm-up before them.
STEPS_TO_TRACE = 1 + _SETTLED


@dataclass(frozen=True)
class TracingSetting:
    """What a trace needs besides the mechanism.

    Attributes:
        peaks: reads both memories.
        on_timeline: takes the timeline.
    """

    peaks: PeakMemory
    on_timeline: Callable[[Timeline], None]


class Tracer:
    """Traces one step, the third in a row in which chunks stay where they are; before and after, nobody looks.

    Nothing waits for the device before the step is over; then the host waits once, for the step's end.

    Args:
        setting: who reads memory, and who takes the timeline.
        pool: the device's memory.
        manager: moves chunks.
        conductor: hears what units do.
        units_of: the names of each chunk's units.
    """

    def __init__(
        self,
        setting: TracingSetting,
        pool: DevicePool,
        manager: StatefulTensorManager,
        conductor: Conductor,
        units_of: Sequence[Sequence[str]],
    ) -> None:
        self._setting = setting
        self._pool = pool
        self._manager = manager
        self._conductor = conductor
        self._units_of = [tuple(names) for names in units_of]
        self._recorder: Recorder | None = None
        self._begin: Moment | None = None
        self._here: frozenset[int] = frozenset()
        self._steps = self._settled = 0
        self._is_done = False

    def step_begins(self, *, settled: bool) -> None:
        """A training step's first forward is about to begin.

        Args:
            settled: nothing is decided in this step.
        """
        if self._is_done:
            return
        if not settled or self._begin is not None:
            # Also where the step that was traced has failed.
            self._forget()
            self._settled = 0
        if not settled:
            return
        self._settled += 1
        if self._settled == _SETTLED - 1:
            self._attach()
        elif self._settled == _SETTLED and self._recorder is not None:
            self._begin = Moment(self._pool.device)

    def step_ends(self) -> None:
        """A step has been launched."""
        self._steps += 1
        if self._recorder is None or self._begin is None:
            return
        self._is_done = True
        recorder, begin, end = self._recorder, self._begin, Moment(self._pool.device)
        recorder.sample(end)
        self._forget()
        end.wait()
        self._setting.on_timeline(self._timeline(recorder, _Clock(begin, end, time.perf_counter())))

    def _attach(self) -> None:
        self._here = frozenset(chunk.number for chunk in self._manager.chunks if chunk.is_here)
        self._recorder = Recorder(self._pool.device, self._memory)
        self._listen(self._recorder)

    def _forget(self) -> None:
        self._recorder = self._begin = None
        self._listen(None)

    def _listen(self, recorder: Recorder | None) -> None:
        lanes = {"to device": self._pool.to_device, "to host": self._pool.to_host, "gather": self._pool.gather}
        for name, lane in lanes.items():
            lane.watch = None if recorder is None else recorder.lane(name)
        self._manager.watch = self._conductor.watch = recorder
        if self._manager.host_steps is not None:
            self._manager.host_steps.watch = recorder
        streamed = self._manager.streamed_steps
        if streamed is not None:
            streamed.watch = recorder
            for name, lane in zip(("stream in", "stream step", "stream out"), streamed.lanes, strict=True):
                lane.watch = None if recorder is None else recorder.lane(name)

    def _memory(self) -> tuple[int, int, int]:
        if self._pool.is_simulated:
            taken = self._pool.owned_bytes
            return taken, taken, self._setting.peaks.read().host_bytes
        peak = self._setting.peaks.interval_peak_bytes()
        reading = self._setting.peaks.read()
        return reading.device_bytes, peak, reading.host_bytes

    def _timeline(self, recorder: Recorder, clock: _Clock) -> Timeline:
        uses = [(use.unit, use.phase, clock.of(use.begin)) for use in recorder.uses]
        ends = [*(begin for _, _, begin in uses[1:]), clock.seconds]
        spans = [
            UnitSpan(unit, phase, max(begin, 0.0), end)
            for (unit, phase, begin), end in zip(uses, ends, strict=True)
            if end > 0
        ]
        works = [_work(seen, clock) for seen in recorder.works]
        works += [_host_work(seen, clock) for seen in recorder.host_steps]
        waits = [
            Wait(
                wait.label.kind, _number(wait.label.owner), wait.unit, wait.phase, clock.of(wait.begin),
                clock.seconds if wait.end is None else clock.of(wait.end),
            )
            for wait in recorder.waits
        ]  # fmt: skip
        samples = [
            MemoryReading(clock.of(one.moment), one.device_bytes, one.device_peak_bytes, one.host_bytes)
            for one in recorder.samples
        ]
        return Timeline(
            step=self._steps,
            seconds=clock.seconds,
            device=describe_device(self._pool.device),
            is_simulated=self._pool.is_simulated,
            chunks=tuple(_facts(chunk, self._units_of[chunk.number]) for chunk in self._manager.chunks),
            spans=tuple(spans),
            works=tuple(w for w in works if w.begin_seconds < clock.seconds and (w.end_seconds or clock.seconds) > 0),
            waits=tuple(wait for wait in waits if wait.begin_seconds >= 0),
            stays=tuple(self._stays(recorder, clock)),
            memory=tuple(sample for sample in samples if sample.seconds >= 0),
        )

    def _stays(self, recorder: Recorder, clock: _Clock) -> list[Stay]:
        """Return when chunks had memory within the step."""
        since = dict.fromkeys(self._here, 0.0)
        stays = []
        for move in recorder.moves:
            moment = max(clock.of(move.moment), 0.0)
            if move.here:
                since.setdefault(move.number, moment)
            elif move.number in since:
                begin = since.pop(move.number)
                if moment > begin:
                    stays.append(Stay(move.number, begin, moment))
        stays += [Stay(number, begin, clock.seconds) for number, begin in since.items() if begin < clock.seconds]
        return sorted(stays, key=lambda stay: (stay.chunk, stay.begin_seconds))


class _Clock:
    """The step's own: seconds since it began, for moments of the device and of the host.

    Args:
        begin: of the step.
        end: likewise; it has come.
        host_end: what the host's clock showed when it had.
    """

    def __init__(self, begin: Moment, end: Moment, host_end: float) -> None:
        self._begin = begin
        self._host_end = host_end
        self.seconds = end.seconds_since(begin)

    def of(self, moment: Moment) -> float:
        moment.wait()
        return moment.seconds_since(self._begin)

    def of_host(self, seconds: float) -> float:
        return seconds - self._host_end + self.seconds


def _work(seen: SeenWork, clock: _Clock) -> Work:
    kind, owner, size = seen.label
    end = None if seen.end is None else clock.of(seen.end)
    return Work(seen.lane, kind, _number(owner), size, clock.of(seen.begin), _within(end, clock))


def _host_work(seen: HostStep, clock: _Clock) -> Work:
    end = None if seen.end is None else clock.of_host(seen.end)
    return Work("host step", "host step", seen.number, seen.size_bytes, clock.of_host(seen.begin), _within(end, clock))


def _within(end: float | None, clock: _Clock) -> float | None:
    return None if end is None or end > clock.seconds else end


def _number(owner: object) -> int | None:
    return owner.number if isinstance(owner, Chunk) else None


def _facts(chunk: Chunk, units: tuple[str, ...]) -> ChunkFacts:
    states = ("streamed" if chunk.streams else chunk.states_place) if chunk.trained else None
    return ChunkFacts(chunk.number, units, chunk.weight_bytes, chunk.resident, states)
