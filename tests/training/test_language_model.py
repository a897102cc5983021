"""A planned language model, built whole and lazily."""

from __future__ import annotations

from contextlib import closing

import torch

from albireo.config import MachineFacts, RunConfig, merge, resolve
from albireo.training.language_model import plan_language_model


def test_built_lazily_it_is_the_same_model() -> None:
    config = resolve(merge(RunConfig(), {"seed": 5, "dropout": 0.25}), MachineFacts("cpu", 1, False))
    plan = plan_language_model(config)
    built, lines = plan.build(None, config, torch.device("cpu"))
    model, source, lazy_lines = plan.build_lazily(None, config)
    assert lazy_lines == lines
    assert model.config.to_dict() == built.config.to_dict()
    assert model.config.dropout == 0.25
    assert model.training
    wanted = dict(built.named_parameters())
    with closing(source):
        for name, parameter in model.named_parameters():
            assert parameter.is_meta
            out = torch.empty(parameter.numel())
            source.fill(parameter, 0, out)
            assert torch.equal(out.view(parameter.shape), wanted[name]), name
    assert list(wanted) == [name for name, _ in model.named_parameters()]
