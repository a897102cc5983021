from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch

from albireo.data import TextOptions, open_source, prepare_text, train_tokenizer
from albireo.errors import DataError, ModelError


def options(tmp_path: Path, sequence_length: int = 16, **others: float) -> TextOptions:
    return TextOptions(sequence_length=sequence_length, cache_folder=tmp_path / "cache", **others)  # type: ignore[arg-type]


def write(tmp_path: Path, **splits: str) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, text in splits.items():
        (folder / f"{split}.txt").write_text(text)
    return folder


def test_a_text_becomes_blocks_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    folder = write(tmp_path, book="some words and more words\n" * 200)
    stages: set[str] = set()
    data = prepare_text(
        open_source(str(folder)),
        None,
        options(tmp_path, vocab_size=300, holdout_share=0.25),
        progress=lambda stage, _done, _total: stages.add(stage),
    )
    tokens = list(chain.from_iterable(data.tokenizer.encode_batch(["some words and more words\n"] * 200)))
    blocks = len(tokens) // 16
    joined = [item["input_ids"] for part in (data.train, data.held_out) for item in part.__getitems__(range(len(part)))]
    assert torch.cat(joined).tolist() == tokens[: blocks * 16]
    assert len(data.held_out) == round(blocks / 4)
    assert data.vocab_size == data.tokenizer.vocab_size <= 300
    assert stages == {"training the tokenizer", "tokenizing train"}
    assert len(data.lines) == 3
    assert (
        f"{len(tokens):,}; blocks of 16: {len(data.train):,} to train on, {len(data.held_out):,} held out"
        in data.lines[2]
    )


def test_a_validation_split_is_what_is_held_out(tmp_path: Path) -> None:
    folder = write(tmp_path, train="to train on\n" * 100, valid="to evaluate on\n" * 20, test="nothing\n")
    tokenizer = train_tokenizer(["to train on\n", "to evaluate on\n"], 280)
    data = prepare_text(open_source(str(folder)), tokenizer, options(tmp_path))
    assert data.tokenizer is tokenizer
    assert tokenizer.decode(data.train[0]["input_ids"].tolist()).startswith("to train on\n")
    assert tokenizer.decode(data.held_out[0]["input_ids"].tolist()).startswith("to evaluate on\n")
    assert len(data.train) == sum(map(len, tokenizer.encode_batch(["to train on\n"] * 100))) // 16
    assert "left aside: test.txt" in data.lines[0]


def test_a_tokenizer_may_be_a_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, book="some words\n" * 100)
    train_tokenizer(["some words\n"], 280).save(tmp_path / "tokenizer")
    data = prepare_text(open_source(str(folder)), tmp_path / "tokenizer", options(tmp_path))
    assert data.tokenizer.special_prefix == (2,)
    with pytest.raises(ModelError, match="there is no tokenizer folder"):
        prepare_text(open_source(str(folder)), "./gone", options(tmp_path))


def test_too_short_texts_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path, train="to train on\n" * 100, valid="x\n")
    with pytest.raises(DataError, match=r"the validation split of .*data has \d tokens, and one block of 16 need"):
        prepare_text(open_source(str(folder)), None, options(tmp_path, vocab_size=300))


def test_real_text(shared_data: Path, tmp_path: Path) -> None:
    source = open_source(str(shared_data / "wikitext-2-raw" / "wiki.test.raw"))
    data = prepare_text(source, shared_data / "tokenizer-opt", options(tmp_path, 1024))
    assert (len(data.train), len(data.held_out), data.vocab_size) == (265, 14, 50265)
    text = data.tokenizer.decode(data.train[0]["input_ids"].tolist())
    assert text.startswith(" = Robert Boulter = \n Robert Boulter is an English film , television and theatre actor .")
