"""Compiled blocks: `torch.compile`, a block's forward at a time."""

from __future__ import annotations

import shutil

import torch
from transformers import PreTrainedModel

from albireo.errors import ModelError
from albireo.models.family import Family

__all__ = ["compile_blocks"]


def compile_blocks(model: PreTrainedModel, family: Family) -> int:
    """Have every block's forward compiled at its first call.

    All blocks of a model share one code object, and their weights are inputs of the compiled one, so the first block
    pays and the others find it made. Hooks on a block run outside, as always.

    Args:
        model: the model; its blocks get a forward of their own, which calls theirs.
        family: tells the blocks.

    Returns:
        How many blocks there are.

    Raises:
        ModelError: there is no C++ compiler, which torch needs to build kernels for a CPU or to launch those of a GPU.
    """
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang", "c++", "g++", "cl")):
        raise ModelError("--compile needs a C++ compiler, and there is none here: install gcc, or leave --compile out")
    blocks = family.blocks(model)
    for _, block in blocks:
        # On the instance, so that neither the class nor another model of it changes.
        block.forward = torch.compile(block.forward)
    return len(blocks)
