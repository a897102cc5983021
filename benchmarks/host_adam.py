"""How fast AdamW steps weights in host memory: the host stepper, and the ways that it was chosen from.

    python benchmarks/host_adam.py
    python benchmarks/host_adam.py --parameters-in-m 512 --threads 14 --ways whole,stepper,stepper_torch

Prints a table: billions of parameters a second, the best and the median round. A way is measured with fp32 gradients
and no output, then with bf16 gradients and a bf16 output. Ways take turns, so that a machine that is busy for a while
is as busy for all of them. A parameter takes 20 bytes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from albireo.device.cores import usable_cores
from albireo.log import Log
from albireo.optim import HostStepper, HybridAdam, stepper_threads
from albireo.optim.host_kernel import TorchKernel
from albireo.optim.host_step import AdamValues, HostStep

# Elements of a tensor: about those of a matrix of a model of a few billion parameters.
ITEM = 8 * 2**20
THREAD_SLICE = 256 * 1024
VALUES = AdamValues(1e-4, 0.9, 0.999, 1e-8, 0.01, decoupled=True, maximize=False)


@dataclass
class Data:
    """Tensors of one model: lists of 1-D tensors of ITEM elements. Outputs are None where nothing is cast out."""

    weights: list[torch.nn.Parameter]
    averages: list[torch.Tensor]
    squares: list[torch.Tensor]
    gradients: list[torch.Tensor]
    outputs: list[torch.Tensor | None]

    @staticmethod
    def of(items: int, dtype: torch.dtype) -> Data:
        """Make them, touched, with gradients of a dtype."""
        cast = dtype != torch.float32
        return Data(
            [torch.nn.Parameter(torch.randn(ITEM)) for _ in range(items)],
            [torch.full((ITEM,), 1e-4) for _ in range(items)],
            [torch.full((ITEM,), 1e-6) for _ in range(items)],
            [torch.randn(ITEM).mul_(1e-3).to(dtype) for _ in range(items)],
            [torch.ones(ITEM, dtype=dtype) if cast else None for _ in range(items)],
        )

    def steps(self) -> Iterator[HostStep]:
        """Yield the tensors' steps."""
        for w, m, v, g, o in zip(self.weights, self.averages, self.squares, self.gradients, self.outputs, strict=True):
            yield HostStep(w.detach(), m, v, g, o, VALUES, number=5.0, factor=1.0)


Way = Callable[[], object]


def whole(data: Data, threads: int, _: ExitStack) -> Way:
    """Step whole tensors with torch's fused kernel; casts are passes of their own."""
    kernel = TorchKernel(threads, slice_elements=ITEM)

    def step() -> None:
        torch.set_num_threads(threads)
        for one in data.steps():
            kernel.submit(one)

    return step


def stepper(data: Data, threads: int, stack: ExitStack, *, compiled: bool = True) -> Way:
    """Step with the host stepper."""
    optimizer = HybridAdam(data.weights, lr=VALUES.lr, weight_decay=VALUES.weight_decay)
    for w, m, v in zip(data.weights, data.averages, data.squares, strict=True):
        optimizer.state[w] = {"step": torch.tensor(5.0), "exp_avg": m, "exp_avg_sq": v}
    host = stack.enter_context(HostStepper(optimizer, threads=threads, compiled=compiled, log=Log()))

    def step() -> None:
        with host.open() as ticket:
            for w, g, o in zip(data.weights, data.gradients, data.outputs, strict=True):
                ticket.submit(w, g, output=o)
        ticket.wait()

    return step


def stepper_torch(data: Data, threads: int, stack: ExitStack) -> Way:
    """Step with the host stepper, and torch's own kernels."""
    return stepper(data, threads, stack, compiled=False)


def python_threads(data: Data, threads: int, _: ExitStack) -> Way:
    """Step slices with torch's kernels on Python threads, each alone in its slice."""

    def work(slices: Iterator[HostStep], lock: threading.Lock) -> None:
        kernel = TorchKernel(1)
        kernel.start()
        while True:
            with lock:
                one = next(slices, None)
            if one is None:
                return
            kernel.submit(one)

    def step() -> None:
        slices, lock = (_part(one, at) for one in data.steps() for at in range(0, ITEM, THREAD_SLICE)), threading.Lock()
        workers = [threading.Thread(target=work, args=(slices, lock)) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return step


def inductor(data: Data, threads: int, _: ExitStack) -> Way:
    """Step whole tensors with one pass that torch.compile makes. Its bits are others."""

    def adamw(one: HostStep, scale: torch.Tensor, root: torch.Tensor) -> None:
        gradient = one.gradient.float()
        weight = one.master * (1 - VALUES.lr * VALUES.weight_decay)
        average = torch.lerp(one.exp_avg, gradient, 1 - VALUES.beta1)
        square = one.exp_avg_sq * VALUES.beta2 + (1 - VALUES.beta2) * gradient * gradient
        weight = weight + scale * average / (square.sqrt() / root + VALUES.eps)
        one.exp_avg.copy_(average)
        one.exp_avg_sq.copy_(square)
        one.master.copy_(weight)
        if one.output is not None:
            one.output.copy_(weight)

    torch.set_num_threads(threads)
    compiled = torch.compile(adamw, dynamic=False)
    scale, root = torch.tensor(-VALUES.lr / (1 - VALUES.beta1**5)), torch.tensor((1 - VALUES.beta2**5) ** 0.5)

    @torch.no_grad()
    def step() -> None:
        torch.set_num_threads(threads)
        for one in data.steps():
            compiled(one, scale, root)

    return step


WAYS = {way.__name__: way for way in (whole, stepper, stepper_torch, python_threads, inductor)}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters-in-m", type=int, default=128, help="millions of parameters that a step updates")
    parser.add_argument("--threads", type=int, default=stepper_threads(usable_cores()), help="that compute")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each way that count")
    parser.add_argument("--ways", default=",".join(WAYS), help="which, separated by commas")
    options = parser.parse_args()
    torch.manual_seed(0)
    items = max(1, options.parameters_in_m * 10**6 // ITEM)
    out = Log(stream=sys.stdout)
    out.line(f"{items * ITEM / 1e6:.0f} M parameters, {options.threads} threads, torch {torch.__version__}\n")
    out.line("| way | gradient, output | best, Gparam/s | median |\n|---|---|---|---|")
    for dtype, label in ((torch.float32, "fp32, none"), (torch.bfloat16, "bf16, bf16")):
        torch.set_num_threads(options.threads)
        data = Data.of(items, dtype)
        with ExitStack() as stack:
            ways = {name: WAYS[name](data, options.threads, stack) for name in options.ways.split(",")}
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for number, (name, way) in itertools.product(range(options.rounds + 1), ways.items()):
                start = time.perf_counter()
                way()
                if number:  # the first round compiles, and touches what is new
                    seconds[name].append(time.perf_counter() - start)
        for name, times in seconds.items():
            best, median = (items * ITEM / 1e9 / value for value in (min(times), statistics.median(times)))
            out.line(f"| {name} | {label} | {best:.2f} | {median:.2f} |")


def _part(one: HostStep, at: int) -> HostStep:
    part = slice(at, at + THREAD_SLICE)
    output = None if one.output is None else one.output[part]
    tensors = (one.master[part], one.exp_avg[part], one.exp_avg_sq[part], one.gradient[part], output)
    return HostStep(*tensors, one.values, one.number, one.factor)


if __name__ == "__main__":
    main()
