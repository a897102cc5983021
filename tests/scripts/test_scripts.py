"""What the scripts install and what they call, with a Python and an `albireo` that only write down how they are called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = '#!/usr/bin/env bash\necho "$@" >>"$(dirname "$0")/called-{name}"\n'


class Copy:
    """A copy of the scripts in a repository of their own, whose environment is made of stubs."""

    def __init__(self, root: Path) -> None:
        self._root = root
        shutil.copytree(ROOT / "scripts", root / "scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, root / name)
        self._bin = root / ".venv" / "bin"
        self._bin.mkdir(parents=True)
        for name in ("python", "albireo"):
            (self._bin / name).write_text(STUB.format(name=name))
            (self._bin / name).chmod(0o755)

    def run(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(self._root / "scripts" / name), *arguments]
        # From elsewhere: the scripts find their repository themselves.
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd="/", env={"PATH": os.environ["PATH"]}
        )

    def installed(self) -> list[str]:
        """Return what was installed, from the first time on."""
        return [line.rsplit(" ", 1)[-1].removeprefix(str(self._root)) for line in self._called("python")]

    def trained(self) -> str:
        """Return how `albireo` was called last."""
        return self._called("albireo")[-1]

    def _called(self, name: str) -> list[str]:
        path = self._bin / f"called-{name}"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path / "repository")


@pytest.mark.parametrize(
    ("script", "arguments", "extra"),
    [
        ("train.sh", [], ""),
        ("train.sh", ["--steps", "3"], ""),
        ("run_clm.sh", [], "[hub]"),
        ("run_clm.sh", ["8"], "[hub]"),
        ("run_clm_synthetic.sh", [], ""),
        ("run_clm_synthetic.sh", ["8", "0", "350m", "2"], ""),
    ],
)
def test_what_is_installed_is_no_matter_of_the_arguments(
    copy: Copy, script: str, arguments: list[str], extra: str
) -> None:
    for _ in range(2):
        ended = copy.run(script, *arguments)
        assert ended.returncode == 0, ended.stderr
        assert copy.installed() == [extra]


def test_nothing_is_installed_twice_whatever_is_run_in_between(copy: Copy) -> None:
    for script in ("run_clm.sh", "train.sh", "run_clm.sh", "run_clm_synthetic.sh", "train.sh"):
        copy.run(script)
    assert copy.installed() == ["[hub]", ""]


DEFAULTS = {
    "run_clm.sh": "--plugin gemini --data wikitext/wikitext-2-raw-v1 --checkpointing --batch-size 16 --mem-cap 0 --model 6.7b --gpus 1",
    "run_clm_synthetic.sh": "--plugin gemini --data synthetic --init random --checkpointing --batch-size 16 --mem-cap 0 --model 125m --gpus 1",
}


@pytest.mark.parametrize("script", DEFAULTS)
def test_four_arguments_and_then_flags(copy: Copy, script: str) -> None:
    copy.run(script)
    assert copy.trained() == f"train opt {DEFAULTS[script]}"
    copy.run(script, "4", "8", "1.3b", "2", "--steps", "9")
    assert copy.trained().endswith("--checkpointing --batch-size 4 --mem-cap 8 --model 1.3b --gpus 2 --steps 9")


@pytest.mark.parametrize("script", DEFAULTS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_given_without_installing_anything(copy: Copy, script: str, flag: str) -> None:
    ended = copy.run(script, flag)
    assert (ended.returncode, ended.stderr, copy.installed()) == (0, "", [])
    assert (
        f"scripts/{script} [batch size per GPU] [memory cap in GB, 0 for none] [model] [number of GPUs]" in ended.stdout
    )
    assert "#" not in ended.stdout
    assert "set -" not in ended.stdout
