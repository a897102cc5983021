"""`albireo run SCRIPT`: start a script of the user's own on several ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from albireo.errors import LaunchError
from albireo.log import Log

if TYPE_CHECKING:
    from albireo.distributed.elastic import ElasticPlan

__all__ = ["run"]

_EPILOG = """
\b
Examples:
  albireo run --nproc-per-node 2 -m platform    two ranks, each of which says where it is
  albireo run --nproc-per-node 2 my_script.py --lr 1e-4 --name "two words"
  albireo run --nproc-per-node gpu -m my_package.train
  albireo run --nnodes 2 --node-rank 0 --master-addr 10.0.0.1 --nproc-per-node gpu my_script.py
"""

# Options of other launchers that log in to machines; each is refused by name.
_LOG_IN_OPTIONS = ("--hostfile", "-H/--host", "--include", "--exclude", "--ssh-port", "--extra-launch-args")

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _as_ranks(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if value in ("gpu", "cpu", "auto") or (value.isdecimal() and int(value) >= 1):
        return value
    raise click.BadParameter(f"{value!r} is neither a whole number of at least 1 nor gpu, cpu or auto")


def _as_nodes(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[int, int]:
    least, colon, most = value.partition(":")
    most = most if colon else least
    if least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most):
        return int(least), int(most)
    raise click.BadParameter(f"{value!r} is neither a whole number of at least 1 nor MIN:MAX")


def _refuse(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value is not None and not context.resilient_parsing:
        raise LaunchError(
            f"{parameter.opts[-1]} is not there: albireo logs in to no machine; run the same command on each with "
            "--nnodes N --node-rank R --master-addr HOST, by a scheduler or by pdsh"
        )


def _refused_options(function: _Function) -> _Function:
    for names in _LOG_IN_OPTIONS:
        decorate = click.option(*names.split("/"), hidden=True, expose_value=False, callback=_refuse)
        function = decorate(function)
    return function


def _option(name: str, *more: str, **how: Any) -> Callable[[_Function], _Function]:
    """Declare an option that can also be given as torch's launcher takes it from the environment, as in PET_NNODES."""
    return click.option(name, *more, envvar=f"PET_{name[2:].replace('-', '_').upper()}", **how)


@click.command(
    "run",
    epilog=_EPILOG,
    context_settings={
        # All after the script is the script's, whatever it looks like.
        "allow_interspersed_args": False,
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
@_option(
    "--nproc-per-node",
    callback=_as_ranks,
    default="1",
    metavar="N",
    help="Ranks on this machine: a number, gpu (one a GPU), cpu (one a core), or auto (gpu, else cpu). Default: 1.",
)
@_option(
    "--nnodes", "--num-nodes", callback=_as_nodes, default="1", metavar="N", help="Machines, or MIN:MAX. Default: 1."
)
@_option("--node-rank", type=click.IntRange(min=0), metavar="R", help="This machine's number, from 0.")
@_option("--master-addr", metavar="HOST", help="The machine of rank 0, as all others reach it.")
@_option(
    "--master-port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="A free port there. Default: any on one machine, else 29500.",
)
@_option("--rdzv-endpoint", metavar="HOST:PORT", help="Where launchers meet, instead of --master-addr and --node-rank.")
@_option(
    "--rdzv-backend",
    type=click.Choice(["static", "c10d"]),
    help="How they meet. Default: c10d with --rdzv-endpoint and no --node-rank, else static.",
)
@_option("--rdzv-id", default="none", metavar="TEXT", help="A name of the run, the same on all machines.")
@_option("--local-addr", metavar="HOST", help="This machine as others reach it, where its name does not tell.")
@_option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Start all ranks anew so often when one fails. Default: 0.",
)
@_option(
    "--shutdown-timeout",
    type=click.IntRange(min=0),
    metavar="SECONDS",
    help="How long ranks may take to end after a signal. Default: 300.",
)
@_option("--standalone", is_flag=True, help="One machine, with no port that a network sees; so it is without --nnodes.")
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module, as for python -m.")
@_refused_options
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(script: str, arguments: tuple[str, ...], module: bool, **values: Any) -> None:
    """Start SCRIPT on several ranks, each with the ARGUMENTS as they are.

    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set for each, as torchrun sets them. Ctrl-C and other
    signals go to every rank; the exit code is that of the rank that failed first, and no rank outlives this command.
    """
    _look_for(script, module=module)
    from albireo.distributed.elastic import launch_elastic

    log = Log()
    plan = _plan(**values)
    for note in plan.place.notes:
        log.warn(note)
    log.line(_describe(plan))
    launch_elastic(plan, [sys.executable, "-u", *(["-m"] if module else []), script, *arguments])


def _look_for(script: str, *, module: bool) -> None:
    """Find out now what each rank would otherwise complain of.

    Raises:
        LaunchError: there is no such script or module.
    """
    if module:
        top = script.partition(".")[0]
        if not top or (find_spec(top) is None and PathFinder.find_spec(top, [str(Path.cwd())]) is None):
            raise LaunchError(f"there is no module {script!r} here")
    elif not Path(script).exists():
        raise LaunchError(f"there is no script {script!r}; give its path, or -m and a module's name")
    elif Path(script).is_dir() and not (Path(script) / "__main__.py").exists():
        raise LaunchError(f"{script!r} is a folder without a __main__.py; give the path of a script")


def _plan(
    *,
    nproc_per_node: str,
    nnodes: tuple[int, int],
    rdzv_id: str,
    local_addr: str | None,
    max_restarts: int,
    shutdown_timeout: int | None,
    standalone: bool,
    **meeting: Any,
) -> ElasticPlan:
    from albireo.distributed.elastic import ElasticPlan
    from albireo.distributed.rendezvous import LOOPBACK, MeetingWish, plan_meeting

    wish = MeetingWish(
        nodes=nnodes,
        node_rank=meeting["node_rank"],
        master_addr=meeting["master_addr"],
        master_port=meeting["master_port"],
        backend=meeting["rdzv_backend"],
        endpoint=meeting["rdzv_endpoint"],
    )
    place = plan_meeting(wish)
    if standalone and place.backend != LOOPBACK:
        raise LaunchError("--standalone means this machine alone: leave it out, or --nnodes and the address")
    return ElasticPlan(
        place=place,
        ranks=_count_ranks(nproc_per_node),
        nodes=nnodes,
        run_id=rdzv_id,
        local_addr=local_addr,
        max_restarts=max_restarts,
        shutdown_seconds=shutdown_timeout,
    )


def _count_ranks(text: str) -> int:
    from albireo.device import detect_device_type, device_count
    from albireo.device.cores import usable_cores

    if text.isdecimal():
        return int(text)
    has_gpu = detect_device_type() == "cuda"
    if text == "gpu" and not has_gpu:
        raise LaunchError(
            "--nproc-per-node gpu: torch sees no GPU here (`albireo check` says why); give a number, or cpu"
        )
    return device_count() if has_gpu and text != "cpu" else usable_cores()


def _describe(plan: ElasticPlan) -> str:
    """Say in one line what is started, and on how many threads."""
    from albireo.device.cores import usable_cores

    ranks = f"{plan.ranks} rank{'s' if plan.ranks > 1 else ''}"
    own = os.environ.get("OMP_NUM_THREADS")
    threads = plan.environment()["OMP_NUM_THREADS"] if own is None else own
    source = f"{usable_cores()} cores shared out" if own is None else "as you set it"
    where = "" if plan.nodes[1] == 1 else f", after all machines have met at {plan.place.endpoint}"
    return f"albireo: starting {ranks} with OMP_NUM_THREADS={threads} each ({source}){where}"
