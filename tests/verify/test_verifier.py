"""What the verifier takes, refuses and leaves as it was; models, criteria and optimizers of a user's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from albireo.booster import Booster
from albireo.checkpoint import TensorSlice
from albireo.distributed import World
from albireo.errors import AlbireoError, ConfigError
from albireo.plugins import LowLevelZeroPlugin, Plugin, TorchDDPPlugin
from albireo.verify import StepReport, Thresholds, Verifier, verify_step

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)


class Regression(nn.Module):
    """A model with a buffer, and weights of dimensions that divide by nothing."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 2)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        outputs: torch.Tensor = self.second(self.norm(self.first(inputs)))
        return outputs


def build(kind: str = "AdamW", width: int = 7, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Regression(width)
    return model, getattr(torch.optim, kind)(model.parameters(), lr=0.1, **options)


def batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"inputs": torch.randn(5, 3, generator=generator), "labels": torch.randn(5, 2, generator=generator)}


def verify(plugin: Plugin, *, kind: str = "AdamW", world: World = ALONE, **options: Any) -> list[StepReport]:
    booster = Booster(plugin=plugin, world=World(world.rank, world.world_size, 0, CPU))
    model, optimizer, *_ = booster.boost(*build(kind, **options), criterion=nn.MSELoss())
    verifier = Verifier(booster, model, optimizer, lambda: build(kind, **options))
    steps = range(3)
    return [
        verifier.step([[batch(10 * step + rank)] for rank in range(world.world_size)], max_norm=1.0) for step in steps
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("plugin", [TorchDDPPlugin, LowLevelZeroPlugin])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("AdamW", {"fused": True}),
        ("AdamW", {"foreach": True, "amsgrad": True}),
        ("Adam", {"weight_decay": 0.1}),
        ("SGD", {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_a_users_criterion_and_optimizer(plugin: Any, precision: str, kind: str, options: dict[str, Any]) -> None:
    for report in verify(plugin(precision=precision), kind=kind, **options):
        assert report.failures == ()
        assert {parameter.name for parameter in report.parameters} == {
            f"{layer}.{part}" for layer in ("first", "norm", "second") for part in ("weight", "bias")
        }


def test_a_single_step_by_itself() -> None:
    booster = Booster(plugin=TorchDDPPlugin(), world=ALONE)
    model, optimizer, *_ = booster.boost(*build(), criterion=nn.MSELoss())
    report = verify_step(booster, model, optimizer, [[batch(0), batch(1)]], None, build)
    assert report.passed
    assert (report.step, report.loss_scale, report.skipped) == (1, None, False)
    assert report.grad_norm == pytest.approx(report.true_norm)
    assert report.loss == pytest.approx(report.reference_loss)


def test_it_trains_as_without_it() -> None:
    """A step that is watched changes what a step changes, and nothing else."""

    def weights(*, watched: bool) -> list[torch.Tensor]:
        booster = Booster(plugin=LowLevelZeroPlugin(precision="bf16"), world=ALONE)
        model, optimizer, *_ = booster.boost(*build(fused=True), criterion=nn.MSELoss())
        verifier = Verifier(booster, model, optimizer, lambda: build(fused=True))
        for step in range(3):
            if watched:
                verifier.step([[batch(step)]], max_norm=1.0)
            else:
                booster.train_step(model, optimizer, [batch(step)], max_norm=1.0)
        return [tensor.clone() for tensor in model.unwrap().state_dict().values()]

    for mine, plain in zip(weights(watched=True), weights(watched=False), strict=True):
        assert torch.equal(mine, plain)


def test_the_documented_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "verify.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(example, "docs/verify.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["1", "True"], ["2", "True"], ["3", "True"]]


def test_tf32_is_as_it_was() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    seen = []

    class Watching(TorchDDPPlugin):
        def export_gradients(self, *arguments: Any) -> Iterable[TensorSlice]:
            seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
            return super().export_gradients(*arguments)

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        verify(Watching())
        assert set(seen) == {(False, False)}
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (True, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_wrong_arguments_are_refused() -> None:
    booster = Booster(plugin=TorchDDPPlugin(), world=ALONE)
    model, optimizer, *_ = booster.boost(*build(), criterion=nn.MSELoss())
    with pytest.raises(ConfigError, match="micro-batches of all 1 ranks, and got those of 2"):
        Verifier(booster, model, optimizer, build).step([[batch(0)], [batch(1)]])
    with pytest.raises(ConfigError, match="the reference model has no first"):
        Verifier(booster, model, optimizer, lambda: build(width=8)).step([[batch(0)]])
    with pytest.raises(ConfigError, match="precision is one of fp32, fp16, bf16, not 'fp8'"):
        Thresholds.of("fp8")


def failing_reference_case(world: World) -> list[str]:
    """What ranks are told when the main rank cannot judge, and that they can go on."""
    booster = Booster(plugin=LowLevelZeroPlugin(precision="fp32"), world=World(world.rank, world.world_size, 0, CPU))
    model, optimizer, *_ = booster.boost(*build(), criterion=nn.MSELoss())
    micro_batches = [[batch(rank)] for rank in range(world.world_size)]
    said = []

    def broken() -> Any:
        raise RuntimeError("out of everything")

    for factory in (lambda: build(width=8), broken):
        try:
            Verifier(booster, model, optimizer, factory).step(micro_batches)
        except (AlbireoError, RuntimeError) as error:
            said.append(str(error))
    report = Verifier(booster, model, optimizer, build).step(micro_batches)
    return [*said, "passed" if report.passed else str(report.failures[0])]


def test_an_error_on_the_main_rank_reaches_all(two_ranks: Any) -> None:
    first, second = two_ranks.run(failing_reference_case)
    assert first[0].startswith("the reference model has no ")
    assert first[1] == "out of everything"
    assert second[:2] == first[:2]
    assert first[2] == second[2] == "passed"


class Losing(LowLevelZeroPlugin):
    """Exports a slice too few, or one twice."""

    def __init__(self, *, twice: bool) -> None:
        super().__init__(precision="fp32")
        self._twice = twice

    def export_optimizer(self, optimizer: Any, names: Mapping[Any, str], world: World) -> Iterable[TensorSlice]:
        slices = list(super().export_optimizer(optimizer, names, world))
        if world.rank == world.world_size - 1 and slices:
            return [*slices, slices[-1]] if self._twice else slices[:-1]
        return slices


def exports_case(world: World, *, twice: bool) -> list[str]:
    return [str(failure) for report in verify(Losing(twice=twice), world=world) for failure in report.failures]


@pytest.mark.parametrize("twice", [False, True])
def test_exports_that_do_not_make_up_whole_tensors_are_a_failure(two_ranks: Any, twice: bool) -> None:
    for said in two_ranks.run(exports_case, twice=twice):
        # Every step fails; where a whole state is lost, it is missed from the step, or by the next one.
        assert len(said) == 3
        for line in said:
            if twice:
                assert line.startswith("exports: elements 0 to ")
                assert "/optimizer/exp_avg_sq/" in line
                assert "are given twice" in line
            else:
                assert line.startswith(("step of", "exports of"))
