"""Frozen layers in 8 and 4 bits under an adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_adapters import IDS, adapter_of, plan_of, shaken, small_gpt2
from tiny_models import small_opt

from albireo.adapters import (
    QuantisedLinear,
    attach_adapter,
    attach_lora,
    count_weights,
    merge_in_place,
    merged_weights,
    own_names,
    quantise_base,
)
from albireo.models import QuantisedWeights
from albireo.ops.quantise import Code
from albireo.sharding.weight_source import ParameterValues

CODES: list[Code] = ["int8", "nf4"]
MODELS = [(small_gpt2, ("c_attn", "mlp.c_fc")), (small_opt, ("q_proj", "v_proj"))]


def quantised(make: Any, targets: tuple[str, ...], code: Code) -> torch.nn.Module:
    model = make()
    assert attach_adapter(model, plan_of(*targets, base=code), seed=3) == []
    return model


def layers(model: torch.nn.Module) -> dict[str, QuantisedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("make", "targets"), MODELS)
def test_all_of_the_blocks_layers_are_quantised_and_nothing_else(make: Any, targets: Any, code: Code) -> None:
    plain = make()
    attach_lora(plain, plan_of(*targets), seed=3)
    model = quantised(make, targets, code)
    wanted = {
        name
        for name, module in plain.named_modules()
        if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
        and "lora_" not in name
        and name != "lm_head"
    }
    assert set(layers(model)) == wanted
    assert count_weights(model) == count_weights(plain) == sum(p.numel() for p in plain.parameters())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(trained) == sorted(adapter_of(plain))
    for name, tensor in adapter_of(plain).items():
        assert torch.equal(adapter_of(model)[name], tensor)
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding.weight, plain.get_input_embeddings().weight)
    # Bytes, whatever the model is cast to.
    assert {p.dtype for name, p in model.bfloat16().named_parameters() if name.endswith((".codes", ".scales"))} == {
        torch.uint8
    }


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("make", "targets"), MODELS)
def test_it_computes_what_a_model_with_the_dequantised_weights_computes(make: Any, targets: Any, code: Code) -> None:
    model, plain = shaken(quantised(make, targets, code)), make()
    attach_lora(plain, plan_of(*targets), seed=3)
    shaken(plain)
    with torch.no_grad():
        for name, layer in layers(model).items():
            plain.get_submodule(name).weight.copy_(layer.dequantised_weight())
    results = []
    for one in (model, plain):
        loss = one(IDS, labels=IDS).loss
        loss.backward()
        results.append((loss.detach(), [p.grad for p in adapter_of(one).values()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    for found, wanted in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("make", "targets"), MODELS)
def test_merged_it_is_a_whole_plain_model(make: Any, targets: Any, code: Code) -> None:
    model = shaken(quantised(make, targets, code)).eval()
    want = model(IDS).logits
    whole = make()
    whole.load_state_dict(merged_weights(model))
    torch.testing.assert_close(whole.eval()(IDS).logits, want, rtol=1e-4, atol=1e-5)
    merge_in_place(model)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("make", "targets"), MODELS)
def test_without_memory_it_is_filled_from_where_the_plain_weights_come_from(
    make: Any, targets: Any, code: Code
) -> None:
    wanted, plain = quantised(make, targets, code), make()
    values = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}

    class Source(ParameterValues):
        """Knows a parameter on the meta device by the name that it had."""

        def __init__(self, model: torch.nn.Module) -> None:
            self.names = {parameter: name for name, parameter in model.named_parameters()}

        def fill(self, parameter: torch.nn.Parameter, start: int, out: torch.Tensor) -> None:
            out.copy_(values[self.names[parameter]].view(-1)[start : start + out.numel()])

    model = make().to("meta")
    inner = Source(model)
    source = QuantisedWeights(inner, quantise_base(model, code))
    names, _ = own_names(wanted)
    found = {name: parameter for parameter, name in own_names(model)[0].items()}
    for tensor, name in names.items():
        if ".lora_" in name:
            continue
        assert found[name].is_meta
        out = torch.empty(tensor.numel(), dtype=tensor.dtype)
        half = tensor.numel() // 2
        source.fill(found[name], half, out[half:])  # type: ignore[arg-type]
        source.fill(found[name], 0, out[:half])  # type: ignore[arg-type]
        assert torch.equal(out, tensor.detach().view(-1)), name
    source.close()


def test_what_is_to_be_left_as_it_is() -> None:
    model = small_opt()
    quantise_base(model, "int8", skip=["fc2"])
    assert not any(name.endswith("fc2") for name in layers(model))
    assert any(name.endswith("fc1") for name in layers(model))
