"""A planned language model, built whole and lazily."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch

from albireo.config import MachineFacts, RunConfig, merge, resolve
from albireo.training.language_data import random_data
from albireo.training.language_model import plan_language_model


@pytest.mark.parametrize("adapter", [{}, {"adapter": "lora", "lora_targets": "q_proj,fc1"}], ids=["none", "lora"])
def test_built_lazily_it_is_the_same_model(adapter: dict[str, Any]) -> None:
    config = resolve(merge(RunConfig(), {"seed": 5, "dropout": 0.25, **adapter}), MachineFacts("cpu", 1, False))
    plan = plan_language_model(config)
    built, lines = plan.build(random_data(10, 8, 0), config, torch.device("cpu"))
    model, source, lazy_lines = plan.build_lazily(random_data(10, 8, 0), config)
    assert lazy_lines == lines
    assert model.config.to_dict() == built.config.to_dict()
    assert model.config.dropout == 0.25
    assert model.training
    wanted = dict(built.named_parameters())
    with closing(source):
        for name, parameter in model.named_parameters():
            # An adapter is trained, and the rest is without memory.
            assert parameter.is_meta == (".lora_" not in name)
            assert parameter.requires_grad == wanted[name].requires_grad == (not adapter or not parameter.is_meta)
            out = torch.empty(parameter.numel())
            source.fill(parameter, 0, out)
            assert torch.equal(out.view(parameter.shape), wanted[name]), name
    assert list(wanted) == [name for name, _ in model.named_parameters()]
