"""How fast the host stepper steps on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from albireo.device.probe_rates import best_seconds
from albireo.optim.adam import HybridAdam
from albireo.optim.host_stepper import HostStepper

__all__ = ["HostAdamRate", "measure_host_adam"]

_PARAMETERS = 32 * 2**20
# Weights and two moments in fp32, a gradient and an output in bf16.
_BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class HostAdamRate:
    """AdamW on the host as an offloaded optimizer steps: bf16 gradients cast in, new bf16 weights cast out.

    Attributes:
        parameters: how many a step updates.
        step_seconds: the best step.
        parameters_per_second: the one by the other.
        threads: how many computed.
        kernel: what computed: "compiled" or "torch".
    """

    parameters: int
    step_seconds: float
    parameters_per_second: float
    threads: int
    kernel: str


def measure_host_adam(
    *, seconds: float, parameters: int = _PARAMETERS, available_bytes: int | None = None
) -> HostAdamRate:
    """Step an optimizer for a while.

    Args:
        seconds: about how long.
        parameters: how many a step updates.
        available_bytes: what may be used; fewer are updated where that is little.
    """
    while (
        available_bytes is not None and parameters > 2**20 and 2 * _BYTES_PER_PARAMETER * parameters > available_bytes
    ):
        parameters //= 2
    weight = torch.nn.Parameter(torch.zeros(parameters))
    gradient = torch.full((parameters,), 1e-3, dtype=torch.bfloat16)
    output = torch.zeros_like(gradient)
    with HostStepper(HybridAdam([weight])) as stepper:

        def step() -> None:
            with stepper.open() as ticket:
                ticket.submit(weight, gradient, output=output)
            ticket.wait()

        step_seconds = best_seconds(step, seconds=seconds)
        return HostAdamRate(parameters, step_seconds, parameters / step_seconds, stepper.threads, stepper.kernel_name)
