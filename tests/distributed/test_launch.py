import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from albireo.device.cores import usable_cores
from albireo.distributed import launch_ranks
from albireo.distributed.launch import rank_environment
from albireo.errors import AlbireoError, LaunchError

ENTRIES = """
import json, os, pathlib, signal, time
import torch
from albireo.errors import DataError

def add(world, payload):
    total = world.sum_in_place(torch.tensor([float(world.rank)])).item()
    folder = pathlib.Path(payload["folder"])
    facts = {"total": total, "threads": os.environ["OMP_NUM_THREADS"], "text": payload["text"]}
    (folder / f"{world.rank}.json").write_text(json.dumps(facts))

def refuse(world, payload):
    if world.rank == 1:
        raise DataError("the data of rank 1 is bad")
    world.barrier()

def die(world, payload):
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()

def wait(world, payload):
    folder = pathlib.Path(payload["folder"])
    (folder / f"{world.rank}.pid").write_text(str(os.getpid()))
    time.sleep(600)
"""


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "launch_entries.py").write_text(ENTRIES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # More ranks than a small machine has GPUs.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def test_every_rank_runs_the_entry_with_the_payload_as_given(entries: Path) -> None:
    launch_ranks("launch_entries:add", {"folder": str(entries), "text": 'two words, a "quote"'}, 2)
    facts = [json.loads((entries / f"{rank}.json").read_text()) for rank in range(2)]
    assert [fact["total"] for fact in facts] == [1.0, 1.0]
    assert all(fact["text"] == 'two words, a "quote"' for fact in facts)
    assert all(int(fact["threads"]) >= 1 for fact in facts)


def test_a_rank_that_refuses_ends_all_with_its_own_words(entries: Path) -> None:
    with pytest.raises(AlbireoError) as caught:
        launch_ranks("launch_entries:refuse", {}, 2)
    assert str(caught.value) == "the data of rank 1 is bad"
    assert caught.value.exit_code == 2


def test_a_rank_that_is_killed_is_named(entries: Path) -> None:
    with pytest.raises(LaunchError, match="rank 1 was ended by SIGKILL"):
        launch_ranks("launch_entries:die", {}, 2)


def test_ranks_die_with_a_launcher_that_is_killed(entries: Path) -> None:
    program = f"from albireo.distributed import launch_ranks; launch_ranks('launch_entries:wait', {{'folder': {str(entries)!r}}}, 2)"
    launcher = subprocess.Popen([sys.executable, "-c", program])
    files = [entries / f"{rank}.pid" for rank in range(2)]
    _until(lambda: all(file.exists() and file.read_text() for file in files), seconds=60)
    ranks = [int(file.read_text()) for file in files]
    assert all(_runs(rank) for rank in ranks)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    _until(lambda: not any(_runs(rank) for rank in ranks), seconds=10)


def test_threads_are_shared_out_and_a_users_own_setting_is_kept() -> None:
    cores = usable_cores()
    assert rank_environment(1, 2, {})["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert rank_environment(1, 2, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    assert rank_environment(1, 2, {})["RANK"] == "1"


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or while it was read
        return False
    return state != "Z"


def _until(condition: object, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.05)
