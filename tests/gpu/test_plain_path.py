"""The plain path on a GPU: right numbers, no waiting, memory under its cap, one line when it runs out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers.masking_utils

from albireo.booster import Booster
from albireo.data import RandomTokens
from albireo.distributed import join_world
from albireo.models import build_model, configure_model, resolve_model
from albireo.ops import linear_cross_entropy
from albireo.optim import adamw, decay_groups
from albireo.plugins import TorchDDPPlugin
from albireo.training.causal_lm import CausalLanguageModel

pytestmark = pytest.mark.gpu

RUN = [sys.executable, "-m", "albireo", "train", "opt", "--eval-every", "0", "--save-every", "0"]


def albireo(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, "--cache", str(cache), *arguments], capture_output=True, text=True, check=False)


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_the_loss_in_pieces_is_the_loss(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 300, 64, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(5003, 64, device="cuda", dtype=dtype) * 0.1).requires_grad_()
    labels = torch.randint(0, 5003, (3, 300), device="cuda")
    labels[:, ::7] = -100
    loss, count = linear_cross_entropy(hidden, weight, labels, shift=True, piece_rows=256)
    loss.backward()
    wide_hidden, wide_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = (wide_hidden @ wide_weight.T)[:, :-1].reshape(-1, 5003)
    expected = F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
    expected.backward()
    assert count.item() == (labels[:, 1:] != -100).sum().item()
    assert loss.item() == pytest.approx(expected.item(), rel=bound)
    for ours, theirs in ((hidden.grad, wide_hidden.grad), (weight.grad, wide_weight.grad)):
        assert ours is not None
        assert theirs is not None
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < bound


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_device(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers 5.17 makes a mask of ones for OPT and then asks the device whether it is one; later ones do not.
    monkeypatch.setattr(transformers.masking_utils, "fast_all", lambda _: True, raising=False)
    world = join_world(single=True)
    choice = resolve_model("tiny")
    config, _ = configure_model(choice, init="random")
    model = build_model(choice, config, init="random", seed=0, device=world.device)
    optimizer = adamw(decay_groups(model.named_parameters(), 0.01), 1e-3)
    booster = Booster(plugin=TorchDDPPlugin(precision=precision), world=world)
    boosted, wrapped, *_ = booster.boost(CausalLanguageModel(model, choice.family), optimizer)
    assert wrapped is not None
    ids = torch.stack([row["input_ids"] for row in RandomTokens(4, 64, 4096, 0).__getitems__(range(4))]).pin_memory()

    def step() -> torch.Tensor:
        batch = {"input_ids": ids, "labels": ids}
        return booster.train_step(boosted, wrapped, [batch, batch], [252, 252], max_norm=1.0).loss_sum

    first = step()
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        last = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert last.item() < first.item()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_learns_and_counts_its_memory(precision: str, tmp_path: Path) -> None:
    done = albireo("--steps", "40", "--precision", precision, "--output", str(tmp_path / "run"), cache=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"] - 1.0
    assert all(row["device_peak_bytes"] > 2**22 for row in rows)
    assert all(1e-5 < row["step_seconds"] < 60 for row in rows)


def test_a_resumed_run_goes_on_as_one_that_never_stopped(tmp_path: Path) -> None:
    common = ["--precision", "bf16", "--save-every", "5", "--schedule", "constant"]
    straight = albireo(*common, "--steps", "10", "--output", str(tmp_path / "straight"), cache=tmp_path)
    assert straight.returncode == 0, straight.stderr
    assert albireo(*common, "--steps", "5", "--output", str(tmp_path / "two"), cache=tmp_path).returncode == 0
    again = [*RUN[:5], "--resume", str(tmp_path / "two"), "--steps", "10"]
    assert subprocess.run(again, capture_output=True, check=False).returncode == 0
    for ours, theirs in zip(rows_of(tmp_path / "two"), rows_of(tmp_path / "straight"), strict=True):
        # Kernels of attention's backward add in no fixed order on a GPU; beyond that, nothing differs.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["lr"] == pytest.approx(theirs["lr"], rel=1e-9) or ours["step"] <= 5


CAPPED = """
import json, sys
import torch
from pathlib import Path
from albireo.distributed import join_world
from albireo.training.plan import plan_run
from albireo.training.start import resolved_config, train_on_rank
options = dict(model="125m", init="random", data="random", precision="bf16", batch_size=16, steps=4, mem_cap=6.0,
               eval_every=0, save_every=0, checkpointing=True)
plan = plan_run(recipe="opt", options=options, output=Path(sys.argv[1]))
train_on_rank(resolved_config(plan), plan.make_folder(), join_world(single=True), export_model=False)
free, total = torch.cuda.mem_get_info()
print("free", free)
"""


def test_a_cap_holds_by_the_drivers_own_count(tmp_path: Path) -> None:
    # What this process has on the device is not the run's.
    before, _ = torch.cuda.mem_get_info()
    done = subprocess.run(
        [sys.executable, "-c", CAPPED, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    used = before - int(done.stdout.strip().splitlines()[-1].split()[1])
    print(f"the driver counts {used / 2**30:.2f} GB under a cap of 6 GB")
    assert 2**30 < used <= 6 * 2**30


def test_running_out_of_memory_is_one_line_that_helps(tmp_path: Path) -> None:
    options = ["--model", "125m", "--init", "random", "--data", "random", "--batch-size", "64", "--mem-cap", "6"]
    done = albireo(*options, "--steps", "3", "--output", str(tmp_path / "run"), cache=tmp_path)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    print(line)
    assert line.startswith("albireo: out of memory on NVIDIA")
    assert "activations" in line
    assert "--checkpointing" in line
    assert "Traceback" not in done.stderr


def test_what_cannot_fit_is_refused_at_once(tmp_path: Path) -> None:
    done = albireo("--model", "66b", "--init", "random", "--output", str(tmp_path / "run"), cache=tmp_path)
    assert done.returncode == 2
    assert "16 bytes for each of 65,7" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_follow_one(tmp_path: Path) -> None:
    common = ["--precision", "fp32", "--no-tf32", "--steps", "10"]
    one = albireo(*common, "--batch-size", "8", "--output", str(tmp_path / "one"), cache=tmp_path)
    assert one.returncode == 0, one.stderr
    two = albireo(*common, "--batch-size", "4", "--gpus", "2", "--output", str(tmp_path / "two"), cache=tmp_path)
    assert two.returncode == 0, two.stderr
    for ours, theirs in zip(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"), strict=True):
        # Products of 8 and of 4 rows take different kernels, and Adam makes whole steps of their rounding.
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)


def test_more_gpus_than_there_are_is_refused(tmp_path: Path) -> None:
    many = torch.cuda.device_count() + 1
    done = albireo("--gpus", str(many), "--output", str(tmp_path / "run"), cache=tmp_path)
    assert done.returncode == 2
    assert f"--gpus {many} asks for more than this machine has" in done.stderr
