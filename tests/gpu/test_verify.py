"""Verify on a GPU, with attention as large as real models have: sums in a fixed order, and equal gradients."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("plugin", ["torch_ddp", "low_level_zero", "gemini"])
def test_a_real_size_is_verified_in_bf16(plugin: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "albireo", "verify", "opt", "--model", "125m", "--init", "random"]
    options = ["--data", "random", "--precision", "bf16", "--checkpointing", "--steps", "1", "--warmup", "0"]
    some_away = ["--offload-optim-frac", "0.5", "--offload-param-frac", "0.5"] if plugin == "gemini" else []
    more = ["--batch-size", "4", "--plugin", plugin, *some_away, "--cache", str(tmp_path)]
    done = subprocess.run([*command, *options, *more], capture_output=True, text=True, check=False)
    print(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
