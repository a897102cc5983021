"""`albireo run`, with scripts that are quick since most of them never load torch."""

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.launcher.api import LaunchConfig
from train_server import TrainServer

from albireo.cli.main import cli
from albireo.device.cores import usable_cores
from albireo.distributed.elastic import ElasticPlan, launch_elastic
from albireo.distributed.launch import loopback_environment
from albireo.distributed.loopback import LoopbackRendezvous
from albireo.distributed.rendezvous import MeetingPlace
from albireo.errors import LaunchError

TELL = """
import json, os, pathlib, sys
facts = {"arguments": sys.argv, "name": __name__, "path": sys.path[0], "environment": dict(os.environ), "pid": os.getpid()}
(pathlib.Path(__file__).parent / f"{os.environ['RANK']}.json").write_text(json.dumps(facts))
"""
END = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    exec(sys.argv[1])
time.sleep(600)
"""
SAVE = """
import os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
def save(number, frame):
    time.sleep(0.3)
    (here / f"{os.environ['RANK']}.saved").write_text(str(number))
    sys.exit(0)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
(here / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
time.sleep(600)
"""
MEET = """
import json, os, pathlib
import torch
import torch
import torch.distributed as dist

def listening(process):
    inodes = set()
    for entry in pathlib.Path(f"/proc/{process}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    lines = [line.split() for name in ("tcp", "tcp6") for line in pathlib.Path(f"/proc/net/{name}").read_text().splitlines()]
    return [words[1].split(":")[0] for words in lines if words[9] in inodes and words[3] == "0A"]

dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
facts = {"total": total.item(), "listening": listening(os.getpid()) + listening(os.getppid())}
dist.barrier()
dist.destroy_process_group()
(pathlib.Path(__file__).parent / f"{os.environ['RANK']}.json").write_text(json.dumps(facts))
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "my script.py"
        path.write_text(text)
        return str(path)

    return write


def facts_of(folder: Path, ranks: int) -> list[dict[str, object]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def test_arguments_arrive_as_given(train_server: TrainServer, tmp_path: Path, script: Callable[[str], str]) -> None:
    path = script(TELL)
    given = ["two words", "", '"quoted"', "it's", "$local_rank", "${local_rank} $$ $$$", "%s", "*", "a\nb", "--", "é"]
    # What looks like a flag of ours is the script's once the script was named.
    given += ["--nproc-per-node", "7", "--nnodes=9", "-m", "--help", "-x", "--hostfile"]
    ended = train_server.run(["run", "--nproc_per_node", "2", path, *given])
    assert (ended.code, ended.output) == (0, "")
    for fact in facts_of(tmp_path, 2):
        assert fact["arguments"] == [path, *given]
        assert fact["name"] == "__main__"
        assert fact["path"] == str(tmp_path)


def test_ranks_are_told_what_torchrun_tells_them(
    train_server: TrainServer, tmp_path: Path, script: Callable[[str], str]
) -> None:
    ended = train_server.run(["run", "--nproc-per-node=2", "--master_port", str(free_port()), script(TELL)])
    assert ended.code == 0
    facts = facts_of(tmp_path, 2)
    assert len({fact["pid"] for fact in facts}) == 2
    for rank, fact in enumerate(facts):
        environment = fact["environment"]
        assert isinstance(environment, dict)
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
        assert [environment[name] for name in names] == [str(rank), str(rank), "2", "2", "127.0.0.1"]
        assert {name: environment[name] for name in loopback_environment()} == loopback_environment()
        # The server's own setting, which is the user's here.
        assert environment["OMP_NUM_THREADS"] == "1"
    assert ended.errors == "albireo: starting 2 ranks with OMP_NUM_THREADS=1 each (as you set it)\n"


def test_cores_are_shared_out_and_this_process_is_left_as_it_was(
    tmp_path: Path, script: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "mine")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    environment = dict(os.environ)
    launch_elastic(plan(ranks=2), [sys.executable, script(TELL)])
    for fact in facts_of(tmp_path, 2):
        told = fact["environment"]
        assert isinstance(told, dict)
        assert told["OMP_NUM_THREADS"] == str(max(1, usable_cores() // 2))
        assert told["NCCL_SOCKET_IFNAME"] == "mine"
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert dict(os.environ) == environment
    assert logging.root.manager.disable == logging.NOTSET
    assert list(temporary.iterdir()) == []


def test_two_ranks_meet_and_nothing_listens_on_a_network(
    train_server: TrainServer, tmp_path: Path, script: Callable[[str], str]
) -> None:
    ended = train_server.run(["run", "--nproc-per-node", "2", script(MEET)])
    assert ended.code == 0, ended.errors
    for fact in facts_of(tmp_path, 2):
        assert fact["total"] == 3.0
        # At least the launcher's store, and all of it on 127.0.0.1.
        assert fact["listening"]
        assert set(fact["listening"]) == {"0100007F"}


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("sys.exit(3)", 3, "rank 1 ended with exit code 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "rank 1 was ended by SIGKILL"),
        ("raise RuntimeError('my own words')", 1, "rank 1 ended with exit code 1"),
    ],
)
def test_the_code_of_a_rank_that_fails_is_the_commands(
    train_server: TrainServer, script: Callable[[str], str], program: str, code: int, said: str
) -> None:
    ended = train_server.run(["run", "--nproc-per-node", "2", script(END), program])
    assert ended.code == code
    first, *own, last = ended.errors.splitlines()
    assert first.startswith("albireo: starting 2 ranks")
    assert last.startswith(f"albireo: {said}")
    # Between the two is what the script said, and not a page of torch's.
    if "RuntimeError" in program:
        assert own[0] == "Traceback (most recent call last):"
        assert own[-1] == "RuntimeError: my own words"
        assert not any("torch" in line or "runpy" in line for line in own)
    else:
        assert own == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_every_rank_which_may_save_in_peace(
    train_server: TrainServer, tmp_path: Path, script: Callable[[str], str], number: signal.Signals, code: int
) -> None:
    launcher = train_server.start(["run", "--nproc-per-node", "2", script(SAVE)])
    wait_for_ranks(tmp_path)
    os.kill(launcher, number)
    ended = train_server.wait()
    assert ended.code == code
    assert [(tmp_path / f"{rank}.saved").read_text() for rank in range(2)] == [str(int(number))] * 2
    assert ended.errors.splitlines()[1:] == [f"albireo: stopped by {number.name}; all ranks have ended"]


def test_ranks_that_do_not_end_after_a_signal_are_ended(
    train_server: TrainServer, tmp_path: Path, script: Callable[[str], str]
) -> None:
    command = ["run", "--nproc-per-node", "2", "--shutdown-timeout", "1"]
    command.append(script(SAVE.replace("time.sleep(0.3)", "time.sleep(600)")))
    if "shutdown_timeout" not in {option.name for option in fields(LaunchConfig)}:
        ended = train_server.run(command)
        assert (ended.code, "needs torch 2.12" in ended.errors) == (2, True)
        return
    launcher = train_server.start(command)
    ranks = wait_for_ranks(tmp_path)
    os.kill(launcher, signal.SIGTERM)
    assert train_server.wait().code == 143
    assert not any(runs(rank) for rank in ranks)


def test_ranks_die_with_a_launcher_that_is_killed(
    train_server: TrainServer, tmp_path: Path, script: Callable[[str], str]
) -> None:
    launcher = train_server.start(["run", "--nproc-per-node", "2", script(SAVE)])
    ranks = wait_for_ranks(tmp_path)
    assert all(runs(rank) for rank in ranks)
    os.kill(launcher, signal.SIGKILL)
    assert train_server.wait().code == -signal.SIGKILL
    until(lambda: not any(runs(rank) for rank in ranks), seconds=10)


def test_ranks_start_anew_as_often_as_was_said(
    train_server: TrainServer, tmp_path: Path, script: Callable[[str], str]
) -> None:
    text = """
import os, pathlib, sys
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
with (pathlib.Path(__file__).parent / "attempts").open("a") as file:
    file.write(attempt)
sys.exit(0 if attempt == sys.argv[1] else 5)
"""
    path = script(text)
    assert train_server.run(["run", "--max-restarts", "2", path, "1"]).code == 0
    assert (tmp_path / "attempts").read_text() == "01"
    assert train_server.run(["run", "--max_restarts", "2", path, "9"]).code == 5
    assert (tmp_path / "attempts").read_text() == "01012"


def test_ranks_that_start_anew_find_an_empty_store() -> None:
    port = free_port()
    handler = LoopbackRendezvous(parameters(f"127.0.0.1:{port}"))
    first = handler.next_rendezvous()
    assert first.bootstrap_store_info is not None
    assert first.bootstrap_store_info.master_port == port
    first.store.set("left", "behind")
    second = handler.next_rendezvous()
    assert second.bootstrap_store_info is not None
    assert second.store.check(["left"]) is False
    # As a rank finds it.
    there = second.bootstrap_store_info
    rank = dist.TCPStore(there.master_addr, there.master_port, is_master=False)
    second.store.set("word", "heard")
    assert rank.get("word") == b"heard"
    handler.shutdown()


def test_a_port_in_use_is_one_line(train_server: TrainServer, script: Callable[[str], str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = train_server.run(["run", "--master-port", str(port), script(TELL)])
    assert ended.code == 2
    assert ended.errors.splitlines()[1:] == [
        f"albireo: --master-port {port} cannot be had: Address already in use; leave it out for any"
    ]


def test_a_module_is_run_as_python_does(train_server: TrainServer, tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text('{"b": 1}')
    ended = train_server.run(["run", "-m", "json.tool", str(tmp_path / "some.json"), "--indent", "1"])
    assert (ended.code, json.loads(ended.output)) == (0, {"b": 1})
    ended = train_server.run(["run", "-m", "no_such_module_anywhere.at_all"])
    assert (ended.code, ended.errors) == (2, "albireo: there is no module 'no_such_module_anywhere.at_all' here\n")


def test_two_launchers_meet(train_server: TrainServer, tmp_path: Path, script: Callable[[str], str]) -> None:
    """Two machines, as far as one can play both."""
    command = ["run", "--num_nodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    path = script(TELL)
    other = train_server.start([*command, "--node_rank", "1", path])
    ended = train_server.run([*command, "--node_rank", "0", path])
    assert ended.code == 0, ended.errors
    until(lambda: not runs(other), seconds=30)
    for rank, fact in enumerate(facts_of(tmp_path, 2)):
        environment = fact["environment"]
        assert isinstance(environment, dict)
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK")
        assert [environment[name] for name in names] == [str(rank), "0", "2", str(rank)]
        # They speak over whatever network the user's settings say.
        assert "GLOO_SOCKET_IFNAME" not in environment


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no/such.py"], "there is no script 'no/such.py'"),
        (["."], "is a folder without a __main__.py"),
        ([], "Missing argument 'SCRIPT'"),
        (["--nproc-per-node", "two", __file__], "'two' is neither a whole number of at least 1 nor gpu, cpu or auto"),
        (["--nproc-per-node", "0", __file__], "'0' is neither"),
        (["--nproc-per-node", "-1", __file__], "'-1' is neither"),
        (["--nproc-per-node", "2.5", __file__], "'2.5' is neither"),
        (["--nnodes", "2:1", __file__], "'2:1' is neither"),
        (["--nnodes", "0", __file__], "'0' is neither"),
        (["--nnodes", "2", __file__], "needs a place to meet"),
        (["--node-rank", "1", __file__], "must be below --nnodes"),
        (["--master-port", "70000", __file__], "70000 is not in the range"),
        (["--rdzv-backend", "carrier-pigeon", __file__], "carrier-pigeon"),
        (["--max-restarts", "-1", __file__], "-1 is not in the range"),
        (["--no-such-flag", __file__], "No such option"),
        (["--hostfile", "hosts", __file__], "--hostfile is not there: albireo logs in to no machine"),
        (["-H", "a,b", __file__], "--host is not there"),
        (["--extra_launch_args", "x", __file__], "--extra-launch-args is not there"),
        (["--standalone", "--nnodes", "2", "--rdzv-endpoint", "10.0.0.1:2", __file__], "--standalone means"),
    ],
)
def test_wrong_input_is_one_line(train_server: TrainServer, arguments: list[str], said: str) -> None:
    ended = train_server.run(["run", *arguments])
    assert (ended.code, ended.output) == (2, "")
    assert ended.errors.startswith("albireo: ")
    assert ended.errors.count("\n") == 1
    assert said in ended.errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_word_for_the_number_of_ranks(
    train_server: TrainServer, tmp_path: Path, script: Callable[[str], str]
) -> None:
    path = script(TELL)
    for word in ("cpu", "auto"):
        assert train_server.run(["run", "--nproc-per-node", word, path]).code == 0
        environment = facts_of(tmp_path, 1)[0]["environment"]
        assert isinstance(environment, dict)
        assert environment["WORLD_SIZE"] == str(usable_cores())
    ended = train_server.run(["run", "--nproc-per-node", "gpu", path])
    assert ended.code == 2
    assert "torch sees no GPU here" in ended.errors


def test_the_environment_counts_as_it_does_for_torchrun() -> None:
    done = CliRunner().invoke(cli, ["run", __file__], env={"PET_NPROC_PER_NODE": "none"})
    assert done.exit_code == 2
    assert "'none' is neither" in done.output


def test_launchers_that_do_not_meet_say_so() -> None:
    nobody = MeetingPlace("c10d", f"127.0.0.1:{free_port()}", {"is_host": "0", "read_timeout": "1"})
    with pytest.raises(LaunchError, match=r"the launchers did not meet at 127\.0\.0\.1") as caught:
        launch_elastic(plan(nodes=(2, 2), place=nobody), [sys.executable, "-c", ""])
    assert caught.value.exit_code == 2


def plan(*, ranks: int = 1, nodes: tuple[int, int] = (1, 1), place: MeetingPlace | None = None) -> ElasticPlan:
    return ElasticPlan(place=place or MeetingPlace("loopback", "127.0.0.1:0"), ranks=ranks, nodes=nodes)


def parameters(endpoint: str) -> RendezvousParameters:
    return RendezvousParameters("loopback", endpoint, "run", 1, 1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_ranks(folder: Path) -> list[int]:
    files = [folder / f"{rank}.pid" for rank in range(2)]
    until(lambda: all(file.exists() and file.read_text() for file in files), seconds=60)
    return [int(file.read_text()) for file in files]


def runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or while it was read
        return False
    return state != "Z"


def until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.02)
