"""What passes. Each number is argued for in docs/verify.md, with what right code and what faults score."""

from __future__ import annotations

from dataclasses import dataclass

from albireo.errors import ConfigError

__all__ = ["Thresholds"]

_GRADIENT = {"fp32": 1e-5, "fp16": 5e-5, "bf16": 2e-4}


@dataclass(frozen=True)
class Thresholds:
    """The largest errors that pass.

    Attributes:
        gradient: of a reduced gradient (|difference| / max(|g|, rms of all gradients x sqrt(n))), and of the loss.
        norm: relative, of the norm that the system reported.
        clip: relative, of an element of the clipped gradient.
        step_ulps: units in the last place between an element of the system's step and of the replayed one, of a
            weight those of the numbers that were subtracted (`replay.subtraction_scale`); 0 is equality to the bit.
    """

    gradient: float
    norm: float = 1e-5
    clip: float = 1e-5
    step_ulps: int = 0

    @staticmethod
    def of(precision: str, *, step_ulps: int = 0) -> Thresholds:
        """Return those of a precision.

        Args:
            precision: "fp32", "fp16" or "bf16".
            step_ulps: what the plugin needs.

        Raises:
            ConfigError: there is no such precision.
        """
        if precision not in _GRADIENT:
            raise ConfigError(f"precision is one of {', '.join(_GRADIENT)}, not {precision!r}")
        return Thresholds(_GRADIENT[precision], step_ulps=step_ulps)
