"""Two benches beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_results import case_of, done

from albireo.bench.case import CaseResult
from albireo.bench.compare import compare, read_rows
from albireo.errors import ConfigError, RunFolderError


def written(path: Path, *results: CaseResult) -> Path:
    path.mkdir()
    (path / "bench.json").write_text(json.dumps({"rows": [result.row() for result in results]}))
    return path


def test_rows_are_paired_by_what_they_measure(tmp_path: Path) -> None:
    first = written(
        tmp_path / "a", done(case_of("gemini"), 10.0), done(case_of("plain"), 4.0), done(case_of("ddp"), 4.0)
    )
    lost = CaseResult(case_of("plain"), "failed", error="no")
    second = written(tmp_path / "b", lost, done(case_of("gemini"), 9.0, 3.0), done(case_of("gemini", 32), 9.0))
    pairs = compare(read_rows(first), read_rows(second / "bench.json"))
    assert [pair.name for pair in pairs] == ["gemini opt 125m batch 8 bf16", "plain opt 125m batch 8 bf16"]
    assert [pair.ratio for pair in pairs] == [0.9, None]
    assert (pairs[0].memory_before, pairs[0].memory_after) == (2 * 2**30, 3 * 2**30)
    assert [pair.falls_below(0.9) for pair in pairs] == [False, True]
    assert [pair.falls_below(0.91) for pair in pairs] == [True, True]


def test_what_did_not_run_before_cannot_have_become_slower() -> None:
    lost = CaseResult(case_of("gemini"), "failed", error="no")
    (pair,) = compare([lost.row()], [done(case_of("gemini"), 5.0).row()])
    assert not pair.falls_below(2.0)


def test_older_files_can_be_read(tmp_path: Path) -> None:
    row = {
        name: value for name, value in done(case_of("gemini"), 5.0).row().items() if name not in ("mem_cap", "rounds")
    }
    (tmp_path / "old.json").write_text(json.dumps({"rows": [row]}))
    (pair,) = compare(read_rows(tmp_path / "old.json"), [done(case_of("gemini"), 10.0).row()])
    assert pair.ratio == 2.0


def test_nothing_in_common_is_said() -> None:
    with pytest.raises(ConfigError, match="no row in common"):
        compare([done(case_of("gemini"), 5.0).row()], [done(case_of("gemini", mem_cap=8.0), 5.0).row()])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": [1]}', '{"rows": [{}]}', '{"rows": 3}'])
def test_another_file_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(RunFolderError, match="is not what albireo bench writes"):
        read_rows(tmp_path)


def test_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"cannot read .*bench\.json: No such file"):
        read_rows(tmp_path)
