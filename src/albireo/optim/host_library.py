"""`host_adam.c`, made by the machine's own C compiler and called without the interpreter's lock."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from albireo.optim.host_step import HostStep

__all__ = ["Form", "HostAdamLibrary", "NoCompiledKernelError", "load_host_adam"]

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_DECAY, _L2, _DECOUPLED = range(3)

# No contraction that is not written down, or the bits would depend on the compiler. The other two only say that nobody
# asks for errno or for traps, without which loops with a square root are not vectorised.
_FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
_COMPILE_SECONDS = 120


class NoCompiledKernelError(Exception):
    """There is no compiled kernel here; the message says why."""


class _Step(ctypes.Structure):
    """`step_t` of the C file."""

    _fields_ = (
        ("master", ctypes.c_void_p),
        ("exp_avg", ctypes.c_void_p),
        ("exp_avg_sq", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("elements", ctypes.c_int64),
        ("gradient_kind", ctypes.c_int32),
        ("output_kind", ctypes.c_int32),
        ("decay", ctypes.c_int32),
        ("factor", ctypes.c_float),
        ("negative_step_size", ctypes.c_float),
        ("one_minus_beta1", ctypes.c_float),
        ("beta2", ctypes.c_float),
        ("one_minus_beta2", ctypes.c_float),
        ("root_of_correction", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("decay_value", ctypes.c_float),
    )


@dataclass(frozen=True)
class Form:
    """In which of the C file's forms torch's kernel computes: that is up to the compiler that torch was built with.

    Attributes:
        body_width: the tail of a tensor is what remains beyond a multiple of this.
        body: form of the body.
        tail: form of the tail.
    """

    body_width: int
    body: int
    tail: int


class HostAdamLibrary:
    """The compiled C file.

    Args:
        path: the shared library; it may be deleted afterwards.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._begin = library.host_adam_begin
        self._begin.argtypes = (ctypes.c_int32,) * 3
        self._begin.restype = ctypes.c_void_p
        # It never waits, so it keeps the interpreter's lock: to get that back from a busy loop takes far longer.
        self._submit = ctypes.PyDLL(str(path), handle=library._handle).host_adam_submit  # noqa: SLF001
        self._submit.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Step))
        self._submit.restype = ctypes.c_int32
        self._wait = library.host_adam_wait
        self._wait.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        self._wait.restype = ctypes.c_int64
        self._work, self._end, self._free = library.host_adam_work, library.host_adam_end, library.host_adam_free
        for function in (self._work, self._end, self._free):
            function.argtypes = (ctypes.c_void_p,)
            function.restype = None

    def begin(self, form: Form) -> int:
        """Return a new queue of steps.

        Args:
            form: how they round.

        Raises:
            MemoryError: there is no memory for it.
        """
        queue: int | None = self._begin(form.body_width, form.body, form.tail)
        if queue is None:
            raise MemoryError("there is no memory for the queue of host Adam")
        return queue

    def submit(self, queue: int, step: HostStep) -> bool:
        """Add a step.

        Returns:
            False if there is no room.
        """
        values = step.values
        decay, decay_value = _NO_DECAY, 0.0
        if values.weight_decay != 0.0:
            decay = _DECOUPLED if values.decoupled else _L2
            decay_value = 1 - values.lr * values.weight_decay if values.decoupled else values.weight_decay
        # Computed in fp64 and rounded once, as torch does.
        c_step = _Step(
            step.master.data_ptr(),
            step.exp_avg.data_ptr(),
            step.exp_avg_sq.data_ptr(),
            step.gradient.data_ptr(),
            None if step.output is None else step.output.data_ptr(),
            step.master.numel(),
            _KINDS[step.gradient.dtype],
            0 if step.output is None else _KINDS[step.output.dtype],
            decay,
            -step.factor if values.maximize else step.factor,
            -values.lr / (1 - values.beta1**step.number),
            1 - values.beta1,
            values.beta2,
            1 - values.beta2,
            math.sqrt(1 - values.beta2**step.number),
            values.eps,
            decay_value,
        )
        return bool(self._submit(queue, ctypes.byref(c_step)))

    def wait(self, queue: int, count: int) -> int:
        """Block until the first so many steps are done.

        Returns:
            How many are done by now.
        """
        done: int = self._wait(queue, count)
        return done

    def work(self, queue: int) -> None:
        """Compute until `end` has been called and nothing is left; the body of a thread."""
        self._work(queue)

    def end(self, queue: int) -> None:
        """Say that no more steps will come."""
        self._end(queue)

    def free(self, queue: int) -> None:
        """Free the queue; no thread may be at work in it."""
        self._free(queue)


def load_host_adam() -> HostAdamLibrary:
    """Return the C file compiled and loaded; a process does so once, which takes about a second.

    Nothing is kept on the disk: a library that lies about may be stale, or be somebody else's.

    Raises:
        NoCompiledKernelError: there is no compiler, it fails, or what it makes cannot be loaded.
    """
    return _made(tuple(_compiler()))


@functools.cache
def _made(compiler: tuple[str, ...]) -> HostAdamLibrary:
    source = resources.files("albireo.optim").joinpath("host_adam.c").read_bytes()
    with tempfile.TemporaryDirectory(prefix="albireo-") as folder:
        path = Path(folder) / "host_adam.so"
        _compile(compiler, source, path)
        try:
            return HostAdamLibrary(path)
        except OSError as error:
            raise NoCompiledKernelError(f"what was compiled cannot be loaded: {error}") from error


def _compile(compiler: Sequence[str], source: bytes, path: Path) -> None:
    native = "-mcpu=native" if os.uname().machine in ("aarch64", "arm64") else "-march=native"
    command = [*compiler, *_FLAGS, native, "-x", "c", "-", "-o", str(path), "-lm"]
    try:
        result = subprocess.run(command, input=source, capture_output=True, timeout=_COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCompiledKernelError(f"the compiler does not run: {error}") from error
    if result.returncode != 0:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "it says nothing")
        raise NoCompiledKernelError(f"{compiler[0]} fails: {first}")


def _compiler() -> Sequence[str]:
    """Return the command of a C compiler."""
    chosen = shlex.split(os.environ.get("CC", ""))
    if chosen:
        return chosen
    for name in ("cc", "gcc", "clang"):
        if (path := shutil.which(name)) is not None:
            return [path]
    raise NoCompiledKernelError("there is no C compiler (cc, gcc or clang; CC names another)")
