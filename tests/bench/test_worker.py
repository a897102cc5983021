"""A case in this process: every recipe, with an adapter too, ours and plain beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from albireo.bench.case import Case
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
