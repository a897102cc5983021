"""How a run is put together: its length, whether it can fit, and what it goes on from."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_texts import write_text

from albireo.config import MachineFacts, RunConfig, config_from_mapping, config_to_mapping, merge, resolve
from albireo.config.run import PLUGIN_OPTIONS
from albireo.device import HostMemory
from albireo.distributed import World
from albireo.errors import CheckpointError, ConfigError, OutOfMemoryError
from albireo.models import FAMILIES
from albireo.optim import warmup_steps_of
from albireo.training.assemble import _check_memory, _with_lengths, open_session
from albireo.training.language_model import plan_language_model
from albireo.training.loop import train_loop
from albireo.training.metrics import read_metrics
from albireo.training.run_folder import RunFolder

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
GB = 2**30


def config_of(**options: Any) -> RunConfig:
    return resolve(merge(RunConfig(), options), MachineFacts("cpu", 1, False))


def lengths_of(size: int, per_step: int, **options: Any) -> tuple[Any, int]:
    config, steps = _with_lengths(config_of(**options), size, per_step)
    assert config.schedule.steps == steps
    return config.schedule, steps


def test_steps_come_of_epochs() -> None:
    schedule, steps = lengths_of(100, 8, epochs=2.0)
    assert (steps, schedule.epochs) == (25, 2.0)
    assert lengths_of(101, 8, epochs=2.0)[1] == 26
    assert lengths_of(100, 8, epochs=0.001)[1] == 1


def test_epochs_come_of_steps() -> None:
    schedule, steps = lengths_of(100, 8, steps=50)
    assert (steps, schedule.epochs) == (50, 4.0)


def test_a_tiny_run_is_one_epoch_unless_told() -> None:
    assert lengths_of(80, 8)[1] == 10


@given(
    size=st.integers(1, 10**6),
    per_step=st.integers(1, 4096),
    length=st.one_of(
        st.builds(lambda steps: {"steps": steps}, st.integers(1, 10**6)),
        st.builds(lambda epochs: {"epochs": epochs}, st.floats(1e-3, 1e3)),
    ),
)
def test_what_was_decided_once_is_decided_again(size: int, per_step: int, length: dict[str, Any]) -> None:
    """A run's config.json holds steps and epochs; a resumed run reads both, and must come to the same steps."""
    config, steps = _with_lengths(config_of(warmup=0.0, **length), size, per_step)
    assert steps == length.get("steps", steps)
    read_back = config_from_mapping(config_to_mapping(config), where="config.json")
    assert _with_lengths(read_back, size, per_step)[1] == steps
    assert _with_lengths(_with_lengths(read_back, size, per_step)[0], size, per_step)[1] == steps


@pytest.mark.parametrize(("steps", "fifth"), [(1, 1), (4, 1), (5, 1), (6, 2), (60, 12), (61, 13)])
def test_a_run_is_looked_at_and_saved_five_times(steps: int, fifth: int) -> None:
    schedule, _ = lengths_of(100, 8, steps=steps)
    assert (schedule.eval_every, schedule.save_every) == (fifth, fifth)
    schedule, _ = lengths_of(100, 8, steps=steps, eval_every=0, save_every=7)
    assert (schedule.eval_every, schedule.save_every) == (0, 7)


@pytest.mark.parametrize(
    ("warmup", "steps", "fits"),
    [
        (0.0, 1, True),
        (0.1, 1, True),
        (1.0, 1, True),
        (5.0, 6, True),
        (5.0, 5, False),
        (9.0, 5, False),
        (0.99, 50, False),
    ],
)
def test_a_warmup_is_shorter_than_the_run(warmup: float, steps: int, fits: bool) -> None:
    if fits:
        lengths_of(100, 8, steps=steps, warmup=warmup)
        return
    with pytest.raises(ConfigError, match=rf"--warmup {warmup:g} .* {steps} steps"):
        lengths_of(100, 8, steps=steps, warmup=warmup)


@example(steps=100, percent=7)
@given(steps=st.integers(1, 10**5), percent=st.integers(0, 99))
def test_a_share_of_a_run_is_rounded_up_and_not_by_a_rounding_error(steps: int, percent: int) -> None:
    assert warmup_steps_of(percent / 100, steps) == -(-steps * percent // 100)


class Memory:
    """What this machine says of itself, in a test's own numbers."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, host_gb: float | None, device_gb: float | None = None
    ) -> None:
        host = None if host_gb is None else HostMemory(int(host_gb * GB), "machine")
        where = "albireo.training.assemble"
        monkeypatch.setattr(f"{where}.read_host_memory", lambda: host)
        monkeypatch.setattr(f"{where}.device_total_bytes", lambda _: None if device_gb is None else int(device_gb * GB))
        monkeypatch.setattr(f"{where}.describe_device", lambda _: "NVIDIA H200")


def check(world_size: int = 1, device: str = "cpu", **options: Any) -> None:
    config = config_of(init="random", model="125m", **options)
    planned = plan_language_model(config)
    # 16 bytes for each of them are 2 GB.
    planned = dataclasses.replace(planned, parameters=2**27, trained=2**27)
    cap = options.get("mem_cap", 0.0)
    config = dataclasses.replace(config, plugin=dataclasses.replace(config.plugin, mem_cap=cap))
    _check_memory(config, planned, World(0, world_size, 0, torch.device(device)))


@pytest.mark.parametrize(
    ("host_gb", "world_size", "said"),
    [
        (2.0, 1, None),
        (1.9, 1, "this machine has 1.9 GB"),
        (4.0, 2, None),
        (3.9, 2, "each rank's share of this machine's memory is 1.9 GB"),
        (None, 1, None),
    ],
)
def test_a_cpu_run_must_fit_the_hosts_memory(
    monkeypatch: pytest.MonkeyPatch, host_gb: float | None, world_size: int, said: str | None
) -> None:
    Memory(monkeypatch, host_gb=host_gb)
    if said is None:
        check(world_size)
        return
    with pytest.raises(OutOfMemoryError) as raised:
        check(world_size)
    assert said in str(raised.value)


def test_a_gpu_run_must_fit_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Memory(monkeypatch, host_gb=0.1, device_gb=2.0)
    check(4, "cuda")
    Memory(monkeypatch, host_gb=100, device_gb=1.5)
    with pytest.raises(OutOfMemoryError, match=r"the NVIDIA H200 has 1\.5 GB"):
        check(1, "cuda")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", lines=60)


class Runs:
    """Runs of a small model over a small text, in this process."""

    def __init__(self, text: Path, cache: Path) -> None:
        self.options = {"data": str(text), "cache": str(cache), "sequence_length": 16, "batch_size": 2}

    def go(self, folder: Path, **options: Any) -> Any:
        made = RunFolder.open(folder) if (folder / "config.json").exists() else RunFolder.create(folder)
        with open_session(config_of(**{**self.options, **options}), made, ALONE) as session:
            assert train_loop(session) == "finished"
            return session


@pytest.fixture
def runs(text: Path, cache_folder: Path) -> Runs:
    return Runs(text, cache_folder)


def test_a_run_goes_on_from_its_newest_checkpoint(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.go(tmp_path / "run", steps=4, save_every=2)
    said = capsys.readouterr().err
    assert "training   4 steps of batch 2 with torch_ddp, fp32, on CPU" in said
    session = runs.go(tmp_path / "run", steps=6)
    assert "going on from the checkpoint of step 4" in capsys.readouterr().err
    assert (session.step, session.position.samples) == (6, 12)
    assert [row.step for row in read_metrics(tmp_path / "run" / "metrics.jsonl")[0]] == [1, 2, 3, 4, 5, 6]
    assert session.parameters == sum(p.numel() for p in session.model.unwrap().parameters())


def test_a_run_that_is_resumed_with_another_batch_counts_samples(runs: Runs, tmp_path: Path) -> None:
    runs.go(tmp_path / "run", steps=4)
    session = runs.go(tmp_path / "run", steps=6, batch_size=5, accumulate=2)
    assert session.position.samples == 4 * 2 + 2 * 10
    blocks = len(session.data.train)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert [row.epoch for row in rows] == [first // blocks + 1 for first in (0, 2, 4, 6, 8, 18)]


def test_fewer_steps_than_are_done_are_refused_and_nothing_is_lost(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.go(folder, steps=4)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match=r"has done 4 steps and cannot end at 3"):
        runs.go(folder, steps=3)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("change", ["text", "sequence length", "holdout"])
def test_other_data_are_refused_and_nothing_is_lost(runs: Runs, text: Path, tmp_path: Path, change: str) -> None:
    folder = tmp_path / "run"
    runs.go(folder, steps=2)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    options: dict[str, Any] = {"steps": 4}
    if change == "text":
        text.write_text(text.read_text().replace("star", "moon"))
    else:
        options |= {"sequence_length": 18} if change == "sequence length" else {"holdout": 0.4}
    with pytest.raises(CheckpointError, match="another data"):
        runs.go(folder, **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_the_configuration_on_the_disk_leaves_nothing_open(runs: Runs, tmp_path: Path) -> None:
    session = runs.go(tmp_path / "run", epochs=0.5)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written == config_to_mapping(session.config)
    assert written["schedule"]["steps"] == math.ceil(0.5 * len(session.data.train) / 2)
    left_open = {name for part in written.values() if isinstance(part, dict) for name in part if part[name] is None}
    # Options of an adapter, or of a plugin, that is not there say nothing.
    adapter = {"lora_rank", "lora_alpha", "lora_dropout", "lora_targets"}
    assert left_open <= {"tokenizer", "cache", *PLUGIN_OPTIONS, *adapter}


@pytest.mark.parametrize("option", ["checkpointing", "dropout"])
def test_options_of_the_model_reach_it(runs: Runs, tmp_path: Path, option: str) -> None:
    session = runs.go(tmp_path / "run", steps=1, **{option: True if option == "checkpointing" else 0.25})
    pretrained = session.model.unwrap().pretrained
    # transformers 5.2x renamed it, and warns at the old name.
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    name = next(name for name in names if hasattr(type(pretrained), name))
    assert getattr(pretrained, name) == (option == "checkpointing")
    assert pretrained.config.dropout == (0.25 if option == "dropout" else 0.0)


_OFFLOADED = {"plugin": "gemini", "offload_optim_frac": 0.5}


@pytest.mark.parametrize("option", [{}, {"plugin": "gemini"}, {"accumulate": 2}, {"checkpointing": False}, _OFFLOADED])
def test_blocks_keep_their_activations_where_gradients_will_be(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: dict[str, Any]
) -> None:
    # One short row: a model of any size has larger gradients.
    options = {"plugin": "low_level_zero", "precision": "bf16", "checkpointing": True, "batch_size": 1, "steps": 2}
    session = runs.go(tmp_path / "run", **{**options, **option})
    kept = "keeping    the activations of" in capsys.readouterr().err
    pretrained = session.model.unwrap().pretrained
    recomputes = [block.gradient_checkpointing for _, block in FAMILIES["opt"].blocks(pretrained)]
    assert kept == (option in ({}, {"plugin": "gemini"}, {"plugin": "torch_fsdp"}))
    assert any(recomputes) == (option in ({"accumulate": 2}, _OFFLOADED))


@pytest.mark.parametrize("where", ["_build_state", "_resume"])
def test_running_out_of_memory_before_the_first_step_is_one_line(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(f"albireo.training.assemble.{where}", fail)
    with pytest.raises(OutOfMemoryError) as raised:
        runs.go(tmp_path / "run", steps=1)
    said = str(raised.value)
    assert said.startswith("out of memory on CPU")
    assert "0.0 GB for weights, gradients and optimizer states" in said
    assert said.endswith("end what else runs there, or take a smaller --model")


@pytest.mark.parametrize(
    ("section", "name"), [("data", "sequence_length"), ("optimizer", "batch_size"), ("optimizer", "learning_rate")]
)
def test_a_configuration_that_leaves_something_open_is_refused(tmp_path: Path, section: str, name: str) -> None:
    """A learning rate that nobody decided must not be a run that learns nothing."""
    config = config_of(data="random", steps=1)
    config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: None})})
    with (
        pytest.raises(ConfigError, match=f"{name} is left open"),
        open_session(config, RunFolder.create(tmp_path), ALONE),
    ):
        pass
