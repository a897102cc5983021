import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from albireo.optim import learning_rate_factor, scheduler_for, set_scheduler_step, warmup_steps_of


@given(
    steps=st.integers(1, 500),
    warmup=st.integers(0, 100),
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
)
def test_it_rises_then_falls_and_every_step_moves(steps: int, warmup: int, schedule: str) -> None:
    warmup = min(warmup, steps - 1)
    factors = [learning_rate_factor(step, steps=steps, warmup_steps=warmup, schedule=schedule) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert factors[warmup] == 1.0


def test_it_ends_at_zero_after_the_last_step() -> None:
    for schedule, end in (("linear", 0.0), ("cosine", 0.0), ("constant", 1.0)):
        assert learning_rate_factor(10, steps=10, warmup_steps=2, schedule=schedule) == end


@pytest.mark.parametrize(("warmup", "steps", "expected"), [(0.1, 60, 6), (0.0, 60, 0), (5.0, 60, 5), (0.5, 3, 2)])
def test_a_warmup_is_a_share_or_a_number(warmup: float, steps: int, expected: int) -> None:
    assert warmup_steps_of(warmup, steps) == expected


@given(st.integers(0, 40))
def test_a_scheduler_put_at_a_step_goes_on_as_one_that_stepped_there(step: int) -> None:
    def fresh() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.3}], lr=0.1)
        return optimizer, scheduler_for(optimizer, steps=50, warmup_steps=7, schedule="cosine")

    walked_optimizer, walked = fresh()
    for _ in range(step):
        walked_optimizer.step()
        walked.step()
    jumped_optimizer, jumped = fresh()
    set_scheduler_step(jumped, step)
    for _ in range(5):
        assert jumped_optimizer.param_groups[0]["lr"] == walked_optimizer.param_groups[0]["lr"]
        for optimizer, scheduler in ((walked_optimizer, walked), (jumped_optimizer, jumped)):
            optimizer.step()
            scheduler.step()
