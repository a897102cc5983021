"""Blocks that keep what they computed although activations are checkpointed: where that costs no memory, it is free speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from albireo.models.checkpointing import keep_activations

__all__ = ["KeptBlocks", "kept_count"]


def kept_count(blocks: int, block_bytes: int, input_bytes: int, gradient_bytes: int) -> int:
    """Return how many of the last blocks can keep what they computed without raising the peak of a step's memory.

    Backward begins with every block's input and with what the kept ones computed; as it goes these leave, and gradients
    take their place. It ends with all gradients and what one block computed. So what fits where gradients will be is
    free.

    Args:
        blocks: how many there are; at least one.
        block_bytes: what one keeps, beside its input.
        input_bytes: what its input takes.
        gradient_bytes: what all gradients take at the end of backward, and do not at its beginning.

    Returns:
        A number from 1, since the last block's backward comes at once, to `blocks`.
    """
    room = gradient_bytes - blocks * input_bytes
    return min(blocks, 1 + max(0, room) // max(1, block_bytes))


class KeptBlocks:
    """Looks at the last block in the first step, and then has as many of the last blocks keep all as cost no memory.

    Nothing that is computed changes: what a block would compute again is what it has kept.

    Args:
        blocks: the model's, in the order of the forward. Each has a switch `gradient_checkpointing`, off for the last.
        gradient_bytes: as for `kept_count`, on this rank.
        say: takes a line for the user once it is decided.

    Attributes:
        block_bytes: what the last block keeps, beside its input; None until it has been seen.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], gradient_bytes: int, *, say: Callable[[str], None] | None = None
    ) -> None:
        self._blocks = list(blocks)
        self._gradient_bytes = gradient_bytes
        self._say = say
        self.block_bytes: int | None = None
        self._seen: dict[int, Tensor] = {}
        self._stack = ExitStack()
        last = self._blocks[-1]
        # What a plugin has put around a block's weights, such as views of a buffer, is the weights' memory too.
        self._handles = [
            last.register_forward_pre_hook(self._begin, with_kwargs=True),
            last.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def _begin(self, block: nn.Module, *_: Any) -> None:
        if block.training and torch.is_grad_enabled():
            self._seen.clear()
            self._stack.enter_context(saved_tensors_hooks(self._see, lambda tensor: tensor))

    def _see(self, tensor: Tensor) -> Tensor:
        # An output that is kept by its own node as itself would never be freed.
        alone = tensor.detach()
        if alone.numel() > 0:
            self._seen[alone.untyped_storage().data_ptr()] = alone
        return alone

    def _end(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._stack.close()
        if output is None or not self._seen:
            self._seen.clear()
            return
        for handle in self._handles:
            handle.remove()
        inputs = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors((args, kwargs))}
        weights = {p.untyped_storage().data_ptr() for p in (*block.parameters(), *block.buffers()) if p.numel() > 0}
        kept = sum(
            tensor.untyped_storage().nbytes()
            for pointer, tensor in self._seen.items()
            if pointer not in weights and pointer not in inputs
        )
        self._seen.clear()
        self.block_bytes = kept
        # The hidden states alone differ from block to block; masks and positions are every block's.
        hidden = next(iter(_tensors((args, kwargs))), None)
        input_bytes = 0 if hidden is None else hidden.numel() * hidden.element_size()
        count = kept_count(len(self._blocks), kept, input_bytes, self._gradient_bytes)
        # The forward has passed the others: the next one is the first to keep more.
        for other in self._blocks[-count:]:
            keep_activations(other)
        if count > 1 and self._say is not None:
            blocks = len(self._blocks)
            self._say(f"keeping    the activations of {count} of {blocks} blocks: they fit where gradients will be")


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
