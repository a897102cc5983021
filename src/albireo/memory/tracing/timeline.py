"""A step's timeline as plain data, to JSON and back. Pure."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from albireo.errors import RunFolderError

__all__ = ["ChunkFacts", "MemoryReading", "Stay", "Timeline", "UnitSpan", "Wait", "Work"]

_T = TypeVar("_T")

_VERSION = 1


@dataclass(frozen=True)
class ChunkFacts:
    """What a timeline says of a chunk besides times.

    Attributes:
        number: which.
        units: the names of the units whose parameters it has; the root's is empty.
        weight_bytes: what its storage takes.
        resident: its weights never leave the device.
        states: where they are: "device", "host", or "streamed" from the host to the device and back; None: nothing steps it.
    """

    number: int
    units: tuple[str, ...]
    weight_bytes: int
    resident: bool
    states: str | None


@dataclass(frozen=True)
class UnitSpan:
    """The computing belongs to a unit, on the device's clock.

    Attributes:
        unit: its name; the root's is empty.
        phase: "forward", "backward" or "step".
        begin_seconds: since the step began.
        end_seconds: likewise.
    """

    unit: str
    phase: Literal["forward", "backward", "step"]
    begin_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Work:
    """Something that runs beside the computing.

    Attributes:
        lane: where: "to device", "to host", "gather", "host step", or "stream in", "stream step" and "stream out".
        kind: what: "weights in", "weights home", "gradient out", "host step", "states in", "streamed step" or "states out".
        chunk: whose; None: nobody's in particular.
        size_bytes: what it moves.
        begin_seconds: since the step began; less than 0 for what began in the step before.
        end_seconds: likewise; None: it had not ended when the step did.
    """

    lane: str
    kind: str
    chunk: int | None
    size_bytes: int
    begin_seconds: float
    end_seconds: float | None


@dataclass(frozen=True)
class Wait:
    """The computing stood still, or the host that feeds it did with the device idle.

    Attributes:
        kind: what for; as of `Work`, or "norm of gradients".
        chunk: whose; None: nobody's in particular.
        unit: who waited.
        phase: of the unit.
        begin_seconds: since the step began.
        end_seconds: likewise.
    """

    kind: str
    chunk: int | None
    unit: str
    phase: str
    begin_seconds: float
    end_seconds: float

    @property
    def seconds(self) -> float:
        """How long."""
        return self.end_seconds - self.begin_seconds


@dataclass(frozen=True)
class Stay:
    """A chunk's storage has memory on the device, filled or not.

    Attributes:
        chunk: which.
        begin_seconds: since the step began.
        end_seconds: likewise.
    """

    chunk: int
    begin_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class MemoryReading:
    """Both memories at one moment, in bytes.

    Attributes:
        seconds: since the step began.
        device_bytes: allocated on the device; on a simulated one, what chunks take.
        device_peak_bytes: the most since the reading before; on a simulated one as `device_bytes`.
        host_bytes: the process's resident memory.
    """

    seconds: float
    device_bytes: int
    device_peak_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class Timeline:
    """One optimizer step, from its first forward to the launch of its last update. Times are seconds.

    Attributes:
        step: which optimizer step of the process, from 1.
        seconds: how long it took.
        device: the device's name.
        is_simulated: the device is a CPU that plays one, whose copies run when somebody waits for them.
        chunks: by number.
        spans: the computing, in order, without gaps.
        works: what ran beside it.
        waits: when it stood still.
        stays: when chunks had memory.
        memory: readings, in order.
    """

    step: int
    seconds: float
    device: str
    is_simulated: bool
    chunks: tuple[ChunkFacts, ...]
    spans: tuple[UnitSpan, ...]
    works: tuple[Work, ...]
    waits: tuple[Wait, ...]
    stays: tuple[Stay, ...]
    memory: tuple[MemoryReading, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"version": _VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def of_mapping(content: Mapping[str, Any], where: str) -> Timeline:
        """Return a timeline from what `to_mapping` made.

        Args:
            content: JSON values.
            where: where they come from, for an error.

        Raises:
            RunFolderError: it is none.
        """
        if content.get("version") != _VERSION:
            raise RunFolderError(f"{where} is no trace of this version: write it again, with --trace")
        timeline = _build(Timeline, {key: value for key, value in content.items() if key != "version"}, where)
        numbers = {work.chunk for work in timeline.works} | {wait.chunk for wait in timeline.waits}
        numbers = (numbers | {stay.chunk for stay in timeline.stays}) - {None}
        known = list(range(len(timeline.chunks)))
        if [chunk.number for chunk in timeline.chunks] != known or not numbers.issubset(known):
            raise RunFolderError(f"{where} is damaged: it speaks of chunks that it does not have")
        return timeline


def _build(kind: type[_T], content: object, where: str) -> _T:
    """Return a dataclass from a mapping, each of whose values has the type that is written there."""
    hints = get_type_hints(kind)
    if not isinstance(content, dict) or set(content) != set(hints):
        raise RunFolderError(f"{where} is damaged: a {kind.__name__} has {', '.join(hints)}")
    return kind(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in content.items()})


def _value(hint: Any, value: object, where: str) -> Any:
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise RunFolderError(f"{where} must be a list")
        return tuple(_value(get_args(hint)[0], part, where) for part in value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, where)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise RunFolderError(f"{where} is one of {', '.join(get_args(hint))}, not {value!r}")
        return value
    allowed = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    # A bool is an int to Python, and none here.
    if not any(type(value) is one for one in allowed) or (isinstance(value, float) and not math.isfinite(value)):
        raise RunFolderError(f"{where} cannot be {value!r}")
    return value
