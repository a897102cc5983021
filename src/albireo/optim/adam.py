"""Adam and AdamW as this project uses them: torch's fused kernel, on the device and on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from albireo.errors import ConfigError

__all__ = ["HybridAdam", "adamw"]


class HybridAdam(torch.optim.Adam):
    """Adam (Kingma and Ba, 2015) or AdamW (Loshchilov and Hutter, 2019) with torch's fused kernel.

    Steps are equal to the bit to those of `torch.optim.AdamW(fused=True)`, or of `Adam(fused=True)` without
    `adamw_mode`; nothing is compiled, on a GPU or on a CPU. Name and arguments are those of Colossal-AI.

    Args:
        model_params: parameters, or groups of them, of floating point.
        lr: the learning rate.
        bias_correction: True; another value is refused.
        betas: decay rates of the two moments.
        eps: what is added to the denominator.
        weight_decay: the decay of weights.
        adamw_mode: weights decay by themselves (AdamW); else the decay is added to the gradient, as an L2 penalty is.
        nvme_offload_fraction: 0; another value is refused.
        nvme_offload_dir: None; another value is refused.

    Raises:
        ConfigError: something is asked for that is not there; the message says what is.
    """

    def __init__(  # noqa: PLR0913  the arguments are those that scripts pass
        self,
        model_params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adamw_mode: bool = True,
        nvme_offload_fraction: float = 0.0,
        nvme_offload_dir: str | None = None,
    ) -> None:
        if not bias_correction:
            raise ConfigError(
                "HybridAdam always corrects the bias of its moments: leave bias_correction=True, with a warm-up if the "
                "first steps are too large, or give boost another torch optimizer"
            )
        if nvme_offload_fraction or nvme_offload_dir is not None:
            raise ConfigError(
                "HybridAdam keeps its states in memory, not on a disk: leave nvme_offload_fraction and "
                "nvme_offload_dir out, or take torch.optim.Adafactor, whose states are small"
            )
        super().__init__(
            model_params, lr, betas, eps, weight_decay, fused=True, decoupled_weight_decay=bool(adamw_mode)
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # As torch's AdamW does: a state that says nothing of the mode, or that Adam saved, does not change it.
        for group in self.param_groups:
            group["decoupled_weight_decay"] = self.defaults["decoupled_weight_decay"]


def adamw(groups: list[dict[str, Any]], learning_rate: float) -> HybridAdam:
    """Return AdamW over groups.

    Args:
        groups: parameter groups, each with its weight decay.
        learning_rate: the peak learning rate.
    """
    return HybridAdam(groups, lr=learning_rate)
