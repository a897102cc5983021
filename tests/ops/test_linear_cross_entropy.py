from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from albireo.errors import ModelError
from albireo.ops import default_piece_rows, linear_cross_entropy

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def plain(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    logits = functional.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=ignore_index)


def case(
    seed: int,
    rows: int = 37,
    width: int = 24,
    words: int = 101,
    ignored: float = 0.2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and labels; logits have a spread of about 1, as a trained head's have."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(words, width, generator=generator) / width**0.5
    bias = torch.randn(words, generator=generator)
    labels = torch.randint(words, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    floats = [t.to(device, dtype).requires_grad_() for t in (hidden, weight, bias)]
    return floats[0], floats[1], floats[2], labels.to(device)


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def distance(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, in the norm that weighs all elements alike; 0 for two zeros."""
    difference = (got.double() - want.double()).norm()
    return float(difference / want.double().norm()) if difference > 0 else 0.0


def sizes_of_terms(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> list[Tensor]:
    """What each gradient would be if its terms could not cancel: the sum of their absolute values.

    Rounding errors are relative to these. Two words and one dimension cancel almost wholly, in any implementation.
    """
    with torch.no_grad():
        probabilities = functional.linear(hidden, weight, bias).softmax(-1)
        counted = labels != -100
        one_hot = functional.one_hot(labels.where(counted, 0), weight.shape[0])
        terms = (probabilities + one_hot) * counted[:, None]
        return [terms @ weight.abs(), terms.t() @ hidden.abs(), terms.sum(0)]


@settings(max_examples=200)
@given(
    leading=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    width=st.integers(1, 40),
    words=st.integers(2, 300),
    piece_rows=st.one_of(st.none(), st.integers(1, 40)),
    ignored=st.sampled_from([0.0, 0.3, 0.9]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_plain_cross_entropy_on_any_shape(
    leading: list[int], width: int, words: int, piece_rows: int | None, ignored: float, with_bias: bool, seed: int
) -> None:
    rows = torch.Size(leading).numel()
    hidden, weight, bias, labels = case(seed, rows, width, words, ignored)
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    bias_or_none = bias if with_bias else None
    loss, count = linear_cross_entropy(
        hidden.view(*leading, width), weight, labels.view(leading), bias=bias_or_none, piece_rows=piece_rows
    )
    want = plain(hidden, weight, labels, bias_or_none)

    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert count.dtype == torch.int64
    assert int(count) == int((labels != -100).sum())
    assert distance(loss.detach(), want.detach()) <= 1e-6
    sizes = sizes_of_terms(hidden, weight, labels, bias_or_none)
    for got, expected, size in zip(gradients(loss, *inputs), gradients(want, *inputs), sizes, strict=False):
        assert got.dtype == expected.dtype
        assert float((got - expected).norm()) <= 1e-6 * float(size.norm())


@pytest.mark.parametrize("piece_rows", [1, 5, 36, 37, 1000])
def test_the_size_of_pieces_does_not_matter(piece_rows: int) -> None:
    hidden, weight, bias, labels = case(0, dtype=torch.float64)
    loss, _ = linear_cross_entropy(hidden, weight, labels, bias=bias, piece_rows=piece_rows)
    want = plain(hidden, weight, labels, bias)
    assert distance(loss.detach(), want.detach()) < 1e-14
    for got, expected in zip(gradients(loss, hidden, weight, bias), gradients(want, hidden, weight, bias), strict=True):
        assert distance(got, expected) < 1e-14


def test_gradients_agree_with_differences() -> None:
    """Central differences in fp64, for every element of every input."""
    *inputs, labels = case(3, rows=5, width=4, words=7, dtype=torch.float64)
    loss, _ = linear_cross_entropy(inputs[0], inputs[1], labels, bias=inputs[2], piece_rows=2)
    for tensor, gradient in zip(inputs, gradients(loss, *inputs), strict=True):
        for index in itertools.product(*map(range, tensor.shape)):
            with torch.no_grad():
                ends = []
                for step in (1e-6, -2e-6):
                    tensor[index] += step
                    ends.append(linear_cross_entropy(inputs[0], inputs[1], labels, bias=inputs[2], piece_rows=2)[0])
                tensor[index] += 1e-6
            assert float(ends[0] - ends[1]) / 2e-6 == pytest.approx(float(gradient[index]), abs=1e-8)


@pytest.mark.skipif(not hasattr(functional, "linear_cross_entropy"), reason="torch has no linear_cross_entropy")
def test_agrees_with_torch_s_own() -> None:
    hidden, weight, _, labels = case(4)
    loss, _ = linear_cross_entropy(hidden, weight, labels, piece_rows=8)
    want = functional.linear_cross_entropy(hidden, weight, labels, reduction="sum")
    assert distance(loss.detach(), want.detach()) < 1e-6
    for got, expected in zip(gradients(loss, hidden, weight), gradients(want, hidden, weight), strict=True):
        assert distance(got, expected) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 1 / 37, 2.0**16 / 37])
def test_in_16_bits_is_no_worse_than_plain(device: str, dtype: torch.dtype, factor: float) -> None:
    """Each against fp64 on the same 16-bit inputs."""
    worse = []
    for seed in range(5):
        hidden, weight, _, labels = case(seed, rows=256, width=64, words=1000, dtype=dtype, device=device)
        wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        want = gradients(plain(*wide, labels) * factor, *wide)
        ours_loss, _ = linear_cross_entropy(hidden, weight, labels, piece_rows=100)
        plain_loss = plain(hidden, weight, labels)
        ours = gradients(ours_loss * factor, hidden, weight)
        theirs = gradients(plain_loss * factor, hidden, weight)
        exact = plain(*wide, labels).detach()
        worse.append(distance(ours_loss.detach(), exact) / distance(plain_loss.detach(), exact))
        for got, other, expected in zip(ours, theirs, want, strict=True):
            assert got.dtype == dtype
            assert got.isfinite().all()
            assert distance(got, expected) <= distance(other, expected)
    assert sorted(worse)[2] < 1.0


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_too_small_for_fp16_survive_until_the_loss_scale_lifts_them(device: str) -> None:
    """A summed loss over few rows of a large vocabulary: probabilities of 1e-6 are lost in an unscaled fp16."""
    hidden, weight, _, labels = case(0, rows=4, width=16, words=300_000, ignored=0, dtype=torch.float16, device=device)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = gradients(plain(*wide, labels) * 2.0**16, *wide)
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    got = gradients(loss * 2.0**16, hidden, weight)
    unlikely = torch.ones(weight.shape[0], dtype=torch.bool, device=device).index_fill_(0, labels, False)
    assert distance(got[1][unlikely], want[1][unlikely]) < 2e-3


@pytest.mark.parametrize("device", DEVICES)
def test_a_confident_right_answer_keeps_its_gradient_in_bf16(device: str) -> None:
    """p = 0.9997 rounds to 1 in bf16; 1 - p must not become zero."""
    weight = torch.tensor([[8.0], [0.0]], dtype=torch.bfloat16, device=device, requires_grad=True)
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([0], device=device))
    (gradient,) = gradients(loss, weight)
    expected = torch.tensor([[-1.0], [1.0]], dtype=torch.float64) / (1 + torch.tensor(8.0, dtype=torch.float64).exp())
    assert distance(gradient.cpu(), expected) < 2**-8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_wide_gradients_to_wide_weights(device: str, dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = case(1, device=device)
    want = gradients(plain(hidden, weight, labels, bias), hidden, weight, bias)
    with torch.autocast(device, dtype=dtype):
        loss, _ = linear_cross_entropy(hidden, weight, labels, bias=bias, piece_rows=10)
        theirs = plain(hidden, weight, labels, bias)
    assert loss.dtype == torch.float32
    got, other = gradients(loss, hidden, weight, bias), gradients(theirs, hidden, weight, bias)
    for ours, plain_one, expected in zip(got, other, want, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < distance(ours, expected) <= 1.05 * distance(plain_one, expected)


def test_autocast_casts_the_weight_once_not_once_a_piece() -> None:
    hidden, weight, _, labels = case(1, rows=64, words=500)
    with Recorder() as recorder, torch.autocast("cpu", dtype=torch.bfloat16):
        linear_cross_entropy(hidden, weight, labels, piece_rows=4)
    casts = [shape for name, shape in recorder.results if "_to_copy" in name and shape == weight.shape]
    assert len(casts) == 2, "to bf16, and on a CPU back to fp32"


@pytest.mark.parametrize("device", DEVICES)
def test_ignored_rows_touch_nothing_whatever_they_hold(device: str) -> None:
    hidden, weight, bias, labels = case(2, device=device)
    want_loss = plain(hidden, weight, labels, bias)
    want = gradients(want_loss, hidden, weight, bias)
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    loss, _ = linear_cross_entropy(hidden, weight, labels, bias=bias, piece_rows=7)
    assert distance(loss.detach(), want_loss.detach()) < 1e-6
    got = gradients(loss, hidden, weight, bias)
    assert (got[0][labels == -100] == 0).all()
    for ours, expected in zip(got, want, strict=True):
        assert distance(ours, expected) < 1e-6


def test_another_ignore_index() -> None:
    hidden, weight, _, labels = case(5)
    labels[labels == -100] = 3
    loss, count = linear_cross_entropy(hidden, weight, labels, ignore_index=3)
    assert int(count) == int((labels != 3).sum())
    assert distance(loss.detach(), plain(hidden, weight, labels, ignore_index=3).detach()) < 1e-6


def test_all_ignored_is_zero_with_zero_gradients() -> None:
    hidden, weight, bias, labels = case(6)
    loss, count = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), bias=bias)
    assert float(loss.detach()) == 0.0
    assert int(count) == 0
    assert all(not gradient.any() for gradient in gradients(loss, hidden, weight, bias))


def test_no_rows_at_all() -> None:
    _, weight, _, _ = case(6)
    hidden = torch.empty(0, weight.shape[1], requires_grad=True)
    loss, count = linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.int64))
    got = gradients(loss, hidden, weight)
    assert (float(loss.detach()), int(count), got[0].shape) == (0.0, 0, hidden.shape)
    assert not got[1].any()


@pytest.mark.parametrize("leading", [(5,), (3, 5), (2, 3, 5), (4, 1)])
def test_shift_judges_each_position_by_the_next_label(leading: tuple[int, ...]) -> None:
    rows = torch.Size(leading).numel()
    hidden, weight, _, labels = case(7, rows=rows)
    hidden_view, label_view = hidden.view(*leading, -1), labels.view(leading)
    loss, count = linear_cross_entropy(hidden_view, weight, label_view, shift=True, piece_rows=4)
    want = plain(hidden_view[..., :-1, :].reshape(-1, weight.shape[1]), weight, label_view[..., 1:].reshape(-1))
    assert int(count) == int((label_view[..., 1:] != -100).sum())
    assert distance(loss.detach(), want.detach()) < 1e-6
    for got, expected in zip(gradients(loss, hidden, weight), gradients(want, hidden, weight), strict=True):
        assert distance(got, expected) < 1e-6


def test_a_tied_weight_gets_both_gradients() -> None:
    _, weight, _, labels = case(8, ignored=0)
    ids = labels.roll(1)
    loss, _ = linear_cross_entropy(functional.embedding(ids, weight).tanh(), weight, labels, piece_rows=9)
    want = plain(functional.embedding(ids, weight).tanh(), weight, labels)
    assert distance(gradients(loss, weight)[0], gradients(want, weight)[0]) < 1e-6


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)))
def test_only_the_gradients_that_are_needed(needed: tuple[bool, bool, bool]) -> None:
    *inputs, labels = case(9)
    for tensor, need in zip(inputs, needed, strict=True):
        tensor.requires_grad_(need)
    hidden, weight, bias = inputs
    loss, _ = linear_cross_entropy(hidden, weight, labels, bias=bias, piece_rows=9)
    assert loss.requires_grad == any(needed)
    if not any(needed):
        return
    loss.backward()
    wanted = [t for t in inputs if t.requires_grad]
    for tensor, expected in zip(wanted, gradients(plain(hidden, weight, labels, bias), *wanted), strict=True):
        assert distance(tensor.grad, expected) < 1e-6
    assert [t.grad is not None for t in inputs] == list(needed)


def test_without_gradients_only_the_loss_is_computed() -> None:
    hidden, weight, _, labels = case(10)
    with torch.no_grad(), Recorder() as recorder:
        loss, _ = linear_cross_entropy(hidden, weight, labels)
    products = [name for name, _ in recorder.results if "addmm" in name]
    assert not loss.requires_grad
    assert len(products) == 1
    assert distance(loss, plain(hidden, weight, labels).detach()) < 1e-6


def test_the_weight_takes_its_gradient_over_without_a_copy() -> None:
    hidden, weight, _, labels = case(11, rows=64, words=500)
    loss, _ = linear_cross_entropy(hidden, weight, labels, piece_rows=8)
    with Recorder() as recorder:
        loss.backward()
    assert [name for name, shape in recorder.results if shape == weight.shape] == ["aten.mul_.Tensor"]


def test_a_second_backward_is_refused() -> None:
    hidden, weight, _, labels = case(12)
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(ModelError, match="second backward"):
        loss.backward()


@pytest.mark.parametrize("training", [True, False])
def test_nothing_as_large_as_all_logits_is_made_and_nothing_is_read_by_the_host(training: bool) -> None:
    rows, width, words, piece_rows = 512, 16, 1000, 32
    hidden, weight, bias, labels = case(13, rows=rows, width=width, words=words)
    with Recorder() as recorder, torch.set_grad_enabled(training):
        loss, count = linear_cross_entropy(hidden, weight, labels, bias=bias, piece_rows=piece_rows)
        if training:
            (loss / count).backward()
    largest = max(torch.Size(shape).numel() for _, shape in recorder.results)
    assert largest == piece_rows * words
    assert largest * 16 == rows * words
    reads = {
        "aten._local_scalar_dense.default",
        "aten.nonzero.default",
        "aten.masked_select.default",
        "aten.item.default",
    }
    assert not reads & {name for name, _ in recorder.results}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_nothing_waits_and_memory_stays_within_two_pieces(dtype: torch.dtype) -> None:
    rows, width, words = 8192, 256, 50272
    hidden, weight, _, labels = case(14, rows, width, words, dtype=dtype, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, count = linear_cross_entropy(hidden, weight, labels)
        (loss / count).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2 * 2**29 + 4 * (2 * weight.numel() + 2 * hidden.numel()) + 2**27


@settings(max_examples=300)
@given(rows=st.integers(0, 200_000), words=st.integers(1, 300_000), device=st.sampled_from(["cpu", "cuda"]))
def test_default_pieces_are_even_and_small_but_not_too_small(rows: int, words: int, device: str) -> None:
    piece = default_piece_rows(rows, words, torch.device(device))
    assert piece >= 1
    assert piece * words * 4 <= (2**29 if device == "cuda" else 2**28) or piece <= 512
    if piece < rows:
        assert piece % 128 == 0
        pieces = -(-rows // piece)
        assert rows - (pieces - 1) * piece > piece - 128 * pieces, "the last piece is no sliver"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, w, b, y: ((h[:, 1:], w, y), {"bias": b}), "do not fit a head"),
        (lambda h, w, b, y: ((h, w[0], y), {"bias": b}), "do not fit a head"),
        (lambda h, w, b, y: ((h, w, y[1:]), {"bias": b}), "one label for each row"),
        (lambda h, w, b, y: ((h, w, y), {"bias": b[1:]}), "a bias of shape"),
        (lambda h, w, _, y: ((h, w.double(), y), {}), "cast one"),
        (lambda h, w, _, y: ((h, w, y), {"piece_rows": 0}), "piece_rows is 0"),
    ],
)
def test_what_does_not_fit_is_said(change: Callable[..., Any], words: str) -> None:
    arguments, options = change(*case(15))
    with pytest.raises(ModelError, match=words):
        linear_cross_entropy(*arguments, **options)


class Recorder(TorchDispatchMode):
    """Notes each operation that made a tensor, with its shape; views of tensors already there are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and not func.is_view:
                self.results.append((str(func), value.shape))
        if not isinstance(result, (Tensor, tuple, list)):
            self.results.append((str(func), torch.Size([])))
        return result
