"""Blocks that keep what they computed although activations are checkpointed: where there is room, that is speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from albireo.models.checkpointing import keep_activations

__all__ = ["ActivationRoom", "KeptBlocks", "kept_count"]


@dataclass(frozen=True)
class ActivationRoom:
    """What there is for activations that are kept, in bytes.

    Attributes:
        gradients: what all gradients take at the end of backward, and do not at its beginning.
        more: by how much the peak of a step may rise.
    """

    gradients: int
    more: int = 0


def kept_count(blocks: int, block_bytes: int, input_bytes: int, room: ActivationRoom) -> int:
    """Return how many of the last blocks can keep what they computed.

    Backward begins with every block's input and with what the kept ones computed; as it goes these leave, and gradients
    take their place. It ends with all gradients and what one block computed. So what fits where gradients will be is
    free.

    Args:
        blocks: how many there are; at least one.
        block_bytes: what one keeps, beside its input.
        input_bytes: what its input takes.
        room: what there is.

    Returns:
        A number from 1, since the last block's backward comes at once, to `blocks`.
    """
    free = max(0, room.gradients - blocks * input_bytes)
    return min(blocks, 1 + (free + room.more) // max(1, block_bytes))


class KeptBlocks:
    """Looks at the last block in the second step, and then has as many of the last blocks keep all as there is room for.

    By then a step has been made, so that its peak is known. Nothing that is computed changes: what a block would compute
    again is what it has kept.

    Args:
        blocks: the model's, in the order of the forward. Each has a switch `gradient_checkpointing`, off for the last.
        room: is asked once, in the second step, what room there is; None: none, and that is that.
        say: takes a line for the user once it is decided.

    Attributes:
        block_bytes: what the last block keeps, beside its input; None until it has been seen.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        room: Callable[[], ActivationRoom | None],
        *,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._blocks = list(blocks)
        self._room = room
        self._say = say
        self.block_bytes: int | None = None
        self._began = False
        self._seen: dict[int, Tensor] = {}
        self._weights: set[int] = set()
        self._stack = ExitStack()
        last = self._blocks[-1]
        self._handles = [
            last.register_forward_pre_hook(self._begin, with_kwargs=True),
            last.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def _begin(self, block: nn.Module, *_: Any) -> None:
        if not block.training or not torch.is_grad_enabled():
            return
        # The last block is never recomputed, so each of its forwards is a step's.
        if self._began:
            self._seen.clear()
            # What a plugin has put around a block's weights, such as views of a buffer, is the weights' memory too; and some
            # are themselves only while the block runs.
            weights = (*block.parameters(), *block.buffers())
            self._weights = {weight.untyped_storage().data_ptr() for weight in weights if weight.numel() > 0}
            self._stack.enter_context(saved_tensors_hooks(self._see, lambda tensor: tensor))
        self._began = True

    def _see(self, tensor: Tensor) -> Tensor:
        # An output that is kept by its own node as itself would never be freed.
        alone = tensor.detach()
        if alone.numel() > 0:
            self._seen[alone.untyped_storage().data_ptr()] = alone
        return alone

    def _end(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._stack.close()
        if output is None or not self._seen:
            self._seen.clear()
            return
        for handle in self._handles:
            handle.remove()
        inputs = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors((args, kwargs))}
        kept = sum(
            tensor.untyped_storage().nbytes()
            for pointer, tensor in self._seen.items()
            if pointer not in self._weights and pointer not in inputs
        )
        self._seen.clear()
        self.block_bytes = kept
        # The hidden states alone differ from block to block; masks and positions are every block's.
        hidden = next(iter(_tensors((args, kwargs))), None)
        input_bytes = 0 if hidden is None else hidden.numel() * hidden.element_size()
        room = self._room()
        if room is None:
            return
        count = kept_count(len(self._blocks), kept, input_bytes, room)
        # The forward has passed the others: the next one is the first to keep more.
        for other in self._blocks[-count:]:
            keep_activations(other)
        if count > 1 and self._say is not None:
            blocks = len(self._blocks)
            more = (count - kept_count(blocks, kept, input_bytes, ActivationRoom(room.gradients))) * kept
            why = "they fit where gradients will be" if more == 0 else f"it takes {more / 2**30:.2f} GB more"
            self._say(f"keeping    the activations of {count} of {blocks} blocks: {why}")


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
