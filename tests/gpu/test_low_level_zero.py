"""ZeRO on a GPU: the plain path's numbers, no waiting, and states that stay on the host where they are put there."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.masking_utils
from torch import nn

from albireo.booster import Booster, StepOutput
from albireo.data import RandomTokens
from albireo.device.pinned import host_buffer
from albireo.distributed import World, join_world
from albireo.models import build_model, configure_model, resolve_model
from albireo.optim import HybridAdam, OptimizerWrapper, adamw, decay_groups
from albireo.plugins import LowLevelZeroPlugin, ModelWrapper, Plugin, TorchDDPPlugin
from albireo.training.causal_lm import CausalLanguageModel

pytestmark = pytest.mark.gpu


def boosted(plugin: Plugin) -> tuple[Booster, ModelWrapper, OptimizerWrapper]:
    world = join_world(single=True)
    choice = resolve_model("tiny")
    config, _ = configure_model(choice, init="random")
    model = build_model(choice, config, init="random", seed=0, device=world.device)
    optimizer = adamw(decay_groups(model.named_parameters(), 0.01), 1e-3)
    booster = Booster(plugin=plugin, world=world)
    wrapped, stepped, *_ = booster.boost(CausalLanguageModel(model, choice.family), optimizer)
    return booster, wrapped, stepped


def steps(
    booster: Booster, model: ModelWrapper, optimizer: OptimizerWrapper, count: int, accumulate: int = 1
) -> list[StepOutput]:
    outputs = []
    for number in range(count):
        batches = []
        for micro in range(accumulate):
            first = 4 * (number * accumulate + micro)
            rows = RandomTokens(4096, 64, 4096, 0).__getitems__(range(first, first + 4))
            ids = torch.stack([row["input_ids"] for row in rows]).pin_memory()
            batches.append({"input_ids": ids, "labels": ids})
        outputs.append(booster.train_step(model, optimizer, batches, [252] * accumulate, max_norm=1.0))
    return outputs


def test_in_fp32_it_follows_torch_ddp() -> None:
    # Attention's backward and the loss add in no fixed order by default.
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        losses, weights = [], []
        for plugin in (TorchDDPPlugin(precision="fp32"), LowLevelZeroPlugin(precision="fp32")):
            booster, model, optimizer = boosted(plugin)
            losses.append([float(output.loss) for output in steps(booster, model, optimizer, 3, accumulate=2)])
            weights.append([p.detach().clone() for p in model.unwrap().parameters()])
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for plain, sharded in zip(*weights, strict=True):
        assert (plain - sharded).abs().max().item() < 1e-4  # Adam turns the noise of a tiny gradient into whole steps


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_device(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers 5.17 makes a mask of ones for OPT and then asks the device whether it is one; later ones do not.
    monkeypatch.setattr(transformers.masking_utils, "fast_all", lambda _: True, raising=False)
    booster, model, optimizer = boosted(LowLevelZeroPlugin(precision=precision, initial_scale=2.0**10))
    first = steps(booster, model, optimizer, 2, accumulate=2)[0]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        last = steps(booster, model, optimizer, 4, accumulate=2)[-1]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert last.loss.item() < first.loss.item()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_states_on_the_host_are_stepped_like_those_on_the_device(precision: str, accumulate: int) -> None:
    results = []
    for offload in (False, True):
        booster, model, optimizer = boosted(
            LowLevelZeroPlugin(precision=precision, cpu_offload=offload, initial_scale=2.0**10)
        )
        outputs = steps(booster, model, optimizer, 8, accumulate)
        results.append([float(output.loss) for output in outputs])
        places = {value.device.type for s in optimizer.unwrap().state.values() for value in s.values() if value.dim()}
        assert places == {"cpu" if offload else "cuda"}
        for fragment in model.fragments:  # type: ignore[attr-defined]
            assert torch.equal(fragment.compute.cpu(), fragment.weights().cpu().to(fragment.compute.dtype))
    bound = 1e-5 if precision == "fp32" else 2e-3
    assert results[0] == pytest.approx(results[1], rel=bound)


def test_a_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)

    def made(seed: int) -> tuple[Booster, ModelWrapper, OptimizerWrapper]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(24, 100), nn.ReLU(), nn.Linear(100, 4))
        booster = Booster(plugin=LowLevelZeroPlugin(precision="bf16"), world=World(0, 1, 0, device))
        wrapped, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-2), nn.CrossEntropyLoss())
        return booster, wrapped, optimizer

    def train(run: tuple[Booster, ModelWrapper, OptimizerWrapper], numbers: range) -> list[torch.Tensor]:
        booster, model, optimizer = run
        for number in numbers:
            rows = torch.randn(16, 24, generator=torch.Generator().manual_seed(number))
            booster.train_step(model, optimizer, {"input": rows, "labels": (rows[:, 0] > 0).long()}, max_norm=1.0)
        return [fragment.weights() for fragment in model.fragments]  # type: ignore[attr-defined]

    run, other = made(1), made(2)
    train(run, range(3))
    run[0].save_model(run[1], tmp_path / "model.safetensors")
    run[0].save_optimizer(run[2], tmp_path / "optimizer.safetensors")
    other[0].load_model(other[1], tmp_path / "model.safetensors")
    other[0].load_optimizer(other[2], tmp_path / "optimizer.safetensors")
    for ours, theirs in zip(train(other, range(3, 6)), train(run, range(3, 6)), strict=True):
        assert ours.is_cuda
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_it_is_verified(precision: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "albireo", "verify", "opt", "--plugin", "low_level_zero", "--precision", precision]
    options = ["--accumulate", "2", "--json", str(tmp_path / "report.json"), "--cache", str(tmp_path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    print(precision, report["max_relative_error"], max(p["step_ulps"] for p in report["parameters"]))


def test_host_buffers_are_page_locked_and_can_be_made_again_and_again() -> None:
    for _ in range(3):
        buffer = host_buffer(3 * 2**20, torch.bfloat16, torch.device("cuda"))
        assert buffer.is_pinned()
        copied = torch.ones(3 * 2**20, dtype=torch.bfloat16, device="cuda")
        buffer.copy_(copied, non_blocking=True)
        torch.cuda.synchronize()
        assert buffer.float().sum().item() == 3 * 2**20
        # If it were still locked, memory at the same place could not be locked again.
        del buffer
        gc.collect()


def test_weights_and_states_leave_the_device_when_they_are_offloaded() -> None:
    peaks = []
    for offload in (False, True):
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        booster, model, optimizer = boosted(LowLevelZeroPlugin(precision="bf16", cpu_offload=offload))
        steps(booster, model, optimizer, 2)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.memory_allocated() - before)
        del booster, model, optimizer
    # 12 bytes a parameter with everything on the device, 2 without.
    assert peaks[1] < peaks[0] * 0.3
