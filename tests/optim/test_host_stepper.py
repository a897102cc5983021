from __future__ import annotations

import copy
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.errors import ConfigError
from albireo.optim import HostStepper, HybridAdam, Ticket, host_kernel_choice, host_stepper, stepper_threads
from albireo.optim.host_kernel import TorchKernel
from albireo.optim.host_kernel_choice import matching_form
from albireo.optim.host_library import Form, HostAdamLibrary, NoCompiledKernelError, load_host_adam

SIZES = (1, 63, 64, 65, 4096, 100003)


def parameters(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]


def gradients(of: list[torch.nn.Parameter], dtype: torch.dtype = torch.float32, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(one.numel(), generator=generator) * 0.1).to(dtype) for one in of]


def states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All that a checkpoint would hold, and the weights."""
    tensors = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            tensors += [parameter.detach(), *(state[key] for key in sorted(state))]
    return tensors


def assert_equal(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    one, other = states(ours), states(theirs)
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)


def torchs_step(optimizer: torch.optim.Optimizer, given: list[torch.Tensor | None], factor: float = 1.0) -> None:
    every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(every, given, strict=True):
        parameter.grad = None if gradient is None else gradient.float() * factor
    optimizer.step()


@pytest.fixture(scope="module")
def compiled() -> tuple[HostAdamLibrary, Form]:
    """What a stepper compiles: once for all tests."""
    try:
        library = load_host_adam()
        return library, matching_form(library)
    except NoCompiledKernelError as error:
        pytest.skip(f"no compiled kernel here: {error}")


@pytest.fixture(params=["torch", "compiled"])
def stepper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., HostStepper]]:
    """Makes steppers, which are closed after the test."""
    made = []
    if request.param == "compiled":
        library, form = request.getfixturevalue("compiled")
        monkeypatch.setattr(host_kernel_choice, "load_host_adam", lambda: library)
        monkeypatch.setattr(host_kernel_choice, "matching_form", lambda _: form)

    def make(optimizer: torch.optim.Optimizer, **options: Any) -> HostStepper:
        options = {"threads": 1, "compiled": request.param == "compiled", **options}
        made.append(HostStepper(optimizer, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def run(host: HostStepper, of: list[torch.nn.Parameter], given: list[torch.Tensor], **options: Any) -> Ticket:
    with host.open(**options) as ticket:
        for parameter, gradient in zip(of, given, strict=True):
            ticket.submit(parameter, gradient)
    return ticket


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, HybridAdam])
def test_steps_and_states_are_those_of_torch(
    stepper: Callable[..., HostStepper], kind: type[torch.optim.Adam], dtype: torch.dtype
) -> None:
    ours, theirs = parameters(), parameters()
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = kind(ours, **options)
    reference = kind(theirs, **options) if kind is HybridAdam else kind(theirs, fused=True, **options)
    host = stepper(optimizer)
    for number in range(4):
        given = gradients(ours, dtype, seed=number)
        run(host, ours, given, factor=0.37).wait()
        torchs_step(reference, [*given], factor=0.37)
    assert_equal(optimizer, reference)
    assert optimizer.state[ours[0]]["step"] == 4.0


def test_what_computes_is_what_was_asked_for(
    request: pytest.FixtureRequest, stepper: Callable[..., HostStepper]
) -> None:
    host = stepper(HybridAdam(parameters()), threads=2)
    assert host.threads == 2
    assert host.kernel_name in request.node.name


def test_a_stepper_compiles_for_itself(compiled: tuple[HostAdamLibrary, Form]) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, reference = (HybridAdam(of, lr=0.1) for of in (ours, theirs))
    with HostStepper(optimizer, threads=2) as host:
        assert host.kernel_name == "compiled"
        run(host, ours, gradients(ours)).wait()
    torchs_step(reference, [*gradients(ours)])
    assert_equal(optimizer, reference)


def test_groups_keep_their_own_values(stepper: Callable[..., HostStepper]) -> None:
    def groups(of: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": of[:2], "lr": 0.1, "weight_decay": 0.0},
            {"params": of[2:4], "betas": (0.3, 0.7), "eps": 1e-3, "decoupled_weight_decay": False, "weight_decay": 0.3},
            {"params": of[4:], "maximize": True},
        ]

    ours, theirs = parameters(), parameters()
    optimizer, reference = (torch.optim.AdamW(groups(of), fused=True) for of in (ours, theirs))
    host = stepper(optimizer)
    for number in range(3):
        given = gradients(ours, seed=number)
        run(host, ours, given).wait()
        torchs_step(reference, [*given])
    assert_equal(optimizer, reference)


def test_what_is_not_submitted_is_not_touched(stepper: Callable[..., HostStepper]) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, reference = (HybridAdam(of, lr=0.1, weight_decay=0.5) for of in (ours, theirs))
    host = stepper(optimizer)
    for number, skipped in enumerate(({1, 4}, {0, 4}, set[int]())):
        given = gradients(ours, seed=number)
        with host.open() as ticket:
            for index, (parameter, gradient) in enumerate(zip(ours, given, strict=True)):
                if index not in skipped:
                    ticket.submit(parameter, gradient)
        ticket.wait()
        torchs_step(reference, [None if index in skipped else one for index, one in enumerate(given)])
        if number == 1:
            assert not optimizer.state[ours[4]]
            assert torch.equal(ours[4], parameters()[4])
    assert_equal(optimizer, reference)
    assert [optimizer.state[one]["step"].item() for one in ours] == [2, 2, 3, 3, 1, 3]


def test_an_empty_step_does_nothing(stepper: Callable[..., HostStepper]) -> None:
    ours = parameters()
    host = stepper(HybridAdam(ours))
    run(host, [], []).wait()
    host.flush()
    assert all(map(torch.equal, ours, parameters()))


def test_a_ticket_keeps_the_values_of_the_call(stepper: Callable[..., HostStepper]) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, reference = (HybridAdam(of, lr=0.1, weight_decay=0.2) for of in (ours, theirs))
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 0.5**step) for one in (optimizer, reference)]
    host = stepper(optimizer)
    for number in range(3):
        given = gradients(ours, seed=number)
        for parameter, gradient in zip(ours, given, strict=True):
            parameter.grad = gradient.clone()
        gate = threading.Event()
        with host.open(factor=0.5) as ticket:
            for parameter in ours:
                assert parameter.grad is not None
                ticket.submit(parameter, parameter.grad, ready=gate.wait)
        # All of this happens before the worker has read anything.
        optimizer.zero_grad()
        optimizer._opt_called = True  # type: ignore[attr-defined]  # the scheduler warns without it
        schedules[0].step()
        optimizer.param_groups[0]["betas"] = (0.0, 0.0)
        assert ticket.done == 0
        gate.set()
        ticket.wait()
        optimizer.param_groups[0]["betas"] = (0.9, 0.999)
        torchs_step(reference, [*given], factor=0.5)
        schedules[1].step()
    assert_equal(optimizer, reference)


def test_tickets_may_be_behind_one_another(stepper: Callable[..., HostStepper]) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, reference = (HybridAdam(of, lr=0.1) for of in (ours, theirs))
    host, gate = stepper(optimizer), threading.Event()
    tickets = []
    for number in range(3):
        given = gradients(ours, seed=number)
        with host.open() as ticket:
            for parameter, gradient in zip(ours, given, strict=True):
                ticket.submit(parameter, gradient, ready=gate.wait)
        tickets.append(ticket)
        torchs_step(reference, [*given])
    gate.set()
    host.flush()
    assert [ticket.done for ticket in tickets] == [len(SIZES)] * 3
    assert_equal(optimizer, reference)


def test_items_are_reported_one_by_one_in_their_order(stepper: Callable[..., HostStepper]) -> None:
    ours = parameters()
    outputs = [torch.zeros(one.numel(), dtype=torch.bfloat16) for one in ours]
    seen: list[tuple[int, bool]] = []
    host = stepper(HybridAdam(ours, lr=0.1))
    gates = [threading.Event() for _ in ours]

    def on_done(index: int) -> None:
        # In this moment the output is whole, and may be sent away.
        seen.append((index, torch.equal(outputs[index], ours[index].detach().bfloat16())))

    ticket = host.open(on_done=on_done)
    for index, (parameter, gradient) in enumerate(zip(ours, gradients(ours), strict=True)):
        assert ticket.submit(parameter, gradient, output=outputs[index], ready=gates[index].wait) == index
    for index, gate in enumerate(gates):
        assert len(seen) == ticket.done == index
        gate.set()
        ticket.wait_for(index)
        assert ticket.done == index + 1
    assert seen == [(index, True) for index in range(len(ours))]
    with pytest.raises(ValueError, match="none of index 6"):
        ticket.wait_for(6)
    ticket.seal()


def test_items_are_fed_while_others_are_on_their_way(stepper: Callable[..., HostStepper]) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, reference = (HybridAdam(of, lr=0.1) for of in (ours, theirs))
    given = gradients(ours)
    host = stepper(optimizer)
    ticket = host.open()
    for index in (5, 0, 3, 1, 4, 2):  # the order of arrival
        number = ticket.submit(ours[index], given[index])
        ticket.wait_for(number)
    assert not ticket.is_sealed
    ticket.wait()
    assert ticket.is_sealed
    torchs_step(reference, [*given])
    assert_equal(optimizer, reference)


def test_states_from_before_are_taken_up(stepper: Callable[..., HostStepper]) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, reference = (HybridAdam(of, lr=0.1) for of in (ours, theirs))
    given = [*gradients(ours)]
    torchs_step(optimizer, [*given])
    torchs_step(reference, [*given])
    host = stepper(optimizer)
    run(host, ours, given).wait()
    torchs_step(reference, [*given])
    assert_equal(optimizer, reference)
    # The other way round, and through what a checkpoint saves.
    torchs_step(optimizer, [*given])
    torchs_step(reference, [*given])
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    run(host, ours, given).wait()
    torchs_step(reference, [*given])
    assert_equal(optimizer, reference)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=8), st.data())
def test_any_sizes_and_any_order(sizes: list[int], data: st.DataObject) -> None:
    ours, theirs = parameters(tuple(sizes)), parameters(tuple(sizes))
    optimizer, reference = (HybridAdam(of, lr=0.1, weight_decay=0.1) for of in (ours, theirs))
    with HostStepper(optimizer, threads=1, compiled=False) as host:
        for number in range(2):
            given = gradients(ours, torch.bfloat16, seed=number)
            order = data.draw(st.permutations(range(len(sizes))))
            taken = order[: data.draw(st.integers(0, len(sizes)))]
            with host.open() as ticket:
                for index in taken:
                    ticket.submit(ours[index], given[index])
            torchs_step(reference, [one if index in taken else None for index, one in enumerate(given)])
    assert_equal(optimizer, reference)


class FaultError(Exception):
    pass


def fail(*_: object) -> None:
    raise FaultError("planted")


@pytest.mark.parametrize("where", ["ready", "on_done", "kernel"])
def test_an_error_of_the_worker_is_raised_where_one_waits(
    stepper: Callable[..., HostStepper], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    ours = parameters()
    host = stepper(HybridAdam(ours))
    if where == "kernel":
        monkeypatch.setattr(host._worker.kernel, "submit", fail)
    ticket = host.open(on_done=fail if where == "on_done" else None)
    ticket.submit(ours[0], gradients(ours)[0], ready=fail if where == "ready" else None)
    with pytest.raises(FaultError, match="planted"):
        ticket.wait_for(0)
    with pytest.raises(RuntimeError, match="stopped on an error"):
        ticket.submit(ours[1], gradients(ours)[1])
    with pytest.raises(FaultError):
        ticket.wait()
    with pytest.raises(FaultError):
        host.flush()
    with pytest.raises(RuntimeError, match="load a checkpoint"):
        host.open()
    host.close()


def test_an_error_nobody_saw_is_raised_by_close() -> None:
    ours = parameters()
    host = HostStepper(HybridAdam(ours), threads=1, compiled=False)
    run(host, ours[:1], gradients(ours[:1]), on_done=fail)
    with pytest.raises(FaultError):
        host.close()
    host.close()


def test_an_error_on_the_way_out_is_not_covered() -> None:
    ours = parameters()
    host = HostStepper(HybridAdam(ours), threads=1, compiled=False)

    def half_a_step() -> None:
        with host:
            host.open(on_done=fail).submit(ours[0], gradients(ours)[0])
            raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        half_a_step()


def test_what_was_done_before_an_error_is_reported(stepper: Callable[..., HostStepper]) -> None:
    ours = parameters()
    host, seen, gate = stepper(HybridAdam(ours)), list[int](), threading.Event()
    ticket = host.open(on_done=seen.append)
    for index, gradient in enumerate(gradients(ours)[:4]):
        ticket.submit(ours[index], gradient, ready=fail if index == 2 else gate.wait)
    gate.set()
    with pytest.raises(FaultError):
        ticket.wait()
    host.close()
    assert seen == [0, 1]
    assert torch.equal(ours[3], parameters()[3])


def test_no_thread_is_left_and_torchs_number_stays(stepper: Callable[..., HostStepper]) -> None:
    before, number = set(threading.enumerate()), torch.get_num_threads()
    host = stepper(HybridAdam(parameters()), threads=3)
    of_new_thread: list[int] = []
    thread = threading.Thread(target=lambda: of_new_thread.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert of_new_thread == [torch.get_num_threads()] == [number]
    assert set(threading.enumerate()) > before
    host.close()
    assert set(threading.enumerate()) == before
    host.close()
    with pytest.raises(RuntimeError, match="closed"):
        host.open()


def test_closing_finishes_what_was_submitted(stepper: Callable[..., HostStepper]) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, reference = (HybridAdam(of, lr=0.1) for of in (ours, theirs))
    with stepper(optimizer) as host:
        run(host, ours, gradients(ours))
    torchs_step(reference, [*gradients(ours)])
    assert_equal(optimizer, reference)


def test_a_forgotten_stepper_ends_its_threads(stepper: Callable[..., HostStepper]) -> None:
    before = set(threading.enumerate())
    ours = parameters()
    run(HostStepper(HybridAdam(ours), threads=1, compiled=False), ours, gradients(ours))
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_gradients_are_let_go_of_when_they_are_done(stepper: Callable[..., HostStepper]) -> None:
    ours = parameters()
    host = stepper(HybridAdam(ours))
    given = gradients(ours)
    gone = [threading.Event() for _ in given]
    for gradient, event in zip(given, gone, strict=True):
        weakref.finalize(gradient, event.set)
    ticket = run(host, ours, given)
    del given, gradient
    ticket.wait()
    # The threads forget an item a moment after they have reported it, and need no other item for that.
    assert all(event.wait(10.0) for event in gone)


def test_half_a_step_cannot_be_read_or_followed(stepper: Callable[..., HostStepper]) -> None:
    ours = parameters()
    host = stepper(HybridAdam(ours))
    ticket = host.open()
    with pytest.raises(RuntimeError, match="seal it before weights"):
        host.flush()
    with pytest.raises(RuntimeError, match="still open"):
        host.open()
    ticket.seal()
    host.flush()
    with pytest.raises(RuntimeError, match="sealed"):
        ticket.submit(ours[0], gradients(ours)[0])


def test_wrong_tensors_are_refused_and_change_nothing(stepper: Callable[..., HostStepper]) -> None:
    ours = [
        torch.nn.Parameter(torch.ones(8)),
        torch.nn.Parameter(torch.ones(2, 4)),
        torch.nn.Parameter(torch.ones(8, dtype=torch.float64)),
        torch.nn.Parameter(torch.ones(16)[::2]),
        torch.nn.Parameter(torch.ones(8, device="meta")),
    ]
    optimizer = HybridAdam([ours[0]])
    optimizer.param_groups[0]["params"] = ours
    gradient = torch.ones(8)
    with stepper(optimizer).open() as ticket:
        for wrong in ours[1:]:
            with pytest.raises(ValueError, match="the parameter must be"):
                ticket.submit(wrong, gradient)
        for bad in (torch.ones(7), torch.ones(8).double(), torch.ones(16)[::2], torch.ones(8, device="meta")):
            with pytest.raises(ValueError, match="the gradient must be"):
                ticket.submit(ours[0], bad)
            with pytest.raises(ValueError, match="the output must be"):
                ticket.submit(ours[0], gradient, output=bad)
        with pytest.raises(ValueError, match="no such parameter"):
            ticket.submit(torch.nn.Parameter(torch.ones(8)), gradient)
        assert not optimizer.state
        optimizer.state[ours[0]] = {"step": torch.tensor(2.0), "exp_avg": torch.ones(8), "exp_avg_sq": torch.ones(3)}
        with pytest.raises(ValueError, match="the state exp_avg_sq must be"):
            ticket.submit(ours[0], gradient)
        assert optimizer.state.pop(ours[0])["step"] == 2.0
        ticket.submit(ours[0], gradient)
        with pytest.raises(RuntimeError, match="already"):
            ticket.submit(ours[0], gradient)


class OwnStep(HybridAdam):
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        pass


def test_other_optimizers_are_refused() -> None:
    one = [torch.nn.Parameter(torch.ones(4))]
    for optimizer in (torch.optim.SGD(one), torch.optim.NAdam(one), OwnStep(one)):
        with pytest.raises(ConfigError, match=f"steps Adam and AdamW, not {type(optimizer).__name__}: take HybridAdam"):
            HostStepper(optimizer, threads=1, compiled=False)
    with pytest.raises(ConfigError, match="no amsgrad=True"):
        HostStepper(torch.optim.AdamW(one, amsgrad=True), threads=1, compiled=False)
    with pytest.raises(ConfigError, match="at least 1 thread"):
        HostStepper(HybridAdam(one), threads=0, compiled=False)


def test_a_variant_that_comes_later_is_refused(stepper: Callable[..., HostStepper]) -> None:
    optimizer = torch.optim.AdamW(parameters())
    host = stepper(optimizer)
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ConfigError, match="amsgrad"):
        host.open()


def test_a_scheduler_and_a_step_before_do_not_disguise_an_optimizer(stepper: Callable[..., HostStepper]) -> None:
    ours = parameters()
    optimizer = torch.optim.AdamW(ours)
    # Both wrap `step`.
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    torchs_step(optimizer, [*gradients(ours)])
    run(stepper(optimizer), ours, gradients(ours)).wait()
    assert optimizer.state[ours[0]]["step"] == 2.0


def test_learning_rates_may_be_tensors(stepper: Callable[..., HostStepper]) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = torch.optim.AdamW(ours, lr=torch.tensor(0.25), fused=True)
    reference = torch.optim.AdamW(theirs, lr=0.25, fused=True)
    run(stepper(optimizer), ours, gradients(ours)).wait()
    torchs_step(reference, [*gradients(ours)])
    assert_equal(optimizer, reference)


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"), [(1, 1, 1), (2, 1, 1), (4, 1, 2), (16, 1, 14), (16, 4, 2), (16, 16, 1), (192, 8, 22)]
)
def test_cores_are_left_to_the_loop(cores: int, ranks: int, threads: int) -> None:
    assert stepper_threads(cores, ranks=ranks) == threads


def test_threads_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_stepper, "usable_cores", lambda: 5)
    with HostStepper(HybridAdam(parameters()), compiled=False) as host:
        assert host.threads == 3
        assert isinstance(host._worker.kernel, TorchKernel)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_that_was_forked_leaves_the_stepper_alone() -> None:
    # As workers of a DataLoader are, in which the threads do not run: to wait for them would be to wait for ever.
    mine = parameters((64,))
    stepper = HostStepper(HybridAdam(mine))
    with stepper.open() as ticket:
        ticket.submit(mine[0], gradients(mine)[0])
    stepper.flush()
    child = os.fork()
    if child == 0:
        del stepper
        gc.collect()
        os._exit(0)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)
    # It goes on here.
    with stepper.open() as ticket:
        ticket.submit(mine[0], gradients(mine)[0])
    stepper.close()
