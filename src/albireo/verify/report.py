"""What a verification came to: plain data that travels as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from albireo.verify.thresholds import Thresholds

__all__ = ["SMALL_LOSS", "Check", "Failure", "ParameterReport", "StepReport", "VerifyReport"]

# A loss below this is compared absolutely: where terms cancel, a relative error says nothing.
SMALL_LOSS = 1e-3

Check = Literal["exports", "gradient", "loss", "norm", "clip", "step", "scale", "weights"]


@dataclass(frozen=True)
class Failure:
    """One thing that is not as it should be.

    Attributes:
        check: which check found it.
        parameter: whose; None if it is of the whole step.
        detail: what was expected and what came.
    """

    check: Check
    parameter: str | None
    detail: str

    def __str__(self) -> str:
        where = "" if self.parameter is None else f" of {self.parameter}"
        return f"{self.check}{where}: {self.detail}"


@dataclass(frozen=True)
class ParameterReport:
    """One parameter in one step.

    Attributes:
        name: its name in the model.
        elements: how many numbers it has.
        relative_error: of its reduced gradient, as the contract has it; None where neither side has a gradient, and
            in a step that was left out for an overflow. Not finite where they cannot be compared.
        clip_error: the largest relative error of an element of its clipped gradient; None as above.
        step_mismatches: elements of weight and states that are not what the replayed step gives.
        step_ulps: the largest distance of such an element, in units in the last place; see `Thresholds.step_ulps`.
    """

    name: str
    elements: int
    relative_error: float | None
    clip_error: float | None
    step_mismatches: int
    step_ulps: int


@dataclass(frozen=True)
class StepReport:
    """One step.

    Attributes:
        step: its number, from 1.
        loss: the system's, over all ranks.
        reference_loss: plain PyTorch's.
        grad_norm: as the system reported it.
        true_norm: the norm of the system's own reduced gradients, in fp64.
        loss_scale: of the step; None without one.
        skipped: the step was left out for an overflow.
        parameters: those that are trained, in the model's order of names.
        failures: what is not as it should be.
    """

    step: int
    loss: float
    reference_loss: float
    grad_norm: float
    true_norm: float
    loss_scale: float | None
    skipped: bool
    parameters: tuple[ParameterReport, ...]
    failures: tuple[Failure, ...]

    @property
    def passed(self) -> bool:
        """True if nothing failed."""
        return not self.failures

    @property
    def worst(self) -> ParameterReport | None:
        """The parameter of the largest error of a gradient; None if no gradient was compared."""
        compared = [parameter for parameter in self.parameters if parameter.relative_error is not None]
        return max(compared, key=_severity, default=None)

    @property
    def max_relative_error(self) -> float:
        """The worst parameter's; 0 if no gradient was compared."""
        worst = self.worst
        return 0.0 if worst is None or worst.relative_error is None else worst.relative_error

    @property
    def max_clip_error(self) -> float | None:
        """The largest relative error of an element of a clipped gradient; None if none was compared."""
        errors = [parameter.clip_error for parameter in self.parameters if parameter.clip_error is not None]
        return max(errors, key=_order, default=None)

    @property
    def loss_error(self) -> float:
        """The relative error of the loss; of one that is very small, the error over 0.001."""
        return abs(self.loss - self.reference_loss) / max(abs(self.reference_loss), SMALL_LOSS)

    @property
    def norm_error(self) -> float | None:
        """The relative error of the reported norm; None in a step that was left out for an overflow."""
        if self.skipped:
            return None
        difference = abs(self.grad_norm - self.true_norm)
        return difference / self.true_norm if self.true_norm > 0 else (0.0 if difference == 0 else math.inf)

    def failed(self, check: Check) -> list[Failure]:
        """Return what a check found."""
        return [failure for failure in self.failures if failure.check == check]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; a number that is not finite becomes null."""
        values = {
            **dataclasses.asdict(self),
            "passed": self.passed,
            "max_relative_error": self.max_relative_error,
            "worst_parameter": None if self.worst is None else self.worst.name,
        }
        finite: dict[str, Any] = _finite(values)
        return finite

    def to_message(self) -> dict[str, Any]:
        """Return what `from_message` makes the same report of; numbers that are not finite are texts."""
        values: dict[str, Any] = _spelled(dataclasses.asdict(self))
        return values

    @staticmethod
    def from_message(values: Mapping[str, Any]) -> StepReport:
        """Return the report that `to_message` was called on."""
        read: dict[str, Any] = _read(values)
        parameters = tuple(ParameterReport(**item) for item in read.pop("parameters"))
        failures = tuple(Failure(**item) for item in read.pop("failures"))
        return StepReport(**read, parameters=parameters, failures=failures)


@dataclass(frozen=True)
class VerifyReport:
    """Several steps of one run.

    Attributes:
        plugin: the plugin's name.
        precision: its precision.
        world_size: how many ranks there were.
        device: where they computed, for people.
        thresholds: what passes.
        steps: the steps.
    """

    plugin: str
    precision: str
    world_size: int
    device: str
    thresholds: Thresholds
    steps: tuple[StepReport, ...]

    @property
    def passed(self) -> bool:
        """True if nothing failed in any step, and gradients were compared in at least one."""
        return self.compared and all(step.passed for step in self.steps)

    @property
    def compared(self) -> bool:
        """True if there was a step that was not left out for an overflow."""
        return any(not step.skipped for step in self.steps)

    @property
    def max_relative_error(self) -> float:
        """The worst of all steps."""
        return max((step.max_relative_error for step in self.steps), key=_order, default=0.0)

    @property
    def first_failure(self) -> tuple[int, Failure] | None:
        """The first step that failed, and what it failed by; None if all passed."""
        return next(((step.step, failure) for step in self.steps for failure in step.failures), None)

    def worst_by_parameter(self) -> list[tuple[int, ParameterReport]]:
        """Return each parameter's worst step and its report there, the worst parameter first."""
        worst: dict[str, tuple[int, ParameterReport]] = {}
        for step in self.steps:
            for parameter in step.parameters:
                known = worst.get(parameter.name)
                if known is None or _severity(parameter) > _severity(known[1]):
                    worst[parameter.name] = (step.step, parameter)
        return sorted(worst.values(), key=lambda item: _severity(item[1]), reverse=True)

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` writes."""
        values = {
            "passed": self.passed,
            "max_relative_error": self.max_relative_error,
            "threshold": self.thresholds.gradient,
            "thresholds": dataclasses.asdict(self.thresholds),
            "plugin": self.plugin,
            "precision": self.precision,
            "world_size": self.world_size,
            "device": self.device,
            "steps": [
                {key: value for key, value in step.to_json().items() if key != "parameters"} for step in self.steps
            ],
            "parameters": [
                {"worst_step": step, **dataclasses.asdict(parameter)} for step, parameter in self.worst_by_parameter()
            ],
        }
        finite: dict[str, Any] = _finite(values)
        return finite

    def to_message(self) -> dict[str, Any]:
        """Return what `from_message` makes the same report of."""
        values: dict[str, Any] = _spelled(dataclasses.asdict(self))
        return values

    @staticmethod
    def from_message(values: Mapping[str, Any]) -> VerifyReport:
        """Return the report that `to_message` was called on."""
        steps = tuple(StepReport.from_message(step) for step in values["steps"])
        return VerifyReport(**{**values, "thresholds": Thresholds(**values["thresholds"]), "steps": steps})


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _severity(parameter: ParameterReport) -> tuple[float, int, float]:
    error = -1.0 if parameter.relative_error is None else _order(parameter.relative_error)
    clip = -1.0 if parameter.clip_error is None else _order(parameter.clip_error)
    return error, parameter.step_mismatches, clip


def _finite(value: Any) -> Any:
    """Replace numbers that JSON cannot hold by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _spelled(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"!": str(value)}
    if isinstance(value, Mapping):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(item) for item in value]
    return value


def _read(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"!"}:
            return _NOT_FINITE[value["!"]]
        return {key: _read(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read(item) for item in value]
    return value
