"""Frozen layers in 8 or 4 bits under an adapter (Dettmers et al., 2023, QLoRA)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from albireo.adapters.layers import adaptable
from albireo.adapters.lora import LoraPlan, attach_lora
from albireo.ops.quantise import Code, code_bytes, dequantise, quantise, scale_bytes
from albireo.ops.quantised_product import quantised_product

__all__ = [
    "QuantisedLayer",
    "QuantisedLinear",
    "attach_adapter",
    "count_weights",
    "quantise_base",
    "quantise_weight",
]


class QuantisedLinear(nn.Module):
    """A frozen linear layer whose weight is in 8 or 4 bits; it is dequantised for each product, into what computes.

    Codes and scales are frozen parameters of bytes: a plugin moves, shards and saves them as it does any other, and need
    not know what they are. They begin uninitialised.

    Args:
        shape: of the weight: `(out, in)`.
        bias: the layer's own, or None.
        code: how the weight is quantised.
        transposed: the layer kept its weight as `[in, out]`, as transformers' Conv1D does.
        device: where codes and scales are; the meta device gives them no memory.

    Attributes:
        codes: uint8, 1-D.
        scales: uint8, 1-D: the bytes of fp32 numbers.
        bias: `[out]`, or None.
        in_features: the last dimension of what it takes.
        out_features: the last dimension of what it returns.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        bias: nn.Parameter | None,
        code: Code,
        *,
        transposed: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.code = code
        self.transposed = transposed
        weights = shape[0] * shape[1]
        self.codes = _bytes(code_bytes(weights, code), device)
        self.scales = _bytes(scale_bytes(weights, code), device)
        self.register_parameter("bias", bias)

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's: `(out, in)`."""
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, in the dtype that computes.

        Args:
            x: `[..., in]`.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = self.get_parameter("bias").to(x.dtype) if self._parameters["bias"] is not None else None
        # FSDP2 has cast all that it gathers, in torch 2.11: a byte is a whole number in any dtype.
        codes, scales = self.codes.to(torch.uint8), self.scales.to(torch.uint8)
        return quantised_product(x, codes, scales, bias, self.shape, self.code)

    def dequantised_weight(self) -> Tensor:
        """Return the weight in fp32, as the layer that was quantised had it: `[out, in]`, or `[in, out]`."""
        weights = self.out_features * self.in_features
        flat = dequantise(self.codes.detach(), self.scales.detach(), weights, self.code, torch.float32)
        matrix = flat.view(self.shape)
        return matrix.t().contiguous() if self.transposed else matrix

    def dequantised(self) -> nn.Module:
        """Return a layer of the kind that was quantised, with what its weight has become."""
        layer: Any
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            layer = Conv1D(0, 0)  # type: ignore[no-untyped-call]
            layer.nf, layer.nx = self.out_features, self.in_features
        else:
            layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.dequantised_weight(), requires_grad=False)
        layer.register_parameter("bias", self._parameters["bias"])
        return cast("nn.Module", layer)

    def extra_repr(self) -> str:
        """See `torch.nn.Module`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, code={self.code}"


@dataclass(frozen=True, eq=False)
class QuantisedLayer:
    """A layer that stands for one that had no memory yet.

    Attributes:
        layer: the new one, without memory.
        weight: the parameter of the one before, which tells a source of weights what is wanted.
    """

    layer: QuantisedLinear
    weight: nn.Parameter


def attach_adapter(model: nn.Module, plan: LoraPlan, *, seed: int) -> list[QuantisedLayer]:
    """Put an adapter on a model, and quantise the layers beside it if the plan says so; see both.

    Args:
        model: a transformers model; its parameters may be without memory.
        plan: the adapter.
        seed: the run's.

    Returns:
        What took the place of layers without memory, whose codes are still to be made.

    Raises:
        ConfigError: peft is not installed, or a target is no module that can have an adapter.
    """
    attach_lora(model, plan, seed=seed)
    return [] if plan.base is None else quantise_base(model, plan.base, skip=[plan.head] if plan.head else [])


def quantise_base(model: nn.Module, code: Code, *, skip: Collection[str] = ()) -> list[QuantisedLayer]:
    """Quantise a model's linear layers, in place: all but its head, its embeddings, and an adapter's own.

    A layer at a time: memory for one in fp32 is needed beside what there is.

    Args:
        model: with adapters or without, all of it frozen but for these; its parameters may be without memory.
        code: how.
        skip: last parts of names of layers to be left as they are.

    Returns:
        What took the place of layers without memory, whose codes are still to be made.
    """
    waiting = []
    for name, module in list(adaptable(model)):
        last = name.removesuffix(".base_layer").rsplit(".", 1)[-1]
        if ".lora_A." in name or ".lora_B." in name or last in skip:
            continue
        layer: Any = module
        weight: nn.Parameter = layer.weight
        transposed = not isinstance(module, nn.Linear)
        rows, columns = weight.shape
        shape = (columns, rows) if transposed else (rows, columns)
        made = QuantisedLinear(shape, layer.bias, code, transposed=transposed, device=weight.device)
        if weight.is_meta:
            waiting.append(QuantisedLayer(made, weight))
        else:
            codes, scales = quantise_weight(weight, code, transposed=transposed)
            with torch.no_grad():
                made.codes.copy_(codes)
                made.scales.copy_(scales)
        made.train(module.training)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, made)
    return waiting


def quantise_weight(weight: Tensor, code: Code, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """Return a layer's codes and scales: blocks run along what comes in.

    Args:
        weight: `[out, in]`, or `[in, out]`.
        code: how.
        transposed: it is the second.
    """
    return quantise(weight.detach().t() if transposed else weight, code)


def count_weights(model: nn.Module) -> int:
    """Return how many parameters a model has, tied ones once, and quantised ones as what they stand for.

    Args:
        model: with quantised layers or without.
    """
    stored = sum(parameter.numel() for parameter in model.parameters())
    for layer in _quantised(model):
        stored += layer.out_features * layer.in_features - layer.codes.numel() - layer.scales.numel()
    return stored


def _quantised(model: nn.Module) -> Iterator[QuantisedLinear]:
    yield from (module for module in model.modules() if isinstance(module, QuantisedLinear))


def _bytes(count: int, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(count, dtype=torch.uint8, device=device), requires_grad=False)
