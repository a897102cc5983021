"""Whole runs on pictures: learnt, stopped and gone on with, proved, and used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_pictures import write_pictures
from transformers import AutoImageProcessor, AutoModelForImageClassification
from whole_runs import ALONE, AWAY, PLUGINS, losses, run_of, verified

from albireo.errors import CheckpointError, ConfigError, DataError
from albireo.models import VIT
from albireo.training.classifying import classify, load_picture_model, read_pictures
from albireo.training.exporting import export_checkpoint
from albireo.training.metrics import read_metrics

CPU = torch.device("cpu")
Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> dict[str, Any]:
    data = write_pictures(tmp_path_factory.mktemp("pictures") / "data", 20, size=64)
    return {"model": "tiny", "data": str(data), "cache": str(cache_folder), "batch_size": 4, "holdout": 0.2}


@pytest.fixture(scope="module")
def learnt(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "learnt"
    run_of(ALONE, recipe="vit", folder=str(folder), options={**options, "steps": 25, "save_every": 25})
    return folder


def pictures_of(options: dict[str, Any]) -> list[Path]:
    return [Path(options["data"]) / name / "000.png" for name in ("green", "red")]


def test_a_run_learns_and_leaves_what_others_load(learnt: Path, options: dict[str, Any]) -> None:
    _, evaluations = read_metrics(learnt / "metrics.jsonl")
    assert evaluations[-1].accuracy == 1.0
    assert evaluations[-1].eval_loss < 0.5 * evaluations[0].eval_loss
    for name in ("loss.png", "accuracy.png", "predictions.png", "confusion.png"):
        with Image.open(learnt / name) as picture:
            assert min(picture.size) > 300
    summary = json.loads((learnt / "summary.json").read_text())
    assert summary["last_eval"]["accuracy"] == 1.0
    assert "perplexity" not in summary["last_eval"]
    model = AutoModelForImageClassification.from_pretrained(learnt / "model")
    assert model.config.id2label == {0: "green", 1: "red"}
    processor = AutoImageProcessor.from_pretrained(learnt / "model")
    trained = load_picture_model(learnt, CPU)
    for path, wanted in zip(pictures_of(options), ("green", "red"), strict=True):
        picture = Image.open(path).convert("RGB")
        with torch.no_grad():
            found = model(**processor(picture, return_tensors="pt")).logits.softmax(-1)[0]
        (shares,) = classify(trained, [picture])
        assert next(iter(shares)) == wanted
        assert shares["green"] == pytest.approx(float(found[0]), abs=0.02)
        assert sum(shares.values()) == pytest.approx(1.0)


def test_a_model_goes_on_where_the_classes_are_its_own_and_gets_a_new_head_where_not(
    learnt: Path, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = {**options, "model": str(learnt / "model"), "steps": 1, "save_every": 0}
    run_of(ALONE, recipe="vit", folder=str(tmp_path / "same"), options=again)
    assert read_metrics(tmp_path / "same" / "metrics.jsonl")[1][0].accuracy == 1.0
    capsys.readouterr()
    data = write_pictures(tmp_path / "other", 6, classes=("blue", "grey", "red"), size=64)
    for plugin in ("torch_ddp", "gemini"):
        folder = str(tmp_path / plugin)
        run_of(ALONE, recipe="vit", folder=folder, options={**again, "data": str(data), "plugin": plugin})
        assert "head       a new one, for 3 classes" in capsys.readouterr().err
    assert losses(tmp_path / "gemini") == losses(tmp_path / "torch_ddp")


@pytest.mark.parametrize(
    ("adapter", "way"),
    [("none", {}), ("none", {"plugin": "gemini"}), ("none", AWAY), ("lora", AWAY)],
    ids=["plain", "gemini", "gemini away", "adapter, gemini away"],
)
def test_a_run_that_was_stopped_goes_on_to_the_bits_of_one_that_never_was(
    options: dict[str, Any], tmp_path: Path, adapter: str, way: dict[str, Any]
) -> None:
    """In the middle of an epoch, with other parts of the pictures in each, and with dropout."""
    flags = {**options, "steps": 11, "eval_every": 4, "save_every": 4, "adapter": adapter, "dropout": 0.1, **way}
    whole = run_of(ALONE, recipe="vit", folder=str(tmp_path / "whole"), options=flags)
    stopped = run_of(ALONE, recipe="vit", folder=str(tmp_path / "cut"), options=flags, stop_at=6)
    assert (stopped["status"], stopped["step"]) == ("interrupted", 6)
    assert run_of(ALONE, recipe="vit", folder=str(tmp_path / "cut"), options=flags) == whole
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("change", [{"augment": False}, {"holdout": 0.3}])
def test_other_samples_are_refused(options: dict[str, Any], tmp_path: Path, change: dict[str, Any]) -> None:
    flags = {**options, "steps": 1, "eval_every": 0}
    run_of(ALONE, recipe="vit", folder=str(tmp_path / "run"), options=flags)
    with pytest.raises(CheckpointError, match="another data"):
        run_of(ALONE, recipe="vit", folder=str(tmp_path / "run"), options={**flags, "steps": 2, **change})


@pytest.mark.parametrize(("plugin", "adapter"), [*((plugin, "none") for plugin in PLUGINS), ("gemini", "qlora8")])
def test_each_plugin_computes_what_plain_pytorch_does(
    run_case: Run, options: dict[str, Any], tmp_path: Path, plugin: str, adapter: str
) -> None:
    flags = {**options, "plugin": plugin, "adapter": adapter}
    for ranks in (1, 2):
        if ranks == 1 and plugin == "torch_fsdp":
            continue  # it needs a process group, and is verified alone by the command
        for report in run_case(verified, ranks, recipe="vit", folder=str(tmp_path / f"run-{ranks}"), options=flags):
            assert report["failures"] == []
            assert report["passed"]
            assert report["worst"] < 1e-4
            if adapter == "none":
                assert len(report["names"]) == sum(1 for _ in VIT.make_model(VIT.config_for("tiny")).parameters())


def test_two_ranks_are_one_that_takes_as_many(run_case: Run, options: dict[str, Any], tmp_path: Path) -> None:
    flags = {**options, "steps": 4, "eval_every": 2, "augment": False}
    run_of(ALONE, recipe="vit", folder=str(tmp_path / "one"), options={**flags, "batch_size": 6})
    run_case(run_of, 2, recipe="vit", folder=str(tmp_path / "two"), options={**flags, "batch_size": 3, "gpus": 2})
    for mine, theirs in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)


def test_an_adapter_and_the_head_beside_it(options: dict[str, Any], learnt: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    flags = {
        **options,
        "model": str(learnt / "model"),
        "adapter": "lora",
        "steps": 3,
        "save_every": 3,
        "learning_rate": 0.01,
    }
    run_of(ALONE, recipe="vit", folder=str(tmp_path / "run"), options=flags)
    pictures = [picture.convert("RGB") for picture in read_pictures(pictures_of(options))]
    wanted = classify(load_picture_model(tmp_path / "run", CPU), pictures)
    base = AutoModelForImageClassification.from_pretrained(learnt / "model")
    trained = load_picture_model(tmp_path / "run", CPU)
    pixels = trained.form.normalised(torch.stack([trained.form.whole(picture) for picture in pictures]))
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    export_checkpoint(tmp_path / "run", tmp_path / "whole", merge=True)
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "whole").eval()
    before = AutoModelForImageClassification.from_pretrained(learnt / "model").eval()
    with torch.no_grad():
        assert float((before(pixel_values=pixels).logits - merged(pixel_values=pixels).logits).abs().max()) > 1e-3
        for model in (loaded, merged):
            shares = model(pixel_values=pixels).logits.softmax(-1)
            for row, found in zip(shares, wanted, strict=True):
                assert found["green"] == pytest.approx(float(row[0]), abs=1e-4)


def test_what_cannot_be_classified(options: dict[str, Any], learnt: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    for path, said in ((tmp_path / "text.jpg", "it is no picture"), (tmp_path / "none.png", "No such file")):
        with pytest.raises(DataError, match=f"{path} cannot be read: {said}"):
            read_pictures([*pictures_of(options), path])
    run_of(ALONE, recipe="opt", folder=str(tmp_path / "opt"), options={
        "data": "random", "sequence_length": 8, "batch_size": 1, "steps": 1, "eval_every": 0, "save_every": 0,
    })  # fmt: skip
    with pytest.raises(ConfigError, match="of the recipe opt, which tells no pictures apart"):
        load_picture_model(tmp_path / "opt", CPU)
