"""Whether what is to be loaded is the model's."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from albireo.checkpoint import TensorSource
from albireo.errors import CheckpointError

__all__ = ["check_model_source"]


def check_model_source(source: TensorSource, names: Mapping[torch.Tensor, str]) -> None:
    """Refuse a source that has not just a model's tensors, or has them in other shapes.

    Args:
        source: where `model/NAME` can be read.
        names: the model's tensors to their names.

    Raises:
        CheckpointError: naming the first tensor that does not fit.
    """
    saved = set(source.names("model/")) - set(source.aliases)
    wanted = {f"model/{name}": tensor for tensor, name in names.items()}
    for missing in sorted(wanted.keys() - saved):
        raise CheckpointError(f"{source.path} has no {missing}: it belongs to another model")
    for unknown in sorted(saved - wanted.keys()):
        raise CheckpointError(f"{source.path} has {unknown}, which this model has not: it belongs to another")
    for name, tensor in wanted.items():
        shape = source.info(name).shape
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} has shape {shape} in {source.path}, and {tuple(tensor.shape)} is to be filled: it belongs to another "
                "model"
            )
