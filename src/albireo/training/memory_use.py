"""Who holds a memory at a moment: measured where tensors can be asked, and told apart by their kind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from albireo.config import RunConfig
from albireo.training.state_bytes import needs_of

__all__ = ["MemoryUse", "measure_memory_use"]


@dataclass(frozen=True)
class MemoryUse:
    """Who holds a device's memory, in bytes.

    Attributes:
        weights: parameters and buffers.
        gradients: their gradients.
        states: the optimizer's.
        logits: the piece of logits and its gradient that the loss holds at a time.
        peak: the most that was allocated.
        is_host: the device is the CPU, so that nothing can be offloaded.
    """

    weights: int
    gradients: int
    states: int
    logits: int
    peak: int
    is_host: bool = False

    @property
    def activations(self) -> int:
        """What is left of the peak: activations, and what is in between."""
        return max(0, self.peak - self.weights - self.gradients - self.states - self.logits)


def measure_memory_use(
    model: Iterable[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    *,
    parameters: int,
    device: torch.device,
    logits_bytes: int,
    peak_bytes: int,
) -> MemoryUse:
    """Tell who holds the memory of a device.

    Args:
        model: what holds its weights; of a sharded one, this rank's part counts.
        optimizer: what steps them or, where they are sharded, this rank's parts of them in fp32.
        config: the run.
        parameters: how many numbers are trained.
        device: whose memory.
        logits_bytes: what the loss holds of logits at a time.
        peak_bytes: the most that was allocated.
    """
    stepped = (parameter for group in optimizer.param_groups for parameter in group["params"])
    states = (value for state in optimizer.state.values() for value in state.values())
    # Gradients come and go during a step; what counts is how many there are at its end.
    gradients = needs_of(config).gradients("one" if device.type == "cpu" else "device")
    return MemoryUse(
        weights=_held_bytes((*model, *stepped), device),
        gradients=int(gradients * parameters),
        states=_held_bytes((state for state in states if isinstance(state, torch.Tensor)), device),
        logits=logits_bytes,
        peak=peak_bytes,
        is_host=device.type == "cpu",
    )


def _held_bytes(tensors: Iterable[torch.Tensor], device: torch.device) -> int:
    """Return the memory that tensors have on a device; views of one another, or two that are one, count once."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        # What FSDP has put in a parameter's place.
        to_local = getattr(tensor, "to_local", None)
        with torch.no_grad():
            local = tensor if to_local is None else to_local()
        if local.device.type == device.type:
            storage = local.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
