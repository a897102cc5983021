"""AdamW on weights that are kept in two halves, as one Triton kernel.

In torch's own kernels a step is four passes: gradients cast and scaled, weights joined, stepped, split. Here each number
is read and written once: 26 bytes a parameter with a bf16 gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from albireo.device.triton_kernels import triton_runs_on
from albireo.optim.adam_values import AdamValues, adam_state, is_adam

__all__ = ["SplitAdam", "SplitStep", "programs_of"]

_Integers = NDArray[np.integer[Any]]

# Elements: of a program, and of what it has in registers at a time.
_CHUNK, _BLOCK, _WARPS = 16384, 1024, 4
# Bytes: what a thread loads and stores at once.
_ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class SplitStep:
    """A parameter to be stepped. All tensors are 1-D, contiguous, of one length, and on one device.

    Attributes:
        parameter: under which the optimizer has its states.
        weight: bf16; half of what is stepped.
        rest: int16; the other half.
        gradient: bf16 or fp32; only read.
    """

    parameter: torch.nn.Parameter
    weight: torch.Tensor
    rest: torch.Tensor
    gradient: torch.Tensor


class SplitAdam:
    """Steps the parameters of a torch Adam or AdamW whose weights are kept in two halves on an NVIDIA GPU.

    A step is that of `torch.optim.AdamW(fused=True)` on the weights joined, split again: within a unit in the last
    place. States are in `optimizer.state` as torch makes them. Nothing waits for the device.

    Args:
        optimizer: one of which `can_step` is true.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._states = optimizer.state
        self._programs: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    @staticmethod
    def can_step(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
        """Return True if the kernel does what an optimizer would do by itself.

        Args:
            optimizer: any torch optimizer.
            device: where its parameters are.
        """
        if not is_adam(optimizer) or not triton_runs_on(device):
            return False
        return all(
            group.get("fused") is True
            # Whether a decay in the gradient is rounded before it is added was the compiler's choice, and it chose
            # otherwise for some elements of torch's kernel than for others. Where decay and gradient cancel, moments
            # differ by any number of units, and what is nearly zero steps as far as anything.
            and (bool(group.get("decoupled_weight_decay")) or not group["weight_decay"])
            # A rate on the device would be waited for.
            and not isinstance(group["lr"], torch.Tensor)
            and not any(group.get(variant) for variant in ("amsgrad", "differentiable", "capturable"))
            for group in optimizer.param_groups
        )

    def step(self, group: Mapping[str, Any], steps: Sequence[SplitStep], factor: torch.Tensor | None) -> None:
        """Step parameters of a group.

        Args:
            group: the optimizer's; its values are copied.
            steps: one for each parameter; gradients of one dtype.
            factor: what gradients are multiplied by in fp32, a scalar on the device; None: by nothing.
        """
        if not steps:
            return
        from albireo.optim.adam_triton import split_adam_kernel, triton_type

        values = AdamValues.of(group)
        states = [adam_state(self._states, step.parameter) for step in steps]
        corrections = _corrections([state["step"] for state in states], values)
        # Kept until the kernel is launched: some may be copies.
        tensors = [
            (step.weight, step.rest, _aligned(step.gradient), state["exp_avg"], state["exp_avg_sq"])
            for step, state in zip(steps, states, strict=True)
        ]
        device = steps[0].weight.device
        table = _on_device(_addresses(tensors), device)
        numels = tuple(step.weight.numel() for step in steps)
        if numels not in self._programs:
            of_programs, of_tensors = programs_of(numels)
            self._programs[numels] = _on_device(of_programs, device), _on_device(of_tensors, device)
        tensor_of_program, first_program = self._programs[numels]
        with torch.cuda.device(device):
            split_adam_kernel[tensor_of_program.shape](
                table,
                tensor_of_program,
                first_program,
                corrections,
                factor,
                len(steps),
                values.lr,
                values.weight_decay,
                values.beta1,
                values.beta2,
                values.eps,
                GRADIENT=triton_type(steps[0].gradient.dtype),
                DECOUPLED=values.decoupled,
                MAXIMIZE=values.maximize,
                CHUNK=_CHUNK,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor where the kernel can read it: a gradient may be a view of anything."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _corrections(counts: Sequence[torch.Tensor], values: AdamValues) -> torch.Tensor:
    """Count a step, and return by how much each moment falls short of a mean: [2, tensors].

    By torch's own kernel: the last bit of a power decides the fifth digit of 1 - 0.999, and a Triton kernel's powers have
    other last bits.
    """
    torch._foreach_add_(list(counts), 1.0)
    count = torch.stack(list(counts))
    return 1.0 - torch.stack([torch.pow(beta, count) for beta in (values.beta1, values.beta2)])


def _addresses(tensors: Sequence[Sequence[torch.Tensor]]) -> _Integers:
    """Return a row for each parameter: where its tensors are, and how many elements it has."""
    rows = [[*(tensor.data_ptr() for tensor in of_one), of_one[0].numel()] for of_one in tensors]
    return np.array(rows, dtype=np.int64)


def programs_of(numels: Sequence[int]) -> tuple[_Integers, _Integers]:
    """Deal tensors to programs of the kernel, a chunk each.

    Args:
        numels: how many elements each tensor has.

    Returns:
        For each program the number of its tensor, and for each tensor its first program.
    """
    chunks = [math.ceil(numel / _CHUNK) for numel in numels]
    first = np.array([0, *itertools.accumulate(chunks)][:-1], dtype=np.int32)
    return np.repeat(np.arange(len(chunks), dtype=np.int32), chunks), first


def _on_device(array: _Integers, device: torch.device) -> torch.Tensor:
    """Copy numbers to the device without waiting for it."""
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)
