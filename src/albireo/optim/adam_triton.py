"""The Triton kernel behind `split_adam`; imported only where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["split_adam_kernel", "triton_type"]


# How many tensors there are must not make another kernel.
@triton.jit(do_not_specialize=["tensors"])
def split_adam_kernel(
    table_pointer,
    tensors_pointer,
    firsts_pointer,
    corrections_pointer,
    factor_pointer,
    tensors,
    lr,
    decay,
    beta1,
    beta2,
    eps,
    GRADIENT: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a chunk of a tensor, of which the table has a row each, and the corrections a column."""
    program = tl.program_id(0)
    tensor = tl.load(tensors_pointer + program)
    first = (program - tl.load(firsts_pointer + tensor)).to(tl.int64) * CHUNK
    row = table_pointer + tensor * 6
    # Addresses are multiples of 16 bytes: loads and stores are as wide.
    weight = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.bfloat16)), 16)
    rest = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.int16)), 16)
    gradient = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(GRADIENT)), 16)
    exp_avg = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), 16)
    exp_avg_sq = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(tl.float32)), 16)
    numel = tl.load(row + 5)
    step_size = tl.div_rn(lr, tl.load(corrections_pointer + tensor))
    root = tl.sqrt_rn(tl.load(corrections_pointer + tensors + tensor))
    factor = 1.0
    if factor_pointer is not None:
        factor = tl.load(factor_pointer)
    # Where a mask is, loads are narrow: all but a tensor's last chunk go without.
    if first + CHUNK <= numel:
        for start in range(0, CHUNK, BLOCK):
            at = first + start + tl.arange(0, BLOCK)
            _step(
                weight + at, rest + at, gradient + at, exp_avg + at, exp_avg_sq + at, None,
                lr, decay, beta1, beta2, eps, step_size, root, factor, DECOUPLED, MAXIMIZE,
            )  # fmt: skip
    else:
        for start in range(0, CHUNK, BLOCK):
            at = first + start + tl.arange(0, BLOCK)
            _step(
                weight + at, rest + at, gradient + at, exp_avg + at, exp_avg_sq + at, at < numel,
                lr, decay, beta1, beta2, eps, step_size, root, factor, DECOUPLED, MAXIMIZE,
            )  # fmt: skip


@triton.jit
def _step(
    weight_at,
    rest_at,
    gradient_at,
    exp_avg_at,
    exp_avg_sq_at,
    mask,
    lr,
    decay,
    beta1,
    beta2,
    eps,
    step_size,
    root,
    factor,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):
    """Step a block. Each number is rounded where torch's fused kernel (2.11) rounds it, so that the bits are the same."""
    # As `split_weights.join`.
    upper = tl.load(weight_at, mask=mask).to(tl.int16, bitcast=True).to(tl.int32) << 16
    master = (upper + tl.load(rest_at, mask=mask).to(tl.int32)).to(tl.float32, bitcast=True)
    gradient = tl.load(gradient_at, mask=mask).to(tl.float32) * factor
    if MAXIMIZE:
        gradient = -gradient
    if DECOUPLED:
        master = tl.fma(-(lr * decay), master, master)
    else:
        gradient = tl.fma(master, decay, gradient)
    square = gradient * gradient
    exp_avg = tl.fma(beta1, tl.load(exp_avg_at, mask=mask), tl.fma(-beta1, gradient, gradient))
    exp_avg_sq = tl.fma(beta2, tl.load(exp_avg_sq_at, mask=mask), tl.fma(-beta2, square, square))
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), root) + eps
    master = master - tl.div_rn(step_size * exp_avg, denominator)
    tl.store(exp_avg_at, exp_avg, mask=mask)
    tl.store(exp_avg_sq_at, exp_avg_sq, mask=mask)
    # As `split_weights.split`.
    weight = master.to(tl.bfloat16)
    rest = master.to(tl.int32, bitcast=True) - (weight.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    tl.store(weight_at, weight, mask=mask)
    tl.store(rest_at, tl.minimum(tl.maximum(rest, -32768), 32767).to(tl.int16), mask=mask)


def triton_type(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's word for what a gradient is."""
    return {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]
