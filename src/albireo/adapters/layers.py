"""Which layers of a model can have an adapter, and be quantised."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["adaptable"]


def adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the matrices that may have an adapter: all but the head, whose weight the loss uses by itself.

    Args:
        model: any module.
    """
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if module is output or not (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            continue
        if module.weight not in embeddings:
            yield name, module
