"""What a rank says of itself, once a second: where its program stands, and whether it moves.

All of it is read from outside, by a thread that looks at the main thread's stack: nothing that trains is instrumented,
patched or slowed down. What a frame holds is looked at only where somebody waits, and only in frames of modules: in
Python 3.11 and 3.12, looking at a long-lived frame keeps its variables alive.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["Moment", "VitalSign", "look", "own_sign", "process_start", "process_state", "processor_seconds"]

_C10D = "torch/distributed/distributed_c10d.py"
_HERE = str(Path(__file__).resolve().parent.parent)
_STDLIB = str(Path(os.__file__).resolve().parent)
_TORCH = str(Path(torch.__file__).resolve().parent)
_SEND = frozenset({"send", "recv", "isend", "irecv", "batch_isend_irecv"})
_COLLECTIVES = _SEND | frozenset(
    {
        "all_gather",
        "all_gather_coalesced",
        "all_gather_into_tensor",
        "all_gather_object",
        "all_gather_single",
        "all_reduce",
        "all_reduce_coalesced",
        "all_to_all",
        "all_to_all_single",
        "barrier",
        "broadcast",
        "broadcast_object_list",
        "gather",
        "gather_object",
        "monitored_barrier",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_single",
        "reduce_scatter_tensor",
        "scatter",
        "scatter_object_list",
    }
)
# Compilers take their time, and so does a person in a debugger.
_EXCUSES = ("/torch/_dynamo/", "/torch/_inductor/", "/triton/", "/pdb.py", "/bdb.py")
# By the ends of this package's files, and functions there.
_ACTIVITIES = (
    ("/training/evaluation.py", "evaluate", "evaluation"),
    ("/checkpoint/writer.py", "save_checkpoint", "saving"),
    ("/plugins/state_files.py", "save_model", "saving"),
    ("/plugins/state_files.py", "save_optimizer", "saving"),
    ("/training/session.py", "_export", "saving"),
    ("/training/assemble.py", "_build_state", "building the model"),
    ("/recipe.py", "load_data", "reading data"),
)
_STEP_PARTS = {"backward": "backward", "step": "optimizer step", "clip_grad_by_norm": "clipping"}
_STEP_ROOMS = ("/optim/", "/sharding/", "/plugins/")


@dataclass(frozen=True)
class Moment:
    """Where a program stands.

    Attributes:
        collective: the one that the program is in; "" if it is in none that can be seen.
        of_all_ranks: False if that is known to be a collective of some ranks only, or between two.
        counts: how many collectives of all ranks were begun, by kind of device.
        activity: such as "forward", "backward", "optimizer step" or "saving".
        module: the innermost module whose forward or backward runs; "" if none does.
        in_step: within a training step, where ranks go together.
        excused: a compiler or a debugger is at work.
        position: differs where the program stands elsewhere.
    """

    collective: str
    of_all_ranks: bool
    counts: tuple[int, ...]
    activity: str
    module: str
    in_step: bool
    excused: bool
    position: int


@dataclass(frozen=True)
class VitalSign:
    """What a rank tells the others.

    Attributes:
        beat: counts up; a rank whose beat stays is silent.
        pid: its process.
        started: when that process began, in the kernel's ticks; tells it from a later one of the same number.
        host: its machine.
        collective: see `Moment`.
        of_all_ranks: see `Moment`.
        counts: see `Moment`.
        activity: see `Moment`.
        module: see `Moment`.
        waits_seconds: for how long it has been in a collective, or has not moved at all.
        stuck_seconds: for how long it has been within a training step without beginning a collective.
        stuck_limit_seconds: from when on that is too long; infinite if nobody can tell.
        idle_share: processor time over time, since it has been waiting.
        ended: "" or how it ended: "left" or "failed".
        verdict: why it ends all ranks, if it does.
        culprit: for the sake of which rank.
    """

    beat: int
    pid: int
    started: int
    host: str
    collective: str = ""
    of_all_ranks: bool = True
    counts: tuple[int, ...] = ()
    activity: str = ""
    module: str = ""
    waits_seconds: float = 0.0
    stuck_seconds: float = 0.0
    stuck_limit_seconds: float = float("inf")
    idle_share: float = 1.0
    ended: str = ""
    verdict: str = ""
    culprit: int = -1

    def encode(self) -> bytes:
        """Return it as JSON."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def decode(data: bytes) -> VitalSign:
        """Return what `encode` was called on."""
        values: dict[str, Any] = json.loads(data)
        return VitalSign(**{**values, "counts": tuple(values["counts"])})

    @property
    def place(self) -> str:
        """Where it stands, for people."""
        return f"{self.activity} of {self.module}" if self.module else self.activity or "its own code"


def look(*, closely: bool = False) -> Moment:
    """Look at what the main thread does.

    Args:
        closely: tell a module's full name, for which frames are looked into.
    """
    stacks = sys._current_frames()  # noqa: SLF001  the one way to another thread's stack
    frame = stacks.get(threading.main_thread().ident or 0)
    frames = list(_outwards(frame))
    in_engine = bool(frames) and frames[0].f_code.co_name == "_engine_run_backward"
    if in_engine:
        # On a GPU, hooks of a backward run in a thread of autograd's own.
        me = threading.get_ident()
        for ident, other in stacks.items():
            if ident != me and (found := list(_outwards(other))) and _collective(found) is not None:
                frames = [*found, *frames]
                break
    del stacks, frame
    collective = _collective(frames)
    activity, in_step = _activity(frames)
    module = _exact_module(frames) if closely else ""
    return Moment(
        collective=collective.f_code.co_name if collective is not None else "",
        of_all_ranks=collective is None or _is_of_all(collective),
        counts=_counts(),
        activity=activity,
        module=module or _module_by_class(frames),
        in_step=in_step,
        excused=any(part in frame.f_code.co_filename for frame in frames for part in _EXCUSES),
        position=hash(tuple((id(frame.f_code), frame.f_lasti) for frame in frames)),
    )


def process_start(pid: int) -> int:
    """Return when a process began, in the kernel's ticks; 0 if that cannot be told."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def process_state(pid: int) -> str:
    """Return the kernel's letter for a process: R, S, D, T (stopped), t (traced), Z; "" if there is none such.

    Raises:
        OSError: this system does not tell.
    """
    if not sys.platform.startswith("linux"):
        raise OSError("no /proc")
    fields = _stat(pid)
    return fields[0] if fields else ""


def own_sign() -> VitalSign:
    """Return a sign that says who this process is."""
    return VitalSign(beat=0, pid=os.getpid(), started=process_start(os.getpid()), host=os.uname().nodename)


def processor_seconds() -> float:
    """Return the processor time of this process, all its threads together."""
    return time.process_time()


def _stat(pid: int) -> list[str]:
    """Return the fields after the command's name, which may hold anything."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _collective(frames: list[FrameType]) -> FrameType | None:
    """Return the call of a collective that the innermost frames, all of them torch's, belong to."""
    found = None
    for frame in frames:
        code = frame.f_code
        if not code.co_filename.startswith(_TORCH):
            break
        if code.co_filename.endswith(_C10D) and code.co_name in _COLLECTIVES:
            found = frame  # the outermost of several: `all_gather_object` is made of others
    return found


def _is_of_all(collective: FrameType) -> bool:
    if collective.f_code.co_name in _SEND:
        return False
    group = collective.f_locals.get("group")
    return group is None or group is dist.group.WORLD


def _counts() -> tuple[int, ...]:
    """Return how many collectives of all ranks this one has begun."""
    if not (dist.is_available() and dist.is_initialized()):
        return ()
    counts = []
    group = dist.group.WORLD
    for kind in ("cpu", "cuda"):
        try:
            counts.append(int(group._get_backend(torch.device(kind))._get_sequence_number_for_group()))  # type: ignore[union-attr]  # noqa: SLF001
        except (RuntimeError, AttributeError):
            counts.append(0)
    return tuple(counts)


def _activity(frames: list[FrameType]) -> tuple[str, bool]:
    """Return what the program is about, and whether that is a part of a training step."""
    activity = "forward" if any(_is_forward(frame.f_code) for frame in frames) else ""
    in_step = False
    for frame in frames:
        code = frame.f_code
        if not code.co_filename.startswith(_HERE):
            continue
        file, name = code.co_filename.removeprefix(_HERE), code.co_name
        if file == "/booster.py" and name == "train_step":
            in_step = True
        elif name in _STEP_PARTS and file.startswith(_STEP_ROOMS):
            in_step, activity = True, _STEP_PARTS[name]
        else:
            activity = next((said for f, n, said in _ACTIVITIES if (f, n) == (file, name)), activity)
    if activity:
        return activity, in_step
    theirs = [frame for frame in frames if not _is_library(frame.f_code.co_filename)]
    # The user's own code says more than this package's, and that more than none.
    named = [frame for frame in theirs if not frame.f_code.co_filename.startswith(_HERE)] or theirs
    if not named:
        return "", in_step
    code, line = named[0].f_code, named[0].f_lineno
    return f"{code.co_qualname} ({Path(code.co_filename).name}:{line})", in_step


def _is_library(file: str) -> bool:
    return file.startswith((_TORCH, "<")) or (file.startswith(_STDLIB) and "site-packages" not in file)


def _is_forward(code: CodeType) -> bool:
    return code.co_name == "forward" and "." in code.co_qualname


def _module_by_class(frames: list[FrameType]) -> str:
    """Return the classes of the modules whose forwards run, the outermost first."""
    names = [
        frame.f_code.co_qualname.rpartition(".")[0].rpartition(".")[2] for frame in frames if _is_forward(frame.f_code)
    ]
    return " > ".join(reversed(names))


def _exact_module(frames: list[FrameType]) -> str:
    """Return the full name of the innermost module whose forward runs, or what a hook of a backward tells of it."""
    modules: list[nn.Module] = []
    hooked: object = None
    for frame in frames:
        code = frame.f_code
        if code.co_name in ("forward", "_call_impl"):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and (not modules or modules[-1] is not module):
                modules.append(module)
        elif "/fsdp/" in code.co_filename and code.co_name in ("pre_backward", "post_backward"):
            named = getattr(frame.f_locals.get("self"), "_module_fqn", None)
            if isinstance(named, str) and named:
                return named
        elif code.co_filename.startswith(_HERE + "/sharding/") and code.co_name == "take":
            hooked = frame.f_locals.get("parameter", hooked)
        elif code.co_filename == _HERE + "/booster.py" and code.co_name == "train_step" and hooked is not None:
            root = frame.f_locals.get("model")
            for name, parameter in root.named_parameters() if isinstance(root, nn.Module) else ():
                if parameter is hooked:
                    return _plain_name(name.rpartition(".")[0])
    if not modules:
        return ""
    innermost, root = modules[0], modules[-1]
    name = next((name for name, module in root.named_modules() if module is innermost), "")
    return f"{_plain_name(name)} ({type(innermost).__name__})" if name else type(innermost).__name__


def _plain_name(name: str) -> str:
    """Return a module's name without those of what wraps the user's model."""
    return re.sub(r"^(module\.)+", "", name)
