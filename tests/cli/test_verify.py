"""`albireo verify`: what it says, writes and leaves, and its exit codes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from train_server import Ended, TrainServer

from albireo.cli.main import main
from albireo.verify import Failure, ParameterReport, StepReport, Thresholds, VerifyReport

SMALL = "--data random --sequence-length 16 --batch-size 2"


@pytest.fixture
def verify(train_server: TrainServer, tmp_path: Path) -> Any:
    """Run `albireo verify opt` with a small model and a report in the test's folder."""

    def run(arguments: str) -> tuple[Ended, dict[str, Any]]:
        target = tmp_path / "report.json"
        ended = train_server.run(["verify", "opt", *shlex.split(SMALL), *shlex.split(arguments), "--json", str(target)])
        content = json.loads(target.read_text(), parse_constant=pytest.fail) if target.exists() else {}
        return ended, content

    return run


def test_three_steps_pass(verify: Any, tmp_path: Path) -> None:
    ended, content = verify("--clip 0.5")
    assert ended.code == 0, ended
    assert content["passed"] is True
    assert content["max_relative_error"] <= 1e-6
    assert content["threshold"] == 1e-5
    assert [step["step"] for step in content["steps"]] == [1, 2, 3]
    assert all(step["passed"] and step["failures"] == [] for step in content["steps"])
    names = {parameter["name"] for parameter in content["parameters"]}
    assert "model.decoder.layers.1.self_attn.out_proj.weight" in names
    assert len(content["parameters"]) == len(names)
    assert "torch_ddp, fp32, 1 rank on CPU" in ended.output
    assert ended.output.splitlines()[-1].startswith("passed: 3 steps; the worst gradient is off by")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_two_ranks_in_fp16_with_a_step_that_is_left_out(verify: Any) -> None:
    ended, content = verify("--gpus 2 --accumulate 2 --precision fp16 --plugin low_level_zero --steps 2 --warmup 0")
    assert ended.code == 0, ended
    assert content["passed"] is True
    assert (content["plugin"], content["precision"], content["world_size"]) == ("low_level_zero", "fp16", 2)
    compared = [step for step in content["steps"] if not step["skipped"]]
    assert len(compared) == 2
    # The last is one that is made to overflow; nothing of it is a number.
    assert content["steps"][-1]["skipped"]
    assert content["steps"][-1]["true_norm"] is None
    assert "passed: 2 steps" in ended.output


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ("--gpus 1 --precision bf16", 1),
        ("--gpus 1 --precision fp16 --mem-cap 0.01 --accumulate 2", 1),
        ("--gpus 1 --offload-optim-frac 0.5 --offload-param-frac 0.5", 1),
        ("--gpus 2 --precision bf16 --offload-optim-frac 1 --offload-param-frac 1 --clip 0.5", 2),
    ],
)
def test_chunks_wherever_they_are(verify: Any, flags: str, ranks: int) -> None:
    ended, content = verify(f"--plugin gemini --steps 2 --warmup 0 {flags}")
    assert ended.code == 0, ended
    assert content["passed"] is True
    assert (content["plugin"], content["world_size"]) == ("gemini", ranks)
    assert len([step for step in content["steps"] if not step["skipped"]]) == 2


def test_flags_that_play_no_part_are_named(verify: Any) -> None:
    ended, content = verify("--steps 1 --warmup 0 --save-every 5 --keep 1 --checkpointing")
    assert ended.code == 0, ended
    assert len(content["steps"]) == 1
    assert "note: --save-every plays no part in verify" in ended.errors
    assert "note: --keep plays no part in verify" in ended.errors


def test_a_configuration_file(verify: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({"schedule": {"steps": 500, "warmup": 100}}))
    ended, content = verify(f"--config {tmp_path / 'mine.json'}")
    assert ended.code == 0, ended
    assert len(content["steps"]) == 3
    assert "training   500 steps" in ended.errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--dropout 0.1 --json {folder}/report.json", ("--dropout 0.1", "leave it out")),
        ("--steps 0", ("--steps", "0")),
        ("--plugin deepspeed", ("--plugin", "torch_ddp")),
        ("--json /no/such/folder/report.json", ("cannot write /no/such/folder/report.json",)),
        ("--json ''", ("--json is empty",)),
        ("--resume runs/x", ("--resume", "albireo verify opt --help")),
        ("--config /no/such/file.json", ("/no/such/file.json",)),
    ],
)
def test_wrong_input_is_one_line(
    train_server: TrainServer, tmp_path: Path, arguments: str, words: tuple[str, ...]
) -> None:
    arguments = arguments.format(folder=tmp_path)
    ended = train_server.run(["verify", "opt", *shlex.split(SMALL), *shlex.split(arguments)])
    assert (ended.code, ended.output) == (2, ""), ended
    (line,) = ended.errors.splitlines()
    assert line.startswith("albireo: ")
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


def failing(recipe: str, options: Mapping[str, Any], *, config_file: Path | None = None) -> VerifyReport:
    part = ParameterReport("head.weight", 6, 0.5, 1e-8, 0, 0)
    failures = (Failure("gradient", "head.weight", "the relative error is 0.5, and 1e-05 is allowed"),)
    step = StepReport(1, 2.0, 2.0, 1.0, 1.0, None, False, (part,), failures)
    return VerifyReport("torch_ddp", "fp32", 1, "CPU", Thresholds.of("fp32"), (step,))


def test_what_does_not_pass_is_named_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("albireo.verify.run.verify_recipe", failing)
    with pytest.raises(SystemExit) as ended:
        main(["verify", "opt", "--json", str(tmp_path / "report.json")])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert printed.err == (
        "albireo: verify failed in step 1: gradient of head.weight: the relative error is 0.5, and 1e-05 is allowed\n"
    )
    assert "FAILED" in printed.out
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is False
