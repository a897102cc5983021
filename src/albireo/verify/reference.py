"""Plain PyTorch: one process, whole weights, no plugin; the gradients that a system's have to equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from albireo.errors import ConfigError
from albireo.ops import sum_of_loss
from albireo.plugins import Criterion
from albireo.plugins.casting import compute_dtypes

__all__ = ["Form", "PlainGradients", "PlainReference", "ReferenceFactory", "group_numbers"]

ReferenceFactory = Callable[[], tuple[nn.Module, torch.optim.Optimizer]]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Form:
    """In which numbers to compute.

    Attributes:
        precision: "fp32", "fp16" or "bf16".
        compute_form: what 16 bits are: autocast over fp32 weights, or a copy of them.
        device: where.
    """

    precision: str
    compute_form: Literal["autocast", "copy"]
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the precision."""
        return _DTYPES[self.precision]

    @property
    def copies(self) -> bool:
        """True if a 16-bit copy of the weights computes."""
        return self.precision != "fp32" and self.compute_form == "copy"

    def context(self) -> AbstractContextManager[Any]:
        """Return what forward runs under."""
        if self.precision == "fp32" or self.compute_form == "copy":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


@dataclass(frozen=True)
class PlainGradients:
    """What plain PyTorch makes of the micro-batches of all ranks.

    Attributes:
        loss: the mean over all that is counted.
        gradients: in fp32 and host memory, without a loss scale, by the parameter's name; only of parameters that have
            one.
    """

    loss: float
    gradients: Mapping[str, torch.Tensor]

    @property
    def finite(self) -> bool:
        """True if every number is."""
        return all(bool(torch.isfinite(gradient).all()) for gradient in self.gradients.values())

    @property
    def rms(self) -> float:
        """The root of the mean square over all elements of all gradients."""
        elements = sum(gradient.numel() for gradient in self.gradients.values())
        squares = sum(float(torch.linalg.vector_norm(g.double())) ** 2 for g in self.gradients.values())
        return float((squares / elements) ** 0.5) if elements else 0.0


class PlainReference:
    """A model of its own, which no plugin has touched. Its weights are filled in anew for each step.

    Args:
        factory: builds what the user gave `boost`: the model, and its optimizer.
        names_of: returns a model's tensors with their names.
        form: in which numbers to compute.

    Attributes:
        groups: each trained parameter's name to the number of its group in the optimizer.
        optimizer_class: the class of the user's optimizer.
    """

    def __init__(
        self, factory: ReferenceFactory, names_of: Callable[[nn.Module], Mapping[torch.Tensor, str]], form: Form
    ) -> None:
        self._form = form
        self._model, optimizer = factory()
        names = names_of(self._model)
        self.groups = group_numbers(optimizer, names)
        self.optimizer_class = type(optimizer)
        if form.copies:
            for parameter, dtype in compute_dtypes(self._model, form.dtype).items():
                parameter.data = parameter.data.to(dtype)
        self._tensors = {name: tensor for tensor, name in names.items()}
        self._trained = {
            name: tensor
            for tensor, name in names.items()
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad and name in self.groups
        }

    def gradients(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        micro_batches: Sequence[Sequence[Mapping[str, Any]]],
        counts: Sequence[Sequence[int]],
        *,
        training: bool = True,
        loss_function: Criterion | None = None,
        criterion: Criterion | None = None,
        loss_scale: float | None = None,
    ) -> PlainGradients:
        """Run the micro-batches one after another, and add their gradients in fp32: in rank order, then in theirs.

        Args:
            weights: name and values of all parameters and buffers.
            micro_batches: by rank, then in the order in which the rank takes them.
            counts: how many terms each one's loss is a mean of.
            training: the model is in training mode.
            loss_function: the user's criterion in the form's precision.
            criterion: the user's criterion itself.
            loss_scale: what losses are multiplied by, in fp16.

        Raises:
            ConfigError: the weights are those of another model.
        """
        self._fill(weights)
        self._model.to(self._form.device).train(training)
        total = sum(sum(of_rank) for of_rank in counts)
        ranks = len(micro_batches)
        # The facade's own arithmetic: the same factor to the bit, so that 16-bit gradients are rounded alike.
        factor: torch.Tensor | float = 1.0 / max(total, 1)
        if ranks > 1:
            factor = ranks / torch.tensor(float(total), device=self._form.device).clamp(min=1.0)
        sums: dict[str, torch.Tensor] = {}
        loss = 0.0
        for batch, count in _in_order(micro_batches, counts):
            loss_sum = self._loss_sum(batch, count, loss_function, criterion)
            scaled = loss_sum * factor
            torch.autograd.backward(scaled if loss_scale is None else scaled * loss_scale)
            loss += float(loss_sum.detach())
            self._collect(sums)
        for gradient in sums.values():
            gradient.div_(ranks * (1.0 if loss_scale is None else loss_scale))
        # Between steps the device is the system's alone.
        self._model.to("cpu")
        return PlainGradients(loss / max(total, 1), {name: gradient.cpu() for name, gradient in sums.items()})

    def _fill(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        missing = set(self._tensors)
        with torch.no_grad():
            for name, values in weights:
                tensor = self._tensors.get(name)
                if tensor is None or tensor.shape != values.shape:
                    raise ConfigError(
                        f"the reference model has no {name} of shape {tuple(values.shape)}: the factory must build the "
                        "model that was boosted"
                    )
                tensor.copy_(values)
                missing.discard(name)
        if missing:
            raise ConfigError(
                f"the boosted model has no {min(missing)}: the factory must build the model that was boosted"
            )

    def _loss_sum(
        self, batch: Mapping[str, Any], count: int, loss_function: Criterion | None, criterion: Criterion | None
    ) -> torch.Tensor:
        inputs = {name: self._moved(value) for name, value in batch.items()}
        if loss_function is None:
            with self._form.context():
                return sum_of_loss(self._model(**self._cast(inputs)), count)
        labels = inputs.pop("labels")
        with self._form.context():
            outputs = self._model(**self._cast(inputs))
        return sum_of_loss(loss_function(outputs, labels), count, criterion)

    def _moved(self, value: Any) -> Any:
        return value.to(self._form.device) if isinstance(value, torch.Tensor) else value

    def _cast(self, value: Any) -> Any:
        if not self._form.copies:
            return value
        if isinstance(value, torch.Tensor):
            return value.to(self._form.dtype) if value.is_floating_point() else value
        if isinstance(value, Mapping):
            return {name: self._cast(item) for name, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._cast(item) for item in value)
        return value

    def _collect(self, sums: dict[str, torch.Tensor]) -> None:
        """Add the gradients that the parameters hold, in fp32, and take them away."""
        for name, parameter in self._trained.items():
            if parameter.grad is not None:
                gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
                if name in sums:
                    sums[name].add_(gradient.float())
                else:
                    sums[name] = gradient.float()
        for parameter in self._model.parameters():
            parameter.grad = None


def group_numbers(optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]) -> dict[str, int]:
    """Return the number of each parameter's group, by its name.

    Args:
        optimizer: a torch optimizer that no plugin has wrapped.
        names: its parameters' names.
    """
    return {
        names[parameter]: number
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        if parameter in names
    }


def _in_order(
    micro_batches: Sequence[Sequence[Mapping[str, Any]]], counts: Sequence[Sequence[int]]
) -> Iterator[tuple[Mapping[str, Any], int]]:
    for batches, numbers in zip(micro_batches, counts, strict=True):
        yield from zip(batches, numbers, strict=True)
