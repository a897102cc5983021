"""Each system, measured in a process of its own; whatever goes wrong there is a result."""

import math

import pytest

from albireo.bench import Case, CaseResult, measure
from albireo.device import read_host_memory

SYSTEMS = ("albireo", "plain", "ddp", "fsdp2", "accelerate")
TOO_MUCH_BYTES = 66e9 * 16


def case_of(system: str, model: str = "tiny") -> Case:
    return Case(system, model, batch_size=2, precision="fp32", sequence_length=16, steps=2, warmup=1, tf32=False)


@pytest.fixture(scope="module")
def results() -> dict[str, CaseResult]:
    """One small case of each system: as many processes, and the tests look at what they left."""
    return {system: measure(case_of(system)) for system in SYSTEMS}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_case_is_measured(results: dict[str, CaseResult], system: str) -> None:
    result = results[system]
    assert (result.status, result.error) == ("ok", "")
    assert result.case == case_of(system)
    assert result.step_seconds is not None
    assert result.step_seconds_min is not None
    assert result.step_seconds_max is not None
    assert 0 < result.step_seconds_min <= result.step_seconds <= result.step_seconds_max < 60
    assert result.samples_per_second == pytest.approx(2 / result.step_seconds)
    assert result.tokens_per_second == pytest.approx(32 / result.step_seconds)
    assert result.host_peak_bytes is not None
    assert 2**26 < result.host_peak_bytes < 2**36
    assert {"python", "torch", "transformers", "device"} <= result.versions.keys()
    assert result.model_tflops is not None
    assert 0 < result.model_tflops < 10


def test_all_systems_begin_with_the_same_weights_and_tokens(results: dict[str, CaseResult]) -> None:
    losses = {system: result.first_loss for system, result in results.items()}
    assert losses["plain"] == pytest.approx(math.log(4096), abs=0.3)
    assert losses == pytest.approx(dict.fromkeys(SYSTEMS, losses["plain"]), abs=1e-5)


def test_a_case_that_cannot_run_is_a_row_with_its_reason() -> None:
    result = measure(case_of("plain", "nosuch"))
    assert result.status == "failed"
    assert "there is no model 'nosuch'" in result.error
    assert len(result.error.splitlines()) == 1
    assert "Traceback" not in result.error
    assert result.row()["step_seconds"] is None


def test_too_little_memory_is_a_row_of_its_own_kind() -> None:
    host = read_host_memory()
    if host is None or host.total_bytes > TOO_MUCH_BYTES:
        pytest.skip("this machine has the memory for OPT-66B, or does not say how much it has")
    result = measure(case_of("albireo", "66b"))
    assert result.status == "out_of_memory"
    assert "979.3 GB" in result.error
    assert len(result.error.splitlines()) == 1


def test_a_case_that_takes_too_long_is_ended() -> None:
    result = measure(case_of("plain"), timeout_seconds=0.05)
    assert (result.status, result.error) == ("failed", "not done after 0.05 s")
