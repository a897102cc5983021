"""A case is checked when it is made, and is the same after a trip through JSON."""

import json

import pytest

from albireo.bench import Case, CaseResult
from albireo.bench.case import SYSTEMS, default_precision
from albireo.errors import ConfigError

CASE = Case(system="plain", model="tiny", batch_size=2, precision="fp32", steps=3)


def test_a_case_comes_back_from_json() -> None:
    assert Case.from_mapping(json.loads(json.dumps(CASE.mapping()))) == CASE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"system": "deepspeed"}, "'deepspeed'"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"sequence_length": 0}, "sequence_length must be at least 1, not 0"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"warmup": 0}, "warmup must be at least 1, not 0"),
        ({"adapter": "qlora4"}, "plain knows the adapters none and lora, not 'qlora4': measure ours with it"),
        ({"system": "fsdp2_compiled", "precision": "fp16"}, "fsdp2_compiled has no loss scale"),
    ],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Case.from_mapping({**CASE.mapping(), **change})
    assert words in str(caught.value)
    if change == {"system": "deepspeed"}:
        assert all(system in str(caught.value) for system in SYSTEMS)


def test_a_row_is_flat_and_says_what_was_measured_and_what_came_of_it() -> None:
    row = CaseResult(CASE, "out_of_memory", error="too much").row()
    assert not any(isinstance(value, dict) for name, value in row.items() if name != "versions")
    assert row | CASE.mapping() == row
    assert (row["status"], row["error"], row["gpus"], row["step_seconds"]) == ("out_of_memory", "too much", 1, None)


def test_precisions_by_default() -> None:
    found = {system: default_precision(system) for system in SYSTEMS}
    assert found["torch_ddp_fp16"] == found["torch_ddp_fp16_compiled"] == "fp16"
    in_fp32 = {system for system, precision in found.items() if precision == "fp32"}
    assert in_fp32 == {
        "albireo", "albireo_compiled", "torch_ddp", "torch_ddp_compiled", "plain", "ddp", "accelerate",
    }  # fmt: skip
