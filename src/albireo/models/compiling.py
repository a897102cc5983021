"""Compiled blocks: `torch.compile`, a block's forward at a time."""

from __future__ import annotations

import shutil
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from albireo.errors import ModelError
from albireo.models.family import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["compile_blocks"]


def compile_blocks(
    model: PreTrainedModel,
    family: Family,
    *,
    checkpointing: bool = False,
    preserve_rng_state: bool = True,
    ragged: bool = False,
) -> int:
    """Have every block's forward compiled at its first call.

    All blocks of a model share one code object, and their weights are inputs of the compiled one, so the first block
    pays and the others find it made. Hooks on a block run outside, as always.

    Activation checkpointing belongs inside what is compiled: then the backward recomputes only what it needs. Around a
    compiled block it would run all of it again, the last product too, which nobody needs.

    Args:
        model: the model; its blocks get a forward of their own, which calls theirs. Its own switch for activation
            checkpointing must be off.
        family: tells the blocks.
        checkpointing: keep only what goes into a block, and compute the rest again in the backward; but the last block
            keeps all, since its backward comes at once. It is compiled by itself.
        preserve_rng_state: recompute with the random state of the forward, as dropout needs.
        ragged: batches have different shapes: compile for all of them at once, and not for the first one first.

    Returns:
        How many blocks there are.

    Raises:
        ModelError: there is no C++ compiler, which torch needs to build kernels for a CPU or to launch those of a GPU.
    """
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang", "c++", "g++", "cl")):
        raise ModelError("--compile needs a C++ compiler, and there is none here: install gcc, or leave --compile out")

    def recomputed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return type(self).forward(self, *args, **kwargs)
        # The class's forward with the block as an argument: a bound one would be compiled for each block anew.
        return checkpoint(
            type(self).forward, self, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, **kwargs
        )

    blocks = family.blocks(model)
    for number, (_, block) in enumerate(blocks, 1):
        forward = MethodType(recomputed, block) if checkpointing and number < len(blocks) else block.forward
        # On the instance, so that neither the class nor another model of it changes.
        block.forward = torch.compile(forward, dynamic=True if ragged else None)
    return len(blocks)
