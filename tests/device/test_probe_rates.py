import pytest
import torch

from albireo.device.probe_rates import measure_matmul, try_training_step

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
def test_matrices_are_multiplied_at_a_rate_that_cores_can_have(kind: str) -> None:
    rate = measure_matmul(CPU, kind, seconds=0.02)
    assert (rate.device, rate.kind) == ("cpu", kind)
    assert 256 <= rate.size <= 2048
    assert 1e7 < rate.flops_per_second < 1e14


def test_measuring_leaves_tf32_as_it_was() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    measure_matmul(CPU, "tf32", seconds=0.01)
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_of_training_works_and_draws_nothing(dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    assert try_training_step(CPU, dtype) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_step_that_does_not_learn_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: None)
    problem = try_training_step(CPU, torch.float32)
    assert problem is not None
    assert problem.startswith("the loss went from")


def test_a_step_that_raises_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no such kernel\nand a page of hints")

    monkeypatch.setattr(torch.optim.AdamW, "step", refuse)
    assert try_training_step(CPU, torch.float32) == "no such kernel"


@pytest.mark.gpu
def test_a_gpu_is_faster_in_short_numbers() -> None:
    device = torch.device("cuda", 0)
    rates = {kind: measure_matmul(device, kind, seconds=0.2).flops_per_second for kind in ("fp32", "tf32", "bf16")}
    assert 1e12 < rates["fp32"] < rates["bf16"] < 1e16
    if torch.cuda.get_device_capability(device)[0] >= 8:
        assert rates["fp32"] < rates["tf32"] < rates["bf16"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert try_training_step(device, dtype) is None
