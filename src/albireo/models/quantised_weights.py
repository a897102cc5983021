"""The first weights of a model with quantised layers, where those come from that are quantised."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from albireo.adapters import QuantisedLayer, quantise_weight
from albireo.sharding.weight_source import WeightSource, check_range

__all__ = ["QuantisedWeights"]


class QuantisedWeights:
    """A `WeightSource` for a model whose quantised layers have no memory yet.

    A layer is read and quantised whole, where its bytes are wanted, and is kept until another one is asked for.

    Args:
        source: of the model before it was quantised; it is closed with this one.
        layers: what `quantise_base` has returned.
    """

    def __init__(self, source: WeightSource, layers: Iterable[QuantisedLayer]) -> None:
        self._source = source
        self._layers: dict[nn.Parameter, tuple[QuantisedLayer, int]] = {}
        self._sizes: dict[nn.Parameter, int] = {}
        for layer in layers:
            for part, parameter in enumerate((layer.layer.codes, layer.layer.scales)):
                self._layers[parameter] = layer, part
                self._sizes[parameter] = parameter.numel()
        self._made: tuple[QuantisedLayer, torch.device, tuple[torch.Tensor, torch.Tensor]] | None = None

    def fill(self, parameter: nn.Parameter, start: int, out: torch.Tensor) -> None:
        """Quantise a layer and copy a range of its bytes, or have the source fill it; see `WeightSource.fill`.

        Raises:
            ConfigError: the parameter is not the model's, or has no such elements.
            ModelError: the values cannot be read.
        """
        if parameter not in self._layers:
            self._source.fill(parameter, start, out)
            return
        layer, part = self._layers[parameter]
        check_range(self._sizes[parameter], start, out)
        with torch.no_grad():
            out.copy_(self._quantised(layer, out.device)[part][start : start + out.numel()])

    def close(self) -> None:
        """Close the source."""
        self._made = None
        self._source.close()

    def _quantised(self, layer: QuantisedLayer, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if self._made is None or self._made[:2] != (layer, device):
            self._made = None  # before there is another one
            weight = torch.empty(layer.weight.shape, dtype=torch.float32, device=device)
            self._source.fill(layer.weight, 0, weight.view(-1))
            made = quantise_weight(weight, layer.layer.code, transposed=layer.layer.transposed)
            self._made = (layer, device, made)
        return self._made[2]
