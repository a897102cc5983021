"""Which kernel steps on this host: the compiled one where it has torch's bits, else torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

import torch

from albireo.log import Log
from albireo.optim.adam_values import AdamValues
from albireo.optim.host_kernel import CompiledKernel, HostKernel, TorchKernel
from albireo.optim.host_library import Form, HostAdamLibrary, NoCompiledKernelError, load_host_adam
from albireo.optim.host_step import HostStep

__all__ = ["choose_kernel", "matching_form"]

# The likeliest first: torch on x86 computes eight elements at a time.
_FORMS = tuple(Form(width, body, tail) for width, body, tail in product((8, 16, 4), (0, 1), (1, 0)))


def choose_kernel(threads: int, *, compiled: bool = True, log: Log | None = None) -> HostKernel:
    """Return what is quickest here. Which it is changes no bit.

    Args:
        threads: how many compute.
        compiled: False takes torch's own kernels, whatever there is.
        log: where a line goes if the compiled kernel cannot be had.
    """
    if compiled:
        try:
            library = load_host_adam()
            return CompiledKernel(library, matching_form(library), threads)
        except NoCompiledKernelError as error:
            if log is not None:
                log.line(f"host Adam: torch's own kernels step, which takes longer than a compiled one: {error}")
    return TorchKernel(threads)


@cache
def matching_form(library: HostAdamLibrary) -> Form:
    """Return the form of the C file that has the bits of torch's kernel.

    Raises:
        NoCompiledKernelError: none has.
    """
    samples = list(_samples())
    wanted = _results(TorchKernel(1), samples)
    for form in _FORMS:
        kernel = CompiledKernel(library, form, 1)
        try:
            results = _results(kernel, samples)
        finally:
            kernel.close()
        if all(map(torch.equal, results, wanted)):
            return form
    raise NoCompiledKernelError("its results are not those of this torch to the bit")


def _results(kernel: HostKernel, steps: list[HostStep]) -> list[torch.Tensor]:
    """Return weights and moments after each step; the steps' own tensors stay as they are."""
    copies = [
        replace(step, master=step.master.clone(), exp_avg=step.exp_avg.clone(), exp_avg_sq=step.exp_avg_sq.clone())
        for step in steps
    ]
    for step in copies:
        kernel.submit(step)
    kernel.wait(len(copies))
    return [tensor for step in copies for tensor in (step.master, step.exp_avg, step.exp_avg_sq)]


def _samples() -> Iterator[HostStep]:
    """Yield steps that tell the forms from each other: a body, and tails of every length, some behind a body."""
    generator = torch.Generator().manual_seed(0)
    plain = AdamValues(1e-3, 0.9, 0.95, 1e-8, 0.0, decoupled=True, maximize=False)
    decayed = replace(plain, weight_decay=0.1)
    for elements in (2048, *range(1, 32)):
        weight, average, root, gradient = (
            torch.randn(elements, generator=generator) * size for size in (2e-2, 1e-3, 3e-3, 1e-2)
        )
        for values in (plain, decayed, replace(decayed, decoupled=False, beta1=0.3)):
            yield HostStep(weight, average, root.square(), gradient, None, values, number=7.0, factor=1.0)
