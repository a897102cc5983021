"""The same training with the loss in pieces and over all logits: what counts as equal, and a run of it."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tiny_texts import write_text

import albireo.training.causal_lm as causal_lm

ROUNDING = 2.0**-24
PLAIN = np.array([8.0, 7.5, 7.0, 6.9])


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "loss_in_pieces.py"
    spec = importlib.util.spec_from_file_location("loss_in_pieces", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", lines=600)


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> Iterator[None]:
    monkeypatch.setenv("ALBIREO_CACHE", str(cache_folder))
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def run(script: ModuleType, text: Path, output: Path, *more: str) -> tuple[int, dict[str, Any]]:
    arguments = ["--data", str(text), "--steps", "6", "--batch-size", "4", "--sequence-length", "16"]
    code = script.main([*arguments, "--output", str(output), *more])
    return code, json.loads((output / "curves.json").read_text())


@pytest.mark.parametrize(
    ("pieces", "passed"),
    [
        (PLAIN, True),
        (PLAIN + 2.9e-3, True),
        (PLAIN + np.array([0, 0, 3.1e-3, 0]), False),
        (PLAIN + np.array([0, np.nan, 0, 0]), False),
        (PLAIN + np.array([0, np.inf, 0, 0]), False),
    ],
)
def test_three_times_the_noise_is_allowed(script: ModuleType, pieces: Any, passed: bool) -> None:
    verdict = script.judge(PLAIN, pieces, [PLAIN, PLAIN - np.array([0, 1e-3, 0, 0])], ROUNDING)
    assert verdict.passed is passed
    assert verdict.noise == pytest.approx(1e-3)


def test_noise_that_is_not_finite_excuses_nothing(script: ModuleType) -> None:
    assert not script.judge(PLAIN, PLAIN, [PLAIN * np.nan], ROUNDING).passed
    assert not script.judge(PLAIN, PLAIN, [PLAIN + np.inf], ROUNDING).passed


def test_without_noise_a_rounding_is_allowed(script: ModuleType) -> None:
    assert script.judge(PLAIN, PLAIN * (1 + 2.0**-24), [PLAIN], ROUNDING).passed
    assert not script.judge(PLAIN, PLAIN * (1 + 2.0**-22), [PLAIN], ROUNDING).passed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_curves_are_equal_and_written_down(script: ModuleType, text: Path, tmp_path: Path, precision: str) -> None:
    code, record = run(script, text, tmp_path / "out", "--precision", precision)
    assert code == 0
    assert set(record["losses"]) == {"plain", "pieces", "wider", "reordered 1", "reordered 2"}
    assert all(len(losses) == 6 for losses in record["losses"].values())
    assert record["losses"]["plain"][-1] < record["losses"]["plain"][0] - 0.1
    assert record["losses"]["wider"] != record["losses"]["plain"]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_gradient_is_found(
    script: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = causal_lm.linear_cross_entropy

    def wrong(hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        # The loss is right; the gradient lacks the last quarter of each text.
        length = hidden.shape[1] * 3 // 4
        return right(torch.cat([hidden[:, :length], hidden[:, length:].detach()], dim=1), *arguments, **options)

    monkeypatch.setattr(causal_lm, "linear_cross_entropy", wrong)
    code, record = run(script, text, tmp_path / "out")
    assert (code, record["passed"]) == (1, False)


def test_missing_text_is_one_line(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--data", str(tmp_path / "none.txt"), "--output", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
