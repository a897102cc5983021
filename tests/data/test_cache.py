from __future__ import annotations

import os
from collections.abc import Iterator
from io import StringIO
from itertools import chain
from pathlib import Path

import pytest

from albireo.data import TextSource, TextTokenizer, cache, open_source, tokenize, train_tokenizer, trained_tokenizer
from albireo.errors import DataError
from albireo.log import Log


class Source(TextSource):
    """Documents in memory, which counts how many were read."""

    def __init__(self, documents: list[str], name: str = "a source") -> None:
        self.name = name
        self.splits = ("train", "validation")
        self.texts = documents
        self.read_bytes = 0
        self.readings = 0

    def fingerprint(self) -> str:
        return "".join(self.texts)

    def describe(self) -> str:
        return self.name

    def _read(self, split: str) -> Iterator[str]:
        self.readings += 1
        for text in self.texts if split == "train" else self.texts[:1]:
            self.read_bytes += len(text.encode())
            yield text


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(["some words and more words\n", "wörter\n"], 280)


@pytest.fixture
def texts() -> list[str]:
    return [f"some words and {number} more wörter\n" for number in range(200)] + [""]


def test_a_stream_is_all_documents_one_after_another(
    tmp_path: Path, tokenizer: TextTokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokenize(Source(texts), tokenizer, "train", cache_folder=tmp_path / "1")
    assert whole[:].tolist() == list(chain.from_iterable(tokenizer.encode_batch(texts)))
    monkeypatch.setattr(cache, "_BATCH_BYTES", 100)
    in_pieces = tokenize(Source(texts), tokenizer, "train", cache_folder=tmp_path / "2")
    assert in_pieces[:].tolist() == whole[:].tolist()
    assert in_pieces.path.read_bytes() == whole.path.read_bytes()


def test_the_second_time_nothing_is_read(tmp_path: Path, tokenizer: TextTokenizer, texts: list[str]) -> None:
    first, second = Source(texts), Source(texts, "under another name")
    stream = tokenize(first, tokenizer, "train", cache_folder=tmp_path)
    assert tokenize(second, tokenizer, "train", cache_folder=tmp_path)[:].tolist() == stream[:].tolist()
    assert (first.readings, second.readings) == (1, 0)


def test_content_tokenizer_and_split_each_make_another_stream(
    tmp_path: Path, tokenizer: TextTokenizer, texts: list[str]
) -> None:
    other = train_tokenizer(["other words\n"], 280)
    streams = [
        tokenize(Source(texts), tokenizer, "train", cache_folder=tmp_path),
        tokenize(Source(texts[1:]), tokenizer, "train", cache_folder=tmp_path),
        tokenize(Source(texts), other, "train", cache_folder=tmp_path),
        tokenize(Source(texts), tokenizer, "validation", cache_folder=tmp_path),
    ]
    assert len({stream.path for stream in streams}) == 4


def test_text_is_encoded_as_it_is_read(
    tmp_path: Path, tokenizer: TextTokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_BATCH_BYTES", 500)
    source, ahead, seen = Source(texts), [], []

    def progress(done_bytes: int, total_bytes: int | None) -> None:
        ahead.append(source.read_bytes - done_bytes)
        seen.append((done_bytes, total_bytes))

    tokenize(source, tokenizer, "train", cache_folder=tmp_path, progress=progress)
    assert len(seen) > 10
    assert set(ahead) == {0}
    assert seen[0][1] is None
    assert seen[-1] == (source.read_bytes, source.read_bytes)


def test_progress_knows_the_size_of_files(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 10)
    seen: list[tuple[int, int | None]] = []
    source = open_source(str(tmp_path / "a.txt"))
    tokenize(source, tokenizer, "train", cache_folder=tmp_path / "c", progress=lambda *at: seen.append(at))
    assert seen[0] == seen[-1] == (110, 110)


@pytest.mark.parametrize("size_bytes", [0, 100, 300])
def test_a_short_stream_is_made_again(
    tmp_path: Path, tokenizer: TextTokenizer, texts: list[str], size_bytes: int
) -> None:
    source, said = Source(texts), StringIO()
    stream = tokenize(source, tokenizer, "train", cache_folder=tmp_path)
    expected = stream[:].tolist()
    path = stream.path
    del stream  # the map of a file that gets shorter must not be looked at
    os.truncate(path, size_bytes)
    again = tokenize(source, tokenizer, "train", cache_folder=tmp_path, log=Log(stream=said))
    assert again[:].tolist() == expected
    assert "are damaged (tokens.safetensors has" in said.getvalue()


def test_an_altered_stream_is_made_again(tmp_path: Path, tokenizer: TextTokenizer, texts: list[str]) -> None:
    stream = tokenize(Source(texts), tokenizer, "train", cache_folder=tmp_path)
    expected = stream[:].tolist()
    for place in (20, 300, -1):  # in the header, in the ids, and the last byte
        data = bytearray(stream.path.read_bytes())
        data[place] ^= 4
        stream.path.write_bytes(data)
        said = StringIO()
        stream = tokenize(Source(texts), tokenizer, "train", cache_folder=tmp_path, log=Log(stream=said))
        assert stream[:].tolist() == expected
        assert "the checksum of tokens.safetensors differs" in said.getvalue()


def test_text_without_tokens_or_with_an_error_leaves_nothing(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match="the train data of a source holds no text, only white space"):
        tokenize(Source(["", "\n"]), tokenizer, "train", cache_folder=tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"good\n" * 1000 + b"\xff")
    with pytest.raises(DataError, match=r"bad\.txt is not UTF-8 text: byte 0xff at offset 5000"):
        tokenize(open_source(str(tmp_path / "bad.txt")), tokenizer, "train", cache_folder=tmp_path)
    assert [path for path in (tmp_path / "tokens").iterdir() if path.suffix != ".lock"] == []


def test_a_trained_tokenizer_is_kept(tmp_path: Path, texts: list[str]) -> None:
    first, second = Source(texts), Source(texts)
    trained = trained_tokenizer(first, 300, cache_folder=tmp_path)
    again = trained_tokenizer(second, 300, cache_folder=tmp_path)
    assert again.fingerprint() == trained.fingerprint() == train_tokenizer(texts, 300).fingerprint()
    assert again.name == "trained on a source"
    assert (first.readings, second.readings) == (1, 0)
    assert trained_tokenizer(first, 262, cache_folder=tmp_path).vocab_size == 262


def test_a_damaged_tokenizer_is_trained_again(tmp_path: Path, texts: list[str]) -> None:
    trained = trained_tokenizer(Source(texts), 300, cache_folder=tmp_path)
    (file,) = (tmp_path / "tokenizers").glob("*/tokenizer.json")
    file.write_text(file.read_text().replace('"</s>"', '"</x>"'))
    said = StringIO()
    again = trained_tokenizer(Source(texts), 300, cache_folder=tmp_path, log=Log(stream=said))
    assert again.fingerprint() == trained.fingerprint()
    assert "the cached tokenizers in" in said.getvalue()
