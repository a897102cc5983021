from typing import Any

import pytest
import torch
from torch import nn

from albireo.errors import CheckpointError
from albireo.optim import complete_names, named_groups, restore_named_groups


def make(**options: Any) -> tuple[dict[nn.Parameter, str], torch.optim.Optimizer]:
    first, second, third = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    groups = [{"params": [first, second]}, {"params": [third], "weight_decay": 0.5}]
    return {first: "a", third: "c"}, torch.optim.AdamW(groups, **{"lr": 0.1, **options})


def params(optimizer: torch.optim.Optimizer) -> list[list[nn.Parameter]]:
    return [group["params"] for group in optimizer.param_groups]


def test_settings_go_from_one_to_the_other_but_not_the_kernels() -> None:
    names, optimizer = make(lr=0.3, betas=(0.5, 0.6), fused=True)
    optimizer.param_groups[1]["initial_lr"] = 7.0
    complete = complete_names(params(optimizer), names)
    assert list(complete.values()) == ["a", "param_groups.0.params.1", "c"]
    saved = named_groups(optimizer, params(optimizer), complete)
    other_names, other = make(foreach=True)
    restore_named_groups(other, params(other), complete_names(params(other), other_names), saved)
    assert [group["lr"] for group in other.param_groups] == [0.3, 0.3]
    assert other.param_groups[0]["betas"] == (0.5, 0.6)
    assert other.param_groups[1]["initial_lr"] == 7.0
    assert other.param_groups[0]["foreach"] is True
    assert not other.param_groups[0]["fused"]


def test_a_rate_that_is_a_tensor_stays_one() -> None:
    names, optimizer = make(lr=torch.tensor(0.5), capturable=True)
    saved = named_groups(optimizer, params(optimizer), complete_names(params(optimizer), names))
    assert saved[0]["lr"] == 0.5
    other_names, other = make(lr=torch.tensor(0.25), capturable=True)
    rate = other.param_groups[0]["lr"]
    restore_named_groups(other, params(other), complete_names(params(other), other_names), saved)
    assert other.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda saved: saved.pop(), "1 groups of parameters, and this one 2"),
        (lambda saved: saved[1]["params"].append("z"), "only the saved optimizer has z in group 1"),
        (lambda saved: saved[0]["params"].remove("a"), "only this optimizer has a in group 0"),
    ],
)
def test_other_groups_are_refused_before_anything_changes(change: Any, said: str) -> None:
    names, optimizer = make()
    complete = complete_names(params(optimizer), names)
    saved = named_groups(optimizer, params(optimizer), complete)
    for group in saved:
        group["lr"] = 99.0
    change(saved)
    with pytest.raises(CheckpointError, match=said):
        restore_named_groups(optimizer, params(optimizer), complete, saved)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
