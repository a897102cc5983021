"""A case in this process: every recipe, with an adapter too, ours and plain beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from albireo.bench.case import Case, CaseResult
from albireo.bench.measure import measure
from albireo.bench.worker import run_case


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """A case's process is its own, and this one is not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_ours_and_plain_begin_alike_on_instructions_models(adapter: str) -> None:
    results = [
        run_case(
            Case(
                recipe="gpt2",
                system=system,
                model="tiny",
                adapter=adapter,
                batch_size=2,
                precision="fp32",
                sequence_length=16,
                steps=2,
                warmup=1,
            )
        )
        for system in ("albireo", "plain")
    ]
    ours, plain = results
    assert (ours.status, plain.status) == ("ok", "ok"), results
    # The same weights and the same tokens.
    assert ours.first_loss == pytest.approx(plain.first_loss, rel=1e-5)
    assert ours.last_loss == pytest.approx(plain.last_loss, rel=1e-2)
    assert ours.row()["adapter"] == adapter


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_ours_and_plain_begin_alike_on_pictures(adapter: str) -> None:
    ours, plain = (
        run_case(
            Case(
                recipe="vit",
                system=system,
                model="tiny",
                adapter=adapter,
                batch_size=4,
                precision="fp32",
                steps=2,
                warmup=1,
            )
        )
        for system in ("albireo", "plain")
    )
    assert (ours.status, plain.status) == ("ok", "ok"), (ours, plain)
    # The same weights and the same pictures.
    assert ours.first_loss == pytest.approx(plain.first_loss, rel=1e-5)
    assert ours.last_loss == pytest.approx(plain.last_loss, rel=3e-2)
    assert (ours.tokens_per_second, ours.model_tflops) == (None, None)
    assert ours.samples_per_second


def test_of_gemini_it_is_seen_how_memory_moves() -> None:
    # In a process of its own: others fork, and a process whose threads have computed must not.
    case = Case("gemini_offload", "tiny", batch_size=2, precision="fp32", sequence_length=16, steps=4, warmup=1)
    result = measure(case)
    assert (result.status, result.error) == ("ok", "")
    assert result.moved_bytes
    seconds = [moment[0] for moment in result.memory_over_step]
    assert 2 < len(seconds) <= 240
    assert seconds == sorted(seconds)
    assert all(host > 2**26 for _, _, host in result.memory_over_step)
    # Too short a run has no step to look at.
    assert measure(dataclasses.replace(case, steps=1)).memory_over_step == []


def over_two_ranks(system: str) -> CaseResult:
    case = Case(
        system, "tiny", batch_size=2, precision="fp32", sequence_length=16, steps=2, warmup=1, tf32=False, gpus=2
    )
    result = run_case(case)
    assert (result.status, result.error) == ("ok", "")
    assert result.step_seconds is not None
    # Of both ranks together.
    assert result.samples_per_second == pytest.approx(4 / result.step_seconds)
    assert result.tokens_per_second == pytest.approx(64 / result.step_seconds)
    assert result.row()["gpus"] == 2
    return result


def test_ranks_share_the_very_batches_that_references_have() -> None:
    ours, theirs = over_two_ranks("low_level_zero"), over_two_ranks("ddp")
    # The main rank's micro-batch of the first step, and after steps on the gradients of both.
    assert theirs.last_loss == pytest.approx(ours.last_loss, abs=0.3)
    assert theirs.model_tflops
    assert ours.model_tflops


@pytest.mark.full
@pytest.mark.parametrize("system", ["fsdp2", "accelerate", "torch_fsdp", "gemini"])
def test_each_system_runs_over_two_ranks(system: str) -> None:
    over_two_ranks(system)


def test_what_is_wrong_on_ranks_is_a_row_too() -> None:
    case = Case("ddp", "nosuch", batch_size=2, precision="fp32", sequence_length=16, steps=2, warmup=1, gpus=2)
    result = run_case(case)
    assert result.status == "failed"
    assert "there is no model 'nosuch'" in result.error
