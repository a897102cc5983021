from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from albireo.errors import ModelError
from albireo.models import OPT, initial_values, initialise, initialise_module, materialise


def built(seed: int, size: str = "tiny") -> PreTrainedModel:
    model = OPT.make_model(OPT.config_for(size))
    materialise(model, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    initialise(model, seed)
    return model


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, again, other = (dict(built(seed).named_parameters()) for seed in (3, 3, 4))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
        drawn = name.endswith("weight") and "norm" not in name
        assert torch.equal(parameter, other[name]) != drawn, name


def test_weights_are_as_transformers_begins_them() -> None:
    """OPT's own rule: normal weights of standard deviation 0.02, the padding row and biases 0, norms 1 and 0."""
    model = built(0).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert abs(float(parameter.mean())) < 0.001, name
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.03), name
    embedding = model.model.decoder.embed_tokens.weight
    assert not embedding[1].any()
    assert embedding[0].any()
    assert model.lm_head.weight is embedding


def test_no_two_modules_begin_alike() -> None:
    model = built(0).requires_grad_(False)
    first = [float(p.flatten()[-1]) for n, p in model.named_parameters() if n.endswith("weight") and "norm" not in n]
    assert len(set(first)) == len(first)


def test_without_a_padding_token_no_row_is_zero() -> None:
    config = OPT.config_for("tiny")
    config.pad_token_id = None
    model = OPT.make_model(config)
    materialise(model, torch.device("cpu"))
    initialise(model, 0)
    assert model.model.decoder.embed_tokens.weight.any(dim=1).all()


def test_any_order_and_any_subset_give_the_same_numbers() -> None:
    """As a builder needs that makes the model chunk by chunk, in an order of its own, in 16 bits."""
    whole = built(5)
    model = OPT.make_model(whole.config)
    for name, module in reversed(list(model.named_modules())):
        if name != "lm_head" and (not name.startswith("model.decoder.layers.0") or name.endswith("fc2")):
            for parameter_name, value in initial_values(module, name, 5, whole.config):
                assert torch.equal(value, whole.get_submodule(name).get_parameter(parameter_name))
    half = OPT.make_model(whole.config).to_empty(device="cpu").to(torch.bfloat16)
    initialise_module(half.model.decoder.layers[1].fc1, "model.decoder.layers.1.fc1", 5, whole.config)
    wanted = whole.model.decoder.layers[1].fc1.weight
    assert torch.equal(half.model.decoder.layers[1].fc1.weight, wanted.to(torch.bfloat16))


def test_the_global_random_state_is_neither_used_nor_changed() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = built(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(first.model.decoder.layers[0].fc1.weight, built(1).model.decoder.layers[0].fc1.weight)


def test_numbers_are_fixed_for_good() -> None:
    """A run that is begun again years later, or continued elsewhere, begins from the same weights."""
    module = nn.Linear(4, 3, device="meta")
    values = dict(initial_values(module, "model.decoder.layers.0.fc1", 42, OPT.config_for("tiny")))
    expected = [
        [-0.005778727, 0.034771200, -0.008294504, 0.035341922],
        [-0.005176175, 0.048592720, -0.003744460, 0.028950509],
        [0.014213564, 0.048492834, -0.039728470, -0.021977954],
    ]
    torch.testing.assert_close(values["weight"], torch.tensor(expected))


def test_a_module_of_an_unknown_type_is_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3))

    model = built(0)
    model.model.decoder.scale = Scale()
    with pytest.raises(ModelError, match=r"model\.decoder\.scale\.factor cannot be initialised.*Scale"):
        initialise(model, 0)


def test_a_module_that_shares_one_of_its_parameters_is_refused() -> None:
    model = built(0)
    layer = model.model.decoder.layers[0]
    layer.fc1.bias = nn.Parameter(torch.zeros(512))
    layer.extra = nn.Linear(128, 512)
    layer.extra.weight = layer.fc1.weight
    with pytest.raises(ModelError, match=r"layers\.0\.extra shares some"):
        initialise(model, 0)


def test_an_untied_head_has_weights_of_its_own() -> None:
    config = OPT.config_for("tiny")
    config.tie_word_embeddings = False
    model = OPT.make_model(config)
    materialise(model, torch.device("cpu"))
    initialise(model.requires_grad_(False), 0)
    assert model.lm_head.weight is not model.model.decoder.embed_tokens.weight
    assert float(model.lm_head.weight.std()) == pytest.approx(0.02, rel=0.01)
    assert not torch.equal(model.lm_head.weight, model.model.decoder.embed_tokens.weight)


def test_threads_end() -> None:
    built(0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("initialise")]


@pytest.mark.parametrize("pair", [((1, "a"), (1, "b")), ((1, "a"), (2, "a")), ((1, "1a"), (11, "a"))])
def test_streams_differ_by_seed_and_by_name(pair: Any) -> None:
    module, config = nn.Linear(8, 8, device="meta"), OPT.config_for("tiny")
    one, other = (dict(initial_values(module, name, seed, config))["weight"] for seed, name in pair)
    assert not torch.equal(one, other)
