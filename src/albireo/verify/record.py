"""One rank's side of a step: what its plugin exports before, within and after it, kept in host memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import nn

from albireo.booster import Booster
from albireo.checkpoint import TensorSlice
from albireo.optim import OptimizerWrapper
from albireo.plugins import ModelWrapper

__all__ = ["Phase", "RankRecord", "RecordedSlice", "fingerprint", "square_sum"]

Phase = Literal["before", "reduced", "clipped", "after"]


class RecordedSlice(NamedTuple):
    """A slice that was exported, in host memory.

    Attributes:
        part: the slice.
        side: the type of the device that it was on: "cpu" or "cuda".
    """

    part: TensorSlice
    side: str


class RankRecord:
    """Takes what a rank's plugin exports around a step.

    Args:
        booster: the plugin and the ranks.
        model: the boosted model.
        optimizer: the boosted optimizer.
        names: the model's tensors to their names.

    Attributes:
        slices: by phase, in the order in which they came.
    """

    def __init__(
        self,
        booster: Booster,
        model: ModelWrapper,
        optimizer: OptimizerWrapper,
        names: Mapping[torch.Tensor, str],
    ) -> None:
        self._plugin, self._world = booster.plugin, booster.world
        self._model, self._optimizer = model, optimizer
        self._names = names
        self._parameters = {tensor: name for tensor, name in names.items() if isinstance(tensor, nn.Parameter)}
        self.slices: dict[Phase, list[RecordedSlice]] = {}

    def take_state(self, phase: Literal["before", "after"]) -> None:
        """Take weights and states; those of before the step are copied, since the step changes them."""
        model = self._plugin.export_model(self._model, self._names, self._world)
        states = self._plugin.export_optimizer(self._optimizer, self._parameters, self._world)
        self._take(phase, [model, states], copy=phase == "before")

    def take_gradients(self, observed: Literal["reduced", "clipped"]) -> None:
        """Take the gradients as they are now; for the step's `observe`."""
        self._take(observed, [self._plugin.export_gradients(self._optimizer, self._parameters, self._world)], copy=True)

    def fingerprints(self) -> dict[str, list[str]]:
        """Return dtype and digest of each parameter that computes on this rank, by name.

        A parameter that is itself sharded has none: what computes is then made of the owners' parts in each forward.
        """
        found = {}
        for parameter in self._plugin.readable_weights(self._model):
            name = self._parameters.get(parameter)
            if name is not None and not hasattr(parameter, "to_local"):
                dtype = str(parameter.dtype).removeprefix("torch.")
                found[name] = [dtype, fingerprint(parameter.detach())]
        return found

    def pieces(self) -> dict[str, list[tuple[str, int, int]]]:
        """Return what this rank steps: of each parameter that has states, by its name, runs of elements.

        Returns:
            For each run the type of the device that steps it, its first element, and one past its last.
        """
        # Stepped where they compute, wherever their states are.
        streamed = {self._parameters.get(p): p.device.type for p in self._model.streamed_parameters()}
        found: dict[str, list[tuple[str, int, int]]] = {}
        for part, side in self.slices.get("after", ()):
            kind, _, rest = part.name.partition("/")
            state, _, name = rest.partition("/")
            # The count of steps is on the host for kernels that do not count themselves.
            if kind == "optimizer" and state != "step":
                piece = (streamed.get(name, side), part.start, part.stop)
                if piece not in found.setdefault(name, []):
                    found[name].append(piece)
        return found

    def _take(self, phase: Phase, exports: Iterable[Iterable[TensorSlice]], *, copy: bool) -> None:
        taken = []
        for export in exports:
            for part in export:
                host = part.data.detach().to("cpu", copy=copy)
                kept = TensorSlice(part.name, part.shape, part.start, host)
                taken.append(RecordedSlice(kept, part.data.device.type))
        self.slices[phase] = taken


def fingerprint(tensor: torch.Tensor) -> str:
    """Return a digest of a tensor's bytes.

    Args:
        tensor: any shape, dtype and device.
    """
    flat = tensor.detach().reshape(-1).to("cpu").contiguous()
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).hexdigest()


def square_sum(slices: Iterable[RecordedSlice]) -> float:
    """Return the sum of the squares of all elements, added in fp64."""
    return sum(float(torch.linalg.vector_norm(item.part.data.double())) ** 2 for item in slices)
