"""The same figures in the terminal, in Markdown and in CSV; ratios to what is alike."""

from __future__ import annotations

import csv
import io

import pytest
from bench_results import case_of, done

from albireo.bench.case import CaseResult
from albireo.bench.table import HEADERS, as_csv, as_markdown, ratios, rows_of_words, scaling, short_number

RESULTS = [
    done(case_of("fsdp2"), 40.0),
    done(case_of("gemini"), 50.0),
    done(case_of("torch_ddp", precision="fp32"), 10.0),
    done(case_of("gemini", batch_size=32), 90.0),
    CaseResult(case_of("low_level_zero"), "out_of_memory", error="too | much"),
]


def test_ratios_are_to_the_reference_on_the_same_batch() -> None:
    # Of batch 32 the reference has no row; where precisions differ its only one counts.
    assert ratios(RESULTS, "fsdp2") == [1.0, 1.25, 0.25, None, None]


def test_a_reference_in_several_precisions_counts_in_ones_own() -> None:
    results = [done(case_of("plain", precision="fp32"), 10.0), done(case_of("plain"), 20.0), *RESULTS[:3]]
    assert ratios(results, "plain") == [1.0, 1.0, 2.0, 2.5, 1.0]
    assert ratios([*results[:2], done(case_of("gemini", precision="fp16"), 30.0)], "plain")[-1] is None


def test_a_row_in_words() -> None:
    row = dict(zip(HEADERS, rows_of_words(RESULTS, "fsdp2")[1], strict=True))
    assert (row["system"], row["samples/s"], row["ratio"], row["device GB"]) == ("gemini", "50.00", "1.25", "2.00")
    assert (row["step ms"], row["spread"], row["reserved GB"], row["status"]) == ("160.00", "30%", "3.00", "ok")
    failed = dict(zip(HEADERS, rows_of_words(RESULTS, "fsdp2")[4], strict=True))
    assert (failed["samples/s"], failed["status"]) == ("", "out of memory: too | much")


def test_markdown_has_a_line_a_row_of_as_many_cells() -> None:
    lines = as_markdown(RESULTS, "fsdp2").splitlines()
    assert len(lines) == 2 + len(RESULTS)
    assert {line.replace("\\|", "").count("|") for line in lines} == {len(HEADERS) + 1}


def test_csv_keeps_what_was_measured_unrounded() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(RESULTS, "fsdp2"))))
    assert [row["system"] for row in rows] == [result.case.system for result in RESULTS]
    assert float(rows[1]["step_seconds"]) == RESULTS[1].step_seconds
    assert int(rows[1]["device_peak_bytes"]) == 2 * 2**30
    assert float(rows[1]["ratio"]) == pytest.approx(1.25)
    assert (rows[4]["step_seconds"], rows[4]["error"]) == ("", "too | much")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(2442.3, "2,442"), (135.2, "135"), (97.84, "97.8"), (1.5, "1.5"), (0.4031, "0.403"), (0.0, "0")],
)
def test_a_bar_says_its_value_without_an_exponent(value: float, shown: str) -> None:
    assert short_number(value) == shown


def test_scaling_is_the_speed_over_that_of_as_many_times_one_rank() -> None:
    one, two = done(case_of("fsdp2"), 40.0), done(case_of("fsdp2", gpus=2), 72.0)
    other = done(case_of("gemini", gpus=2), 80.0)
    results = [one, two, other]
    assert [scaling(result, results) for result in results] == [None, pytest.approx(0.9), None]
    # A ratio is one of like to like: both on two.
    assert ratios(results, "fsdp2") == [1.0, 1.0, pytest.approx(80 / 72)]
    row = dict(zip(HEADERS, rows_of_words(results, "fsdp2")[1], strict=True))
    assert (row["GPUs"], row["scaling"]) == ("2", "0.90")
