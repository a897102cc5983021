"""What a run came to, as numbers and as a table."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest

from albireo.device import PeakReading
from albireo.training.metrics import EvalRow, TrainRow
from albireo.training.run_folder import RunFolder
from albireo.training.summary import RunFacts, print_summary, summarise

FACTS = RunFacts(
    status="finished",
    model="opt-tiny",
    parameters=954_880,
    plugin="torch_ddp",
    precision="fp32",
    device="cpu",
    world_size=1,
    total_seconds=65.2,
    compile_seconds=None,
)


def train_row(step: int, loss: float, step_seconds: float = 0.5, epoch: int = 1) -> TrainRow:
    return TrainRow(
        step,
        epoch,
        loss,
        1e-3,
        1.0,
        8 / step_seconds,
        1024 / step_seconds,
        step_seconds,
        2**30 + step,
        2 * 2**30 - step,
    )


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run")


@pytest.fixture
def summary(folder):
    rows = [train_row(step, 8.0 - step / 10, step_seconds=30.0 if step == 1 else 0.5) for step in range(1, 31)]
    rows += [train_row(step, 5.0 if step % 2 else 4.0, epoch=2) for step in range(31, 61)]
    evals = [EvalRow(0, 8.3), EvalRow(20, 6.5), EvalRow(40, 5.2), EvalRow(60, 5.4)]
    return summarise(rows, evals, FACTS, folder)


def printed(summary, folder, stream=None):
    stream = stream if stream is not None else io.StringIO()
    print_summary(summary, folder, stream)
    return stream.getvalue()


def test_summary_of_a_run(summary):
    assert summary == {
        "status": "finished",
        "model": "opt-tiny",
        "parameters": 954_880,
        "trained_parameters": 954_880,
        "plugin": "torch_ddp",
        "precision": "fp32",
        "device": "cpu",
        "world_size": 1,
        "steps": 60,
        "epochs": 2,
        "train_loss": 4.5,
        "train_loss_steps": 20,
        "non_finite_steps": 0,
        "first_eval": {"step": 0, "eval_loss": 8.3, "perplexity": pytest.approx(math.exp(8.3))},
        "last_eval": {"step": 60, "eval_loss": 5.4, "perplexity": pytest.approx(math.exp(5.4))},
        "best_eval": {"step": 40, "eval_loss": 5.2, "perplexity": pytest.approx(math.exp(5.2))},
        "step_seconds": 0.5,
        "samples_per_second": 16.0,
        "tokens_per_second": 2048.0,
        "training_seconds": 30.0 + 59 * 0.5,
        "compile_seconds": None,
        "total_seconds": 65.2,
        "device_peak_bytes": 2**30 + 60,
        "host_peak_bytes": 2 * 2**30 - 1,
        "memory_before": None,
        "memory_after": None,
        "device_reserved_peak_bytes": 0,
        "plan": None,
        "loss_plot_path": "loss.png",
        "model_path": "model",
    }


def test_a_summary_is_strict_json_whatever_the_losses_were(folder):
    rows = [train_row(1, math.nan), train_row(2, math.inf), train_row(3, 2.0)]
    evals = [EvalRow(0, 900.0), EvalRow(1, math.nan), EvalRow(3, math.inf)]
    summary = summarise(rows, evals, FACTS, folder)
    folder.write_summary(summary)
    assert json.loads(folder.summary_path.read_text()) == summary
    assert (summary["train_loss"], summary["train_loss_steps"], summary["non_finite_steps"]) == (2.0, 1, 2)
    assert summary["first_eval"] == summary["best_eval"] == {"step": 0, "eval_loss": 900.0, "perplexity": None}
    assert summary["last_eval"] == {"step": 3, "eval_loss": None, "perplexity": None}
    text = printed(summary, folder)
    assert "not finite           the loss of 2 steps\n" in text
    assert "evaluation, first    loss 900.000, perplexity inf (step 0)\n" in text
    assert "evaluation, last     loss not finite (step 3)\n" in text


def test_a_run_stopped_before_its_first_step(folder):
    summary = summarise([], [], FACTS, folder)
    assert summary["steps"] == 0
    assert summary["train_loss"] is summary["step_seconds"] is summary["last_eval"] is None
    assert "evaluation" not in printed(summary, folder)


def test_the_table_in_a_file(summary, folder):
    folder.loss_plot_path.write_bytes(b"")
    folder.model_path.mkdir()
    assert printed(summary, folder).splitlines() == [
        "run finished",
        "model                opt-tiny, 955K parameters",
        "trained with         torch_ddp, fp32, cpu",
        "steps                60, 2 epochs",
        "training loss        4.500 (mean of the last 20 steps)",
        "evaluation, first    loss 8.300, perplexity 4023.9 (step 0)",
        "evaluation, last     loss 5.400, perplexity 221.4 (step 60)",
        "evaluation, best     loss 5.200, perplexity 181.3 (step 40)",
        "step time            0.5 s (median)",
        "speed                16 samples/s, 2,048 tokens/s",
        "total time           1:05, of which 1:00 in steps",
        "device memory, peak  1.00 GB",
        "host memory, peak    2.00 GB",
        f"loss plot  {folder.loss_plot_path}",
        f"model      {folder.model_path}",
    ]


def test_a_run_that_went_on_says_what_its_times_cover(folder):
    rows = [train_row(step, 5.0, step_seconds=60.0) for step in range(1, 4)]
    summary = summarise(rows, [], dataclasses.replace(FACTS, total_seconds=65.0), folder)
    assert (summary["training_seconds"], summary["total_seconds"]) == (180.0, 65.0)
    assert "total time           1:05 since it went on; 3:00 in steps of the whole run\n" in printed(summary, folder)


def test_the_cost_of_compiling_is_kept(folder):
    summary = summarise([train_row(1, 5.0)], [], dataclasses.replace(FACTS, compile_seconds=23.09), folder)
    assert summary["compile_seconds"] == 23.09
    assert "compiling            23.1 s\n" in printed(summary, folder)


def test_only_what_is_there_is_named(summary, folder):
    assert str(folder.path) not in printed(summary, folder)
    folder.loss_plot_path.write_bytes(b"")
    assert printed(summary, folder).splitlines()[-1] == f"loss plot  {folder.loss_plot_path}"


def test_a_long_path_is_not_broken(summary, tmp_path):
    folder = RunFolder.create(tmp_path / ("d" * 120) / ("e" * 120))
    folder.model_path.mkdir()
    assert printed(summary, folder).endswith(f"model      {folder.model_path}\n")


def test_many_ranks_and_large_models(summary, folder):
    summary = {
        **summary,
        "world_size": 4,
        "device": "NVIDIA H200",
        "parameters": 6_658_473_984,
        "tokens_per_second": 1e5,
    }
    text = printed(summary, folder)
    assert "trained with         torch_ddp, fp32, 4 ranks on NVIDIA H200\n" in text
    assert "opt-tiny, 6.66B parameters\n" in text
    assert "100,000 tokens/s\n" in text


def test_a_terminal_gets_colour_and_the_same_words(summary, folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for name, value in (("TERM", "xterm"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    text = printed(summary, folder, Terminal())
    assert "\x1b[" in text
    assert "loss 5.400, perplexity 221.4 (step 60)" in text


def test_names_that_look_like_markup_are_printed_as_they_are(summary, folder):
    assert "[red]m[/red], 955K" in printed({**summary, "model": "[red]m[/red]"}, folder)


ADAPTED = dataclasses.replace(
    FACTS,
    trained_parameters=9_549,
    memory_before=PeakReading(2**30, 3 * 2**30, 4 * 2**30, 0, device_reserved_bytes=2 * 2**30, host_bytes=2**29),
    memory_after=PeakReading(2**29, 3 * 2**30, 4 * 2**30, 0, device_reserved_bytes=4 * 2**30, host_bytes=2**30),
)


def test_an_adapter_s_run_says_what_is_trained_and_what_it_takes(folder):
    folder.adapter_path.mkdir()
    (folder.adapter_path / "adapter_model.safetensors").write_bytes(b"x" * 2**20)
    summary = summarise([train_row(1, 5.0)], [], ADAPTED, folder)
    assert (summary["parameters"], summary["trained_parameters"]) == (954_880, 9_549)
    assert (summary["adapter_path"], summary["adapter_bytes"]) == ("adapter", 2**20)
    assert "model_path" not in summary
    folder.write_summary(summary)
    text = printed(summary, folder)
    for line in (
        "trained                9,549 of 954,880 parameters (1.0000%)",
        "device memory, before  1.00 GB allocated, 2.00 GB reserved",
        "device memory, after   512 MB allocated, 4.00 GB reserved",
        "device memory, peak    1.00 GB allocated, 4.00 GB reserved",
        "adapter file           1.00 MB",
        f"adapter    {folder.adapter_path}",
    ):
        assert f"{line}\n" in text, text


def test_on_a_cpu_memory_is_the_hosts(folder):
    rows = [dataclasses.replace(train_row(1, 5.0), device_peak_bytes=0)]
    text = printed(summarise(rows, [], ADAPTED, folder), folder)
    assert "host memory, before  512 MB\n" in text
    assert "host memory, after   1.00 GB\n" in text
    assert "device" not in text
