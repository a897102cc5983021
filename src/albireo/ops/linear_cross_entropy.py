"""Cross entropy behind a linear head, without ever holding all logits.

The logits of a language model are its largest activation: 32 rows of 1,024 tokens over OPT's 50,272 words are 6.1 GB
in fp32, and plain autograd keeps several copies. Here the rows go through the head in pieces, and each piece's
gradients are taken while its logits are at hand (the idea of Liger's and Apple's fused cross entropies, in torch's own
kernels): nothing of the size rows x vocabulary is ever allocated, and no logits are computed twice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from albireo.device.triton_kernels import triton_runs_on
from albireo.errors import ModelError
from albireo.ops.softmax_kernel import loss_and_gradient

__all__ = ["default_piece_rows", "linear_cross_entropy"]

# Larger pieces are quicker on a GPU, where each piece also reads and writes the head's whole gradient once.
_PIECE_BYTES = 2**28
_GPU_PIECE_BYTES = 2**29
_MIN_PIECE_ROWS = 512
_ROW_MULTIPLE = 128
# Probabilities over 50,000 words are about 2e-5: subnormal in fp16, which would lose most of their bits.
# Times 1,024 they are normal numbers, and the largest, 1,024, is far from fp16's 65,504.
_FP16_SCALE = 1024.0


def default_piece_rows(rows: int, vocabulary: int, device: torch.device) -> int:
    """Return how many rows go through the head at once.

    At most 256 MB of fp32 logits a piece (512 MB on a GPU), but no fewer than 512 rows, under which matrix products run slowly; pieces
    of equal size, so that the last is no sliver; all rows at once if they fit.

    Args:
        rows: tokens in all.
        vocabulary: columns of the logits.
        device: where they are.
    """
    piece_bytes = _GPU_PIECE_BYTES if device.type == "cuda" else _PIECE_BYTES
    limit = max(_MIN_PIECE_ROWS, piece_bytes // (4 * vocabulary) // _ROW_MULTIPLE * _ROW_MULTIPLE)
    if rows <= limit:
        return max(rows, 1)
    pieces = math.ceil(rows / limit)
    return math.ceil(rows / pieces / _ROW_MULTIPLE) * _ROW_MULTIPLE


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    piece_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross entropies of `hidden @ weight.T + bias` against `labels`, and how many were counted.

    Matrix products run in autocast's dtype where it is on, else in the tensors' own; logits, softmax, loss and the
    gradients' accumulation over pieces are fp32 (fp64 for fp64 input). The gradients are those of the sum, taken in
    the forward; the backward multiplies them by the incoming gradient in fp32 and casts last, so that a loss scale
    acts as it does in plain autograd. Nothing waits for the device. A second backward through the same result, or a
    gradient of the gradient, is refused.

    Args:
        hidden: `[..., H]`, any number of leading dimensions.
        weight: `[V, H]`, a head's weight, tied to an embedding or not.
        labels: `[...]`, the leading shape of `hidden`; integers in `[0, V)`, or `ignore_index`.
        bias: `[V]`, if the head has one.
        ignore_index: the label of positions that do not count: no loss, and gradients of exactly zero.
        shift: position t is judged by the label at t + 1 of the last dimension; a row's last position by none.
        piece_rows: rows (tokens) a piece; `default_piece_rows` chooses if None.

    Returns:
        The loss's sum, a scalar in fp32, and the number of counted labels, an int64 scalar on the same device.

    Raises:
        ModelError: shapes or dtypes do not fit together.
    """
    _check(hidden, weight, labels, bias, piece_rows)
    if shift:
        # The labels move, not the hidden states: a slice of those would be a copy of them all.
        labels = torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)], dim=-1)
    labels = labels.reshape(-1).to(torch.int64)
    counted = labels != ignore_index
    rows = hidden.reshape(-1, hidden.shape[-1])
    if piece_rows is None:
        piece_rows = default_piece_rows(rows.shape[0], weight.shape[0], rows.device)
    dtype = _product_dtype(rows, weight)
    if torch.is_grad_enabled():
        loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            rows, weight, bias, labels, counted, piece_rows, dtype
        )
    else:
        loss = _by_pieces(rows, weight, bias, labels, counted, piece_rows, dtype, (False, False, False))[0]
    return loss, counted.sum()


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, piece_rows: int | None) -> None:
    if weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ModelError(
            f"hidden states of shape {list(hidden.shape)} do not fit a head of shape {list(weight.shape)}: "
            "expected [..., H] and [V, H]"
        )
    if hidden.shape[:-1] != labels.shape:
        raise ModelError(
            f"labels of shape {list(labels.shape)} do not fit hidden states of shape {list(hidden.shape)}: "
            "expected one label for each row"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ModelError(f"a bias of shape {list(bias.shape)} does not fit a head of shape {list(weight.shape)}")
    if piece_rows is not None and piece_rows < 1:
        raise ModelError(f"piece_rows is {piece_rows}: expected 1 or more, or None for the default")


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype that `torch.nn.functional.linear` would multiply in."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise ModelError(f"hidden states are {hidden.dtype}, the head is {weight.dtype}: cast one, or turn autocast on")
    return hidden.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """Takes the gradients in the forward, scales them in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        counted: Tensor,
        piece_rows: int,
        dtype: torch.dtype,
    ) -> Tensor:
        needs = ctx.needs_input_grad[:3]
        loss, gradients, scale = _by_pieces(hidden, weight, bias, labels, counted, piece_rows, dtype, needs)
        ctx.gradients, ctx.scale = gradients, scale
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise ModelError("linear_cross_entropy has given its gradients away: call it again for a second backward")
        # In place, and let go before they are returned: a weight's gradient is as large as the head itself, and
        # autograd makes it the parameter's `.grad` without a copy only if nobody else holds it.
        gradients, ctx.gradients = ctx.gradients, None
        factor = grad_output / ctx.scale
        scaled = [None if grad is None else grad.mul_(factor) for grad in gradients]
        del gradients
        cast = [None if grad is None else grad.to(dtype) for grad, dtype in zip(scaled, ctx.dtypes, strict=True)]
        return (*cast, None, None, None, None)


def _by_pieces(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    counted: Tensor,
    piece_rows: int,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None], float]:
    """Return the loss, the gradients asked for in fp32 (or fp64) times a scale, and that scale.

    Args:
        hidden: `[N, H]`.
        weight: `[V, H]`.
        bias: `[V]` or None.
        labels: `[N]`.
        counted: `[N]`, False where the label is to be ignored.
        piece_rows: rows a piece.
        dtype: of the matrix products.
        needs: whether hidden, weight and bias need a gradient.
    """
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Only CUDA multiplies 16-bit matrices into fp32. Elsewhere operands are rounded to 16 bits and widened again.
    narrow = dtype if hidden.is_cuda else wide
    scale = _FP16_SCALE if narrow == torch.float16 else 1.0
    for_hidden, for_weight, for_bias = needs
    grad_hidden = hidden.new_empty(hidden.shape, dtype=wide) if for_hidden else None
    grad_weight = weight.new_zeros(weight.shape, dtype=wide) if for_weight else None
    grad_bias = weight.new_zeros((1, vocabulary), dtype=wide) if for_bias else None
    loss = hidden.new_zeros((), dtype=wide)
    softmax = _Softmax(hidden, min(piece_rows, rows), vocabulary, wide, narrow, scale)

    with torch.autocast(hidden.device.type, enabled=False):
        head = weight.to(dtype).to(narrow)
        for start in range(0, rows, piece_rows):
            piece = slice(start, min(start + piece_rows, rows))
            keep = counted[piece, None]
            # With ignored rows zeroed here, they add nothing to the weight's gradient, whatever they held.
            x = torch.where(keep, hidden[piece], 0).to(dtype).to(narrow)
            logits = softmax.logits[: piece.stop - start]
            _multiply(x, head.t(), logits, accumulate=False)
            if bias is not None:
                logits.add_(bias)
            piece_loss, gradient = softmax.take(logits, labels[piece, None], keep, with_gradient=any(needs))
            loss.add_(piece_loss)
            if grad_hidden is not None and gradient is not None:
                _multiply(gradient, head, grad_hidden[piece], accumulate=False)
            if grad_weight is not None and gradient is not None:
                _multiply(gradient.t(), x, grad_weight, accumulate=True)
            if grad_bias is not None and gradient is not None:
                _multiply(keep.t().to(narrow), gradient, grad_bias, accumulate=True)
    if grad_hidden is not None:
        grad_hidden.masked_fill_(~counted[:, None], 0)
    return loss, (grad_hidden, grad_weight, grad_bias.view(-1) if grad_bias is not None else None), scale


class _Softmax:
    """From a piece of logits to its loss and the gradient of the logits, in buffers that every piece uses again.

    On a CPU, fresh ones would cost a page fault every 4 KB.
    """

    def __init__(
        self, like: Tensor, rows: int, vocabulary: int, wide: torch.dtype, narrow: torch.dtype, scale: float
    ) -> None:
        self.logits = like.new_empty((rows, vocabulary), dtype=wide)
        self._fused = wide == torch.float32 and triton_runs_on(like.device)
        # The kernel writes the gradient alone: in the dtype of the products, or over the logits if that is theirs.
        in_place = self._fused and narrow == wide
        self._second = (
            self.logits if in_place else like.new_empty((rows, vocabulary), dtype=narrow if self._fused else wide)
        )
        self._narrow = narrow
        self._scale = scale

    def take(
        self, logits: Tensor, labels: Tensor, keep: Tensor, *, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the piece's loss and, if asked for, the gradient of its logits times the scale; both in buffers.

        Args:
            logits: `[n, V]`, the first rows of `self.logits`; not to be used afterwards.
            labels: `[n, 1]`.
            keep: `[n, 1]`, False where a row is to be ignored.
            with_gradient: whether the gradient is needed.
        """
        second = self._second[: logits.shape[0]]
        if self._fused and with_gradient:
            losses = loss_and_gradient(logits, labels.view(-1), keep.view(-1), second, self._scale)
            return losses.sum(), second
        return self._by_torch(logits, labels, keep, second, with_gradient=with_gradient)

    def _by_torch(
        self, logits: Tensor, labels: Tensor, keep: Tensor, logp: Tensor, *, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        target = torch.where(keep, labels, 0)
        if self._fused:
            logp = torch.log_softmax(logits, dim=-1)
        else:
            torch.log_softmax(logits, dim=-1, out=logp)
        target_logp = logp.gather(1, target)
        loss = -torch.where(keep, target_logp, 0).sum()
        if not with_gradient:
            return loss, None
        # The gradient of the logits is softmax - one_hot, written once, in the dtype of the products. At the
        # target, p - 1 comes from expm1, since rounding p to 16 bits first would leave nothing of 1 - 0.999.
        if self._scale != 1.0:
            logp.add_(math.log(self._scale))
        gradient = logp
        if self._narrow != logits.dtype:
            gradient = logits.view(self._narrow).view(-1)[: logits.numel()].view(logits.shape)
        torch.exp(logp, out=gradient)
        gradient.scatter_(1, target, torch.expm1(target_logp).mul_(self._scale).to(self._narrow))
        return loss, gradient


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """Write `a @ b` to `out`, or add it there; `out` may be fp32 where a and b have 16 bits, on CUDA."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=float(accumulate), out=out)
    else:
        torch.addmm(out, a, b, out.dtype, beta=float(accumulate), out=out)
