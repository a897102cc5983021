"""Blocks that keep what they computed, on a GPU: the same numbers, and no more memory than was allowed."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from albireo.distributed import join_world
from albireo.training.metrics import read_metrics
from albireo.training.plan import plan_run
from albireo.training.start import resolved_config, train_on_rank

pytestmark = pytest.mark.gpu

_STEPS = 6


@pytest.fixture(autouse=True)
def no_cap() -> Iterator[None]:
    """A cap is the process's; the next test has none."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def trained(folder: Path, plugin: str, **options: object) -> tuple[list[float], int]:
    """Return the losses of a run of OPT-125M, and the most that it took after its blocks were counted."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    given = {
        "model": "125m", "init": "random", "data": "random", "precision": "bf16", "batch_size": 8, "sequence_length": 512,
        "steps": _STEPS, "eval_every": 0, "save_every": 0, "checkpointing": True, "plugin": plugin,
    }  # fmt: skip
    plan = plan_run(recipe="opt", options=given | options, output=folder)
    run = plan.make_folder()
    peaks = train_on_rank(resolved_config(plan), run, join_world(single=True), export_model=False)
    rows, _ = read_metrics(run.metrics_path)
    return [row.loss for row in rows], peaks.device_peak_bytes


@pytest.mark.parametrize("plugin", ["torch_ddp_fp16", "torch_fsdp", "low_level_zero", "gemini"])
def test_more_memory_is_taken_as_far_as_allowed_and_no_number_changes(plugin: str, tmp_path: Path) -> None:
    options = {"precision": "fp16"} if plugin == "torch_ddp_fp16" else {}
    least, less = trained(tmp_path / "none", plugin, checkpointing_slack=0.0, **options)
    usual, some = trained(tmp_path / "some", plugin, checkpointing_slack=0.2, **options)
    all_kept, most = trained(tmp_path / "all", plugin, checkpointing_slack=100.0, **options)
    # Two runs of the same on a GPU differ by the order of their sums; on a CPU these are equal to the bit.
    assert usual == pytest.approx(least, rel=1e-3)
    assert all_kept == pytest.approx(least, rel=1e-3)
    # Its allocations are rounded up, and the head's gradient comes before those of blocks.
    assert less < some <= 1.22 * less
    assert most >= some


def test_a_cap_is_kept(tmp_path: Path) -> None:
    losses, peak = trained(tmp_path / "capped", "low_level_zero", checkpointing_slack=100.0, mem_cap=6.0)
    assert len(losses) == _STEPS
    assert peak < 6 * 2**30


def test_where_chunks_move_nothing_more_is_kept(tmp_path: Path) -> None:
    _, without = trained(tmp_path / "without", "gemini", checkpointing_slack=0.0, offload_optim_frac=0.5)
    _, with_slack = trained(tmp_path / "with", "gemini", checkpointing_slack=100.0, offload_optim_frac=0.5)
    assert with_slack <= 1.01 * without
