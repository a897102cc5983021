"""The dynamic loss scale of fp16, kept on the device so that the host never waits for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from albireo.errors import ConfigError

__all__ = ["LossScale", "LossScalePolicy"]


@dataclass(frozen=True)
class LossScalePolicy:
    """How a loss scale moves (Micikevicius et al., 2018). Names and meanings are those of Colossal-AI.

    Attributes:
        initial_scale: the first scale.
        min_scale: it never falls below this.
        max_scale: it never grows beyond this.
        growth_factor: what it is multiplied by after enough steps without overflow.
        backoff_factor: what it is multiplied by after an overflow.
        growth_interval: how many steps without overflow are enough.
        hysteresis: how many overflows since it last grew it takes until each makes it fall.

    Raises:
        ConfigError: numbers that make no sense.
    """

    initial_scale: float = 2.0**16
    min_scale: float = 1.0
    max_scale: float = 2.0**32
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 1000
    hysteresis: int = 1

    def __post_init__(self) -> None:
        """Refuse what could not work."""
        if not 0 < self.min_scale <= self.initial_scale <= self.max_scale:
            raise ConfigError(
                f"a loss scale begins between its bounds: initial_scale {self.initial_scale:g} does not lie in "
                f"min_scale {self.min_scale:g} to max_scale {self.max_scale:g}"
            )
        if not self.growth_factor >= 1.0 >= self.backoff_factor > 0:
            raise ConfigError(
                f"a loss scale grows and falls: growth_factor is at least 1 and backoff_factor above 0 and at most 1, not "
                f"{self.growth_factor:g} and {self.backoff_factor:g}"
            )
        if self.growth_interval < 1 or self.hysteresis < 1:
            raise ConfigError(
                f"growth_interval and hysteresis are at least 1, not {self.growth_interval} and {self.hysteresis}"
            )


class LossScale:
    """A loss scale and its counts. Nothing here waits for the device except `state` and `load`.

    Args:
        policy: how it moves.
        device: where it is kept.

    Attributes:
        value: the scale, an fp32 scalar; a new tensor after each update.
    """

    def __init__(self, policy: LossScalePolicy, device: torch.device) -> None:
        self._policy = policy
        self.value = torch.tensor(policy.initial_scale, dtype=torch.float32, device=device)
        self._good_steps = torch.zeros((), dtype=torch.float32, device=device)
        self._overflows = torch.zeros((), dtype=torch.float32, device=device)

    def update(self, overflow: torch.Tensor) -> None:
        """Move the scale after a step.

        Args:
            overflow: 1 if a gradient was not finite, else 0; an fp32 scalar on the device.
        """
        policy = self._policy
        overflowed = overflow > 0
        overflows = self._overflows + overflow
        falls = overflowed & (overflows >= policy.hysteresis)
        good_steps = torch.where(overflowed, 0.0, self._good_steps + 1)
        grows = good_steps >= policy.growth_interval
        lower = torch.clamp(self.value * policy.backoff_factor, min=policy.min_scale)
        higher = torch.clamp(self.value * policy.growth_factor, max=policy.max_scale)
        self.value = torch.where(falls, lower, torch.where(grows, higher, self.value))
        self._good_steps = torch.where(grows, 0.0, good_steps)
        self._overflows = torch.where(grows, 0.0, overflows)

    def state(self) -> dict[str, float]:
        """Return the scale and its counts; waits for the device."""
        return {
            "scale": float(self.value),
            "_growth_tracker": float(self._good_steps),
            "_overflow_tracker": float(self._overflows),
        }

    def load(self, state: dict[str, float]) -> None:
        """Put back what `state` returned; of a torch `GradScaler`'s state what the two have in common."""
        self.value = torch.full_like(self.value, state.get("scale", self._policy.initial_scale))
        self._good_steps = torch.full_like(self._good_steps, state.get("_growth_tracker", 0.0))
        self._overflows = torch.full_like(self._overflows, state.get("_overflow_tracker", 0.0))
