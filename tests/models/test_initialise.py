from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from albireo.errors import ModelError
from albireo.models import OPT, InitialValues, initialise, initialise_module, materialise


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
    model = OPT.make_model(whole.config).to_empty(device="cpu").to(torch.bfloat16)
    for name, module in reversed(list(model.named_modules())):
        if name != "lm_head" and not name.startswith("model.decoder.layers.0"):
            initialise_module(module, name, 5, whole.config)
            for parameter_name, parameter in module.named_parameters(recurse=False):
                wanted = whole.get_submodule(name).get_parameter(parameter_name)
                assert torch.equal(parameter, wanted.to(torch.bfloat16)), f"{name}.{parameter_name}"


@settings(max_examples=30)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_part_of_a_parameter_can_be_drawn_alone(data: st.DataObject, dtype: torch.dtype) -> None:
    """As a rank needs that holds a slice of it; this one has two and a half blocks, and a padding row between two."""
    size = 5 * 2**19
    values = InitialValues("a.weight", 3, size, std=0.5, zeros=range(2**20 - 1000, 2**20 + 1000))
    whole = torch.empty(size)
    values.fill(whole)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    part = torch.full((stop - start,), math.nan, dtype=dtype)
    values.fill(part, start)
    assert torch.equal(part, whole[start:stop].to(dtype))


def test_large_parameters_are_drawn_block_by_block_and_still_normal() -> None:
    module = nn.Linear(2048, 1300, bias=False)
    initialise_module(module, "big", 0, OPT.config_for("tiny"))
    values = module.weight.detach().flatten()
    assert float(values.std()) == pytest.approx(0.02, rel=2e-3)
    blocks = values.split(2**20)
    assert len(blocks) == 3
    assert not torch.equal(blocks[0][:1000], blocks[1][:1000])


def test_the_global_random_state_is_neither_used_nor_changed() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = built(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(first.model.decoder.layers[0].fc1.weight, built(1).model.decoder.layers[0].fc1.weight)


def test_numbers_are_fixed_for_good() -> None:
    """A run that is begun again years later, or continued elsewhere, begins from the same weights."""
    module = nn.Linear(4, 3)
    initialise_module(module, "model.decoder.layers.0.fc1", 42, OPT.config_for("tiny"))
    expected = [
        [-0.031659529, 0.018522158, 0.008482691, 0.014282908],
        [0.007043816, 0.019337105, 0.015241988, -0.026349537],
        [-0.028759222, 0.022254756, -0.000448136, 0.028351473],
    ]
    torch.testing.assert_close(module.weight.detach(), torch.tensor(expected))


def test_a_module_of_an_unknown_type_is_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3))

    model = built(0)
    model.model.decoder.scale = Scale()
    with pytest.raises(ModelError, match=r"model\.decoder\.scale\.factor cannot be initialised.*Scale"):
        initialise(model, 0)


def test_a_parameter_that_two_modules_share_is_the_first_ones() -> None:
    model = built(0)
    layer = model.model.decoder.layers[0]
    layer.extra = nn.Linear(128, 512)
    layer.extra.weight = layer.fc1.weight
    before = layer.fc1.weight.detach().clone()
    initialise(model, 0)
    assert torch.equal(layer.fc1.weight, before)
    assert not layer.extra.bias.any()


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


@pytest.mark.parametrize("other", [("b", 1, 0), ("a", 2, 0), ("a", 1, 2**20), ("a\x001", 1, 0), ("1\x00a", 1, 0)])
def test_streams_differ_by_seed_by_name_and_by_block(other: tuple[str, int, int]) -> None:
    name, seed, start = other
    one, two = torch.empty(8), torch.empty(8)
    InitialValues("a", 1, 2**21, std=1.0).fill(one)
    InitialValues(name, seed, 2**21, std=1.0).fill(two, start)
    assert not torch.equal(one, two)
