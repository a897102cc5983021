"""Gemini where something goes wrong, and where somebody reads while steps are under way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from gemini_runs import ALONE, Boosted, LateKernel, boosted, gemini, groups, late_and_alone, least_bytes, left, train
from gemini_zoo import KINDS, WIDTH, Blocks, built
from torch import nn

from albireo.booster import Booster
from albireo.checkpoint import tensor_names
from albireo.errors import ConfigError, OutOfMemoryError
from albireo.memory import Gemini
from albireo.optim import HybridAdam, host_stepper
from albireo.optim.host_step import HostStep
from albireo.plugins import GeminiPlugin, ModelWrapper, Plugin, TorchDDPPlugin

AWAY: dict[str, Any] = {"offload_optim_frac": 1.0, "offload_param_frac": 1.0}
WAYS: dict[str, dict[str, Any]] = {
    "away": AWAY,
    "away without prefetch": {**AWAY, "max_prefetch": 0},
    "half": {"offload_optim_frac": 0.5, "offload_param_frac": 0.5},
    "auto": {},
    "auto under a cap": {"mem_cap_bytes": 26_000},
}


@pytest.fixture(autouse=True)
def _late() -> Iterator[None]:
    with late_and_alone():
        yield


class Fails(torch.autograd.Function):
    """Passes a tensor through, and fails in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004  torch's signature
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG004  torch's signature
        raise ValueError("planted")


def fail(*_: Any) -> None:
    raise ValueError("planted")


def plant(part: nn.Module, when: str) -> Any:
    if when == "forward":
        return part.register_forward_pre_hook(fail)
    return part.register_forward_hook(lambda *call: Fails.apply(call[-1]))


@pytest.mark.parametrize("where", ["blocks.0", "blocks.2", "blocks.3.down", "head"])
@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_fails_in_the_middle_leaves_nothing(way: str, when: str, where: str) -> None:
    wanted = boosted(TorchDDPPlugin(), "plain")
    numbers = train(wanted, "plain", range(4), 2, 0.5)
    run = boosted(gemini(**WAYS[way]), "plain")
    found = [train(run, "plain", range(1), 2, 0.5)]
    for step in range(1, 4):
        before = left(run)
        handle = plant(run[1].unwrap().get_submodule(where), when)
        with pytest.raises(ValueError, match="planted"):
            train(run, "plain", range(7, 8), 2, 0.5)
        handle.remove()
        assert left(run) == before
        found.append(train(run, "plain", range(step, step + 1), 2, 0.5))
    assert [pair for part in found for pair in part] == numbers
    assert left(run) == left(wanted)


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("way", WAYS)
def test_a_first_step_that_fails_is_watched_again(way: str, when: str) -> None:
    wanted = boosted(TorchDDPPlugin(), "plain")
    numbers = train(wanted, "plain", range(3), 1, 0.5)
    run = boosted(gemini(**WAYS[way]), "plain")
    handle = plant(run[1].unwrap().get_submodule("blocks.2"), when)
    with pytest.raises(ValueError, match="planted"):
        train(run, "plain", range(7, 8), 1, 0.5)
    handle.remove()
    assert train(run, "plain", range(3), 1, 0.5) == numbers
    assert left(run) == left(wanted)


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("way", WAYS)
def test_a_loop_of_the_users_own_goes_on_after_a_failure(way: str, when: str) -> None:
    """It forgets the gradients, and takes another batch."""

    def step(run: Boosted, number: int) -> None:
        booster, model, optimizer = run
        booster.backward(model(**KINDS["plain"].batch(number, 0, 0))[0] / 16, optimizer)
        optimizer.step()
        optimizer.zero_grad()

    wanted, run = boosted(TorchDDPPlugin(), "plain"), boosted(gemini(**WAYS[way]), "plain")
    for number in range(4):
        step(wanted, number)
        handle = plant(run[1].unwrap().get_submodule("blocks.2"), when)
        with pytest.raises(ValueError, match="planted"):
            step(run, 7)
        run[2].zero_grad()
        handle.remove()
        step(run, number)
    assert left(run) == left(wanted)


def test_a_forward_without_a_backward_leaves_nothing() -> None:
    wanted = boosted(TorchDDPPlugin(), "plain")
    train(wanted, "plain")
    for way, options in WAYS.items():
        run = boosted(gemini(**options), "plain")
        for number in range(3):
            run[1](**KINDS["plain"].batch(9, 0, 0))  # with gradients, which nobody asks for
            train(run, "plain", range(number, number + 1))
        assert left(run) == left(wanted), way


class Keeps(nn.Module):
    """A block that leaves what it computes in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = self.layer(x)
        return x


class Aside(Blocks):
    """Reads it there."""

    def middle(self, x: torch.Tensor, branch: bool) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
            if isinstance(block, Keeps):
                x = x + block.kept
        return x


@pytest.mark.parametrize("way", WAYS)
def test_outputs_that_are_kept_as_attributes_are_a_clear_error_or_right(way: str) -> None:
    def trained(plugin: Plugin) -> list[tuple[float, float]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Aside()
            model.blocks[2] = Keeps()
        booster = Booster(plugin=plugin, world=ALONE)
        wrapped, optimizer, *_ = booster.boost(model, HybridAdam(groups(model), lr=1e-2))
        return train((booster, wrapped, optimizer), "plain")

    said = ""
    try:
        # The weights may be there by chance.
        assert trained(gemini(**WAYS[way])) == trained(TorchDDPPlugin())
    except RuntimeError as error:
        said = str(error)
    assert re.search(r"backward of blocks\.2 .*what its forward returns", said) or (
        not said and way != "away without prefetch"
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_somebody_else_wrote_moved_or_replaced_is_refused(way: str, precision: str) -> None:
    def written(model: nn.Module) -> None:
        with torch.no_grad():
            model.head.weight.mul_(2)

    def replaced(model: nn.Module) -> None:
        model.blocks[1].up.weight.data = torch.zeros_like(model.blocks[1].up.weight)

    def loaded(model: nn.Module) -> None:
        model.load_state_dict({name: torch.zeros(t.shape) for name, t in model.state_dict().items()})

    changes: list[tuple[Callable[[nn.Module], object], str]] = [
        (written, "written to"),
        (lambda model: model.double(), "left its place"),
        (replaced, "left its place"),
        (loaded, "written to"),
    ]
    for change, words in changes:
        for between_steps in (False, True):
            run = booster, model, optimizer = boosted(gemini(precision=precision, **WAYS[way]), "plain")
            train(run, "plain", range(2))
            if not between_steps:
                booster.backward(model(**KINDS["plain"].batch(2, 0, 0))[0], optimizer)

            def change_and_go_on() -> None:
                change(model.unwrap())  # noqa: B023  called at once
                if between_steps:  # noqa: B023
                    train(run, "plain", range(2, 3))  # noqa: B023
                else:
                    optimizer.step()  # noqa: B023

            # What is away cannot even be written to.
            with pytest.raises(RuntimeError, match=rf"{words}|more than one element of the written-to tensor"):
                change_and_go_on()


def test_what_is_away_reads_as_nan() -> None:
    _, model, _ = run = boosted(gemini(**AWAY), "plain")
    train(run, "plain", range(2))
    for parameter in model.unwrap().parameters():
        assert torch.isnan(parameter).all()
    for parameter in run[0].plugin.readable_weights(model):
        assert torch.isfinite(parameter).all()
    for parameter in model.unwrap().parameters():
        assert torch.isnan(parameter).all()


def test_a_backward_through_weights_that_have_been_stepped_is_an_error() -> None:
    for options in WAYS.values():
        booster, model, optimizer = run = boosted(gemini(**options), "plain")
        train(run, "plain", range(2))
        stale, _ = model(**KINDS["plain"].batch(0, 0, 0))
        train(run, "plain", range(1))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            booster.backward(stale, optimizer)


@pytest.mark.parametrize("kind", ["plain", "opt", "twice", "branch", "conv", "gpt2 padded"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_least_that_a_model_needs_does_and_a_byte_less_is_refused(kind: str, prefetch: int) -> None:
    least = least_bytes(kind)
    run = boosted(gemini(mem_cap_bytes=least, max_prefetch=prefetch), kind)
    train(run, kind)
    assert gemini_of(run[1]).manager._pool.peak_bytes <= least
    with pytest.raises(OutOfMemoryError):
        train(boosted(gemini(mem_cap_bytes=least - 1, max_prefetch=prefetch), kind), kind)


class Wide(nn.Module):
    """Tens of megabytes, so that the sizes of messages say something."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(1500, 1500) for _ in range(3))
        self.head = nn.Linear(1500, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for block in self.blocks:
            x = block(x)
        return self.head(x).float().square().sum(), torch.tensor(len(x))


def wide(plugin: GeminiPlugin) -> Boosted:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Wide()
    booster = Booster(plugin=plugin, world=ALONE)
    return booster, *booster.boost(model, HybridAdam(model.parameters(), lr=1e-6))[:2]  # type: ignore[return-value]


def step_of(run: Boosted) -> float:
    booster, model, optimizer = run
    return float(booster.train_step(model, optimizer, {"x": torch.ones(2, 1500)}, 2).loss_sum)


MEGABYTE = 2**20


@pytest.mark.parametrize(
    ("options", "cap", "memory"),
    [
        ({}, "mem_cap_bytes", "device"),
        ({}, "host_cap_bytes", "host"),
        ({"placement_policy": "static"}, "mem_cap_bytes", "device"),
        (AWAY, "mem_cap_bytes", "device"),
        (AWAY, "host_cap_bytes", "host"),
        ({"precision": "bf16"}, "mem_cap_bytes", "device"),
        ({"precision": "bf16", "offload_optim_frac": 1.0}, "host_cap_bytes", "host"),
    ],
)
def test_an_impossible_cap_is_refused_with_the_least_that_does(options: dict[str, Any], cap: str, memory: str) -> None:
    options = {"min_chunk_size_m": 4, **options}
    with pytest.raises(OutOfMemoryError, match=f"{memory} memory") as refused:
        wide(gemini(**options, **{cap: 4 * MEGABYTE}))
    found = re.search(rf"at least ([\d.]+) GB of {memory} memory, and there are 0\.00 GB: raise --", str(refused.value))
    assert found is not None, str(refused.value)
    assert float(found[1]) > 0.0
    run = wide(gemini(**options, **{cap: int(float(found[1]) * 2**30)}))
    assert step_of(run) > step_of(run) > 0.0


def test_both_caps_that_are_too_small_together_are_refused() -> None:
    """What the host has no room for is on the device, and a cap there that would do alone does not."""
    wide(gemini(mem_cap_bytes=40 * MEGABYTE))
    wide(gemini(host_cap_bytes=40 * MEGABYTE))
    with pytest.raises(OutOfMemoryError, match=r"at least .* GB of (host|device) memory, .* raise --"):
        wide(gemini(mem_cap_bytes=40 * MEGABYTE, host_cap_bytes=40 * MEGABYTE))


def test_a_host_without_room_for_states_has_them_on_the_device() -> None:
    run = wide(gemini(host_cap_bytes=80 * MEGABYTE, mem_cap_bytes=80 * MEGABYTE))
    plain = wide(gemini())
    assert [step_of(run) for _ in range(3)] == [step_of(plain) for _ in range(3)]
    inner = gemini_of(run[1])
    assert {chunk.states_place for chunk in inner.chunks} == {"device", "host"}
    assert inner.placement.host_bytes <= 80 * MEGABYTE
    assert inner.placement.device_bytes <= 80 * MEGABYTE


class Broken(LateKernel):
    """Fails at its fifth step."""

    def submit(self, step: HostStep) -> None:
        if self._submitted == 4:
            raise ValueError("planted on the stepper's thread")
        super().submit(step)


@pytest.mark.parametrize("then", ["forward", "flush", "step", "save", "load", "clip"])
def test_an_error_on_the_steppers_thread_is_raised_at_the_next_use(then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_stepper, "choose_kernel", lambda threads, **_: Broken(threads))
    booster, model, optimizer = run = boosted(gemini(**AWAY), "plain")
    names, _ = tensor_names(model.unwrap())
    train(run, "plain", range(1))  # the error is not here
    uses: dict[str, Callable[[], object]] = {
        "forward": lambda: model(**KINDS["plain"].batch(1, 0, 0)),
        "flush": model.flush,  # type: ignore[dict-item]
        "step": optimizer.step,
        "save": lambda: list(booster.plugin.export_state(model, optimizer, names, ALONE)),
        "load": lambda: booster.plugin.import_state(model, optimizer, names, None),  # type: ignore[arg-type]
        "clip": lambda: train(run, "plain", range(1, 2), 1, 0.5),
    }
    if then == "step":
        # Without a gradient there is nothing to step, and so nothing to say.
        with suppress(ValueError):
            booster.backward(model(**KINDS["plain"].batch(1, 0, 0))[0], optimizer)
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError), match=r"planted|half stepped"):
            uses[then]()


@pytest.mark.parametrize("way", ["away", "half"])
def test_what_changes_after_the_step_is_for_the_next_one(way: str) -> None:
    def trained(*, meddle: bool) -> dict[str, str]:
        booster, model, optimizer = run = boosted(gemini(**WAYS[way]), "plain")
        for number in range(3):
            booster.backward(model(**KINDS["plain"].batch(number, 0, 0))[0] / 16, optimizer)
            optimizer.clip_grad_by_norm(0.5)
            before = [dict(group) for group in optimizer.param_groups]
            optimizer.step()
            if meddle:
                # Nothing has been stepped yet on the host.
                for group in optimizer.param_groups:
                    group.update(lr=77.0, weight_decay=3.0, betas=(0.1, 0.2), eps=1.0)
                optimizer.zero_grad()
                assert all(p.grad is None for p in model.unwrap().parameters())
                model.flush()  # type: ignore[operator]
                for group, old in zip(optimizer.param_groups, before, strict=True):
                    group.update({key: value for key, value in old.items() if key != "params"})
            else:
                optimizer.zero_grad()
        return left(run)

    assert trained(meddle=True) == trained(meddle=False)


def test_a_step_goes_on_beside_the_loop() -> None:
    """It has only begun when `step` returns, and readers wait for all of it."""
    readers: dict[str, Callable[[Boosted], object]] = {
        "save": left,
        "weights": lambda run: [p.sum() for p in run[0].plugin.readable_weights(run[1])],
        "flush": lambda run: run[1].flush(),  # type: ignore[operator]
        "forward": lambda run: run[1](**KINDS["plain"].batch(1, 0, 0)),
        "evaluate": lambda run: evaluated(run[1]),
    }
    for name, read in readers.items():
        run = boosted(gemini(**AWAY), "plain")
        train(run, "plain", range(1))
        worker = gemini_of(run[1]).manager.host_steps._stepper._worker  # type: ignore[union-attr]
        assert worker._reported == 0, name
        read(run)
        assert worker._reported == worker._put > 0, name


def evaluated(model: ModelWrapper) -> object:
    with torch.no_grad():
        return model.evaluation_module(**KINDS["plain"].batch(1, 0, 0))


def test_forward_waits_for_what_it_uses_alone() -> None:
    run = boosted(gemini(**AWAY, max_prefetch=0), "plain")
    train(run, "plain", range(1))
    worker = gemini_of(run[1]).manager.host_steps._stepper._worker  # type: ignore[union-attr]
    reported = []
    for block in run[1].unwrap().blocks:
        block.register_forward_hook(lambda *_: reported.append(worker._reported))
    run[1](**KINDS["plain"].batch(1, 0, 0))
    assert reported == sorted(set(reported))
    assert 0 < reported[0] < reported[-1] == worker._put


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"placement_policy": "magic"}, "auto or static, not 'magic'"),
        (
            {"placement_policy": "auto", "offload_optim_frac": 0.5},
            "offload_optim_frac is for placement_policy='static'",
        ),
        ({"offload_param_frac": 1.5}, "offload_param_frac is a share from 0 to 1, not 1.5"),
        ({"shard_param_frac": -0.1}, "shard_param_frac is a share from 0 to 1"),
        ({"precision": "int8"}, "precision is one of"),
        ({"master_weights": False}, "master_weights=True"),
        ({"max_norm": -1.0}, "max_norm"),
        ({"max_prefetch": -1}, "max_prefetch"),
        ({"min_chunk_size_m": 0}, "min_chunk_size_m"),
        ({"mem_cap_bytes": 0}, "mem_cap_bytes is more than 0"),
        ({"host_cap_bytes": -5}, "host_cap_bytes is more than 0"),
        ({"initial_scale": 2.0**40}, "initial_scale"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        GeminiPlugin(**options)


def test_what_cannot_be_sharded_is_refused_before_the_model_changes() -> None:
    model = built("plain")
    with pytest.raises(ConfigError, match="LBFGS"):
        Booster(plugin=GeminiPlugin(), world=ALONE).boost(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ConfigError, match=r"model\.float"):
        Booster(plugin=GeminiPlugin(), world=ALONE).boost(built("plain").double())
    with pytest.raises(OutOfMemoryError, match="at least"):
        boosted(gemini(mem_cap_bytes=1), "plain")
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())


def test_a_model_without_an_optimizer_evaluates() -> None:
    model, plain = built("plain"), built("plain")
    batch = KINDS["plain"].batch(0, 0, 0)
    for options in WAYS.values():
        wrapped, optimizer, *_ = Booster(plugin=gemini(**options), world=ALONE).boost(built("plain"))
        assert optimizer is None
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(wrapped(**batch)[0], plain(**batch)[0])
    del model


def gemini_of(model: ModelWrapper) -> Gemini:
    return model.gemini  # type: ignore[attr-defined, no-any-return]
