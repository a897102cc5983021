"""How both sides compute while they are compared."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from albireo.errors import AlbireoError
from albireo.verify.comparable import comparable
from albireo.verify.reference import Form

FORM = Form(precision="fp32", compute_form="copy", device=torch.device("cuda"))


def test_sums_are_made_in_a_fixed_order_on_a_gpu_and_what_was_set_comes_back() -> None:
    tf32 = torch.backends.cuda.matmul.allow_tf32
    with comparable(FORM):
        assert torch.are_deterministic_algorithms_enabled()
        # Attention's kernels keep to any order where torch may only warn.
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert torch.backends.cuda.matmul.allow_tf32 == tf32


def test_on_a_cpu_nothing_is_asked_for() -> None:
    with comparable(replace(FORM, device=torch.device("cpu"))):
        assert not torch.are_deterministic_algorithms_enabled()


def test_what_the_user_asked_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        with comparable(FORM):
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(mode=False)


def test_an_operation_without_a_fixed_order_is_one_line_that_names_it() -> None:
    refused = "put_ does not have a deterministic implementation, but you set it\nand more lines"
    with (
        pytest.raises(AlbireoError, match=r"put_ does not have a deterministic implementation.*warn_only=True"),
        comparable(FORM),
    ):
        raise RuntimeError(refused)
    with pytest.raises(RuntimeError, match="something else"), comparable(FORM):
        raise RuntimeError("something else")
    assert not torch.are_deterministic_algorithms_enabled()
