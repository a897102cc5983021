"""`albireo bench`: what it writes, and what it refuses before anything is measured."""

import json
import shlex
from pathlib import Path

import pytest
from bench_results import case_of, done
from train_server import TrainServer

ROW_KEYS = {
    "system", "plugin", "model", "batch_size", "precision", "gpus", "status", "samples_per_second", "step_seconds",
    "device_peak_bytes", "host_peak_bytes",
}  # fmt: skip


def test_a_small_measurement(train_server: TrainServer, tmp_path: Path) -> None:
    sizes = "--batch-sizes 2 --sequence-length 16 --steps 2 --warmup 1"
    arguments = f"bench opt --systems plain --models tiny,nosuch {sizes} --output {tmp_path / 'bench'}"
    ended = train_server.run(shlex.split(arguments))
    assert (ended.code, ended.errors) == (0, ""), ended
    content = json.loads((tmp_path / "bench" / "bench.json").read_text(), parse_constant=pytest.fail)
    assert {"machine", "command", "rows"} <= content.keys()
    assert {"python", "torch", "device"} <= content["machine"].keys()
    assert content["command"].startswith("albireo")
    done, failed = content["rows"]
    assert done.keys() >= ROW_KEYS
    assert failed.keys() >= ROW_KEYS
    assert (done["system"], done["model"], done["batch_size"], done["gpus"]) == ("plain", "tiny", 2, 1)
    assert done["status"] == "ok"
    assert done["samples_per_second"] == pytest.approx(2 / done["step_seconds"])
    assert failed["status"] == "failed"
    assert "'nosuch'" in failed["error"]
    assert failed["step_seconds"] is None
    assert "plain opt tiny batch 2 fp32: ok" in ended.output
    assert "plain opt nosuch batch 2 fp32: failed" in ended.output
    assert str(tmp_path / "bench" / "bench.json") in ended.output.splitlines()[-1]
    names = {path.name for path in (tmp_path / "bench").iterdir()}
    assert names == {
        "bars.png", "bars.svg", "bench.csv", "bench.json", "bench.md", "report.html", "rounds.jsonl", "tradeoff.png",
        "tradeoff.svg",
    }  # fmt: skip
    # It goes on where it stopped: what was measured is taken as it is, what failed is tried again.
    again = train_server.run(shlex.split(arguments))
    assert again.code == 0, again
    assert "1 of 2 rounds are in" in again.output
    assert "tiny batch 2 fp32: ok" not in again.output
    assert "plain opt nosuch batch 2 fp32: failed" in again.output
    assert json.loads((tmp_path / "bench" / "bench.json").read_text())["rows"] == content["rows"]


def test_two_benches_beside_each_other(train_server: TrainServer, tmp_path: Path) -> None:
    for name, speed in (("a", 10.0), ("b", 9.0)):
        rows = [done(case_of("gemini"), speed).row(), done(case_of("fsdp2"), 5.0).row()]
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    arguments = ["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    ended = train_server.run(arguments)
    assert (ended.code, ended.errors) == (0, ""), ended
    assert "0.900" in ended.output
    assert train_server.run([*arguments, "--fail-under", "0.9"]).code == 0
    ended = train_server.run([*arguments, "--fail-under", "0.95"])
    assert ended.code == 1
    assert ended.output.splitlines()[-1] == "below 0.95 of before: gemini opt 125m batch 8 bf16"
    ended = train_server.run(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "none.json")])
    assert (ended.code, ended.output) == (2, "")
    assert ended.errors.startswith("albireo: cannot read")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--systems deepspeed", ("--systems", "'deepspeed'", "albireo", "plain", "fsdp2")),
        ("--systems ,", ("--systems needs at least one word",)),
        ("--models ''", ("--models needs at least one word",)),
        ("--batch-sizes eight", ("--batch-sizes takes whole numbers", "'eight'")),
        ("--batch-sizes 8,0", ("--batch-sizes must be at least 1, not 0",)),
        ("--precisions fp32,int8", ("--precisions", "'int8'", "fp32", "fp16", "bf16")),
        ("--sequence-length 1", ("--sequence-length", "1")),
        ("--steps 0", ("--steps", "0")),
        ("--warmup 0", ("--warmup", "0")),
        ("--rounds 0", ("--rounds", "0")),
        ("--adapters qlora", ("--adapters knows none, lora, qlora8, qlora4, not 'qlora'",)),
        ("--plugins gemini,ddp", ("--plugins knows torch_ddp", "not 'ddp'")),
        ("--peers deepspeed", ("--peers knows plain, ddp, fsdp2", "accelerate", "not 'deepspeed'")),
        ("--plugins gemini --reference fsdp2", ("--reference is one of those that are measured, gemini, not 'fsdp2'",)),
        ("--peers fsdp2 --precisions fp16", ("fsdp2 has no loss scale",)),
        ("--peers ddp --adapters qlora8", ("ddp knows the adapters none and lora",)),
        ("--mem-cap -1", ("--mem-cap",)),
        ("--rounds many", ("--rounds", "many")),
        ("--output ''", ("--output is empty",)),
        ("--modles tiny", ("--modles", "--models", "albireo bench opt --help")),
    ],
)
def test_wrong_values_are_refused_before_anything_runs(
    train_server: TrainServer, tmp_path: Path, arguments: str, words: tuple[str, ...]
) -> None:
    ended = train_server.run(["bench", "opt", "--output", str(tmp_path / "bench"), *shlex.split(arguments)])
    assert (ended.code, ended.output) == (2, ""), ended
    (line,) = ended.errors.splitlines()
    assert line.startswith("albireo: ")
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_folder_would_be(train_server: TrainServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    ended = train_server.run(["bench", "opt", "--output", str(tmp_path / "file")])
    assert (ended.code, ended.output) == (2, ""), ended
    assert ended.errors.startswith(f"albireo: cannot make {tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "mine"
