"""GPT-2's family: sizes, first weights, and files as the hub has them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from albireo.errors import ModelError
from albireo.models import (
    GPT2,
    OPT,
    Vocabulary,
    build_model,
    check_weights,
    configure_model,
    initialise,
    load_weights,
    materialise,
    resolve_model,
)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("124m", 124_439_808), ("medium", 354_823_168), ("large", 774_030_080), ("xl", 1_557_611_200)],
)
def test_the_sizes_are_those_that_are_published(size: str, parameters: int) -> None:
    config = GPT2.config_for(size)
    assert GPT2.count_parameters(config) == parameters
    assert GPT2.max_sequence_length(config) == 1024


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("gpt2", "124m"),
        ("GPT2-medium", "medium"),
        ("gpt2-xl", "xl"),
        ("124", "124m"),
        ("774m", "large"),
        ("tiny", "tiny"),
    ],
)
def test_names_that_users_have_for_them(name: str, size: str) -> None:
    choice = resolve_model(name, GPT2)
    assert (choice.family, choice.size) == (GPT2, size)


def test_a_size_is_that_of_the_family_that_is_asked_for() -> None:
    assert resolve_model("tiny", OPT).family is OPT
    assert resolve_model("tiny", GPT2).family is GPT2
    with pytest.raises(ModelError, match=r"there is no model '125m': expected one of tiny, 124m, medium, large, xl,"):
        resolve_model("125m", GPT2)


def test_a_folder_of_another_family_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"is of type 'opt', and this recipe trains 'gpt2': .*`albireo train opt`"):
        resolve_model(str(saved), GPT2)


def built(seed: int) -> GPT2LMHeadModel:
    model = GPT2.make_model(GPT2.config_for("tiny"))
    materialise(model, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    initialise(model, seed)
    return model


def test_weights_are_as_transformers_begins_them() -> None:
    """Normal of 0.02; those that write to the residual stream by the root of twice the layers less; biases 0, norms 1."""
    model = built(0).requires_grad_(False)
    residual = 0.02 / math.sqrt(2 * 2)
    for name, parameter in model.named_parameters():
        if ".ln_" in name:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            std = residual if name.endswith("c_proj.weight") else 0.02
            assert float(parameter.std()) == pytest.approx(std, rel=0.03), name
    assert model.lm_head.weight is model.transformer.wte.weight
    other = dict(built(1).named_parameters())
    assert not torch.equal(model.transformer.h[0].attn.c_attn.weight, other["transformer.h.0.attn.c_attn.weight"])


def test_a_padding_id_is_nobodys_business() -> None:
    """transformers would look for it in every batch, which waits for the device, and warn of a mask that is not needed."""
    vocabulary = Vocabulary(4096, bos=0, eos=0, pad=7)
    config, _ = configure_model(resolve_model("tiny", GPT2), init="random", vocabulary=vocabulary)
    assert config.pad_token_id is None
    assert (config.bos_token_id, config.eos_token_id, config.vocab_size) == (0, 0, 4096)


def test_a_folder_as_the_hub_has_it(tmp_path: Path) -> None:
    """The hub's own files leave out the backbone's name, and hold the masks of causal attention."""
    model = built(3)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    for layer in range(2):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8)
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    choice = resolve_model(str(tmp_path), GPT2)
    check_weights(tmp_path, GPT2, choice.config())
    config, _ = configure_model(choice, init="pretrained")
    loaded = build_model(choice, config, init="pretrained", seed=0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    # A bias of the projection is no mask, though its name ends much like one's.
    del old["h.0.attn.c_attn.bias"]
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for transformer\.h\.0\.attn\.c_attn\.bias"):
        load_weights(loaded, tmp_path, GPT2)


def test_dropout_is_the_users(tmp_path: Path) -> None:
    built(0).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "resid_pdrop": 0.1, "pad_token_id": 5}))
    config = resolve_model(str(tmp_path), GPT2).config(dropout=0.3)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.3, 0.3, 0.0)
    assert config.pad_token_id is None


def test_its_parts() -> None:
    model = built(0)
    assert isinstance(GPT2.head(model), nn.Linear)
    assert [name for name, _ in GPT2.blocks(model)] == ["transformer.h.0", "transformer.h.1"]
    targets = [m for name, m in model.named_modules() if name.endswith(GPT2.lora_targets)]
    assert len(targets) == 2
    assert all(isinstance(module, Conv1D) for module in targets)
