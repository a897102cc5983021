"""The Triton kernel behind `softmax_kernel`; imported only where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["softmax_loss_kernel"]


@triton.jit
def softmax_loss_kernel(
    logits_pointer,
    labels_pointer,
    keep_pointer,
    gradient_pointer,
    losses_pointer,
    vocabulary,
    logits_stride,
    gradient_stride,
    scale,
    BLOCK: tl.constexpr,
):
    """One program a row: an online softmax over blocks of the row, then the gradient block by block."""
    row = tl.program_id(0).to(tl.int64)
    logits_pointer += row * logits_stride
    gradient_pointer += row * gradient_stride
    keep = tl.load(keep_pointer + row) != 0
    label = tl.load(labels_pointer + row)
    if keep:
        # Kept per lane, and joined once at the end: a reduction a block would cost more than the exponentials.
        highest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(logits_pointer + columns, mask=columns < vocabulary, other=float("-inf"))
            higher = tl.maximum(highest, x)
            # A lane that has seen nothing yet holds -inf, and -inf less -inf would be no number.
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(highest - safe) + tl.exp(x - safe)
            highest = higher
        peak = tl.max(highest, axis=0)
        sum_of_all = tl.sum(total * tl.exp(highest - peak), axis=0)
        log_sum = peak + tl.log(sum_of_all)
        tl.store(losses_pointer + row, log_sum - tl.load(logits_pointer + label))
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            x = tl.load(logits_pointer + columns, mask=inside, other=float("-inf"))
            probability = tl.exp(x - log_sum)
            value = tl.where(columns == label, probability - 1.0, probability) * scale
            tl.store(gradient_pointer + columns, value.to(gradient_pointer.dtype.element_ty), mask=inside)
    else:
        tl.store(losses_pointer + row, 0.0)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            zero = tl.zeros([BLOCK], dtype=gradient_pointer.dtype.element_ty)
            tl.store(gradient_pointer + columns, zero, mask=columns < vocabulary)
