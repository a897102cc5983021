"""Rounds outlive the process that measured them, and are taken for no others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from bench_results import MACHINE, case_of, done

from albireo.bench.case import CaseResult
from albireo.bench.kept_rounds import KeptRounds
from albireo.errors import ConfigError, RunFolderError

ZERO, GEMINI = case_of("low_level_zero"), case_of("gemini")


def test_rounds_come_back_case_by_case_in_order(tmp_path: Path) -> None:
    kept = KeptRounds(tmp_path / "rounds.jsonl")
    rounds = [done(ZERO, 4.0), done(GEMINI, 5.0), done(ZERO, 6.0, last_loss=float("nan"))]
    for result in rounds:
        kept.add(result)
    again = KeptRounds(tmp_path / "rounds.jsonl")
    assert again.of(GEMINI) == kept.of(GEMINI) == [rounds[1]]
    assert [result.samples_per_second for result in again.of(ZERO)] == [4.0, 6.0]
    assert again.of(dataclasses.replace(ZERO, steps=11)) == []


def test_out_of_memory_is_an_answer_and_a_failure_is_not(tmp_path: Path) -> None:
    kept = KeptRounds(tmp_path / "rounds.jsonl")
    kept.add(CaseResult(ZERO, "out_of_memory", error="too much"))
    kept.add(CaseResult(GEMINI, "failed", error="a bug"))
    again = KeptRounds(tmp_path / "rounds.jsonl")
    assert ([result.error for result in again.of(ZERO)], again.of(GEMINI)) == (["too much"], [])


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rounds.jsonl"
    kept = KeptRounds(path)
    kept.add(done(ZERO, 4.0))
    kept.add(done(GEMINI, 5.0))
    path.write_bytes(path.read_bytes()[:-cut])
    again = KeptRounds(path)
    assert (len(again.of(ZERO)), again.of(GEMINI)) == (1, [])
    again.add(done(GEMINI, 7.0))
    assert [result.samples_per_second for result in KeptRounds(path).of(GEMINI)] == [7.0]


@pytest.mark.parametrize(
    "line", ["{}", "[1]", "not JSON", '{"case": {"system": "plain"}}', '{"case": 1, "status": "ok"}']
)
def test_another_file_is_refused_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rounds.jsonl"
    KeptRounds(path).add(done(ZERO, 4.0))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunFolderError, match=r"rounds\.jsonl: line 2 is no round of this bench: take another --output"):
        KeptRounds(path)


def test_two_machines_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    KeptRounds(path).add(done(ZERO, 4.0))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="of another machine or of other versions"):
        KeptRounds(path).add(done(GEMINI, 5.0, versions={**MACHINE, "device": "another"}))
    assert path.read_bytes() == before
