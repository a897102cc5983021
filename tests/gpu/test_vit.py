"""ViT on a GPU: each plugin computes what plain PyTorch does, and a run learns from pictures that workers decode."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


def albireo(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "albireo", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


@pytest.mark.parametrize(
    ("plugin", "precision"), [("gemini", "bf16"), ("low_level_zero", "fp16"), ("torch_fsdp", "bf16")]
)
def test_each_plugin_is_exact(plugin: str, precision: str, tmp_path: Path) -> None:
    done = albireo(
        "verify", "vit", "--model", "tiny", "--plugin", plugin, "--precision", precision, "--batch-size", "8", "--steps", "2",
        "--checkpointing", "--cache", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_learns(tmp_path: Path) -> None:
    done = albireo(
        "train", "vit", "--model", "tiny", "--plugin", "gemini", "--precision", "bf16", "--batch-size", "32", "--epochs", "12",
        "--workers", "2", "--save-every", "0", "--output", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["last_eval"]["accuracy"] > 0.5
