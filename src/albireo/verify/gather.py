"""What all ranks recorded of a step, as whole tensors on the main rank, a parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from albireo.checkpoint import TensorSlice
from albireo.distributed import World
from albireo.plugins.whole_tensors import WholeTensors, with_whole_tensors
from albireo.verify.record import Phase, RecordedSlice

__all__ = ["ParameterTensors", "StepTensors", "with_step_tensors"]


class ParameterTensors(NamedTuple):
    """All that was recorded of one parameter, or buffer, on all ranks.

    Attributes:
        name: its name.
        tensors: whole tensors in host memory, by phase and kind (`model`, `gradient`, or a state such as `exp_avg`).
    """

    name: str
    tensors: Mapping[tuple[Phase, str], torch.Tensor]


class StepTensors:
    """The tensors of a step, for the main rank. Made by `with_step_tensors`, and good as long as it runs.

    Args:
        tensors: of all ranks, under `PHASE/NAME`.
    """

    def __init__(self, tensors: WholeTensors) -> None:
        self._tensors = tensors
        self._places: dict[str, dict[tuple[Phase, str], TensorSlice]] = {}
        for part in tensors.slices:
            parameter, place = _place(part.name)
            self._places.setdefault(parameter, {})[place] = part

    def weights_before(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and values of each parameter and buffer before the step."""
        for name, places in self._places.items():
            if ("before", "model") in places:
                yield name, self._tensors.tensor(places["before", "model"])

    def parameters(self) -> Iterator[ParameterTensors]:
        """Yield all that there is of each parameter and buffer, in the order of names."""
        for name in sorted(self._places):
            places = self._places[name].items()
            yield ParameterTensors(name, {place: self._tensors.tensor(part) for place, part in places})


def with_step_tensors(
    slices: Mapping[Phase, Sequence[RecordedSlice]], world: World, action: Callable[[StepTensors], None]
) -> None:
    """Do something with the tensors of a step on the main rank; all ranks call this, and all raise if it fails.

    Args:
        slices: this rank's, by phase.
        world: the ranks.
        action: what the main rank does.

    Raises:
        CheckpointError: the ranks' slices do not make up whole tensors.
        AlbireoError: on the other ranks, if the action failed, with its message.
    """
    named = [replace(item.part, name=f"{phase}/{item.part.name}") for phase, items in slices.items() for item in items]
    with_whole_tensors(named, world, lambda tensors: action(StepTensors(tensors)))


def _place(name: str) -> tuple[str, tuple[Phase, str]]:
    """Return the parameter's name, and phase and kind, of `PHASE/model/NAME` or `PHASE/optimizer/STATE/NAME`."""
    phase, kind, rest = name.split("/", 2)
    if kind == "optimizer":
        kind, rest = rest.split("/", 1)
    return rest, (_PHASES[phase], kind)


_PHASES: Mapping[str, Phase] = {"before": "before", "reduced": "reduced", "clipped": "clipped", "after": "after"}
