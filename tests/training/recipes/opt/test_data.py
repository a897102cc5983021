"""What a run reads, and the fingerprint by which a resumed run knows it again."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from tiny_texts import write_text

from albireo.config import MachineFacts, RunConfig, merge, resolve
from albireo.data import TokenBlocks, load_tokenizer
from albireo.errors import DataError
from albireo.training.language_data import RANDOM_BLOCKS, LanguageData
from albireo.training.progress import Progress
from albireo.training.recipes.opt.data import load_run_data


def config_of(**options: Any) -> RunConfig:
    return resolve(merge(RunConfig(), {"sequence_length": 16, **options}), MachineFacts("cpu", 1, False))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", lines=60)


def load(cache: Path, *, screen: io.StringIO | None = None, tokenizer: Any = None, **options: Any) -> LanguageData:
    config = config_of(cache=str(cache), **options)
    with Progress(stream=screen or io.StringIO()) as progress:
        return load_run_data(config, tokenizer=tokenizer, vocab_size=300, progress=progress)


def ids_of(data: Any) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in data.__getitems__(range(len(data)))]


def test_random_tokens_need_no_tokenizer(tmp_path: Path) -> None:
    data = load(tmp_path, data="random")
    assert data.tokenizer is None
    assert len(data.train) == RANDOM_BLOCKS
    train, held_out = torch.tensor(ids_of(data.train)), torch.tensor(ids_of(data.held_out))
    assert train.shape == (RANDOM_BLOCKS, 16)
    assert (int(train.min()), int(train.max())) == (0, 299)
    assert not any(bool((train == row).all(dim=1).any()) for row in held_out)
    assert ids_of(load(tmp_path, data="random").train) == train.tolist()
    assert "random tokens of 300 kinds" in data.lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"seed": 43}, {"sequence_length": 17}])
def test_random_tokens_are_known_by_what_decides_them(tmp_path: Path, change: dict[str, Any]) -> None:
    before = load(tmp_path, data="random")
    assert load(tmp_path, data="random").fingerprint == before.fingerprint
    assert load(tmp_path, data="random", **change).fingerprint != before.fingerprint


def test_the_largest_seed_is_one_like_others(tmp_path: Path) -> None:
    data = load(tmp_path, data="random", seed=2**63 - 1)
    assert ids_of(data.held_out) != ids_of(load(tmp_path, data="random").held_out)


def test_a_text_is_tokenized_packed_and_a_share_held_out(text: Path, cache_folder: Path) -> None:
    data = load(cache_folder, data=str(text), holdout=0.1)
    assert data.tokenizer is not None
    assert isinstance(data.train, TokenBlocks)
    rows = [*ids_of(data.train), *ids_of(data.held_out)]
    whole = data.tokenizer.encode_batch([line + "\n" for line in text.read_text().split("\n")])
    flat = [token for ids in whole for token in ids]
    assert [token for row in rows for token in row] == flat[: len(rows) * 16]
    assert len(data.held_out) == pytest.approx(len(rows) * 0.1, abs=1)
    assert any(line.startswith("tokenizer") for line in data.lines)


def test_the_embedded_text_trains_a_tokenizer_of_its_own(cache_folder: Path) -> None:
    data = load(cache_folder, data="synthetic", sequence_length=128)
    assert data.tokenizer is not None
    assert data.tokenizer.vocab_size <= 300
    assert len(data.train) > 100
    again = load(cache_folder, data="synthetic", sequence_length=128)
    assert (again.fingerprint, ids_of(again.held_out)) == (data.fingerprint, ids_of(data.held_out))


def test_a_fingerprint_is_that_of_content_and_not_of_a_place(text: Path, cache_folder: Path, tmp_path: Path) -> None:
    before = load(cache_folder, data=str(text)).fingerprint
    assert load(cache_folder, data=str(text), seed=7).fingerprint == before
    other = tmp_path / "elsewhere.txt"
    other.write_bytes(text.read_bytes())
    assert load(tmp_path / "cache", data=str(other)).fingerprint == before


@pytest.mark.parametrize("change", ["a word", "the length", "the share held out", "the tokenizer"])
def test_a_fingerprint_changes_with_anything_that_decides_a_sample(
    text: Path, cache_folder: Path, tmp_path: Path, change: str
) -> None:
    first = load(cache_folder, data=str(text))
    options: dict[str, Any] = {"data": str(text)}
    if change == "a word":
        text.write_text(text.read_text().replace("star", "moon", 1))
        # The same tokenizer: only the text is another.
        options["tokenizer"] = first.tokenizer
    elif change == "the length":
        options["sequence_length"] = 17
    elif change == "the share held out":
        options["holdout"] = 0.3
    else:
        assert first.tokenizer is not None
        story = tmp_path / "story.txt"
        story.write_text("once upon a time there were stars " * 40)
        other = load(cache_folder, data=str(story)).tokenizer
        assert other is not None
        other.save(tmp_path / "tokenizer")
        options["tokenizer"] = load_tokenizer(tmp_path / "tokenizer")
    assert load(cache_folder, **options).fingerprint != first.fingerprint


def test_a_text_that_is_too_short_is_said(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(DataError, match=r"short\.txt"):
        load(tmp_path / "cache", data=str(path))


def test_data_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path, data=str(tmp_path / "none.txt"))


class Told(Progress):
    """Writes down which tasks were shown, and how far each came."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.tasks: list[list[Any]] = []
        self.open = 0
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)

    def task(self, description: str, total: int | None = None) -> Any:
        told = self
        self.tasks.append([description, 0])

        class Task:
            def __enter__(self) -> Self:
                told.open += 1
                assert told.open == 1, "one stage is over before the next begins"
                return self

            def __exit__(self, *_: object) -> None:
                told.open -= 1

            def advance(self, amount: int = 1) -> None:
                assert amount >= 0
                told.tasks[-1][1] += amount

        return Task()


def test_each_stage_is_shown_from_its_beginning_to_its_end(text: Path, tmp_path: Path) -> None:
    progress = Told()
    config = config_of(data=str(text), cache=str(tmp_path / "cache"))
    load_run_data(config, tokenizer=None, vocab_size=300, progress=progress)
    assert [name for name, _ in progress.tasks] == ["training the tokenizer", "tokenizing train"]
    size = text.stat().st_size
    assert all(done == pytest.approx(size, abs=1) for _, done in progress.tasks)
    assert progress.open == 0


def test_a_stage_that_fails_is_closed(text: Path, tmp_path: Path) -> None:
    progress = Told()
    config = config_of(data=str(text), cache=str(tmp_path / "cache"), sequence_length=2000)
    with pytest.raises(DataError):
        load_run_data(config, tokenizer=None, vocab_size=300, progress=progress)
    assert progress.open == 0


def test_what_the_data_room_says_is_shown(text: Path, tmp_path: Path) -> None:
    load(tmp_path / "cache", data=str(text))
    tokens = next((tmp_path / "cache").rglob("tokens.safetensors"))
    tokens.write_bytes(tokens.read_bytes()[:-2])
    progress = Told()
    config = config_of(data=str(text), cache=str(tmp_path / "cache"))
    load_run_data(config, tokenizer=None, vocab_size=300, progress=progress)
    assert [line for line in progress.lines if line.startswith("warning: the cached")] != []
