"""Whole runs on instructions: what is counted, however they are cut up, stopped and gone on with, and proved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_instructions import write_instructions
from whole_runs import ALONE, AWAY, PLUGINS, config_of, losses, run_of, verified

from albireo.errors import CheckpointError
from albireo.training.assemble import open_session
from albireo.training.run_folder import RunFolder

# Batches that straddle epochs; a length that cuts some answers.
SHORT = {"model": "tiny", "sequence_length": 96, "batch_size": 2, "accumulate": 2, "holdout": 0.2}

Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> dict[str, Any]:
    data = write_instructions(tmp_path_factory.mktemp("data") / "mine.json", 26)
    return {"data": str(data), "cache": str(cache_folder), **SHORT}


def test_the_loss_is_the_mean_over_the_answers_tokens_and_of_no_padding(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Against transformers' own model, each sample alone and unpadded."""
    RunFolder.create(tmp_path / "run")
    with open_session(config_of("gpt2", options), RunFolder(tmp_path / "run", is_new=False), ALONE) as session:
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
    run_of(ALONE, recipe="gpt2", folder=str(tmp_path / "one"), options={**flags, "batch_size": 8, "accumulate": 1})
    run_of(ALONE, recipe="gpt2", folder=str(tmp_path / "four"), options={**flags, "batch_size": 2, "accumulate": 4})
    run_case(run_of, 2, recipe="gpt2", folder=str(tmp_path / "two"), options={**flags, "gpus": 2})
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
    whole = run_of(ALONE, recipe="gpt2", folder=str(tmp_path / "whole"), options=flags)
    stopped = run_of(ALONE, recipe="gpt2", folder=str(tmp_path / "cut"), options=flags, stop_at=6)
    assert (stopped["status"], stopped["step"]) == ("interrupted", 6)
    assert run_of(ALONE, recipe="gpt2", folder=str(tmp_path / "cut"), options=flags) == whole
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("change", [{"loss_on": "all"}, {"bucket": 3}, {"sequence_length": 95}])
def test_other_samples_are_refused(options: dict[str, Any], tmp_path: Path, change: dict[str, Any]) -> None:
    run_of(ALONE, recipe="gpt2", folder=str(tmp_path / "run"), options={**options, "steps": 1, "eval_every": 0})
    with pytest.raises(CheckpointError, match="another data"):
        run_of(ALONE, recipe="gpt2", folder=str(tmp_path / "run"), options={**options, "steps": 2, **change})


def test_another_adapter_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    lora = {**options, "steps": 1, "eval_every": 0, "adapter": "lora"}
    run_of(ALONE, recipe="gpt2", folder=str(tmp_path / "run"), options=lora)
    with pytest.raises(CheckpointError, match="another adapter: LoRA of rank 8, alpha 16"):
        run_of(ALONE, recipe="gpt2", folder=str(tmp_path / "run"), options={**lora, "lora_alpha": 4.0})
    with pytest.raises(CheckpointError, match="another adapter: LoRA of rank 8, alpha 16"):
        run_of(ALONE, recipe="gpt2", folder=str(tmp_path / "run"), options={**lora, "adapter": "qlora8"})


@pytest.mark.parametrize("adapter", ["none", "lora", "qlora8"])
@pytest.mark.parametrize("plugin", PLUGINS)
def test_each_plugin_computes_what_plain_pytorch_does(
    run_case: Run, options: dict[str, Any], tmp_path: Path, plugin: str, adapter: str
) -> None:
    """On two ranks, on padded rows: those with an adapter too, of which only the adapter's gradients are there."""
    flags = {**options, "plugin": plugin, "adapter": adapter}
    for report in run_case(verified, 2, recipe="gpt2", folder=str(tmp_path / "run"), options=flags):
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
    report = verified(
        ALONE, recipe="gpt2", folder=str(tmp_path / "run"), options={**options, **AWAY, "adapter": adapter}
    )
    assert report["failures"] == []
    assert report["passed"]
    assert report["worst"] < 1e-5


@pytest.mark.parametrize("plugin", ["torch_fsdp", "low_level_zero", "gemini"])
def test_a_sharded_adapter_is_written_whole(
    run_case: Run, options: dict[str, Any], tmp_path: Path, plugin: str
) -> None:
    flags = {**options, "adapter": "lora", "steps": 3, "eval_every": 0, "bucket": 8}
    run_of(ALONE, recipe="gpt2", folder=str(tmp_path / "one"), options={**flags, "accumulate": 4})
    run_case(run_of, 2, recipe="gpt2", folder=str(tmp_path / "two"), options={**flags, "plugin": plugin, "gpus": 2})
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(not name.endswith("lora_B.weight") or float(tensor.abs().max()) > 0 for name, tensor in one.items())
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-3)
    assert not (tmp_path / "two" / "model").exists()
