from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.log import Log
from albireo.optim import host_kernel_choice, host_library
from albireo.optim.adam_values import AdamValues
from albireo.optim.host_kernel import CompiledKernel, HostKernel, TorchKernel
from albireo.optim.host_kernel_choice import choose_kernel, matching_form
from albireo.optim.host_library import Form, HostAdamLibrary, NoCompiledKernelError, load_host_adam
from albireo.optim.host_step import HostStep

PLAIN = AdamValues(1e-2, 0.9, 0.95, 1e-8, 0.0, decoupled=True, maximize=False)
DECAYED = replace(PLAIN, weight_decay=0.1)
L2 = replace(DECAYED, decoupled=False)
# Sizes without a tail, with one, with nothing else; a slice, and more than one.
SIZES = (1, 7, 63, 64, 65, 1000, 4096, 65536, 65537, 1000003)


@pytest.fixture(scope="module")
def library() -> HostAdamLibrary:
    try:
        return load_host_adam()
    except NoCompiledKernelError as error:
        pytest.skip(f"no compiled kernel here: {error}")


@pytest.fixture(scope="module")
def form(library: HostAdamLibrary) -> Form:
    try:
        return matching_form(library)
    except NoCompiledKernelError as error:
        pytest.skip(f"no compiled kernel here: {error}")


@pytest.fixture(params=["torch", "compiled"])
def kernel(request: pytest.FixtureRequest) -> Iterator[HostKernel]:
    if request.param == "torch":
        yield TorchKernel(1)
        return
    made = CompiledKernel(request.getfixturevalue("library"), request.getfixturevalue("form"), 2)
    yield made
    made.close()


def step_of(
    elements: int,
    values: AdamValues = DECAYED,
    *,
    dtype: torch.dtype = torch.float32,
    output: torch.dtype | None = None,
    factor: float = 1.0,
    number: float = 3.0,
    seed: int = 0,
) -> HostStep:
    generator = torch.Generator().manual_seed(seed)
    weight, average, root, gradient = (torch.randn(elements, generator=generator) for _ in range(4))
    return HostStep(
        weight * 0.05,
        average * 1e-3,
        (root * 1e-2).square(),
        (gradient * 1e-2).to(dtype),
        None if output is None else torch.full((elements,), math.nan, dtype=output),
        values,
        number,
        factor,
    )


def reference(step: HostStep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What torch's optimizer makes of the whole tensor, its gradient cast and multiplied by torch."""
    values = step.values
    weight = torch.nn.Parameter(step.master.clone())
    kind = torch.optim.AdamW if values.decoupled else torch.optim.Adam
    optimizer = kind(
        [weight],
        lr=values.lr,
        betas=(values.beta1, values.beta2),
        eps=values.eps,
        weight_decay=values.weight_decay,
        maximize=values.maximize,
        fused=True,
    )
    weight.grad = step.gradient.float() * step.factor
    optimizer.state[weight] = {
        "step": torch.tensor(step.number - 1),
        "exp_avg": step.exp_avg.clone(),
        "exp_avg_sq": step.exp_avg_sq.clone(),
    }
    optimizer.step()
    state = optimizer.state[weight]
    return weight.detach(), state["exp_avg"], state["exp_avg_sq"]


def check(kernel: HostKernel, steps: list[HostStep]) -> None:
    wanted = [reference(step) for step in steps]
    gradients = [step.gradient.clone() for step in steps]
    before = kernel.wait(0)
    for step in steps:
        kernel.submit(step)
    assert kernel.wait(before + len(steps)) == before + len(steps)
    for step, (weight, average, square), gradient in zip(steps, wanted, gradients, strict=True):
        assert torch.equal(step.exp_avg, average)
        assert torch.equal(step.exp_avg_sq, square)
        assert torch.equal(step.master, weight)
        assert torch.equal(step.gradient, gradient)
        if step.output is not None:
            assert torch.equal(step.output, weight.to(step.output.dtype))


@pytest.mark.parametrize("values", [PLAIN, DECAYED, L2, replace(DECAYED, beta1=0.3), replace(L2, maximize=True)])
def test_steps_have_the_bits_of_torchs_fused_optimizer(kernel: HostKernel, values: AdamValues) -> None:
    check(kernel, [step_of(elements, values) for elements in SIZES])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output", [None, torch.float32, torch.bfloat16, torch.float16])
def test_casts_and_the_factor_have_the_bits_of_torch(
    kernel: HostKernel, dtype: torch.dtype, output: torch.dtype | None
) -> None:
    steps = [
        step_of(elements, dtype=dtype, output=output, factor=factor)
        for elements in (5, 64, 1001, 70000)
        for factor in (1.0, 1 / 3, 1024.0)
    ]
    check(kernel, steps)


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_threads_and_slices(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        for slice_elements in (64, 4096, 2**20):
            kernel = TorchKernel(threads, slice_elements=slice_elements)
            kernel.start()
            check(kernel, [step_of(elements, dtype=torch.bfloat16) for elements in (1, 63, 65, 20003)])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_compiled_threads(library: HostAdamLibrary, form: Form, threads: int) -> None:
    kernel = CompiledKernel(library, form, threads)
    try:
        check(kernel, [step_of(elements, output=torch.bfloat16) for elements in (1000003, 1, 64 * 1024, 3)])
    finally:
        kernel.close()


@settings(max_examples=60)
@given(
    st.integers(1, 3000),
    st.sampled_from([PLAIN, DECAYED, L2]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.floats(1e-3, 1e3),
    st.integers(1, 10**5),
    st.integers(1, 20),
)
def test_any_size_and_slice_has_torchs_bits(
    library: HostAdamLibrary,
    form: Form,
    elements: int,
    values: AdamValues,
    dtype: torch.dtype,
    factor: float,
    number: int,
    slices: int,
) -> None:
    compiled = CompiledKernel(library, form, 1)
    try:
        for kernel in (compiled, TorchKernel(1, slice_elements=64 * slices)):
            check(kernel, [step_of(elements, values, dtype=dtype, output=dtype, factor=factor, number=float(number))])
    finally:
        compiled.close()


def test_every_16_bit_gradient_is_cast_as_torch_casts_it(kernel: HostKernel) -> None:
    # A first moment that forgets all: it becomes the gradient itself.
    values = replace(PLAIN, beta1=0.0)
    for dtype in (torch.bfloat16, torch.float16):
        gradient = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        step = replace(step_of(2**16, values), gradient=gradient)
        wanted = reference(step)[1]
        before = kernel.wait(0)
        kernel.submit(step)
        kernel.wait(before + 1)
        assert torch.equal(step.exp_avg.nan_to_num(12345.0), wanted.nan_to_num(12345.0))
        assert torch.equal(step.exp_avg.isnan(), wanted.isnan())


def test_outputs_are_rounded_to_nearest_even_and_nan_stays(kernel: HostKernel) -> None:
    # Halfway between two bf16 numbers and two fp16 numbers, beyond the largest, subnormal, infinite and NaN; a step
    # with a zero gradient and a zero moment leaves weights as they are.
    bits = [0x3F808000, 0x3F818000, 0x3F801000, 0x3F803000, 0x7F7FFFFF, 0x477FF000, 0x33000001, 0x00012345]
    bits += [0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x7FC00000]
    both = torch.tensor(bits, dtype=torch.int32)
    weight = torch.cat([both.view(torch.float32), -both.view(torch.float32)]).repeat(3)
    zeros = torch.zeros_like(weight)
    for dtype in (torch.bfloat16, torch.float16):
        step = HostStep(
            weight.clone(), zeros.clone(), zeros + 1, zeros, torch.empty_like(weight, dtype=dtype), PLAIN, 1.0, 1.0
        )
        before = kernel.wait(0)
        kernel.submit(step)
        kernel.wait(before + 1)
        assert step.output is not None
        wanted = weight.to(dtype)
        assert torch.equal(step.output.isnan(), weight.isnan())
        assert torch.equal(step.output[~weight.isnan()], wanted[~weight.isnan()])


def test_an_infinite_gradient_is_not_hidden(kernel: HostKernel) -> None:
    step = step_of(100, dtype=torch.bfloat16, output=torch.bfloat16)
    step.gradient[3], step.gradient[99] = math.inf, math.nan
    before = kernel.wait(0)
    kernel.submit(step)
    kernel.wait(before + 1)
    assert step.output is not None
    for tensor in (step.master, step.output):
        assert tensor.isnan().nonzero().flatten().tolist() == [3, 99]


def test_tensors_need_no_alignment(kernel: HostKernel) -> None:
    whole = step_of(301, dtype=torch.bfloat16, output=torch.bfloat16)
    assert whole.output is not None
    part = slice(1, 301)
    check(
        kernel,
        [
            replace(
                whole,
                master=whole.master[part],
                exp_avg=whole.exp_avg[part],
                exp_avg_sq=whole.exp_avg_sq[part],
                gradient=whole.gradient[part],
                output=whole.output[part],
            )
        ],
    )
    assert whole.output[0].isnan()


def test_nothing_beyond_the_tensors_is_written(kernel: HostKernel) -> None:
    guards = [torch.full((300,), 7.0) for _ in range(3)]
    output = torch.full((300,), 7.0, dtype=torch.bfloat16)
    inner = slice(64, 64 + 101)
    step = step_of(101, dtype=torch.bfloat16)
    for guard, tensor in zip(guards, (step.master, step.exp_avg, step.exp_avg_sq), strict=True):
        guard[inner] = tensor
    master, average, square = (guard[inner] for guard in guards)
    check(kernel, [replace(step, master=master, exp_avg=average, exp_avg_sq=square, output=output[inner])])
    for tensor in (*guards, output):
        assert torch.all(tensor[:64] == 7.0)
        assert torch.all(tensor[165:] == 7.0)


def test_more_steps_than_there_is_room_for(library: HostAdamLibrary, form: Form) -> None:
    kernel = CompiledKernel(library, form, 1)
    try:
        check(kernel, [step_of(3, seed=seed) for seed in range(2100)])
    finally:
        kernel.close()


def test_no_thread_is_left_after_close(library: HostAdamLibrary, form: Form) -> None:
    before = set(threading.enumerate())
    kernel = CompiledKernel(library, form, 3)
    assert len(set(threading.enumerate()) - before) == 3
    step = step_of(300000)
    wanted = reference(step)[0]
    kernel.submit(step)
    kernel.close()
    assert set(threading.enumerate()) == before
    assert torch.equal(step.master, wanted)
    kernel.close()


def test_another_form_has_other_bits(library: HostAdamLibrary, form: Form) -> None:
    kernel = CompiledKernel(library, replace(form, body=1 - form.body), 1)
    try:
        with pytest.raises(AssertionError):
            check(kernel, [step_of(4096)])
    finally:
        kernel.close()


@pytest.mark.parametrize(
    ("compiler", "reason"), [("false", "false fails"), ("/nowhere/cc", "does not run"), ("true", "cannot be loaded")]
)
def test_without_a_compiler_torch_steps_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compiler: str, reason: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    kernel = choose_kernel(2, log=Log())
    line = capsys.readouterr().err
    assert (kernel.name, kernel.threads) == ("torch", 2)
    assert line.count("\n") == 1
    assert reason in line


def test_no_compiler_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoCompiledKernelError, match="no C compiler"):
        load_host_adam()


def test_a_kernel_with_other_bits_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], library: HostAdamLibrary
) -> None:
    # As with a torch whose kernels were made without fused multiply-add.
    def other_bits(_: TorchKernel, step: HostStep, *__: object) -> None:
        step.exp_avg.mul_(0.9)

    monkeypatch.setattr(TorchKernel, "_step_slice", other_bits)
    with pytest.raises(NoCompiledKernelError, match="to the bit"):
        matching_form.__wrapped__(library)
    # A process finds out once.
    monkeypatch.setattr(host_kernel_choice, "matching_form", matching_form.__wrapped__)
    assert choose_kernel(1, log=Log()).name == "torch"
    assert "to the bit" in capsys.readouterr().err


def test_nothing_is_left_on_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_library.tempfile, "tempdir", str(tmp_path))
    try:
        load_host_adam()
    except NoCompiledKernelError as error:
        pytest.skip(f"no compiled kernel here: {error}")
    assert list(tmp_path.iterdir()) == []
