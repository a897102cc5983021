"""Pictures and the page: all that was measured is on them, and the page needs nothing else."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import numpy as np
from bench_results import MACHINE, case_of, done
from PIL import Image

from albireo.bench.case import CaseResult
from albireo.bench.memory_curves import draw_memory
from albireo.bench.page import page_of
from albireo.bench.pictures import Picture, draw

RESULTS = [
    done(case_of("torch_ddp", size, "fp32"), 10.0 + size, 4.0)
    if system == "torch_ddp"
    else done(case_of(system, size), 30.0)
    for size in (8, 32)
    for system in ("torch_ddp", "gemini")
]
LOST = CaseResult(case_of("low_level_zero"), "out_of_memory", error="1 < 2 & <script>")


def words_of(picture: Picture) -> str:
    return " ".join(re.findall(r">([^<>]+)</text>", picture.svg))


def test_pictures_name_every_system_precision_and_batch() -> None:
    pictures = {picture.name: picture for picture in draw([*RESULTS, LOST])}
    assert list(pictures) == ["bars", "batch-sizes", "tradeoff"]
    for picture in pictures.values():
        words = words_of(picture)
        assert all(name in words for name in ("torch_ddp fp32", "gemini bf16", "opt 125m")), words
        image = np.asarray(Image.open(io.BytesIO(picture.png)))
        assert image.shape[0] > 400
        assert image.std() > 10
    assert "out of memory" in words_of(pictures["bars"])
    assert "18" in words_of(pictures["bars"])


def test_one_batch_size_makes_no_lines_and_nothing_measured_no_picture() -> None:
    assert [picture.name for picture in draw(RESULTS[:2])] == ["bars", "tradeoff"]
    assert draw([LOST]) == []


def test_pictures_are_the_same_each_time() -> None:
    assert draw(RESULTS) == draw(RESULTS)


class Reader(HTMLParser):
    """Collects what a page refers to, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_all_rows_and_needs_no_network() -> None:
    results = [*RESULTS, LOST]
    pictures = draw(results)
    page = page_of(
        results,
        pictures,
        machine=MACHINE,
        command="albireo bench opt --models '<b>'",
        date="2026-01-01",
        reference="gemini",
    )
    reader = Reader()
    reader.feed(page)
    assert reader.tags.count("svg") == len(pictures)
    assert reader.tags.count("tr") == 1 + len(results)
    # Within the page alone.
    assert all(reference.startswith("#") for reference in reader.references), reader.references
    assert not {"script", "link", "img", "iframe", "b"} & set(reader.tags)
    assert not re.search(r"url\((?!#)|@import", page)
    for text in ("a <GPU> & more", "--models '<b>'", "1 < 2 & <script>", "3.12.0", "gemini"):
        assert text in reader.text
    assert 'name="viewport"' in page


def test_a_step_of_geminis_is_drawn_with_both_memories() -> None:
    moments = [[0.0, 1e9, 4e9], [0.01, 2e9, 4e9], [0.02, 1e9, 4.1e9]]
    results = [done(case_of("fsdp2"), 40.0), done(case_of("gemini", gpus=2), 50.0, memory_over_step=moments)]
    picture = draw_memory(results)
    assert picture is not None
    assert "gemini opt 125m batch 8 bf16 on 2 ranks" in picture.svg
    assert "fsdp2" not in picture.svg
    assert draw_memory(results[:1]) is None
