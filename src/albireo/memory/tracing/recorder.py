"""The recorder: writes down what happens in a step, as moments that are read when it is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from albireo.device.clock import Moment
from albireo.device.watch import LaneWatch, WaitWatch, WorkLabel
from albireo.memory.chunk import Chunk

__all__ = ["HostStep", "MemoryNow", "Move", "Recorder", "Sample", "SeenUse", "SeenWait", "SeenWork"]

Phase = Literal["forward", "backward", "step"]

MemoryNow = Callable[[], tuple[int, int, int]]
"""Returns what is allocated on the device, the most since the last call, and the process's resident memory, in bytes."""


@dataclass(eq=False)
class SeenWork:
    """Something on a lane; `end` is None while it runs."""

    lane: str
    label: WorkLabel
    begin: Moment
    end: Moment | None = None


@dataclass(eq=False)
class SeenWait:
    """A wait in a unit's name; `end` is None while it lasts."""

    label: WorkLabel
    unit: str
    phase: Phase
    begin: Moment
    end: Moment | None = None


@dataclass(frozen=True, eq=False)
class SeenUse:
    """From here on the computing is a unit's."""

    unit: str
    phase: Phase
    begin: Moment


@dataclass(frozen=True, eq=False)
class Move:
    """A chunk's storage has been given memory, or has let it go."""

    number: int
    here: bool
    moment: Moment


@dataclass(frozen=True, eq=False)
class Sample:
    """Both memories, in bytes."""

    moment: Moment
    device_bytes: int
    device_peak_bytes: int
    host_bytes: int


@dataclass(eq=False)
class HostStep:
    """A chunk is stepped on the host, by the host's clock; `end` is None while it is."""

    number: int
    size_bytes: int
    begin: float
    end: float | None = None


class Recorder(WaitWatch):
    """Is told by all who move or use chunks. It never waits for the device; lists only grow, so any thread may call.

    Args:
        device: whose clock.
        memory: reads both memories.

    Attributes:
        uses: in the order of execution.
        works: by lane in the order of execution.
        waits: in the order of execution.
        moves: in the order in which they were launched.
        samples: likewise.
        host_steps: in the order of execution.
    """

    def __init__(self, device: torch.device, memory: MemoryNow) -> None:
        self._device = device
        self._memory = memory
        # What a thread is within: a wait within a wait, or within something on a lane, is not the computing's.
        self._within = threading.local()
        self._unit = ""
        self._phase: Phase = "step"
        self._stepping: dict[int, HostStep] = {}
        self.uses: list[SeenUse] = []
        self.works: list[SeenWork] = []
        self.waits: list[SeenWait] = []
        self.moves: list[Move] = []
        self.samples: list[Sample] = []
        self.host_steps: list[HostStep] = []

    def lane(self, name: str) -> LaneWatch:
        """Return what hears of a lane.

        Args:
            name: the lane's.
        """
        return _OneLane(self, name)

    def enters(self, unit: str, phase: Phase) -> None:
        """The computing belongs to a unit from here on.

        Args:
            unit: its name; the root's is empty.
            phase: of the step.
        """
        self._unit, self._phase = unit, phase
        moment = Moment(self._device)
        self.uses.append(SeenUse(unit, phase, moment))
        self.sample(moment)

    def chunk_moves(self, chunk: Chunk, *, here: bool) -> None:
        """A chunk's storage has been given memory, or has let it go.

        Args:
            chunk: which.
            here: it has memory now.
        """
        moment = Moment(self._device)
        self.moves.append(Move(chunk.number, here, moment))
        self.sample(moment)

    def host_begins(self, chunk: Chunk) -> None:
        """The host stepper has a chunk's next gradient, and begins; called by its thread.

        Args:
            chunk: which.
        """
        if chunk.number not in self._stepping:
            step = HostStep(chunk.number, chunk.shard_bytes, time.perf_counter())
            self._stepping[chunk.number] = step
            self.host_steps.append(step)

    def host_ends(self, chunk: Chunk) -> None:
        """The host stepper has done a chunk; called by its thread.

        Args:
            chunk: which.
        """
        step = self._stepping.pop(chunk.number, None)
        if step is not None:
            step.end = time.perf_counter()

    @contextmanager
    def waiting(self, label: WorkLabel) -> Iterator[None]:
        """See the base class: what lies between the two moments the device stood still."""
        if getattr(self._within, "anything", False):
            yield
            return
        wait = SeenWait(label, self._unit, self._phase, Moment(self._device))
        self.waits.append(wait)
        self._within.anything = True
        try:
            yield
        finally:
            self._within.anything = False
            wait.end = Moment(self._device)

    @contextmanager
    def work(self, lane: str, label: WorkLabel) -> Iterator[None]:
        """Return a context around something that runs on a lane.

        Args:
            lane: its name.
            label: what it is.
        """
        work = SeenWork(lane, label, Moment(self._device))
        self.works.append(work)
        before = getattr(self._within, "anything", False)
        self._within.anything = True
        try:
            yield
        finally:
            self._within.anything = before
            work.end = Moment(self._device)

    def sample(self, moment: Moment) -> None:
        """Read both memories.

        Args:
            moment: when.
        """
        self.samples.append(Sample(moment, *self._memory()))


class _OneLane(LaneWatch):
    """A recorder's ear at one lane."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder = recorder
        self._name = name

    @contextmanager
    def work(self, label: WorkLabel) -> Iterator[None]:
        with self._recorder.work(self._name, label):
            yield

    @contextmanager
    def waiting(self, label: WorkLabel) -> Iterator[None]:
        with self._recorder.waiting(label):
            yield
