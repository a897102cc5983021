"""Adapters from a script: a model gets one, every plugin trains it alone, and only it is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import small_opt

from albireo.adapters import QuantisedLinear
from albireo.booster import Booster
from albireo.distributed import World
from albireo.errors import CheckpointError, ConfigError
from albireo.models import LazyInitContext
from albireo.optim import HybridAdam
from albireo.plugins import GeminiPlugin, LowLevelZeroPlugin, Plugin, TorchDDPPlugin, TorchFSDPPlugin

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
IDS = torch.tensor([[5, 9, 17, 33, 4, 8]])
PLUGINS: dict[str, Callable[[], Plugin]] = {
    "torch_ddp": TorchDDPPlugin,
    "torch_fsdp": TorchFSDPPlugin,
    "low_level_zero": lambda: LowLevelZeroPlugin(stage=2, precision="fp32"),
    "gemini": lambda: GeminiPlugin(
        precision="fp32", offload_optim_frac=1.0, offload_param_frac=1.0, shard_param_frac=0.5, min_chunk_size_m=0.002
    ),
    "low_level_zero_bf16": lambda: LowLevelZeroPlugin(stage=1, precision="bf16"),
}

Run = Callable[..., list[Any]]


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **options})


def train(world: World, *, plugin: str, folder: str) -> dict[str, Any]:
    """Train an adapter for two steps and save it."""
    world = World(world.rank, world.world_size, world.local_rank, CPU)
    booster = Booster(plugin=PLUGINS[plugin](), world=world)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = booster.enable_lora(small_opt(), lora_config=lora())
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = HybridAdam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    boosted, wrapped, *_ = booster.boost(model, optimizer)
    losses = []
    for _ in range(3):
        batch = {"input_ids": IDS + world.rank, "labels": IDS + world.rank}
        losses.append(float(booster.train_step(boosted, wrapped, batch).loss))
    booster.save_lora_as_pretrained(boosted, folder)
    if plugin != "torch_fsdp" and "bf16" not in plugin:
        names = {parameter: name for name, parameter in model.named_parameters()}
        for parameter in booster.plugin.readable_weights(boosted):
            assert names[parameter] not in frozen or torch.equal(frozen[names[parameter]], parameter)
    return {"losses": losses}


@pytest.mark.parametrize(
    ("plugin", "ranks"),
    [*((name, 2) for name in PLUGINS), *((name, 1) for name in ("torch_ddp", "low_level_zero", "gemini"))],
)
def test_a_script_trains_and_saves_an_adapter(run_case: Run, tmp_path: Path, plugin: str, ranks: int) -> None:
    for result in run_case(train, ranks, plugin=plugin, folder=str(tmp_path / "adapter")):
        assert result["losses"][-1] < result["losses"][0]
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sorted(weights) == [
        f"base_model.model.model.decoder.layers.0.self_attn.{name}_proj.lora_{part}.weight"
        for name in "qv"
        for part in "AB"
    ]
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert all(float(tensor.abs().max()) > 0 for tensor in weights.values())
    base = small_opt()
    with torch.no_grad():
        before = base(IDS).logits
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        assert not torch.allclose(loaded(IDS).logits, before)
    # And a script goes on with it.
    again = Booster(world=ALONE).enable_lora(small_opt(), pretrained_dir=tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, loaded(IDS).logits)
    trained = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4


def test_a_model_without_memory_gets_its_adapter_within_the_context() -> None:
    booster = Booster(plugin=PLUGINS["gemini"](), world=ALONE)
    with LazyInitContext():
        model = booster.enable_lora(small_opt(), lora_config=lora())
    assert all(parameter.is_meta for parameter in model.parameters())
    optimizer = HybridAdam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    boosted, wrapped, *_ = booster.boost(model, optimizer)
    batch = {"input_ids": IDS, "labels": IDS}
    losses = [float(booster.train_step(boosted, wrapped, batch).loss) for _ in range(3)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("plugin", sorted(set(PLUGINS) - {"torch_fsdp"}))  # it needs a process group
@pytest.mark.parametrize(
    "how",
    [
        {"quantize": True},
        {"bnb_quantization_config": SimpleNamespace(load_in_8bit=True, llm_int8_skip_modules=["fc2"])},
    ],
    ids=["nf4", "int8"],
)
def test_a_quantised_base_is_trained_beside(plugin: str, how: dict[str, Any], tmp_path: Path) -> None:
    booster = Booster(plugin=PLUGINS[plugin](), world=ALONE)
    model = booster.enable_lora(small_opt(), lora_config=lora(), **how)
    codes = {module.code for module in model.modules() if isinstance(module, QuantisedLinear)}
    assert codes == {"nf4" if "quantize" in how else "int8"}
    assert isinstance(model.get_submodule("base_model.model.model.decoder.layers.0.fc2"), torch.nn.Linear) == (
        "quantize" not in how
    )
    optimizer = HybridAdam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    boosted, wrapped, *_ = booster.boost(model, optimizer)
    batch = {"input_ids": IDS, "labels": IDS}
    losses = [float(booster.train_step(boosted, wrapped, batch).loss) for _ in range(3)]
    assert losses[-1] < losses[0]
    booster.save_lora_as_pretrained(boosted, tmp_path / "adapter")
    # Others put it on a model that is not quantised.
    loaded = peft.PeftModel.from_pretrained(small_opt(), str(tmp_path / "adapter"))
    assert sorted(n for n, _ in loaded.named_parameters() if "lora_" in n)


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    booster = Booster(world=ALONE)
    boosted, *_ = booster.boost(small_opt())
    (tmp_path / "file").write_text("")
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: booster.enable_lora(small_opt()), ConfigError, "either a lora_config, or the pretrained_dir"),
        (lambda: booster.enable_lora(small_opt(), tmp_path, lora()), ConfigError, "either a lora_config"),
        (
            lambda: booster.enable_lora(small_opt(), lora_config=lora(), bnb_quantization_config=object()),
            ConfigError,
            "neither load_in_8bit nor load_in_4bit",
        ),
        (
            lambda: booster.enable_lora(
                small_opt(),
                lora_config=lora(),
                bnb_quantization_config=SimpleNamespace(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
            ),
            ConfigError,
            "'nf4' here, not 'fp4'",
        ),
        (
            lambda: booster.enable_lora(small_opt().to("meta"), lora_config=lora(), quantize=True),
            ConfigError,
            "what is quantised has to be there",
        ),
        (lambda: booster.enable_lora(boosted, lora_config=lora()), ConfigError, "boosted already"),
        (lambda: booster.enable_lora(small_opt(), lora_config={"r": 4}), ConfigError, "not a dict"),
        (lambda: booster.enable_lora(small_opt(), tmp_path), ConfigError, "has no adapter_config.json"),
        (
            lambda: booster.enable_lora(small_opt(), lora_config=lora(target_modules=["c_attn"])),
            ConfigError,
            "the adapter does not go on this model: .*c_attn",
        ),
        (lambda: booster.save_lora_as_pretrained(boosted, tmp_path), ConfigError, "has no adapter"),
        (lambda: booster.save_lora_as_pretrained(small_opt(), tmp_path), ConfigError, "that boost returned"),
    ]
    for call, kind, said in cases:
        with pytest.raises(kind, match=said):
            call()
    model, *_ = booster.boost(booster.enable_lora(small_opt(), lora_config=lora()))
    with pytest.raises(CheckpointError, match="cannot be written"):
        booster.save_lora_as_pretrained(model, tmp_path / "file")
