"""A timeline as data: to JSON and back, in words, in Chrome's form and as a picture."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.errors import RunFolderError
from albireo.memory.tracing import Timeline, describe_trace, read_trace, write_trace
from albireo.memory.tracing.chrome import to_chrome
from albireo.memory.tracing.reading import busy_seconds
from albireo.memory.tracing.timeline import ChunkFacts, MemoryReading, Stay, UnitSpan, Wait, Work

TIMELINE = Timeline(
    step=4,
    seconds=2.0,
    device="a GPU",
    is_simulated=False,
    chunks=(ChunkFacts(0, ("",), 100, True, "device"), ChunkFacts(1, ("a", "b"), 2**30, False, "host")),
    spans=(
        UnitSpan("", "forward", 0.0, 0.5),
        UnitSpan("a", "forward", 0.5, 1.0),
        UnitSpan("a", "backward", 1.0, 1.9),
        UnitSpan("", "step", 1.9, 2.0),
    ),
    works=(
        Work("to device", "weights in", 1, 2**30, 0.0, 0.75),
        Work("to host", "gradient out", 1, 2**30, 1.5, None),
        Work("host step", "host step", 1, 2**30, -0.5, 0.25),
    ),
    waits=(
        Wait("weights in", 1, "a", "forward", 0.5, 1.0),
        Wait("weights in", 1, "a", "backward", 1.0, 1.125),
        Wait("host step", 1, "", "forward", 0.0, 0.25),
    ),
    stays=(Stay(0, 0.0, 2.0), Stay(1, 0.25, 2.0)),
    memory=(MemoryReading(0.0, 100, 100, 2**31), MemoryReading(0.5, 2**30, 2**31, 2**31)),
)

seconds = st.integers(-20, 20).map(lambda number: number / 4)
works = st.builds(
    lambda begin, end: Work("lane", "kind", None, 1, begin, end),
    seconds,
    st.one_of(st.none(), seconds),
).filter(lambda work: work.end_seconds is None or work.end_seconds >= work.begin_seconds)


def test_a_timeline_comes_back_from_its_files(tmp_path: Path) -> None:
    write_trace(TIMELINE, tmp_path / "run")
    assert read_trace(tmp_path / "run") == TIMELINE
    assert read_trace(tmp_path / "run" / "trace.json") == TIMELINE
    picture = (tmp_path / "run" / "trace.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (1440, 1080)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "trace-chrome.json",
        "trace.json",
        "trace.png",
    ]


def _without(content: dict[str, Any]) -> None:
    del content["waits"]


def _more(content: dict[str, Any]) -> None:
    content["waits"][0]["colour"] = "red"


def _text(content: dict[str, Any]) -> None:
    content["seconds"] = "2"


def _truth(content: dict[str, Any]) -> None:
    content["step"] = True


def _infinite(content: dict[str, Any]) -> None:
    content["seconds"] = float("inf")


def _no_phase(content: dict[str, Any]) -> None:
    content["spans"][0]["phase"] = "sideways"


def _no_chunk(content: dict[str, Any]) -> None:
    content["works"][0]["chunk"] = 2


def _another_version(content: dict[str, Any]) -> None:
    content["version"] = 2


@pytest.mark.parametrize(
    "damage",
    [_without, _more, _text, _truth, _infinite, _no_phase, _no_chunk, _another_version],
    ids=lambda f: f.__name__,
)
def test_a_damaged_trace_is_refused_in_one_line(damage: Any, tmp_path: Path) -> None:
    content = TIMELINE.to_mapping()
    content = json.loads(json.dumps(content))
    damage(content)
    (tmp_path / "trace.json").write_text(json.dumps(content))
    with pytest.raises(RunFolderError, match=r"trace\.json"):
        read_trace(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b"null"])
def test_what_is_no_trace_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_bytes(content)
    with pytest.raises(RunFolderError, match="is no trace"):
        read_trace(tmp_path)


def test_a_folder_without_a_trace_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="--plugin gemini --trace"):
        read_trace(tmp_path)


def test_words_say_what_was_waited_for_by_cause_and_by_unit() -> None:
    text = "\n".join(describe_trace(TIMELINE))
    assert "step 4: 2.000 s on a GPU" in text
    assert "backward 900.00 ms" in text
    assert "the computing waited 875.00 ms (43.8%)" in text
    # The lane ran for 0.25 of the 0.625 seconds that were waited for it.
    assert "for weights in: 625.00 ms (31.2%); to device was busy 40% of that" in text
    assert "500.00 ms  in forward of a" in text
    assert "125.00 ms  in backward of a" in text
    assert "for host step: 250.00 ms (12.5%); host step was busy 100% of that" in text
    assert "250.00 ms  in forward of the root" in text
    assert "to device: busy 750.00 ms (37.5%) with 1, 1 GB, 1.43 GB/s while busy" in text
    assert "to host: busy 500.00 ms" in text
    assert "memory: at most 2 GB on the device, 2 GB of the process on the host" in text
    assert "simulated" not in text


def test_chromes_form_has_every_span_in_microseconds() -> None:
    events = to_chrome(TIMELINE)["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [(rows[event["tid"]], event["name"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    assert ("computing", "forward root", 0.0, 0.5e6) in spans
    assert ("waits of the computing", "weights in", 0.5e6, 0.5e6) in spans
    # What had not ended runs to the end.
    assert ("to host", "gradient out", 1.5e6, 0.5e6) in spans
    assert len(spans) == len(TIMELINE.spans) + len(TIMELINE.works) + len(TIMELINE.waits)
    assert [event["args"]["bytes"] for event in events if event["name"] == "device bytes"] == [100, 2**30]


@given(st.lists(works, max_size=6), seconds, seconds)
def test_busy_seconds_count_each_moment_once(of_lane: list[Work], one: float, other: float) -> None:
    begin, end = sorted((one, other))
    ticks = [begin + tick / 4 for tick in range(int((end - begin) * 4))]
    busy = [
        tick
        for tick in ticks
        if any(
            work.begin_seconds <= tick and (end if work.end_seconds is None else work.end_seconds) >= tick + 0.25
            for work in of_lane
        )
    ]
    assert busy_seconds(of_lane, begin, end) == pytest.approx(len(busy) / 4)
