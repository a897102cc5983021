"""The step of one parameter by torch's own optimizer, and the comparison of bits."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from albireo.optim import HybridAdam

__all__ = ["Mismatch", "Replay", "Stepped", "compare_bits", "subtraction_scale"]

# Elements: a multiple of what any of torch's CPU kernels computes at once.
_ALIGNMENT = 64

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Stepped(NamedTuple):
    """A parameter and its states.

    Attributes:
        weight: whole, in host memory.
        states: by name, such as `exp_avg`; none if the optimizer has none of it.
    """

    weight: torch.Tensor
    states: Mapping[str, torch.Tensor]


class Mismatch(NamedTuple):
    """How two tensors differ.

    Attributes:
        elements: how many of them have other bits.
        ulps: the largest distance, in units in the last place; of a large number what an int64 holds.
    """

    elements: int
    ulps: int


@dataclass(frozen=True)
class Replay:
    """Torch's own optimizer, for one parameter at a time.

    Attributes:
        optimizer_class: the user's. This library's own AdamW is replaced by torch's, with its fused kernel.
        settings: the parameter's group in the step: its rate, decay and the like.
        device: the side that the system steps on.
    """

    optimizer_class: type[torch.optim.Optimizer]
    settings: Mapping[str, Any]
    device: torch.device

    def step(self, before: Stepped, gradient: torch.Tensor, pieces: Iterable[tuple[int, int]] = frozenset()) -> Stepped:
        """Step a parameter.

        Args:
            before: weight and states of before the step.
            gradient: the system's own, clipped; of the weight's shape.
            pieces: the runs of elements in which the system steps it: first, and one past the last. They change
                nothing, but on a CPU, where torch's fused kernels compute the tail of a tensor by other instructions
                than its body, with other last bits. Where all runs begin at multiples of 64 elements they do not
                count; else each is stepped by itself, as the system does it.

        Returns:
            Weight and states after the step, in host memory.
        """
        runs = sorted(set(pieces))
        if all(start % _ALIGNMENT == 0 for start, _ in runs):
            return self._step(before, gradient)
        parts = [self._step(_cut(before, run), gradient.reshape(-1)[slice(*run)]) for run in runs]
        shape = before.weight.shape
        states = {}
        for name, first in parts[0].states.items():
            whole = first.dim() == 0
            states[name] = first if whole else torch.cat([part.states[name] for part in parts]).reshape(shape)
        return Stepped(torch.cat([part.weight for part in parts]).reshape(shape), states)

    def _step(self, before: Stepped, gradient: torch.Tensor) -> Stepped:
        optimizer_class, settings = self.optimizer_class, dict(self.settings)
        if issubclass(optimizer_class, HybridAdam):
            optimizer_class = torch.optim.AdamW if settings["decoupled_weight_decay"] else torch.optim.Adam
            settings["fused"] = True
        accepted = inspect.signature(optimizer_class.__init__).parameters
        parameter = nn.Parameter(before.weight.to(self.device, copy=True))
        parameter.grad = gradient.to(self.device, parameter.dtype)
        chosen = {key: value for key, value in settings.items() if key in accepted and key != "params"}
        optimizer = optimizer_class([parameter], **chosen)
        for name, value in before.states.items():
            # A step count lies beside its parameter where a kernel counts, and on the host otherwise.
            beside = name != "step" or settings.get("fused") or settings.get("capturable")
            optimizer.state[parameter][name] = value.to(self.device if beside else "cpu", copy=True)
        optimizer.step()
        states = {
            name: value.detach().cpu()
            for name, value in optimizer.state[parameter].items()
            if isinstance(value, torch.Tensor)
        }
        return Stepped(parameter.detach().cpu(), states)


def _cut(whole: Stepped, run: tuple[int, int]) -> Stepped:
    """Return some elements of a parameter and its states; a count of steps is all of them's."""
    states = {
        name: value if value.dim() == 0 else value.reshape(-1)[slice(*run)] for name, value in whole.states.items()
    }
    return Stepped(whole.weight.reshape(-1)[slice(*run)], states)


def subtraction_scale(before: torch.Tensor, after: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
    """Return the size of the numbers that a step took an update from, or got, whichever is larger.

    Where an old weight and its update nearly cancel, a last bit of either is many units in the last place of what they
    leave: the result has no more right digits than they had.

    Args:
        before: a weight before the step.
        after: what the step should make of it. What a system made of it must not set its own unit.
        settings: the parameter's group: its rate, its decay, and whether weights decay by themselves.

    Returns:
        A size for each element, in fp64.
    """
    decayed = before.double()
    if settings.get("decoupled_weight_decay"):
        decayed = decayed * (1.0 - float(settings["lr"]) * float(settings["weight_decay"]))
    return torch.maximum(decayed.abs(), after.double().abs())


def compare_bits(
    found: torch.Tensor | None, expected: torch.Tensor | None, scale: torch.Tensor | None = None
) -> Mismatch:
    """Compare two tensors bit by bit. One that is not there is equal to one of zeros: a state before its first step.

    Args:
        found: in host memory.
        expected: of the same shape and dtype; if not so, all elements differ.
        scale: sizes at which to take units in the last place, of the same shape, and no smaller than what is expected;
            None takes those of the numbers themselves, and counts the numbers between. Parts of a unit count as one.
    """
    if found is None or expected is None:
        present = found if expected is None else expected
        return Mismatch(0, 0) if present is None else compare_bits(present, torch.zeros_like(present))
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return Mismatch(max(found.numel(), 1), torch.iinfo(torch.int64).max)
    mine, theirs = _as_integers(found), _as_integers(expected)
    different = mine != theirs
    elements = int(different.sum())
    if elements == 0:
        return Mismatch(0, 0)
    distance = (_ordered(mine[different]) - _ordered(theirs[different])).abs()
    if scale is not None:
        pair = found.detach().reshape(-1)[different], expected.detach().reshape(-1)[different]
        units = _units(*pair, scale.reshape(-1)[different])
        # Of what is not finite there are no units: such numbers lie as far apart as their bits say.
        distance = torch.where(torch.isfinite(units), units.clamp(max=2.0**62).to(torch.int64), distance)
    # Such as +0 and -0, which lie beside each other and are not the same bits.
    return Mismatch(elements, max(1, int(distance.max())))


def _units(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return how many units in the last place lie between numbers, taken at a scale; not finite if one of them is not."""
    of_dtype = torch.finfo(expected.dtype)
    # A size is a fraction from 1/2 to 1 times a power of two. Below the least normal number all have its units.
    power = torch.frexp(scale.double().clamp(min=of_dtype.tiny)).exponent.double() - 1.0
    unit = torch.exp2(power) * of_dtype.eps
    return torch.where(torch.isfinite(scale), (found.double() - expected.double()).abs() / unit, torch.nan).ceil()


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).contiguous().view(_INTEGERS[tensor.element_size()])


def _ordered(integers: torch.Tensor) -> torch.Tensor:
    """Map the bits of floating-point numbers to integers that count them in their order."""
    wide = integers.to(torch.int64)
    lowest = torch.iinfo(integers.dtype).min
    return torch.where(wide < 0, lowest - wide, wide)
