"""The rows of a run: written, read back, and cut where a run goes on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.errors import RunFolderError
from albireo.training.metrics import EvalRow, MetricsWriter, TrainRow, cut_after, finite_or_none, read_metrics

ROW = TrainRow(
    step=1,
    epoch=1,
    loss=8.3,
    lr=1e-3,
    grad_norm=2.5,
    samples_per_second=40.0,
    tokens_per_second=5120.0,
    step_seconds=0.2,
    device_peak_bytes=0,
    host_peak_bytes=2**30,
)


def write(path: Path, *rows: TrainRow | EvalRow) -> bytes:
    with MetricsWriter(path) as writer:
        for row in rows:
            writer.write(row)
    return path.read_bytes()


def steps_of(path: Path) -> list[tuple[str, int]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [("eval" if "eval_loss" in record else "train", record["step"]) for record in records]


def run_of(path: Path, steps: int, every: int) -> bytes:
    rows: list[TrainRow | EvalRow] = [EvalRow(0, 8.3)]
    for step in range(1, steps + 1):
        rows.append(replace(ROW, step=step))
        if step % every == 0:
            rows.append(EvalRow(step, 8.3 - step / 10))
    return write(path, *rows)


def test_lines_have_the_contracts_fields_in_order(tmp_path):
    lines = write(tmp_path / "m", EvalRow(0, 2.0), ROW).decode().splitlines()
    assert list(json.loads(lines[0])) == ["step", "eval_loss", "perplexity"]
    assert list(json.loads(lines[1])) == [
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "samples_per_second",
        "tokens_per_second",
        "step_seconds",
        "device_peak_bytes",
        "host_peak_bytes",
    ]
    assert json.loads(lines[0]) == {"step": 0, "eval_loss": 2.0, "perplexity": math.exp(2.0)}
    assert json.loads(lines[1]) == asdict(ROW)


def test_rows_come_back_exactly(tmp_path):
    row = replace(ROW, loss=1 / 3, lr=1e-300)
    write(tmp_path / "m", EvalRow(0, 8.1), row, EvalRow(1, 0.1))
    assert read_metrics(tmp_path / "m") == ([row], [EvalRow(0, 8.1), EvalRow(1, 0.1)])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null(tmp_path, value):
    content = write(tmp_path / "m", replace(ROW, loss=value, grad_norm=value), EvalRow(1, value))

    def refuse(text):
        raise AssertionError(text)

    train, evaluation = (json.loads(line, parse_constant=refuse) for line in content.splitlines())
    assert train["loss"] is None
    assert train["grad_norm"] is None
    assert train["lr"] == 1e-3
    assert evaluation["eval_loss"] is None
    train_rows, eval_rows = read_metrics(tmp_path / "m")
    assert math.isnan(train_rows[0].loss)
    assert math.isnan(train_rows[0].grad_norm)
    assert math.isnan(eval_rows[0].eval_loss)


def test_perplexity_is_null_where_a_float_cannot_hold_it(tmp_path):
    record = json.loads(write(tmp_path / "m", EvalRow(0, 710.0)))
    assert record == {"step": 0, "eval_loss": 710.0, "perplexity": None}
    assert EvalRow(0, 710.0).perplexity == math.inf
    assert EvalRow(0, math.log(30)).perplexity == pytest.approx(30)


def test_finite_or_none():
    assert [finite_or_none(value) for value in (1, 2.5, None, math.nan, math.inf)] == [1, 2.5, None, None, None]


def test_a_row_is_in_the_file_before_write_returns(tmp_path):
    writer = MetricsWriter(tmp_path / "m")
    writer.write(ROW)
    assert read_metrics(tmp_path / "m")[0] == [ROW]
    writer.close()
    writer.close()


def test_a_writer_goes_on_behind_the_rows_there_are(tmp_path):
    write(tmp_path / "m", ROW)
    write(tmp_path / "m", replace(ROW, step=2))
    assert steps_of(tmp_path / "m") == [("train", 1), ("train", 2)]


def test_sync_reaches_the_disk_of_this_file(tmp_path, monkeypatch):
    synced = []
    writer = MetricsWriter(tmp_path / "m")
    monkeypatch.setattr("os.fsync", synced.append)
    writer.sync()
    assert synced == [writer._file.fileno()]
    writer.close()


def test_a_full_disk_is_one_line():
    message = r"^cannot write /dev/full: No space left on device$"
    with MetricsWriter(Path("/dev/full")) as writer, pytest.raises(RunFolderError, match=message):
        writer.write(ROW)


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(RunFolderError, match=r"cannot write .*none/m: No such file"):
        MetricsWriter(tmp_path / "none" / "m")
    with pytest.raises(RunFolderError, match=r"cannot read .*none/m: No such file"):
        read_metrics(tmp_path / "none" / "m")


def test_cut_keeps_the_steps_done_and_their_evaluation_byte_for_byte(tmp_path):
    path = tmp_path / "m"
    run_of(path, steps=9, every=3)
    before = path.read_bytes().splitlines(keepends=True)
    cut_after(path, 6)
    assert path.read_bytes() == b"".join(before[:9])
    assert steps_of(path)[-2:] == [("train", 6), ("eval", 6)]


@pytest.mark.parametrize(("step", "rows"), [(-1, 0), (0, 1), (1, 2), (3, 5), (9, 13), (100, 13)])
def test_cut_at_any_step(tmp_path, step, rows):
    run_of(tmp_path / "m", steps=9, every=3)
    cut_after(tmp_path / "m", step)
    assert len(steps_of(tmp_path / "m")) == rows


def test_cut_of_no_file_makes_none(tmp_path):
    cut_after(tmp_path / "m", 3)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=150, deadline=None)
@given(kept_bytes=st.integers(0, 3000), step=st.integers(-1, 12))
def test_a_run_killed_at_any_byte_can_be_read_and_cut(tmp_path_factory, kept_bytes, step):
    path = tmp_path_factory.mktemp("killed") / "m"
    content = run_of(path, steps=9, every=3)[:kept_bytes]
    # A row that only lacks its newline is whole: no part of a JSON object is one.
    whole = content.count(b"\n") + (not content.endswith(b"\n") and content.endswith(b"}"))
    path.write_bytes(content)
    train_rows, eval_rows = read_metrics(path)
    assert len(train_rows) + len(eval_rows) == whole
    cut_after(path, step)
    assert len(steps_of(path)) == sum(row.step <= step for row in [*train_rows, *eval_rows])
    write(path, replace(ROW, step=99))
    assert read_metrics(path)[0][-1].step == 99


def test_a_tail_of_zeros_that_a_power_cut_leaves_is_dropped(tmp_path):
    path = tmp_path / "m"
    content = write(path, ROW)
    path.write_bytes(content + b"\0" * 4096)
    assert read_metrics(path) == ([ROW], [])
    cut_after(path, 1)
    assert path.read_bytes() == content


GOOD = json.dumps(asdict(ROW)).encode()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (GOOD[:40], "it is no JSON"),
        (b"", "it is no JSON"),
        (b"\xff\xfe", "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b"[1, 2]", "it is no JSON object"),
        (GOOD.replace(b'"lr"', b'"rate"'), "'lr' is missing"),
        (GOOD.replace(b'"step": 1', b'"step": true'), "'step' must be an integer, but is True"),
        (GOOD.replace(b'"step": 1', b'"step": null'), "'step' must be an integer, but is None"),
        (GOOD.replace(b"8.3", b'"low"'), "'loss' must be a number, but is 'low'"),
        (GOOD.replace(b"8.3", b"1" + b"0" * 400), "'loss' is larger than any number measured"),
        (b'{"eval_loss": 1.0}', "'step' is missing"),
    ],
)
def test_a_damaged_line_is_named_and_the_file_left_alone(tmp_path, line, reason):
    path = tmp_path / "m"
    for content in (GOOD + b"\n" + line + b"\n" + GOOD + b"\n", GOOD + b"\n" + line + b"\n"):
        path.write_bytes(content)
        for use in (lambda: read_metrics(path), lambda: cut_after(path, 5)):
            with pytest.raises(RunFolderError) as caught:
                use()
            assert str(caught.value) == f"{path} is damaged at line 2: {reason}; remove that line"
        assert path.read_bytes() == content


def test_fields_of_a_later_version_are_passed_over(tmp_path):
    (tmp_path / "m").write_bytes(GOOD.replace(b'{"step"', b'{"new": [1], "step"') + b"\n")
    assert read_metrics(tmp_path / "m") == ([ROW], [])
