"""Activation checkpointing: keep only what goes into a block, and compute the rest again in the backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from albireo.errors import ModelError
from albireo.models.family import Family
from albireo.models.recomputation import recompute_in_backward

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_FUNCTION = "_gradient_checkpointing_func"

__all__ = ["enable_activation_checkpointing", "keep_activations"]


def enable_activation_checkpointing(
    model: PreTrainedModel, *, preserve_rng_state: bool, family: Family | None = None
) -> None:
    """Turn on the model's own activation checkpointing, a block at a time (Chen et al., 2016).

    Args:
        model: the model; it recomputes while it is in training mode.
        preserve_rng_state: recompute with the random state of the forward, as dropout needs. Without dropout False
            saves keeping and restoring that state for each block.
        family: tells the blocks. The last one then keeps what it has computed: its backward comes at once, when as much
            would be computed again; and those that need no random state are recomputed in our own way, which takes less of
            the host's time. None: all are recomputed, by torch.

    Raises:
        ModelError: the model has no such switch.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(f"{type(model).__name__} has no activation checkpointing: train it without --checkpointing")
    options = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    # transformers 5.2x renamed the switch and warns at the old name; 5.17 knows only that one.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[no-untyped-call]
    # The switch also makes embeddings ask for a gradient, frozen or not, which only reentrant checkpointing needs.
    model.disable_input_require_grads()  # type: ignore[no-untyped-call]
    if family is None:
        return
    if not preserve_rng_state:
        for module in model.modules():
            # Where transformers looks for what recomputes.
            if _FUNCTION in vars(module):
                vars(module)[_FUNCTION] = recompute_in_backward
    _, last = family.blocks(model)[-1]
    keep_activations(last)


def keep_activations(block: nn.Module) -> None:
    """Have one block keep what it computes, in a model of which the others are recomputed.

    Args:
        block: one of the model's.
    """
    vars(block)["gradient_checkpointing"] = False
