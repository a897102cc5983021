"""Whole runs whose ranks hold parts: the model that is written is whole, and a run goes on to its very bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_texts import write_text

from albireo.config import MachineFacts, RunConfig, merge, resolve
from albireo.device import capture_random_state, restore_random_state
from albireo.distributed import World
from albireo.training.metrics import read_metrics
from albireo.training.run_folder import RunFolder
from albireo.training.start import train_on_rank

CPU = torch.device("cpu")
OPTIONS = {"sequence_length": 16, "batch_size": 2, "accumulate": 2, "steps": 4, "eval_every": 2, "save_every": 2}


def run_case_of(world: World, *, folder: str, options: dict[str, Any]) -> None:
    """Run to the end, or go on with what lies in the folder."""
    world = World(world.rank, world.world_size, world.local_rank, CPU)
    if world.is_main and not (Path(folder) / "config.json").exists():
        RunFolder.create(Path(folder))
    world.barrier()
    before = capture_random_state(CPU)
    config = resolve(merge(RunConfig(), options), MachineFacts("cpu", 1, False))
    try:
        train_on_rank(config, RunFolder(Path(folder), is_new=False), world)
    finally:
        restore_random_state(before, CPU)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> dict[str, Any]:
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt", lines=24)
    return {"data": str(text), "cache": str(cache_folder), **OPTIONS}


@pytest.fixture(scope="module")
def plain(two_ranks: Any, tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    two_ranks.run(run_case_of, folder=str(folder), options=options)
    return folder


def numbers_of(folder: Path) -> list[tuple[Any, ...]]:
    train, evaluations = read_metrics(folder / "metrics.jsonl")
    rows: list[tuple[Any, ...]] = [(row.step, row.loss, row.grad_norm) for row in train]
    return rows + [(row.step, row.eval_loss) for row in evaluations]


@pytest.mark.parametrize("plugin", ["torch_fsdp", "low_level_zero"])
def test_a_sharded_run_leaves_a_whole_model_and_goes_on(
    two_ranks: Any, tmp_path: Path, options: dict[str, Any], plain: Path, plugin: str
) -> None:
    folder = tmp_path / "run"
    chosen = {**options, "plugin": plugin}
    two_ranks.run(run_case_of, folder=str(folder), options=chosen)
    for mine, theirs in zip(numbers_of(folder), numbers_of(plain), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    model = (folder / "model" / "model.safetensors").read_bytes()
    ours, wanted = load_file(folder / "model" / "model.safetensors"), load_file(plain / "model" / "model.safetensors")
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4)
    configs = [json.loads((path / "model" / "config.json").read_text()) for path in (folder, plain)]
    assert configs[0] == configs[1]

    before = numbers_of(folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    shutil.rmtree(folder / "model")
    two_ranks.run(run_case_of, folder=str(folder), options=chosen)
    assert numbers_of(folder) == before
    assert (folder / "model" / "model.safetensors").read_bytes() == model


def test_one_rank_has_a_process_group_for_as_long_as_it_needs_one(tmp_path: Path, options: dict[str, Any]) -> None:
    chosen = {**options, "plugin": "torch_fsdp", "precision": "bf16", "steps": 2}
    run_case_of(World(0, 1, 0, CPU), folder=str(tmp_path / "run"), options=chosen)
    assert not torch.distributed.is_initialized()
    written = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["dtype"] == "float32"
