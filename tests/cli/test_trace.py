"""`albireo train --trace` and `albireo trace`: a run leaves its files, and the words say what they hold."""

from __future__ import annotations

import json
from pathlib import Path

from train_server import TrainServer


def test_a_traced_run_leaves_its_files_and_is_read_in_words(train_server: TrainServer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = (
        "--plugin gemini --offload-optim-frac 1 --offload-param-frac 1 --steps 4 --sequence-length 16 --batch-size 2"
    )
    nothing = ["--eval-every", "0", "--save-every", "0"]
    ended = train_server.run(["train", "opt", *flags.split(), *nothing, "--trace", "--output", str(run)])
    assert ended.code == 0, ended.errors
    assert json.loads((run / "trace.json").read_text())["step"] == 4
    assert {"trace.png", "trace-chrome.json"} <= {path.name for path in run.iterdir()}
    plan = json.loads((run / "summary.json").read_text())["plan"]
    assert {chunk["states"] for chunk in plan["chunks"]} == {"host"}
    assert {chunk["weights"] for chunk in plan["chunks"]} == {"travel"}
    assert plan["parameters_stepped"]["host"] == sum(chunk["parameters"] for chunk in plan["chunks"]) > 0
    words = train_server.run(["trace", str(run)])
    assert words.code == 0, words.errors
    assert words.output.startswith("step 4: ")
    assert "the computing waited" in words.output
    assert "  for weights in: " in words.output


def test_a_run_without_a_trace_is_one_line_and_exit_code_2(train_server: TrainServer, tmp_path: Path) -> None:
    ended = train_server.run(["trace", str(tmp_path)])
    assert (ended.code, ended.output) == (2, "")
    assert ended.errors.count("\n") == 1
    assert "--plugin gemini --trace" in ended.errors
