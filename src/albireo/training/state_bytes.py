"""What each plugin takes for a parameter: the bytes of weights, gradients and AdamW's states, on one rank. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from albireo.config import RunConfig

__all__ = ["Memory", "MemoryNeeds", "StateBytes", "needs_of"]

Memory = Literal["device", "host", "one"]
"""A device's memory, a host's beside it, or one that is both, as on a CPU."""

_FP32, _MOMENTS = 4, 8

# Every model is built whole and in fp32 on its device, and sharded or cast there.
_BUILDING = _FP32


@dataclass(frozen=True)
class StateBytes:
    """Bytes for each parameter of the model.

    Attributes:
        weights: all copies of them.
        gradients: at the end of backward, where they are most.
        states: the optimizer's.
    """

    weights: float = 0.0
    gradients: float = 0.0
    states: float = 0.0

    @property
    def total(self) -> float:
        """All three."""
        return self.total_of(1.0)

    def total_of(self, trained: float) -> float:
        """Return all three where not all parameters have a gradient and states.

        Args:
            trained: the share of the parameters that are trained.
        """
        return self.weights + trained * (self.gradients + self.states)


@dataclass(frozen=True)
class MemoryNeeds:
    """What one rank takes, and where.

    Not counted: buckets, gathered blocks, scratch and the device's own context, which do not grow with the model, and
    activations.

    Attributes:
        device: on the device that computes.
        host: in host memory, because it was offloaded.
        building: what the device has to hold while the model is built.
    """

    device: StateBytes
    host: StateBytes = StateBytes()
    building: float = _BUILDING

    def bytes_per_parameter(self, memory: Memory, trained: float = 1.0) -> float:
        """Return what a memory has to have at least.

        Args:
            memory: which.
            trained: the share of the parameters that are trained.
        """
        on_host = self.host.total_of(trained)
        if memory == "host":
            return on_host
        return max(self.building, self.device.total_of(trained) + (on_host if memory == "one" else 0.0))

    def gradients(self, memory: Memory) -> float:
        """Return what gradients take in a memory at the end of backward.

        Args:
            memory: which.
        """
        parts = {"device": [self.device], "host": [self.host], "one": [self.device, self.host]}
        return sum(part.gradients for part in parts[memory])


def needs_of(config: RunConfig) -> MemoryNeeds:
    """Return what each of a run's ranks takes for a parameter.

    Args:
        config: a resolved configuration.
    """
    plugin, ranks = config.plugin, config.plugin.gpus
    if config.adapter.bits is not None:
        # Scales beside the codes, and what is not quantised, come on top: the model is built layer by layer.
        return MemoryNeeds(StateBytes(config.adapter.bits / 8, _FP32, _MOMENTS), building=0.0)
    if plugin.plugin == "low_level_zero":
        return _low_level_zero(config)
    if plugin.plugin == "torch_fsdp":
        share = StateBytes(_FP32 / ranks, _FP32 / ranks, _MOMENTS / ranks)
        return MemoryNeeds(StateBytes(), share) if plugin.cpu_offload else MemoryNeeds(share)
    if plugin.plugin == "gemini":
        # What goes where is decided when the memories are known, and refused there if it cannot be; the model is built in
        # its places.
        return MemoryNeeds(StateBytes(), StateBytes(), building=0.0)
    # fp32 whatever computes: torch_ddp autocasts.
    return MemoryNeeds(StateBytes(_FP32, _FP32, _MOMENTS))


def _low_level_zero(config: RunConfig) -> MemoryNeeds:
    ranks, offloads = config.plugin.gpus, config.plugin.cpu_offload
    compute = _FP32 if config.plugin.precision == "fp32" else 2
    # In fp32, what computes is the master too, and in bf16 half of it, unless that is on the host.
    shared = 0 if offloads else {"fp32": _FP32, "bf16": 2}.get(config.plugin.precision or "", 0)
    master = (_FP32 - shared) / ranks
    on_device, on_host = _zero_gradients(config, compute)
    if not offloads:
        return MemoryNeeds(StateBytes(compute + master, on_device, _MOMENTS / ranks))
    # New weights travel from a buffer in the dtype that computes.
    host = StateBytes(master + compute / ranks, on_host, _MOMENTS / ranks)
    return MemoryNeeds(StateBytes(compute, on_device), host)


def _zero_gradients(config: RunConfig, compute: int) -> tuple[float, float]:
    """Return gradients' bytes on the device, and in the buffers on the host that offloading has."""
    ranks, accumulate = config.plugin.gpus, config.optimizer.accumulate
    if ranks == 1:
        # The first micro-batch's are kept as autograd left them; with the second they are added up in fp32.
        whole = compute if accumulate == 1 else _FP32
        if not config.plugin.cpu_offload:
            return whole, 0.0
        # They leave with the last micro-batch: on the device is what those before it have left.
        earlier = {1: 0.0, 2: float(compute)}.get(accumulate, float(_FP32))
        return earlier, whole
    # Stage 1 adds whole gradients up until the last micro-batch. Else each rank has its part of the means.
    adds_whole = config.plugin.zero_stage == 1 and accumulate > 1
    return _FP32 if adds_whole else _FP32 / ranks, _FP32 / ranks
