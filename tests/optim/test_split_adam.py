"""How tensors are dealt to the programs of the one-pass kernel. The kernel itself is looked at on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from albireo.optim import HybridAdam
from albireo.optim import split_adam as module
from albireo.optim.split_adam import SplitAdam, programs_of


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=20))
def test_each_chunk_of_each_tensor_has_one_program(numels: list[int]) -> None:
    tensor_of_program, first_program = programs_of(numels)
    chunks = [
        (int(tensor), program - int(first_program[tensor])) for program, tensor in enumerate(tensor_of_program.tolist())
    ]
    wanted = [(tensor, chunk) for tensor, numel in enumerate(numels) for chunk in range(-(-numel // module._CHUNK))]
    assert chunks == wanted


def test_no_kernel_steps_on_a_cpu() -> None:
    assert not SplitAdam.can_step(HybridAdam([nn.Parameter(torch.ones(4))]), torch.device("cpu"))


def test_a_decay_in_the_gradient_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "triton_runs_on", lambda _: True)

    def can_step(*groups: dict[str, float], adamw_mode: bool) -> bool:
        parameters = [{"params": [nn.Parameter(torch.ones(4))], **group} for group in groups]
        return SplitAdam.can_step(HybridAdam(parameters, adamw_mode=adamw_mode), torch.device("cpu"))

    assert can_step({"weight_decay": 0.1}, {"weight_decay": 0.0}, adamw_mode=True)
    assert can_step({"weight_decay": 0.0}, adamw_mode=False)
    assert not can_step({"weight_decay": 0.0}, {"weight_decay": 0.1}, adamw_mode=False)
