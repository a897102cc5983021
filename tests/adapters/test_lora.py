"""LoRA on models: what is trained, how it begins, and what cannot have it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_adapters import IDS, adapter_of, plan_of, shaken, small_gpt2
from tiny_models import small_opt

from albireo.adapters import (
    LoraPlan,
    attach_lora,
    check_targets,
    count_lora,
    has_lora,
    load_adapter,
    lora_config_in,
    merge_in_place,
    merged_weights,
    own_name,
    own_names,
    save_adapter,
)
from albireo.errors import ConfigError, ModelError
from albireo.models import GPT2


def test_the_published_size_of_gpt2s_adapter() -> None:
    model = GPT2.make_model(GPT2.config_for("124m"))
    trained = count_lora(model, LoraPlan(8, 16.0, 0.0, GPT2.lora_targets))
    assert trained == 294_912
    assert trained + GPT2.count_parameters(GPT2.config_for("124m")) == 124_734_720


@pytest.mark.parametrize(("make", "targets"), [(small_gpt2, ("c_attn", "mlp.c_fc")), (small_opt, ("q_proj", "v_proj"))])
def test_only_the_adapter_is_trained_and_at_first_changes_nothing(make: Any, targets: tuple[str, ...]) -> None:
    model = make()
    before = model(IDS).logits
    count = count_lora(model, plan_of(*targets))
    attach_lora(model, plan_of(*targets), seed=3)
    assert torch.equal(model(IDS).logits, before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(trained) == sorted(adapter_of(model))
    assert sum(parameter.numel() for parameter in adapter_of(model).values()) == count
    assert has_lora(model)
    assert not has_lora(make())
    assert lora_config_in(model).fan_in_fan_out == (make is small_gpt2)
    with pytest.raises(ConfigError, match="no adapter"):
        lora_config_in(make())


def test_first_weights_hang_on_the_seed_and_the_name_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (small_gpt2() for _ in range(3))
    attach_lora(first, plan_of("c_attn"), seed=3)
    # With more targets, in another order, and with another past of the process.
    torch.rand(3)
    attach_lora(again, plan_of("c_fc", "c_attn"), seed=3)
    attach_lora(other, plan_of("c_attn"), seed=4)
    torch.set_rng_state(state)
    for name, parameter in adapter_of(first).items():
        assert torch.equal(parameter, adapter_of(again)[name]), name
        assert torch.equal(parameter, adapter_of(other)[name]) == ("lora_B" in name), name
        if "lora_A" in name:
            assert float(parameter.detach().abs().max()) <= 1 / 16**0.5
            assert float(parameter.detach().std()) == pytest.approx(1 / 16**0.5 / 3**0.5, rel=0.2)


def test_the_global_random_state_is_not_moved() -> None:
    state = torch.get_rng_state()
    attach_lora(small_gpt2(), plan_of(), seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (("q_proj",), "the model has no module 'q_proj'; those that can have an adapter are c_attn, c_fc, c_proj"),
        (("c_attn", "ln_1"), "transformer.h.0.ln_1 is a LayerNorm, which can have no adapter"),
        (("lm_head",), "lm_head is a Linear, which can have no adapter here"),
        (("wte",), "transformer.wte is a Embedding"),
        (("h.0",), "transformer.h.0 is a GPT2Block"),
        (("attn",), "transformer.h.0.attn is a GPT2Attention"),
    ],
)
def test_what_can_have_no_adapter_is_named(targets: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_targets(small_gpt2(), targets)
    assert said in str(refused.value)
    assert str(refused.value).startswith("--lora-targets")


def test_names_are_the_familys_own() -> None:
    model = small_gpt2()
    plain, aliases = own_names(model)
    attach_lora(model, plan_of(), seed=0)
    names, again = own_names(model)
    assert set(plain.values()) <= set(names.values())
    assert set(names.values()) - set(plain.values()) == {
        f"transformer.h.{layer}.attn.c_attn.lora_{part}.weight" for layer in range(2) for part in "AB"
    }
    assert aliases == again == {"lm_head.weight": "transformer.wte.weight"}
    assert own_name("h.0.attn.c_attn.base_layer.bias") == "h.0.attn.c_attn.bias"


@pytest.mark.parametrize(("make", "targets"), [(small_gpt2, ("c_attn", "c_fc")), (small_opt, ("q_proj", "fc1"))])
def test_a_merged_model_computes_what_the_adapter_did(make: Any, targets: tuple[str, ...]) -> None:
    model = make()
    attach_lora(model, plan_of(*targets), seed=1)
    shaken(model)
    expected = model(IDS).logits
    weights = merged_weights(model)
    plain = make()
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert (weights["lm_head.weight"] == weights[own_names(plain)[1]["lm_head.weight"]]).all()
    kept = copy.deepcopy(weights)
    merge_in_place(model)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(kept[name], weights[name]) for name in kept)
    merge_in_place(plain)  # without adapters: nothing


def test_a_folder_is_loaded_by_peft_and_by_us(tmp_path: Path) -> None:
    model = small_gpt2()
    attach_lora(model, plan_of(), seed=1)
    shaken(model)
    expected = model(IDS).logits
    names, _ = own_names(model)
    save_adapter({name: t.detach() for t, name in names.items()}, lora_config_in(model), tmp_path, base="owner/base")
    loaded = peft.PeftModel.from_pretrained(small_gpt2(), str(tmp_path))
    torch.testing.assert_close(loaded(IDS).logits, expected)
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert (config.base_model_name_or_path, config.inference_mode) == ("owner/base", True)
    assert not lora_config_in(model).inference_mode
    other = small_gpt2()
    attach_lora(other, plan_of(), seed=2)
    load_adapter(other, tmp_path)
    assert torch.equal(other(IDS).logits, expected)
    larger = small_gpt2()
    attach_lora(larger, plan_of(rank=8), seed=2)
    with pytest.raises(ModelError, match="another adapter's"):
        load_adapter(larger, tmp_path)
    with pytest.raises(ModelError, match="cannot be read"):
        load_adapter(other, tmp_path / "nothing")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="cannot be read"):
        load_adapter(other, tmp_path)


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'albireo\[adapters\]'"):
        attach_lora(small_gpt2(), plan_of(), seed=0)
