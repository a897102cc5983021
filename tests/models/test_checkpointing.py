from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from albireo.errors import ModelError
from albireo.models import OPT, enable_activation_checkpointing, initialise, materialise


def built(dropout: float = 0.0) -> PreTrainedModel:
    config = OPT.config_for("tiny", vocab_size=64, dropout=dropout)
    model = OPT.make_model(config)
    materialise(model, torch.device("cpu"))
    initialise(model, 0)
    return model.train()


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    ids = torch.arange(32).view(2, 16)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("keeps_last", "runs_of_blocks"), [(False, 4), (True, 3)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_the_same_and_blocks_run_twice(dropout: float, keeps_last: bool, runs_of_blocks: int) -> None:
    want = gradients(built(dropout))
    model = built(dropout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_activation_checkpointing(model, preserve_rng_state=dropout > 0, family=OPT if keeps_last else None)
    runs = []
    for _, block in OPT.blocks(model):
        block.fc1.register_forward_hook(lambda *_: runs.append(1))
    got = gradients(model)
    assert len(runs) == runs_of_blocks
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


def test_preserving_the_random_state_matters_where_there_is_dropout() -> None:
    want = gradients(built(0.5))
    model = built(0.5)
    enable_activation_checkpointing(model, preserve_rng_state=False)
    got = gradients(model)
    assert any(not torch.equal(got[name], gradient) for name, gradient in want.items())


def test_nothing_is_left_on_the_embedding() -> None:
    model = built()
    enable_activation_checkpointing(model, preserve_rng_state=False)
    assert not model.get_input_embeddings()._forward_hooks


def test_evaluation_does_not_recompute() -> None:
    model = built()
    enable_activation_checkpointing(model, preserve_rng_state=False)
    model.eval()
    runs = []
    OPT.blocks(model)[0][1].fc1.register_forward_hook(lambda *_: runs.append(1))
    model(input_ids=torch.arange(8)[None], use_cache=False).logits.sum().backward()
    assert len(runs) == 1


def test_a_model_without_the_switch_is_refused() -> None:
    model = built()
    model.supports_gradient_checkpointing = False
    with pytest.raises(ModelError, match="OPTForCausalLM has no activation checkpointing"):
        enable_activation_checkpointing(model, preserve_rng_state=False)
    assert isinstance(model, nn.Module)
