"""The picture of the losses: what its artists hold, and that the file is a whole PNG."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.errors import RunFolderError
from albireo.files import FileOperations
from albireo.training.metrics import EvalRow, MetricsWriter, TrainRow
from albireo.training.plot import build_figure, draw_loss, highest_loss_shown, smooth, thin_out


def train_rows(losses, epochs: int = 1) -> list[TrainRow]:
    count = len(losses)
    return [
        TrainRow(i + 1, 1 + i * epochs // count, float(loss), 1e-3, 1.0, 10.0, 1e4, 0.1, 0, 2**30)
        for i, loss in enumerate(losses)
    ]


def falling(count: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(count)
    return 3.0 + 5.0 * np.exp(-np.arange(count) / (count / 8)) + 0.1 * noise


def artists(figure) -> dict[str, object]:
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def legend_of(figure) -> list[str]:
    legend = figure.axes[0].get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def texts_of(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def chunks_of_png(data: bytes) -> dict[bytes, bytes]:
    """Parse a PNG, checking every checksum, so that a torn file is caught."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind] = chunks.get(kind, b"") + body
        at += 12 + length
    return chunks


def test_the_file_is_a_whole_png_of_the_size_promised(tmp_path):
    with MetricsWriter(tmp_path / "m") as writer:
        for row in [EvalRow(0, 8.2), *train_rows(falling(60)), EvalRow(60, 3.3)]:
            writer.write(row)
    draw_loss(tmp_path / "m", tmp_path / "loss.png", "OPT tiny")
    chunks = chunks_of_png((tmp_path / "loss.png").read_bytes())
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    assert (width, height) == (1350, 750)
    assert b"IEND" in chunks
    channels = {2: 3, 6: 4}[chunks[b"IHDR"][9]]
    pixels = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width * channels)
    assert len(np.unique(pixels)) > 50  # something was drawn
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["loss.png", "m"]


def test_the_old_picture_stays_when_the_new_one_cannot_be_written(tmp_path):
    class Full(FileOperations):
        def about_to(self, operation: str, path: Path) -> None:
            if operation == "write":
                raise OSError(28, "No space left on device")

    (tmp_path / "m").write_text("")
    (tmp_path / "loss.png").write_bytes(b"old")
    with pytest.raises(RunFolderError, match=r"cannot write .*loss\.png: No space left"):
        draw_loss(tmp_path / "m", tmp_path / "loss.png", "", Full())
    assert (tmp_path / "loss.png").read_bytes() == b"old"


def test_raw_smoothed_and_evaluated_losses_are_drawn_as_they_are():
    losses = falling(60)
    evals = [EvalRow(0, 8.4), EvalRow(20, 4.2), EvalRow(40, 3.7), EvalRow(60, 3.512)]
    figure = build_figure(train_rows(losses), evals, "a $title$")
    drawn = artists(figure)
    np.testing.assert_array_equal(drawn["training"].get_xdata(), np.arange(1, 61))
    np.testing.assert_array_equal(drawn["training"].get_ydata(), losses)
    smoothed = drawn["training, smoothed"].get_ydata()
    assert smoothed.shape == (60,)
    assert np.abs(np.diff(smoothed, 2)).mean() < np.abs(np.diff(losses, 2)).mean() / 5
    assert np.abs(smoothed - losses).max() < 0.5
    assert drawn["evaluation"].get_xydata().tolist() == [[0, 8.4], [20, 4.2], [40, 3.7], [60, 3.512]]
    assert drawn["evaluation"].get_marker() == "o"
    assert drawn["training"].get_alpha() < 0.5
    assert legend_of(figure) == ["training", "training, smoothed", "evaluation"]
    assert texts_of(figure) == [f"loss 3.512\nperplexity\n{math.exp(3.512):.4g}"]
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss (nats per token)")
    assert axes.get_title(loc="left") == "a $title$"
    low, high = axes.get_ylim()
    assert low < losses.min() < 8.4 < high


def test_each_epoch_has_its_mean_at_its_middle_and_a_line_at_its_beginning():
    losses = falling(90)
    figure = build_figure(train_rows(losses, epochs=3), [], "")
    drawn = artists(figure)
    np.testing.assert_allclose(drawn["mean of an epoch"].get_xdata(), [15.5, 45.5, 75.5])
    np.testing.assert_allclose(drawn["mean of an epoch"].get_ydata(), losses.reshape(3, 30).mean(axis=1))
    boundaries = [line.get_xdata()[0] for line in figure.axes[0].get_lines() if list(line.get_ydata()) == [0, 1]]
    assert boundaries == [30.5, 60.5]
    assert texts_of(figure) == ["epoch 1", "epoch 2", "epoch 3"]
    assert "mean of an epoch" in legend_of(figure)


def test_one_epoch_has_no_mean():
    assert "mean of an epoch" not in artists(build_figure(train_rows(falling(60)), [], ""))


def test_the_mean_of_an_epoch_leaves_out_what_is_not_finite():
    losses = [4.0, math.nan, 2.0, math.nan, math.nan, math.nan]
    figure = build_figure(train_rows(losses, epochs=2), [], "")
    assert artists(figure)["mean of an epoch"].get_xydata().tolist() == [[2.0, 3.0]]


def test_nothing_draws_over_the_title_or_the_legend():
    losses = falling(300)
    losses[100], losses[200] = math.nan, 500.0
    for figure in (
        build_figure(train_rows(losses, epochs=4), [EvalRow(0, 8.4), EvalRow(300, 3.4)], "title"),
        build_figure(train_rows(falling(300)), [EvalRow(300, 3.4)], "title"),
    ):
        figure.canvas.draw()
        axes = figure.axes[0]
        title = axes._left_title.get_window_extent()
        legend = axes.get_legend().get_window_extent()
        assert legend.y0 > axes.bbox.y1
        assert title.y0 >= legend.y1
        for text in axes.texts:
            assert not text.get_window_extent().overlaps(legend)
            assert not text.get_window_extent().overlaps(title)
        for artist in (*axes.texts, axes.get_legend(), axes._left_title):
            box = artist.get_window_extent()
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert box.y1 <= figure.bbox.y1


@pytest.mark.parametrize("count", [1, 2, 9])
def test_few_points_are_marked_and_not_smoothed(count):
    drawn = artists(build_figure(train_rows(falling(count)), [], ""))
    assert "training, smoothed" not in drawn
    assert drawn["training"].get_marker() == "."
    assert len(drawn["training"].get_xdata()) == count


def test_losses_that_are_not_finite_leave_a_gap_and_are_marked():
    losses = falling(60)
    losses[[5, 30]] = math.nan, math.inf
    figure = build_figure(train_rows(losses), [EvalRow(20, math.nan), EvalRow(40, 3.9)], "")
    drawn = artists(figure)
    assert not np.isfinite(drawn["training"].get_ydata()[[5, 30]]).any()
    assert np.isfinite(drawn["training, smoothed"].get_ydata()).all()
    assert sorted(drawn["not finite (3 of 62)"].get_xdata()) == [6, 20, 31]
    assert drawn["evaluation"].get_xydata().tolist() == [[40, 3.9]]


def test_a_run_without_a_finite_loss_says_so():
    figure = build_figure(train_rows([math.nan] * 20), [EvalRow(20, math.nan)], "")
    assert texts_of(figure) == ["no finite loss"]
    assert legend_of(figure) == ["not finite (21 of 21)"]
    figure.canvas.draw()


def test_a_run_without_rows_can_be_drawn():
    figure = build_figure([], [], r"a title $\frac$ that is no mathematics")
    figure.canvas.draw()
    assert legend_of(figure) == []


def test_evaluations_alone_can_be_drawn():
    figure = build_figure([], [EvalRow(0, 8.0), EvalRow(5, 20000.0)], "")
    figure.canvas.draw()
    assert legend_of(figure) == ["evaluation"]


@pytest.mark.parametrize("at", [0, 30, 59])
def test_a_huge_spike_does_not_flatten_the_rest(at):
    losses = falling(60)
    losses[at] = 12_000.0
    figure = build_figure(train_rows(losses), [EvalRow(0, 8.4), EvalRow(60, 3.3)], "")
    drawn = artists(figure)
    assert figure.axes[0].get_ylim()[1] < 9.5
    assert drawn["above the scale (up to 12,000)"].get_xdata().tolist() == [at + 1]
    smoothed = drawn["training, smoothed"].get_ydata()
    assert np.nanmax(smoothed) < 9.5


def test_a_last_evaluation_above_the_scale_is_still_written_inside_the_picture():
    figure = build_figure(train_rows(falling(60)), [EvalRow(0, 8.4), EvalRow(60, 9000.0)], "")
    figure.canvas.draw()
    (text,) = figure.axes[0].texts
    assert text.get_text() == "loss 9000.000\nperplexity\ninf"
    assert text.get_window_extent().y1 <= figure.bbox.y1


def test_no_limit_hides_a_natural_start_or_a_divergence_that_lasts():
    long_run = np.concatenate([np.linspace(10.8, 3, 50), np.full(5000, 3.0)])
    assert highest_loss_shown(long_run, np.array([10.9])) == 10.9
    diverged = np.concatenate([np.full(800, 3.0), np.full(200, 9.0)])
    assert highest_loss_shown(diverged, np.array([])) == 9.0
    assert highest_loss_shown(np.array([math.nan]), np.array([math.nan])) == math.inf
    assert highest_loss_shown(np.array([5.0]), np.array([])) == 5.0


def test_smoothing_keeps_a_straight_line_to_both_ends():
    line = np.linspace(9.0, 2.0, 50)
    np.testing.assert_allclose(smooth(line, 7), line, rtol=1e-12)


def test_smoothing_is_the_least_squares_line_around_each_point():
    values, half = falling(40), 5
    values[[3, 17]] = math.nan
    smoothed = smooth(values, half)
    for centre in range(40):
        near = np.array([i for i in range(centre - half, centre + half + 1) if 0 <= i < 40 and np.isfinite(values[i])])
        weights = (1 - np.abs((near - centre) / (half + 1)) ** 3) ** 3
        slope_and_value = np.polyfit(near - centre, values[near], 1, w=np.sqrt(weights))
        assert smoothed[centre] == pytest.approx(slope_and_value[1], rel=1e-9)


def test_smoothing_does_not_invent_a_line_across_a_gap():
    values = falling(100)
    values[40:70] = math.nan
    smoothed = smooth(values, 6)
    assert np.isnan(smoothed[44:66]).all()
    assert np.isfinite(smoothed[:40]).all()
    assert np.isfinite(smoothed[70:]).all()


def test_a_window_wider_than_the_run_smooths_too():
    assert smooth(np.array([4.0, 3.0, 2.0]), 10) == pytest.approx([4.0, 3.0, 2.0])
    assert np.isnan(smooth(np.full(5, math.nan), 2)).all()


@given(
    values=st.lists(st.floats(0, 20) | st.just(math.nan), min_size=1, max_size=300),
    most_points=st.integers(2, 40),
)
def test_thinning_keeps_order_size_and_extremes(values, most_points):
    array = np.array(values)
    steps, kept = thin_out(np.arange(1.0, len(values) + 1), array, most_points)
    assert steps.size == kept.size <= max(most_points, 2)
    assert (np.diff(steps) > 0).all()
    np.testing.assert_array_equal(kept, array[steps.astype(int) - 1])
    if np.isfinite(array).any():
        assert np.nanmax(kept) == np.nanmax(array)
        assert np.nanmin(kept) == np.nanmin(array)


def test_a_long_run_is_thinned():
    drawn = artists(build_figure(train_rows(falling(9000)), [], ""))
    assert len(drawn["training"].get_xdata()) <= 4000
    assert len(drawn["training, smoothed"].get_xdata()) <= 4000


def test_drawing_leaves_matplotlib_as_it_was():
    code = (
        "import sys\n"
        "import albireo.training.plot as plot\n"
        "assert 'matplotlib' not in sys.modules, 'imported too early'\n"
        "import matplotlib\n"
        "before = dict(dict.items(matplotlib.rcParams))  # raw: asking for the backend imports pyplot\n"
        "plot.build_figure([], [], 'title').canvas.draw()\n"
        "assert dict(dict.items(matplotlib.rcParams)) == before, 'settings were changed'\n"
        "assert 'matplotlib.pyplot' not in sys.modules, 'pyplot was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
