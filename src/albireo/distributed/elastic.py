"""Start a script on several ranks through torch's elastic launcher, and see it through.

torch's agent starts the ranks, watches them, starts them anew if asked to, and meets the agents of other machines. What
is added here: a rank dies with its launcher and has its share of the cores; ranks of one machine are not to be seen on
any network; arguments, signals and exit codes arrive as they are; and of a failure one line is said.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from albireo.distributed import lifeline
from albireo.distributed.launch import describe_end, loopback_environment, threads_environment
from albireo.distributed.loopback import LoopbackRendezvous
from albireo.distributed.rendezvous import LOOPBACK, MeetingPlace
from albireo.errors import Interrupted, LaunchError

__all__ = ["ElasticPlan", "launch_elastic"]

# A save of a large model takes minutes; the 30 seconds that torch gives would cut it off.
_SHUTDOWN_SECONDS = 300
# How often the ranks are looked at. When one fails, the others soon fail of it: the first has to be seen alone.
_LOOK_SECONDS = 0.02
_LOOK_AT_NETWORK_SECONDS = 0.1
# No site-packages and no user's paths: what `lifeline.py` needs is all in the standard library.
_LIGHT_PYTHON = ("-I", "-S")
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class ElasticPlan:
    """What torch's agent on this machine is to do.

    Attributes:
        place: where it meets those of other machines.
        ranks: how many ranks run on this machine.
        nodes: the smallest and the largest number of machines.
        run_id: the same for all launchers of a run.
        local_addr: this machine's address as others see it; looked up if None.
        max_restarts: how often all ranks are started anew after one has failed.
        shutdown_seconds: how long ranks may take to end after a signal; None: 300, or 30 where torch cannot be told.
    """

    place: MeetingPlace
    ranks: int = 1
    nodes: tuple[int, int] = (1, 1)
    run_id: str = "none"
    local_addr: str | None = None
    max_restarts: int = 0
    shutdown_seconds: int | None = None

    def environment(self) -> dict[str, str]:
        """Return the variables that ranks get where the user has not set them."""
        threads = threads_environment(self.ranks)
        return {**threads, **loopback_environment()} if self.place.backend == LOOPBACK else threads


def launch_elastic(plan: ElasticPlan, command: Sequence[str]) -> None:
    """Run a command on every rank of this machine, and wait for all.

    Args:
        plan: how many, and where they meet.
        command: the program, with its path, and its arguments; each arrives as it is.

    Raises:
        LaunchError: the launchers did not meet (exit code 2), or a rank failed: `exit_code` is the rank's own, or 128
            and the number of the signal that ended it.
        Interrupted: Ctrl-C was pressed; the ranks got it, and have ended.
    """
    rendezvous_handler_registry.register(LOOPBACK, LoopbackRendezvous)
    # The ranks start as `lifeline.py`, which has the kernel end them with this process and then becomes the command.
    tied = [*_LIGHT_PYTHON, lifeline.__file__, str(os.getpid()), *command]
    try:
        with _environment(plan.environment()), _signal_handlers_kept(), _quiet():
            # torch replaces $local_rank and $$ in arguments.
            elastic_launch(_config(plan), sys.executable)(*(word.replace("$", "$$") for word in tied))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise _with_code(LaunchError(describe_end(rank, failure.exitcode)), failure.exitcode) from None
    except SignalException as error:
        kind = Interrupted if error.sigval == signal.SIGINT else LaunchError
        raise _with_code(kind(f"stopped by {error.sigval.name}; all ranks have ended"), -error.sigval) from None
    except (RendezvousError, dist.DistError) as error:
        first = error.__cause__ or error
        reason = str(first).strip().splitlines()[0]
        raise LaunchError(f"the launchers did not meet at {plan.place.endpoint}: {reason}") from error


def _config(plan: ElasticPlan) -> LaunchConfig:
    options: dict[str, Any] = {}
    known = {option.name for option in fields(LaunchConfig)}
    if "signals_to_handle" in known:
        options["signals_to_handle"] = ",".join(number.name for number in _handled_signals())
    if "shutdown_timeout" in known:
        options["shutdown_timeout"] = _SHUTDOWN_SECONDS if plan.shutdown_seconds is None else plan.shutdown_seconds
    elif plan.shutdown_seconds is not None:
        raise LaunchError("--shutdown-timeout needs torch 2.12 or later; this one always gives ranks 30 seconds")
    return LaunchConfig(
        min_nodes=plan.nodes[0],
        max_nodes=plan.nodes[1],
        nproc_per_node=plan.ranks,
        logs_specs=_NoLogs(),
        run_id=plan.run_id,
        role="default",
        rdzv_endpoint=plan.place.endpoint,
        rdzv_backend=plan.place.backend,
        rdzv_configs=dict(plan.place.options),
        max_restarts=plan.max_restarts,
        monitor_interval=_LOOK_SECONDS if plan.place.backend == LOOPBACK else _LOOK_AT_NETWORK_SECONDS,
        local_addr=plan.local_addr,
        **options,
    )


def _handled_signals() -> list[signal.Signals]:
    """Return the signals that ranks get too; who started this process with nohup wants it to outlive the terminal."""
    kept_out = signal.SIGHUP if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else None
    return [number for number in _HANDLED if number != kept_out]


def _with_code(error: LaunchError | Interrupted, code: int) -> LaunchError | Interrupted:
    error.exit_code = code if code >= 0 else 128 - code
    return error


class _NoLogs(LogsSpecs):
    """Ranks print where their launcher prints, and no folder is left behind."""

    def __init__(self) -> None:
        super().__init__()

    @property
    def root_log_dir(self) -> str:
        return os.devnull

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        for environment in envs.values():
            environment["TORCHELASTIC_ERROR_FILE"] = ""
        console = dict.fromkeys(envs, "")
        return LogsDest(stdouts=console, stderrs=dict(console), error_files=dict.fromkeys(envs, os.devnull))


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Set variables that are not set, for the ranks to inherit; torch's agent sets more."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in defaults.items() if name not in before})
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Put the handlers back that torch's agent replaces once ranks run."""
    before = {number: signal.getsignal(number) for number in _HANDLED}
    if before[signal.SIGINT] == signal.default_int_handler:
        # Until ranks run there is nothing to tidy up, and Python's own handler would have to wait for minutes: torch
        # waits for other machines in code that never looks at it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the agent's log to itself, unless the user asked for it: a script's own traceback is what matters."""
    if "LOGLEVEL" in os.environ or "TORCH_LOGS" in os.environ:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
