"""`albireo check`: what it says, what it writes, and when it says no."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from train_server import Ended, TrainServer

import albireo
from albireo.cli.check import check
from albireo.cli.check_hub import hub_problem
from albireo.distributed.probe import AllReduceCheck

GB = 2**30


@pytest.fixture(scope="module")
def quick(train_server: TrainServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, dict[str, Any]]:
    """One check for all tests that look at what it found."""
    file = tmp_path_factory.mktemp("check") / "check.json"
    ended = train_server.run(["check", "--quick", "--touch", "0.25", "--json", str(file)])
    return ended, json.loads(file.read_text())


def test_the_machine_that_runs_this_passes(quick: tuple[Ended, dict[str, Any]]) -> None:
    ended, report = quick
    assert (ended.code, report["passed"]) == (0, True), ended.output
    assert report["albireo"] == albireo.__version__
    assert report["quick"] is True
    assert report["machine"]["torch"] == torch.__version__
    statuses = {feature["name"]: feature["status"] for feature in report["features"]}
    assert statuses["train on the CPU"] == "ok"
    assert statuses["several ranks"] == "ok"
    assert statuses["hub reachable"] == "skipped"
    assert "failed" not in statuses.values()


def test_it_takes_no_longer_than_was_promised(quick: tuple[Ended, dict[str, Any]]) -> None:
    # 6 seconds on two cores that nobody else uses; other tests may run beside this one.
    assert 0.5 < quick[1]["seconds"] < 30


def test_what_is_written_has_its_names_and_is_in_range(quick: tuple[Ended, dict[str, Any]]) -> None:
    _, report = quick
    names = {
        "albireo",
        "quick",
        "seconds",
        "passed",
        "machine",
        "host_memory",
        "gpus",
        "communication",
        "rates",
        "features",
    }
    assert set(report) == names
    memory = report["host_memory"]
    assert 0 < memory["available_bytes"] <= memory["total_bytes"]
    assert memory["usable_bytes"] <= memory["total_bytes"]
    assert memory["touched"]["ended"] == "all"
    assert memory["touched"]["touched_bytes"] >= GB // 4
    gloo = report["communication"][0]
    assert (gloo["backend"], gloo["ranks"], gloo["ok"]) == ("gloo", 2, True)
    rates = report["rates"]
    assert set(rates) == {"host_copy", "host_adam", "device_copies", "matmul"}
    assert 1e8 < rates["host_copy"]["bytes_per_second"] < 2e12
    assert rates["host_adam"]["parameters"] == 8 * 2**20
    assert 1e6 < rates["host_adam"]["parameters_per_second"] < 1e11
    assert all(1e7 < rate["flops_per_second"] < 1e16 for rate in rates["matmul"])
    assert {"fp32", "bf16", "fp16"} <= {rate["kind"] for rate in rates["matmul"]}
    assert len(report["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_the_table_says_what_the_file_does(quick: tuple[Ended, dict[str, Any]]) -> None:
    ended, report = quick
    lines = [line.rstrip() for line in ended.output.splitlines()]
    for feature in report["features"]:
        (line,) = [line for line in lines if line.startswith(f"  {feature['name']} ") and feature["why"] in line]
        assert {"ok": " ok ", "missing": " not here ", "skipped": " - ", "failed": " FAILED "}[
            feature["status"]
        ] in line
    total = report["host_memory"]["total_bytes"] / GB
    assert any(line.startswith("  MemTotal") and f"{total:.1f} GB" in line for line in lines)
    assert "  touched                   0.2 GB of 0.2 GB" in ended.output
    # Colors are for terminals.
    assert "\x1b" not in ended.output


def test_a_check_that_says_no_is_exit_code_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick: tuple[Ended, dict[str, Any]]
) -> None:
    def broken(backend: str, ranks: int) -> AllReduceCheck:
        return AllReduceCheck(backend, ranks, ok=False, why="nobody answers", start_seconds=1.0, bytes_per_second=None)

    def refuse(**_: object) -> None:
        raise RuntimeError("out of memory\nand more lines")

    monkeypatch.setattr("albireo.distributed.probe.check_all_reduce", broken)
    monkeypatch.setattr("albireo.device.probe_copies.measure_host_copy", refuse)
    file = tmp_path / "check.json"
    done = CliRunner().invoke(check, ["--quick", "--json", str(file)], standalone_mode=False)
    assert done.return_value == 1, done.output
    assert "FAILED: nobody answers" in done.output
    report = json.loads(file.read_text())
    assert report["passed"] is False
    assert report["rates"]["host_copy"] is None
    failed = [(feature["name"], feature["why"]) for feature in report["features"] if feature["status"] == "failed"]
    # The rest was measured all the same.
    gpus = [("several GPUs", "nobody answers")] if report["gpus"] else []
    assert failed == [("several ranks", "nobody answers"), *gpus, ("measuring", "host copy: out of memory")]
    assert report["rates"]["host_adam"] is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--touch", "0"], "0.0 is not in the range"),
        (["--touch", "nan"], "--touch takes a number of GB above 0"),
        (["--touch", "inf"], "inf is not in the range"),
        (["--touch", "much"], "'much'"),
        (["--json", "/no/such/folder/file"], "there is no folder /no/such/folder"),
        (["--json", "/"], "is a folder"),
        (["--json", ""], "--json is empty"),
        (["--fast"], "No such option"),
        (["everything"], "unexpected extra argument"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_measured(
    train_server: TrainServer, arguments: list[str], said: str
) -> None:
    ended = train_server.run(["check", *arguments])
    assert (ended.code, ended.output) == (2, "")
    assert ended.errors.count("\n") == 1
    assert said in ended.errors


def test_the_network_is_left_alone_where_that_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_problem() == "HF_HUB_OFFLINE is set"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc/passwd")
    assert hub_problem() == "HF_ENDPOINT=file:///etc/passwd is no address of the web"
    # Nobody listens there.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert hub_problem().startswith("http://127.0.0.1:1: ")


def test_any_answer_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import http.server
    import threading

    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    # It knows no HEAD, and says so: 501.
    assert hub_problem() == ""
    thread.join()
    server.server_close()


def test_help_loads_nothing_heavy() -> None:
    program = "import sys, albireo.cli.main as m\ntry: m.main(['check', '--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "albireo check --quick" in done.stdout


@pytest.mark.gpu
def test_a_gpu_is_found_used_and_measured(quick: tuple[Ended, dict[str, Any]]) -> None:
    ended, report = quick
    gpu = report["gpus"][0]
    assert 0 < gpu["free_bytes"] <= gpu["total_bytes"]
    nccl = report["communication"][1]
    assert (nccl["backend"], nccl["ok"]) == ("nccl", True), nccl["why"]
    copies = report["rates"]["device_copies"]
    assert all(rate > 1e9 for name, rate in copies.items() if name.endswith("_per_second"))
    statuses = {feature["name"]: feature["status"] for feature in report["features"]}
    assert statuses["train on a GPU"] == "ok"
    assert f"GPU 0                     {gpu['name']}" in ended.output
