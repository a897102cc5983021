"""What is shown while a run goes on, with a clock that the test moves."""

from __future__ import annotations

import io
import math
import re
import sys
import threading

import pytest

from albireo.training.metrics import EvalRow, TrainRow
from albireo.training.progress import Progress, format_bytes, format_duration, format_perplexity


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal_of_80_columns(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "30")
    monkeypatch.setenv("NO_COLOR", "1")


def row(step: int, loss: float = 6.5, device_peak_bytes: int = 0) -> TrainRow:
    return TrainRow(step, 1, loss, 5e-5, 1.0, 96.0, 12345.6, 0.5, device_peak_bytes, 900 * 2**20)


def lines_of(steps: int, seconds_a_step: float, first_step: int = 1) -> list[str]:
    clock, stream = Clock(), io.StringIO()
    with Progress(stream=stream, clock=clock) as progress:
        progress.start_training(first_step, steps)
        for step in range(first_step, steps + 1):
            clock.seconds += seconds_a_step
            progress.update(row(step))
    return stream.getvalue().splitlines()


def steps_shown(lines: list[str]) -> list[int]:
    return [int(re.match(r"step (\d+)/", line)[1]) for line in lines]


def test_a_line_of_a_step_says_all_numbers():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream=stream, clock=clock)
    progress.start_training(1, 100)
    clock.seconds += 3
    progress.update(row(1))
    clock.seconds += 20
    progress.update(row(11, device_peak_bytes=3 * 2**29))
    assert stream.getvalue().splitlines() == [
        "step 1/100  loss 6.500  lr 5.00e-05  12,346 tokens/s  host 900 MB  elapsed 0:03",
        # 10 steps took 20 s after the first, so the 89 that are left take 178 s.
        "step 11/100  loss 6.500  lr 5.00e-05  12,346 tokens/s  device 1.50 GB  host 900 MB  elapsed 0:23  left 2:58",
    ]


def test_fast_steps_give_a_line_for_each_twentieth_and_the_first_and_last():
    assert steps_shown(lines_of(steps=1010, seconds_a_step=0.001)) == [1, *range(52, 1010, 51), 1010]


def test_slow_steps_give_a_line_every_ten_seconds():
    assert steps_shown(lines_of(steps=1000, seconds_a_step=1.0))[:5] == [1, 11, 21, 31, 41]


def test_few_steps_give_a_line_each():
    assert steps_shown(lines_of(steps=3, seconds_a_step=0.001)) == [1, 2, 3]


def test_a_run_that_goes_on_begins_where_it_was():
    lines = lines_of(steps=60, seconds_a_step=100, first_step=58)
    assert steps_shown(lines) == [58, 59, 60]
    assert [line.split("elapsed ")[1] for line in lines] == ["1:40", "3:20  left 1:40", "5:00  left 0:00"]


def test_lines_hold_no_control_characters():
    clock, stream = Clock(), io.StringIO()
    with Progress(stream=stream, clock=clock) as progress:
        with progress.task("tokenizing", 10) as task:
            clock.seconds += 60
            task.advance(10)
        progress.start_training(1, 2)
        progress.message("[bold]a path: [/tmp/x]")
        progress.update(row(1))
        progress.evaluation(EvalRow(1, 5.0))
    text = stream.getvalue()
    assert "[bold]a path: [/tmp/x]\n" in text
    assert not re.search(r"[^\x20-\x7e\n]", text)


def test_an_evaluation_is_a_line_with_what_was_before():
    stream = io.StringIO()
    progress = Progress(stream=stream, clock=Clock())
    progress.evaluation(EvalRow(0, 8.318))
    progress.start_training(1, 60)
    progress.evaluation(EvalRow(20, 6.512), EvalRow(0, 8.318))
    progress.evaluation(EvalRow(40, math.nan))
    progress.evaluation(EvalRow(60, 800.0))
    assert stream.getvalue().splitlines() == [
        "step 0  evaluation loss 8.318, perplexity 4097.0",
        "step 20/60  evaluation loss 6.512, perplexity 673.2 (loss was 8.318 at step 0)",
        "step 40/60  evaluation loss nan, perplexity nan",
        "step 60/60  evaluation loss 800.000, perplexity inf",
    ]


def test_a_long_task_is_told_and_a_short_one_is_not():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream=stream, clock=clock)
    with progress.task("evaluating", 4) as task:
        clock.seconds += 1.9
        task.advance(4)
    assert stream.getvalue() == ""
    with progress.task("tokenizing", 3000) as task:
        for _ in range(3):
            clock.seconds += 6
            task.advance(1000)
    with progress.task("downloading") as task:
        clock.seconds += 3
        task.advance()
    assert stream.getvalue().splitlines() == [
        "tokenizing  1,000/3,000",
        "tokenizing  3,000/3,000",
        "tokenizing  3,000/3,000  took 0:18",
        "downloading  1",
        "downloading  1  took 0:03",
    ]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_ranks_are_silent(stream):
    with Progress(enabled=False, stream=stream, clock=Clock()) as progress:
        progress.start_training(1, 2)
        with progress.task("tokenizing", 3) as task:
            task.advance(3)
        progress.update(row(1))
        progress.evaluation(EvalRow(1, 2.0), EvalRow(0, 3.0))
        progress.message("hello")
    assert stream.getvalue() == ""


def test_a_bar_on_a_terminal():
    clock, stream = Clock(), Terminal()
    threads, out, err = threading.active_count(), sys.stdout, sys.stderr
    with Progress(stream=stream, clock=clock) as progress:
        progress.start_training(1, 60)
        clock.seconds += 2
        progress.update(row(30, device_peak_bytes=3 * 2**29))
        clock.seconds += 4
        progress.update(row(40, device_peak_bytes=3 * 2**29))
        # Nobody draws behind the caller's back: tokenizing may fork at any time.
        assert threading.active_count() == threads
    text = stream.getvalue()
    frames = [frame for frame in re.split(r"training", text)[1:] if "loss" in frame]
    assert "40/60 elapsed 0:06  left 0:08" in frames[-1]
    assert "loss 6.500  lr 5.00e-05  12,346 tokens/s  device 1.50 GB  host 900 MB" in frames[-1]
    assert "━" in frames[-1]
    assert (sys.stdout, sys.stderr) == (out, err)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is hidden, and comes back


def test_the_bar_is_seen_before_the_first_step_is_done():
    stream = Terminal()
    progress = Progress(stream=stream, clock=Clock())
    progress.start_training(21, 60)
    assert "20/60 elapsed 0:00" in stream.getvalue()
    progress.close()
    progress.close()


def test_a_bar_is_not_drawn_for_every_one_of_many_steps_but_for_the_last():
    clock, stream = Clock(), Terminal()
    with Progress(stream=stream, clock=clock) as progress:
        progress.start_training(1, 1000)
        for step in range(1, 1001):
            clock.seconds += 0.001
            progress.update(row(step))
        before_close = stream.getvalue()
    assert 10 <= before_close.count("tokens/s") <= 13
    assert "1000/1000 elapsed 0:01  left 0:00" in before_close


def test_messages_stay_above_the_bar_unchanged():
    stream = Terminal()
    text = "run [1/2] [bold]in[/bold] /a/folder" + "/deep" * 30
    with Progress(stream=stream, clock=Clock()) as progress:
        progress.start_training(1, 60)
        progress.message(text)
        last_bar = stream.getvalue().rindex("training")
    assert stream.getvalue().index(text) < last_bar


def test_a_task_has_a_bar_while_it_goes_on():
    clock, stream = Clock(), Terminal()
    with Progress(stream=stream, clock=clock) as progress:
        progress.start_training(1, 60)
        with progress.task("evaluating", 2000) as task:
            clock.seconds += 3
            task.advance(500)
            assert "500/2,000 elapsed 0:03" in stream.getvalue()
            during = len(stream.getvalue())
        after = stream.getvalue()[during:]
    assert "training" in after
    assert "evaluating" not in after


def test_the_cursor_comes_back_after_a_failure():
    stream = Terminal()

    def fail() -> None:
        with Progress(stream=stream, clock=Clock()) as progress:
            progress.start_training(1, 60)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(stream=stream, clock=Clock()) as progress:
        progress.start_training(1, 60)
        progress.update(row(1))
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().startswith("step 1/60")


def test_standard_error_is_where_it_goes(capsys):
    with Progress() as progress:
        progress.message("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_formats():
    assert [format_bytes(size) for size in (0, 320 * 2**20, 2**30, 3 * 2**29)] == [
        "0 MB",
        "320 MB",
        "1.00 GB",
        "1.50 GB",
    ]
    assert [format_duration(seconds) for seconds in (0, 5.4, 65, 3599.6, 7384)] == [
        "0:00",
        "0:05",
        "1:05",
        "1:00:00",
        "2:03:04",
    ]
    assert [format_perplexity(value) for value in (1.0, 673.21, 123456.7, 1.234e9, math.inf)] == [
        "1.0",
        "673.2",
        "123456.7",
        "1.2e+09",
        "inf",
    ]
