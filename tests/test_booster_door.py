"""Scripts of users' own, on one rank and two: the names that scripts use, both styles of a loop, exact means."""

from __future__ import annotations

import hashlib
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_models import small_opt
from torch import nn
from transformers import OPTForCausalLM

from albireo import Booster, DistCoordinator, HybridAdam, TorchDDPPlugin
from albireo.distributed import World
from albireo.distributed.launch import rank_environment
from albireo.errors import ConfigError
from albireo.optim import ScaledOptimizer
from albireo.plugins import ModelWrapper

ALONE = World(0, 1, 0, torch.device("cpu"))
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

Run = Callable[..., list[Any]]


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def run_case(request: pytest.FixtureRequest) -> Run:
    """Run a case alone in this process, or on two ranks."""

    def run(case: Callable[..., Any], **arguments: Any) -> list[Any]:
        if request.param == 1:
            return [case(ALONE, **arguments)]
        return request.getfixturevalue("two_ranks").run(case, **arguments)

    return run


def digest(tensors: Any) -> str:
    return hashlib.sha256(b"".join(tensor.detach().cpu().numpy().tobytes() for tensor in tensors)).hexdigest()


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(3, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))


def script_case(world: World, *, folder: str, precision: str) -> dict[str, Any]:
    """A script as it is written for the API: nothing in it is named otherwise."""
    coordinator = DistCoordinator()
    rows = torch.randn(32, 3, generator=torch.Generator().manual_seed(1))
    dataset = torch.utils.data.TensorDataset(rows, (rows[:, 0] > 0).long() + 2 * (rows[:, 1] > 0).long())

    def build() -> Any:
        plugin = TorchDDPPlugin(
            broadcast_buffers=True, bucket_cap_mb=25, find_unused_parameters=False, gradient_as_bucket_view=True
        )
        booster = Booster(mixed_precision=precision, plugin=plugin)
        dataloader = plugin.prepare_dataloader(dataset, batch_size=4, shuffle=True, drop_last=True, seed=3)
        model = network()
        optimizer = HybridAdam(model.parameters(), lr=3e-2, weight_decay=0.01)
        lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)
        boosted = booster.boost(model, optimizer, nn.CrossEntropyLoss(), dataloader, lr_scheduler)
        assert len(boosted) == 5
        return booster, *boosted

    def epoch(made: Any, number: int) -> list[float]:
        booster, model, optimizer, criterion, dataloader, lr_scheduler = made
        dataloader.sampler.set_epoch(number)
        losses = []
        for index, (inputs, labels) in enumerate(dataloader):
            last = index % 2 == 1
            with nullcontext() if last else booster.no_sync(model, optimizer):
                loss = criterion(model(inputs), labels)
                booster.backward(loss / 2, optimizer)
            if last:
                optimizer.clip_grad_by_norm(1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        assert 0.0 < optimizer.get_grad_norm() < float("inf")
        return losses

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = build()
        losses = [loss for number in range(4) for loss in epoch(made, number)]
        booster, model, optimizer, _, _, lr_scheduler = made
        booster.save_model(model, f"{folder}/model", shard=True)
        booster.save_optimizer(optimizer, f"{folder}/optimizer", shard=True)
        booster.save_lr_scheduler(lr_scheduler, f"{folder}/lr_scheduler")
        coordinator.block_all()
        other = build()
        booster, model, optimizer, _, _, lr_scheduler = other
        booster.load_model(model, f"{folder}/model")
        booster.load_optimizer(optimizer, f"{folder}/optimizer")
        booster.load_lr_scheduler(lr_scheduler, f"{folder}/lr_scheduler")
        for one in (made, other):
            epoch(one, 9)
    return {
        "losses": losses,
        "made": digest(made[1].parameters()),
        "other": digest(other[1].parameters()),
        "rates": [one[5].get_last_lr() for one in (made, other)],
        "precision": [booster.plugin.precision, isinstance(optimizer, ScaledOptimizer)],
    }


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_script_of_the_api_trains_saves_and_goes_on(run_case: Run, tmp_path: Path, precision: str) -> None:
    results = run_case(script_case, folder=str(tmp_path), precision=precision)
    for result in results:
        assert sum(result["losses"][-4:]) < 0.7 * sum(result["losses"][:4])
        assert result["made"] == result["other"] == results[0]["made"]
        assert result["rates"][0] == result["rates"][1]
        assert result["precision"] == [precision, precision == "fp16"]


def tiny_opt() -> OPTForCausalLM:
    return small_opt(vocab_size=29, max_position_embeddings=10)


def ragged(rank: int, micro_batch: int) -> dict[str, torch.Tensor]:
    """Texts of which much or little counts; of one micro-batch nothing at all."""
    generator = torch.Generator().manual_seed(10 * rank + micro_batch)
    ids = torch.randint(0, 29, (2 + rank, 10), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < (0.1, 0.8, 1.1)[micro_batch], -100, ids)
    return {"input_ids": ids, "labels": labels}


def plain_hugging_face_case(world: World, *, style: str) -> dict[str, Any]:
    """One SGD step of rate 1: what the weights change by is the gradient."""
    model = tiny_opt()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    booster = Booster()
    boosted, optimizer, *_ = booster.boost(model, inner)
    mine = [ragged(world.rank, number) for number in range(3)]
    if style == "counted":
        output = booster.train_step(boosted, optimizer, mine)
    else:
        tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in mine]
        output = booster.train_step(boosted, optimizer, mine, tokens)
    total = world.sum_in_place(torch.tensor([output.loss_sum.item(), output.tokens], dtype=torch.float64))
    # By hand, in one process: all texts of all ranks, summed, and divided once.
    plain = tiny_opt()
    loss, count = torch.zeros(()), 0
    for rank in range(world.world_size):
        for number in range(3):
            batch = ragged(rank, number)
            logits = plain(input_ids=batch["input_ids"]).logits[:, :-1].reshape(-1, 29)
            labels = batch["labels"][:, 1:].reshape(-1)
            loss = loss + F.cross_entropy(logits, labels, reduction="sum")
            count += int((labels != -100).sum())
    (loss / count).backward()
    worst = 0.0
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert theirs.grad is not None
            worst = max(worst, ((theirs - ours - theirs.grad).norm() / (theirs.grad.norm() + 1e-2)).item())
    return {
        "worst": worst,
        "count": [total[1].item(), count],
        "loss": [total[0].item(), loss.item()],
        "mean": [output.loss.item(), output.loss_sum.item() / output.tokens],
        "digest": digest(model.parameters()),
    }


@pytest.mark.parametrize("style", ["counted", "given"])
def test_a_plain_models_mean_is_exact_over_ragged_micro_batches(run_case: Run, style: str) -> None:
    results = run_case(plain_hugging_face_case, style=style)
    for result in results:
        assert result["worst"] < 1e-5  # a mean of means comes to 1e-1
        assert result["count"][0] == result["count"][1]
        assert result["loss"][0] == pytest.approx(result["loss"][1], rel=1e-6)
        assert result["mean"][0] == pytest.approx(result["mean"][1])
        assert result["digest"] == results[0]["digest"]


def criterion_case(world: World) -> dict[str, Any]:
    """Classes with a criterion of torch's, ragged over ranks and micro-batches; one mapping stands for a list of one."""
    differences = []
    for criterion in (F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")):
        for micro_batches in (1, 2):
            model, plain = network(), network()
            booster = Booster()
            boosted, optimizer, *_ = booster.boost(model, torch.optim.SGD(model.parameters(), lr=1.0), criterion)
            parts = {
                (rank, number): torch.randn(
                    2 + 3 * rank + number, 3, generator=torch.Generator().manual_seed(rank + 7 * number)
                )
                for rank in range(world.world_size)
                for number in range(micro_batches)
            }
            batches = [
                {"input": rows, "labels": torch.arange(len(rows)) % 4}
                for (rank, _), rows in parts.items()
                if rank == world.rank
            ]
            given = batches[0] if micro_batches == 1 else batches
            output = booster.train_step(boosted, optimizer, given, max_norm=0.0)
            assert output.tokens == sum(len(batch["input"]) for batch in batches)
            assert all("labels" in batch for batch in batches), "the caller's own mapping was changed"
            inputs = torch.cat(list(parts.values()))
            labels = torch.cat([torch.arange(len(rows)) % 4 for rows in parts.values()])
            F.cross_entropy(plain(inputs), labels).backward()
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                assert theirs.grad is not None
                differences.append((theirs - ours - theirs.grad).abs().max().item())
    return {"worst": max(differences)}


def test_a_criterions_mean_is_exact_too(run_case: Run) -> None:
    for result in run_case(criterion_case):
        assert result["worst"] < 1e-6


def test_a_criterion_computes_in_the_plugins_precision() -> None:
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        booster = Booster(mixed_precision=precision, world=ALONE)
        model, _, criterion, *_ = booster.boost(network(), None, F.cross_entropy)
        outputs = model(torch.randn(2, 3))
        assert outputs.dtype == dtype
        assert criterion(outputs, torch.tensor([1, 2])).dtype == torch.float32


def test_what_train_step_cannot_use_is_named() -> None:
    booster = Booster(world=ALONE)
    model = network()
    boosted, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    rows, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ConfigError, match="shape \\(2, 4\\): a scalar is needed"):
        booster.train_step(boosted, optimizer, {"input": rows})
    with pytest.raises(ConfigError, match="a mapping of the forward's arguments, not a Tensor"):
        booster.train_step(boosted, optimizer, [rows, labels])  # type: ignore[list-item]
    boosted, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()), F.cross_entropy)
    with pytest.raises(ConfigError, match="the criterion needs labels, and the batch has only input"):
        booster.train_step(boosted, optimizer, {"input": rows})
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Booster(TorchDDPPlugin()), r"Booster\(plugin=...\)"),  # type: ignore[arg-type]
        (lambda: Booster(mixed_precision="fp8"), "precision is one of fp32, fp16, bf16, not 'fp8'"),
        (lambda: Booster(mixed_precision="fp16", plugin=TorchDDPPlugin(precision="bf16")), "give one of them"),
        (lambda: Booster(device="cuda:77"), "not on cuda:77"),
        (lambda: Booster().no_sync(), r"booster.no_sync\(model\)"),
        (lambda: Booster().execute_pipeline(iter([]), None, None, return_loss=True), "booster.train_step"),
    ],
)
def test_what_is_not_there_is_refused_with_an_alternative(build: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build()


def test_a_precision_may_be_said_twice_alike() -> None:
    plugin = TorchDDPPlugin(precision="bf16")
    assert Booster(mixed_precision="bf16", plugin=plugin).plugin is plugin
    assert Booster().plugin.precision == "fp32"
    assert Booster(device="cpu").world.device.type == "cpu"
    chosen = TorchDDPPlugin()
    Booster(mixed_precision="fp16", plugin=chosen)
    assert chosen.precision == "fp16"
    with pytest.raises(ConfigError, match="precision 'fp16'"):
        Booster(mixed_precision="bf16", plugin=chosen)


def test_what_is_boosted_is_not_boosted_again() -> None:
    booster = Booster(world=ALONE)
    model = network()
    boosted, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    assert isinstance(boosted, ModelWrapper)
    for again in (lambda: booster.boost(boosted), lambda: booster.boost(model, optimizer)):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="boosted already"):
            again()


def frozen_case(world: World) -> list[int]:
    """A model of which nothing is trained, such as a teacher."""
    model = network()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    boosted, optimizer, *_ = Booster().boost(model)
    assert optimizer is None
    return list(boosted(torch.zeros(2, 3)).shape)


def test_a_model_of_which_nothing_is_trained_can_be_boosted(run_case: Run) -> None:
    assert all(shape == [2, 4] for shape in run_case(frozen_case))


def test_values_that_are_no_tensors_go_to_the_model() -> None:
    seen: list[Any] = []

    class Note(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, rows: torch.Tensor, note: str, *, flag: bool) -> SimpleNamespace:
            seen.append((note, flag))
            return SimpleNamespace(loss=self.layer(rows).mean())

    booster = Booster(world=ALONE)
    model = Note()
    boosted, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    output = booster.train_step(boosted, optimizer, {"rows": torch.ones(5, 3), "note": "a", "flag": True})
    assert (seen, output.tokens) == ([("a", True)], 5)


RUN = """
import os, runpy, sys
for path, port in zip(sys.argv[1::2], sys.argv[2::2]):
    os.environ["MASTER_PORT"] = port
    runpy.run_path(path)
"""


@pytest.fixture
def same_random_state() -> Any:
    from albireo.device import capture_random_state, restore_random_state

    state = capture_random_state(torch.device("cpu"))
    yield
    restore_random_state(state, torch.device("cpu"))


@pytest.mark.usefixtures("same_random_state")
def test_the_examples_run_on_one_rank_and_on_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = [EXAMPLES / "own_loop.py", EXAMPLES / "own_loop_by_hand.py"]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    # Ranks meet where a launcher would have them meet: at a port that is open already.
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in examples]
    places = [word for path, store in zip(examples, stores, strict=True) for word in (str(path), str(store.port))]
    met = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w") as said:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RUN, *places],
                cwd=tmp_path / "two",
                stdout=said,
                env={**rank_environment(rank, 2, os.environ), **met},
            )
            for rank in range(2)
        ]
    monkeypatch.chdir(tmp_path / "one")
    for path in examples:
        runpy.run_path(str(path))
    alone = capsys.readouterr().out
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    for text in (alone, (tmp_path / "said").read_text()):
        lines = text.splitlines()
        assert len(lines) == 5, text
        assert float(lines[3].rpartition(" ")[2]) < 0.3
        assert lines[4] in {f"right: {percent}%" for percent in range(95, 101)}
    for name in ("model", "by_hand"):
        one, two = (load_file(tmp_path / folder / "circle" / f"{name}.safetensors") for folder in ("one", "two"))
        # Two ranks of half the batch see the same samples in the same steps.
        assert all(torch.allclose(one[key], two[key], atol=1e-3 if name == "model" else 1e-1) for key in one)
