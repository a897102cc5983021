"""Whole runs on instructions: what is counted, however they are cut up, stopped and gone on with, and proved."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_instructions import write_instructions

from albireo.config import MachineFacts, RunConfig, merge, resolve
from albireo.device import capture_random_state, restore_random_state
from albireo.distributed import World
from albireo.errors import CheckpointError
from albireo.training.assemble import open_session
from albireo.training.loop import train_loop
from albireo.training.metrics import read_metrics
from albireo.training.run_folder import RunFolder
from albireo.training.session import Session
from albireo.verify.run import _verify_on_rank

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
PLUGINS = ("torch_ddp", "torch_ddp_fp16", "torch_fsdp", "low_level_zero", "gemini")
# Everything is at home on the host, and its device has room for little more than a chunk at a time.
AWAY = {"plugin": "gemini", "offload_optim_frac": 1.0, "offload_param_frac": 1.0, "mem_cap": 0.01}
# Batches that straddle epochs; a length that cuts some answers.
SHORT = {"model": "tiny", "sequence_length": 96, "batch_size": 2, "accumulate": 2, "holdout": 0.2}

Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> dict[str, Any]:
    data = write_instructions(tmp_path_factory.mktemp("data") / "mine.json", 26)
    return {"data": str(data), "cache": str(cache_folder), **SHORT}


def config_of(options: dict[str, Any]) -> RunConfig:
    config = resolve(merge(RunConfig.of("gpt2"), options), MachineFacts("cpu", 1, False))
    if config.adapter.is_on:
        config = merge(config, {"lora_targets": options.get("lora_targets", "c_attn")})
    return config


def digest_of(session: Session) -> str:
    state = session.state
    parts = session.booster.plugin.export_state(state.model, state.optimizer, state.names, session.world)
    digests = sorted(
        f"{part.name} {hashlib.sha256(part.data.detach().numpy().tobytes()).hexdigest()}" for part in parts
    )
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def run_of(world: World, *, folder: str, options: dict[str, Any], stop_at: int = 0) -> dict[str, Any]:
    """Run, or go on with what lies in the folder, until the end or a stop in a step."""
    world = World(world.rank, world.world_size, world.local_rank, CPU)
    path = Path(folder)
    if world.is_main and not (path / "config.json").exists():
        RunFolder.create(path)
    before = capture_random_state(CPU)
    try:
        world.barrier()
        with open_session(config_of(options), RunFolder(path, is_new=False), world) as session:
            begin = session.begin_step

            def begin_step() -> None:
                session.stop.requested = session.step + 1 == stop_at
                begin()

            session.begin_step = begin_step  # type: ignore[method-assign]
            status = train_loop(session)
            if status == "finished":
                session.finish(status)
            digest = digest_of(session) if world.world_size == 1 else ""
            return {"status": status, "step": session.step, "digest": digest}
    finally:
        restore_random_state(before, CPU)


def losses(folder: Path) -> tuple[list[float], list[float]]:
    train, evaluations = read_metrics(folder / "metrics.jsonl")
    return [row.loss for row in train], [row.eval_loss for row in evaluations]


def test_the_loss_is_the_mean_over_the_answers_tokens_and_of_no_padding(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Against transformers' own model, each sample alone and unpadded."""
    RunFolder.create(tmp_path / "run")
    with open_session(config_of(options), RunFolder(tmp_path / "run", is_new=False), ALONE) as session:
        model = session.model.unwrap().pretrained
        (step, *_) = session.batches()
        assert len({batch.input_ids.shape for batch in step}) > 1
        total, count = 0.0, 0
        for batch in step:
            for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
                length = int((labels >= 0).nonzero().max()) + 1
                with torch.no_grad():
                    logits = model(input_ids=ids[None, :length]).logits[0].double()
                places = (labels[1:length] >= 0).nonzero().flatten()
                chosen = torch.log_softmax(logits[places], dim=-1)[torch.arange(len(places)), labels[1:][places]]
                total, count = total - float(chosen.sum()), count + len(places)
        assert count == sum(batch.tokens for batch in step)
        output = session.booster.train_step(
            session.model,
            session.optimizer,
            [session.recipe.inputs(batch) for batch in step],
            [batch.tokens for batch in step],
        )
        assert float(output.loss) == pytest.approx(total / count, rel=1e-5)


def test_two_ranks_are_one_that_takes_as_many(run_case: Run, options: dict[str, Any], tmp_path: Path) -> None:
    """The same steps to rounding, however a step is cut up into ranks and micro-batches."""
    flags = {**options, "steps": 6, "eval_every": 3, "bucket": 8}
    run_of(ALONE, folder=str(tmp_path / "one"), options={**flags, "batch_size": 8, "accumulate": 1})
    run_of(ALONE, folder=str(tmp_path / "four"), options={**flags, "batch_size": 2, "accumulate": 4})
    run_case(run_of, 2, folder=str(tmp_path / "two"), options={**flags, "gpus": 2})
    for other in ("four", "two"):
        for mine, theirs in zip(losses(tmp_path / other), losses(tmp_path / "one"), strict=True):
            assert mine == pytest.approx(theirs, rel=2e-4)
    assert losses(tmp_path / "one")[0][-1] < losses(tmp_path / "one")[0][0] - 0.3


@pytest.mark.parametrize("way", [{}, {"plugin": "gemini"}, AWAY], ids=["plain", "gemini", "gemini away"])
@pytest.mark.parametrize("adapter", ["none", "lora", "qlora4"])
def test_a_run_that_was_stopped_goes_on_to_the_bits_of_one_that_never_was(
    options: dict[str, Any], tmp_path: Path, adapter: str, way: dict[str, Any]
) -> None:
    masks: dict[str, Any] = {"dropout": 0.1} if adapter == "none" else {"adapter": adapter, "lora_dropout": 0.1}
    flags = {**options, "steps": 9, "eval_every": 3, "save_every": 4, **masks, **way}
    whole = run_of(ALONE, folder=str(tmp_path / "whole"), options=flags)
    stopped = run_of(ALONE, folder=str(tmp_path / "cut"), options=flags, stop_at=6)
    assert (stopped["status"], stopped["step"]) == ("interrupted", 6)
    assert run_of(ALONE, folder=str(tmp_path / "cut"), options=flags) == whole
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("change", [{"loss_on": "all"}, {"bucket": 3}, {"sequence_length": 95}])
def test_other_samples_are_refused(options: dict[str, Any], tmp_path: Path, change: dict[str, Any]) -> None:
    run_of(ALONE, folder=str(tmp_path / "run"), options={**options, "steps": 1, "eval_every": 0})
    with pytest.raises(CheckpointError, match="another data"):
        run_of(ALONE, folder=str(tmp_path / "run"), options={**options, "steps": 2, **change})


def test_another_adapter_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    lora = {**options, "steps": 1, "eval_every": 0, "adapter": "lora"}
    run_of(ALONE, folder=str(tmp_path / "run"), options=lora)
    with pytest.raises(CheckpointError, match="another adapter: LoRA of rank 8, alpha 16"):
        run_of(ALONE, folder=str(tmp_path / "run"), options={**lora, "lora_alpha": 4.0})
    with pytest.raises(CheckpointError, match="another adapter: LoRA of rank 8, alpha 16"):
        run_of(ALONE, folder=str(tmp_path / "run"), options={**lora, "adapter": "qlora8"})


def verified(world: World, *, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    world = World(world.rank, world.world_size, world.local_rank, CPU)
    flags = {**options, "eval_every": 0, "save_every": 0, "steps": 2, "warmup": 0.0, "gpus": world.world_size}
    if world.is_main:
        RunFolder.create(Path(folder))
    world.barrier()
    before = capture_random_state(CPU)
    try:
        report = _verify_on_rank(config_of(flags), RunFolder(Path(folder), is_new=False), world, 2)
    finally:
        restore_random_state(before, CPU)
    names = {parameter.name for step in report.steps for parameter in step.parameters}
    failures = [str(failure) for step in report.steps for failure in step.failures]
    return {"passed": report.passed, "worst": report.max_relative_error, "names": sorted(names), "failures": failures}


@pytest.mark.parametrize("adapter", ["none", "lora", "qlora8"])
@pytest.mark.parametrize("plugin", PLUGINS)
def test_each_plugin_computes_what_plain_pytorch_does(
    run_case: Run, options: dict[str, Any], tmp_path: Path, plugin: str, adapter: str
) -> None:
    """On two ranks, on padded rows: those with an adapter too, of which only the adapter's gradients are there."""
    flags = {**options, "plugin": plugin, "adapter": adapter}
    for report in run_case(verified, 2, folder=str(tmp_path / "run"), options=flags):
        assert report["failures"] == []
        assert report["passed"]
        assert report["worst"] < 1e-4
        if adapter != "none":
            assert report["names"] == sorted(
                f"transformer.h.{layer}.attn.c_attn.lora_{part}.weight" for layer in range(2) for part in "AB"
            )


@pytest.mark.parametrize("adapter", ["none", "lora", "qlora4"])
def test_chunks_that_come_and_go_compute_what_plain_pytorch_does(
    options: dict[str, Any], tmp_path: Path, adapter: str
) -> None:
    report = verified(ALONE, folder=str(tmp_path / "run"), options={**options, **AWAY, "adapter": adapter})
    assert report["failures"] == []
    assert report["passed"]
    assert report["worst"] < 1e-5


@pytest.mark.parametrize("plugin", ["torch_fsdp", "low_level_zero", "gemini"])
def test_a_sharded_adapter_is_written_whole(
    run_case: Run, options: dict[str, Any], tmp_path: Path, plugin: str
) -> None:
    flags = {**options, "adapter": "lora", "steps": 3, "eval_every": 0, "bucket": 8}
    run_of(ALONE, folder=str(tmp_path / "one"), options={**flags, "accumulate": 4})
    run_case(run_of, 2, folder=str(tmp_path / "two"), options={**flags, "plugin": plugin, "gpus": 2})
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(not name.endswith("lora_B.weight") or float(tensor.abs().max()) > 0 for name, tensor in one.items())
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-3)
    assert not (tmp_path / "two" / "model").exists()
