import pytest
import torch

from albireo.optim import clip_by_norm, global_norm


def test_the_norm_is_that_of_all_gradients_together() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), ())]
    expected = torch.cat([gradient.reshape(-1).double() for gradient in gradients]).norm()
    assert global_norm(gradients).item() == pytest.approx(expected.item(), rel=1e-6)
    assert global_norm([]).item() == 0.0


def test_long_gradients_lose_nothing_on_a_cpu() -> None:
    assert global_norm([torch.full((5_000_001,), 0.1)]).item() == pytest.approx(0.1 * 5_000_001**0.5, rel=1e-6)


def test_a_sum_of_16_bit_gradients_is_taken_in_fp32() -> None:
    assert global_norm([torch.full((1000, 1000), 100.0, dtype=torch.float16)]).item() == pytest.approx(1e5, rel=1e-5)


@pytest.mark.parametrize("cut", [0, 3, 20])
def test_ranks_that_hold_parts_add_their_squares(cut: int) -> None:
    whole = torch.randn(20, generator=torch.Generator().manual_seed(2))
    parts = [[whole[:cut]], [whole[cut:]]] if 0 < cut < 20 else [[], [whole]]
    sums: list[torch.Tensor] = []

    def collect(squares: torch.Tensor) -> torch.Tensor:
        assert squares.dtype == torch.float64
        assert squares.dim() == 0
        sums.append(squares)
        return squares

    for part in parts:
        global_norm(part, collect)
    norms = [global_norm(part, lambda _: sums[0] + sums[1]) for part in parts]
    assert torch.equal(*norms)
    assert norms[0].dtype == torch.float32
    assert norms[0].item() == pytest.approx(whole.double().norm().item(), rel=1e-7)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_gives_torchs_own_bits(max_norm: float) -> None:
    generator = torch.Generator().manual_seed(1)
    ours = [torch.randn(4, 5, generator=generator), torch.randn(7, generator=generator)]
    theirs = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in ours]
    for parameter, gradient in zip(theirs, ours, strict=True):
        parameter.grad = gradient.clone()
    norm = global_norm(ours)
    clip_by_norm(ours, norm, max_norm)
    torch.nn.utils.clip_grads_with_norm_(theirs, max_norm, norm)
    for parameter, gradient in zip(theirs, ours, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_a_norm_that_is_not_finite_is_not_hidden() -> None:
    gradients = [torch.tensor([1.0, float("inf")])]
    norm = global_norm(gradients)
    clip_by_norm(gradients, norm, 1.0)
    assert not torch.isfinite(norm)
    assert not torch.isfinite(gradients[0]).all()
