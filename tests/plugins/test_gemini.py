"""Gemini on the simulated device: wherever weights and states are, and whatever moves, no bit of a training changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gemini_runs import ALONE, Boosted, boosted, everything, gemini, groups, late_and_alone, least_bytes, left, train
from gemini_zoo import KINDS, built
from tiny_models import small_opt
from torch import nn

from albireo import LazyInitContext
from albireo.booster import Booster
from albireo.checkpoint import OneRank, Snapshot, open_checkpoint, save_checkpoint, tensor_names
from albireo.memory import Gemini
from albireo.optim import HybridAdam, host_stepper
from albireo.optim.host_kernel_choice import choose_kernel
from albireo.plugins import GeminiPlugin, LowLevelZeroPlugin, ModelWrapper, Plugin, TorchDDPPlugin

# Adam has the same bits on both sides here, so that shares of states can be compared with one another too.
STATIC = {
    f"states {states:g} weights {weights:g}": {"offload_optim_frac": states, "offload_param_frac": weights}
    for states in (0.0, 0.5, 1.0)
    for weights in (0.0, 0.5, 1.0)
}
AWAY = {"offload_optim_frac": 1.0, "offload_param_frac": 1.0}
ALL_WAYS: dict[str, dict[str, Any]] = {
    **STATIC,
    "auto": {},
    "no room beyond the least": {"cap": 1.0},
    "no room, no prefetch": {"cap": 1.0, "max_prefetch": 0},
    "little": {"cap": 1.5},
    "little, no prefetch": {"cap": 1.5, "max_prefetch": 0},
    "room for all": {"cap": 100.0},
    "no prefetch": {**AWAY, "max_prefetch": 0},
    "far prefetch": {**AWAY, "max_prefetch": 9},
    "a chunk for each parameter": {**AWAY, "min_chunk_size_m": 1e-9},
    "one chunk a unit": {"offload_param_frac": 1.0, "min_chunk_size_m": 1.0},
    "away under a cap": {**AWAY, "cap": 1.5},
}
SOME_WAYS = ["states 0 weights 1", "states 1 weights 1", "auto", "no room beyond the least", "little"]
FEW_WAYS = ["states 0.5 weights 0.5", "no room beyond the least"]
# How many micro-batches, and where gradients are clipped; one of each precision goes all ways.
CELLS = [
    ("fp32", 1, 0.5, list(ALL_WAYS)), ("bf16", 3, 0.5, list(ALL_WAYS)), ("fp16", 1, 0.0, list(ALL_WAYS)),
    ("fp32", 3, 0.0, FEW_WAYS), ("bf16", 1, 0.0, FEW_WAYS), ("fp16", 3, 0.5, SOME_WAYS),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _late() -> Iterator[None]:
    with late_and_alone():
        yield


def plugin_of(way: str, kind: str, accumulate: int, **options: Any) -> GeminiPlugin:
    how = dict(ALL_WAYS[way])
    if "cap" in how:
        share = how.pop("cap")
        how["mem_cap_bytes"] = int(least_bytes(kind, accumulate=accumulate, **options) * share)
    return gemini(**{**how, **options, **{key: how[key] for key in ("min_chunk_size_m",) if key in how}})


def reference(kind: str, precision: str, accumulate: int, clip: float) -> dict[str, Any]:
    """What another plugin makes of it, to the bit; in bf16 ZeRO keeps weights in halves, so Gemini's own."""
    plugin = {
        "fp32": TorchDDPPlugin(),
        "fp16": LowLevelZeroPlugin(precision="fp16", initial_scale=2.0**8),
        "bf16": gemini(precision="bf16", placement_policy="static"),
    }[precision]
    return everything(plugin, kind, accumulate=accumulate, clip=clip)


@pytest.mark.parametrize(("precision", "accumulate", "clip", "ways"), CELLS)
def test_where_chunks_are_changes_no_bit(precision: str, accumulate: int, clip: float, ways: list[str]) -> None:
    wanted = reference("opt", precision, accumulate, clip)
    assert len(set(wanted["numbers"])) == len(wanted["numbers"])
    for way in ways:
        plugin = plugin_of(way, "opt", accumulate, precision=precision)
        assert everything(plugin, "opt", accumulate=accumulate, clip=clip) == wanted, way


@pytest.mark.parametrize(("precision", "ways"), [("fp32", SOME_WAYS), ("bf16", FEW_WAYS)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "opt"])
def test_every_kind_of_model_keeps_its_bits(kind: str, precision: str, ways: list[str]) -> None:
    wanted = reference(kind, precision, 2, 0.5)
    for key in [key for key in wanted["left"] if key.startswith("optimizer/") and key.endswith("/empty@0")]:
        del wanted["left"][key]  # what has no elements has no states
    for way in ways:
        plugin = plugin_of(way, kind, 2, precision=precision)
        assert everything(plugin, kind, accumulate=2, clip=0.5) == wanted, way


def test_the_compiled_kernel_of_the_host_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_stepper, "choose_kernel", choose_kernel)
    wanted = reference("opt", "bf16", 1, 0.5)
    assert everything(gemini(precision="bf16", **AWAY), "opt", clip=0.5) == wanted


def test_where_everything_fits_nothing_moves() -> None:
    _, model, _ = run = boosted(gemini(), "opt")
    train(run, "opt")
    inner = gemini_of(model)
    assert inner.placement.traffic_bytes == 0
    assert {(chunk.states_place, chunk.home_place) for chunk in inner.chunks} == {("device", "storage")}
    assert inner.manager.host_steps is None


def test_fractions_are_kept_by_bytes_whatever_the_size_of_chunks() -> None:
    for size in (0.0005, 0.002, 1.0):
        _, model, _ = boosted(gemini(offload_optim_frac=0.3, offload_param_frac=0.7, min_chunk_size_m=size), "plain")
        chunks = gemini_of(model).chunks
        whole = sum(chunk.weight_bytes for chunk in chunks)
        largest = 4 * max(parameter.numel() for parameter in model.unwrap().parameters())
        states = sum(chunk.weight_bytes for chunk in chunks if chunk.states_place == "host")
        weights = sum(chunk.weight_bytes for chunk in chunks if chunk.home_place != "storage")
        assert abs(states - 0.3 * whole) <= largest
        assert abs(weights - 0.7 * whole) <= largest


def test_gradients_come_back_with_the_states_that_come_to_the_device() -> None:
    """The first step sends all of them to the host; what is stepped on the device is then found there."""
    booster, model, optimizer = boosted(gemini(), "plain")
    booster.backward(model(**KINDS["plain"].batch(0, 0, 0))[0], optimizer)
    inner = gemini_of(model)
    offload = inner.gradients.offload
    assert offload is not None
    fragments = [fragment for chunk in inner.chunks for fragment in chunk.fragments]
    assert all(offload.in_flight(fragment) is not None for fragment in fragments)
    optimizer.clip_grad_by_norm(0.5)
    assert all(offload.in_flight(fragment) is None for fragment in fragments)
    assert not offload._buffers
    assert all(inner.gradients.kept_bytes(chunk) > 0 for chunk in inner.chunks)


@pytest.mark.parametrize("how", [{}, AWAY, {"placement_policy": "static"}], ids=["auto", "away", "here"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loop_of_the_users_own_accumulates_with_no_sync(how: dict[str, Any], precision: str) -> None:
    def trained(plugin: Plugin) -> dict[str, str]:
        booster, model, optimizer = run = boosted(plugin, "plain")
        for step in range(3):
            batches = [KINDS["plain"].batch(step, 0, micro) for micro in range(3)]
            for batch in batches[:-1]:
                with booster.no_sync(model, optimizer):
                    booster.backward(model(**batch)[0] / 48, optimizer)
            booster.backward(model(**batches[-1])[0] / 48, optimizer)
            optimizer.clip_grad_by_norm(0.5)
            optimizer.step()
            optimizer.zero_grad()
        return left(run)

    plain = TorchDDPPlugin() if precision == "fp32" else LowLevelZeroPlugin(precision="fp16", initial_scale=2.0**8)
    assert trained(gemini(precision=precision, **how)) == trained(plain)


@pytest.mark.parametrize("way", ["auto", "states 1 weights 1", "states 0 weights 1", "no room beyond the least"])
def test_evaluation_plain_forwards_and_generation_between_steps(way: str) -> None:
    def looked_at(plugin: Plugin) -> list[Any]:
        run = boosted_opt(plugin)
        booster, model, optimizer = run
        seen: list[Any] = []
        for step in range(3):
            batch = KINDS["opt"].batch(step, 0, 0)
            output = booster.train_step(model, optimizer, batch, KINDS["opt"].terms(batch), max_norm=0.5)
            seen.append(float(output.loss_sum))
            with torch.no_grad():
                seen.append(model(**batch).logits.tolist())
                seen.append(model.unwrap()(**batch).logits.tolist())
                seen.append(model.unwrap().model(batch["input_ids"]).last_hidden_state.tolist())
            model.eval()
            with torch.inference_mode():
                seen.append(float(model.evaluation_module(**batch).loss))
            seen.append(model.unwrap().generate(batch["input_ids"][:, :4], max_new_tokens=5, do_sample=False).tolist())
            model.train()
        return seen

    assert looked_at(plugin_of(way, "opt", 1)) == looked_at(TorchDDPPlugin())


def boosted_opt(plugin: Plugin) -> Boosted:
    """A transformers model as it is, of the zoo's sizes."""
    model = small_opt(num_hidden_layers=3, hidden_size=24)
    booster = Booster(plugin=plugin, world=ALONE)
    wrapped, optimizer, *_ = booster.boost(model, HybridAdam(groups(model), lr=1e-2))
    return booster, wrapped, optimizer


@pytest.mark.parametrize("way", ["auto", "states 1 weights 1"])
def test_an_evaluation_between_micro_batches(way: str) -> None:
    def trained(plugin: Plugin) -> dict[str, str]:
        booster, model, optimizer = run = boosted(plugin, "plain")
        for step in range(3):
            for micro in range(2):
                loss = model(**KINDS["plain"].batch(step, 0, micro))[0]
                with torch.no_grad():
                    model(**KINDS["plain"].batch(7, 0, 0))
                booster.backward(loss / 32, optimizer)
                with torch.no_grad():
                    model(**KINDS["plain"].batch(8, 0, 0))
            optimizer.step()
            optimizer.zero_grad()
        return left(run)

    assert trained(plugin_of(way, "plain", 2)) == trained(TorchDDPPlugin())


@pytest.mark.parametrize("way", ["auto", "states 1 weights 1", "little"])
def test_batches_of_other_sizes_are_watched_anew(way: str) -> None:
    def trained(plugin: Plugin) -> list[float]:
        booster, model, optimizer = boosted(plugin, "plain")
        losses = []
        for step, rows in enumerate((2, 5, 1, 5, 7, 2)):
            ids = torch.randint(0, 41, (rows, 9), generator=torch.Generator().manual_seed(step))
            losses.append(float(booster.train_step(model, optimizer, {"ids": ids}, rows * 8, max_norm=0.5).loss_sum))
        return losses

    assert trained(plugin_of(way, "plain", 1)) == trained(TorchDDPPlugin())


@pytest.mark.compiles
@pytest.mark.parametrize("kind", ["plain", "recomputed"])
def test_compiled_blocks(kind: str) -> None:
    def compiled(plugin: Plugin) -> dict[str, Any]:
        run = boosted(plugin, kind, change=lambda model: [block.compile() for block in model.blocks])
        return {"numbers": train(run, kind, range(3), 1, 0.5), "left": left(run)}

    wanted = compiled(TorchDDPPlugin())
    for way in ("auto", "states 1 weights 1", "no room beyond the least"):
        assert compiled(plugin_of(way, kind, 1)) == wanted, way


@pytest.mark.parametrize("kind", ["plain", "tied blocks", "frozen"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_is_built_without_memory(kind: str, precision: str) -> None:
    def lazily(plugin: Plugin) -> dict[str, Any]:
        with LazyInitContext(seed=3):
            model = KINDS[kind].build()
        booster = Booster(plugin=plugin, world=ALONE)
        wrapped, optimizer, *_ = booster.boost(model.train(), HybridAdam(groups(model), lr=1e-2))
        run = booster, wrapped, optimizer
        return {"numbers": train(run, kind, range(2), 1, 0.5), "left": left(run)}

    wanted = lazily(TorchDDPPlugin() if precision == "fp32" else gemini(precision="bf16", placement_policy="static"))
    assert wanted["numbers"][0][1] > 0
    for way in ("auto", "states 1 weights 1", "little"):
        assert lazily(plugin_of(way, kind, 1, precision=precision)) == wanted, way


def test_peft_adapters_on_a_frozen_base() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def adapted(plugin: Plugin) -> list[Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            lora = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "fc1"], init_lora_weights=False)
            model = peft.get_peft_model(small_opt(num_hidden_layers=3, hidden_size=24), lora)
        booster = Booster(plugin=plugin, world=ALONE)
        wrapped, optimizer, *_ = booster.boost(model, HybridAdam(groups(model), lr=1e-2))
        run = booster, wrapped, optimizer
        numbers = train(run, "opt", range(3), 2, 0.5)
        return [numbers, left(run), model.generate(input_ids=torch.tensor([[3, 5, 7]]), max_new_tokens=4).tolist()]

    wanted = adapted(TorchDDPPlugin())
    for options in ({}, AWAY, {"offload_param_frac": 1.0}, {"mem_cap_bytes": 60_000}):
        assert adapted(gemini(**options)) == wanted, options


@pytest.mark.parametrize("kind", ["SGD", "amsgrad"])
def test_optimizers_that_the_host_stepper_does_not_step(kind: str) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        if kind == "SGD":
            return torch.optim.SGD(groups(model), lr=1e-2, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(groups(model), lr=1e-2, foreach=True, amsgrad=True)

    def trained(plugin: Plugin) -> dict[str, Any]:
        model = built("branch")
        booster = Booster(plugin=plugin, world=ALONE)
        wrapped, optimizer, *_ = booster.boost(model, make(model))
        run = booster, wrapped, optimizer
        return {"numbers": train(run, "branch", range(3), 2, 0.5), "left": left(run)}

    wanted = trained(TorchDDPPlugin())
    for way in ("auto", "states 0.5 weights 0.5", "states 1 weights 1", "little"):
        assert trained(plugin_of(way, "branch", 2)) == wanted, way


@pytest.mark.parametrize("way", ["auto", "states 0.5 weights 0.5", "states 1 weights 1", "no room beyond the least"])
def test_an_overflow_leaves_no_trace(way: str) -> None:
    booster, model, optimizer = run = boosted(plugin_of(way, "plain", 1, precision="fp16", hysteresis=1), "plain")
    train(run, "plain", range(2), 1, 0.5)
    before = left(run)
    loss, _ = model(**KINDS["plain"].batch(2, 0, 0))
    booster.backward(loss * 1e30, optimizer)
    assert not torch.isfinite(optimizer.clip_grad_by_norm(0.5))
    optimizer.step()
    optimizer.zero_grad()
    assert left(run) == before
    assert optimizer.scaler_state()["scale"] == 2.0**7
    train(run, "plain", range(2, 3), 1, 0.5)
    assert left(run) != before
    counts = {int(state["step"]) for state in optimizer.unwrap().state.values()}
    assert counts == {3}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_saved_goes_on_under_any_placement(tmp_path: Path, precision: str) -> None:
    run = boosted(gemini(precision=precision, **AWAY), "branch")
    train(run, "branch", range(2), 1, 0.5)
    booster, model, optimizer = run
    names, aliases = tensor_names(model.unwrap())
    parts = booster.plugin.export_state(model, optimizer, names, ALONE)
    snapshot = Snapshot(
        step=2, slices=parts, shared_state={}, aliases={f"model/{a}": f"model/{b}" for a, b in aliases.items()}
    )
    save_checkpoint(tmp_path, snapshot, ranks=OneRank(), keep=2)
    saved = left(run)
    wanted = train(run, "branch", range(2, 4), 1, 0.5), left(run)
    others: list[Plugin] = [plugin_of(way, "branch", 1, precision=precision) for way in ("auto", "little", FEW_WAYS[0])]
    if precision == "fp32":
        others += [TorchDDPPlugin(), LowLevelZeroPlugin(precision="fp32")]
    for plugin in others:
        other = boosted(plugin, "branch")
        train(other, "branch", range(1), 1, 0.5)  # what is there is to be forgotten
        names, _ = tensor_names(other[1].unwrap())
        plugin.import_state(other[1], other[2], names, open_checkpoint(tmp_path / "step-00000002"))
        assert left(other) == saved, plugin
        assert (train(other, "branch", range(2, 4), 1, 0.5), left(other)) == wanted, plugin


def gemini_of(model: ModelWrapper) -> Gemini:
    return model.gemini  # type: ignore[attr-defined, no-any-return]
