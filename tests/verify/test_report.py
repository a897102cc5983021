"""Reports: what counts as passed, what the worst is, and how they travel."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

from rich.console import Console

from albireo.verify import Failure, ParameterReport, StepReport, Thresholds, VerifyReport
from albireo.verify.table import print_report, verdict

GOOD = ParameterReport("layer.weight", 12, 1e-8, 2e-8, 0, 0)
STEP = StepReport(1, 2.5, 2.5, 1.0, 1.0, None, False, (GOOD, replace(GOOD, name="layer.bias", relative_error=3e-8)), ())
SKIPPED = replace(
    STEP, step=2, skipped=True, grad_norm=math.inf, true_norm=math.nan, loss_scale=4.0,
    parameters=(replace(GOOD, relative_error=None, clip_error=None),),
)  # fmt: skip
FAILURE = Failure("gradient", "layer.weight", "the relative error is nan, and 1e-05 is allowed")
FAILED = replace(STEP, step=3, parameters=(replace(GOOD, relative_error=math.nan),), failures=(FAILURE,))


def report(*steps: StepReport) -> VerifyReport:
    return VerifyReport("torch_ddp", "fp32", 1, "CPU", Thresholds.of("fp32"), steps)


def printed(of: VerifyReport) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    print_report(of, console)
    return console.export_text()


def test_reports_travel_as_json() -> None:
    whole = report(STEP, SKIPPED, FAILED)
    message = json.loads(json.dumps(whole.to_message(), allow_nan=False))
    again = VerifyReport.from_message(message)
    assert repr(again) == repr(whole)  # where nan is nan


def test_the_file_holds_no_number_that_json_has_not() -> None:
    content = json.loads(json.dumps(report(STEP, SKIPPED, FAILED).to_json(), allow_nan=False))
    assert content.keys() >= {"passed", "max_relative_error", "threshold", "steps", "parameters"}
    assert content["passed"] is False
    assert content["max_relative_error"] is None
    assert content["threshold"] == 1e-5
    assert [step["passed"] for step in content["steps"]] == [True, True, False]
    assert content["steps"][2]["failures"] == [
        {"check": "gradient", "parameter": "layer.weight", "detail": FAILURE.detail}
    ]
    assert [part["name"] for part in content["parameters"]] == ["layer.weight", "layer.bias"]
    assert content["parameters"][0]["worst_step"] == 3


def test_what_passes() -> None:
    good = report(STEP, SKIPPED)
    assert good.passed
    assert good.max_relative_error == 3e-8
    assert STEP.worst is not None
    assert STEP.worst.name == "layer.bias"
    assert verdict(good).startswith("passed: 1 steps; the worst gradient is off by 3e-08")
    assert not report().passed
    assert not report(SKIPPED).passed
    assert "every step was left out" in verdict(report(SKIPPED))
    bad = report(STEP, FAILED)
    assert not bad.passed
    assert verdict(bad) == f"verify failed in step 3: gradient of layer.weight: {FAILURE.detail}"


def test_tables_fit_a_terminal_of_80_columns() -> None:
    name = "model.decoder.layers.1.self_attn.out_proj.weight"
    long = replace(STEP, parameters=(replace(GOOD, name=name, step_mismatches=1234),), failures=(FAILURE,))
    text = printed(report(STEP, SKIPPED, long))
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("failed in step"))
    for words in (name, "1,234", "other", "overflow", "FAILED:", str(FAILURE)):
        assert words in text, text
    assert "…" not in text
