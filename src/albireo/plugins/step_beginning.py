"""What a step begins with, to begin it again."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn

__all__ = ["StepBeginning"]


class StepBeginning:
    """The random state and the buffers of a model before a step's first forward. It is taken in every step, so it costs little.

    Args:
        model: the user's.
        device: what computes.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  what libraries draw from
        self._torch = torch.get_rng_state()
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._buffers = [(buffer, buffer._version) for buffer in model.buffers()]  # noqa: SLF001  no other name

    @property
    def is_unchanged(self) -> bool:
        """True if nothing but random numbers has moved on: a forward that writes to a buffer cannot be made again."""
        return all(buffer._version == version for buffer, version in self._buffers)  # noqa: SLF001

    def restore(self) -> None:
        """Go back to the random numbers of the step's beginning."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        if self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)
