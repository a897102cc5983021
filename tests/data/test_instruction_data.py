"""From instructions to samples: what they hold, what counts in them, and how they are filled up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_instructions import records, write_instructions

from albireo.data import (
    InstructionData,
    InstructionOptions,
    InstructionSource,
    TextTokenizer,
    open_instructions,
    pad_rows,
    prepare_instructions,
    train_tokenizer,
)
from albireo.data.instruction import parse_instruction
from albireo.data.tokenizer import SpecialTokens
from albireo.data.tokenizer_training import GPT2_TOKENS
from albireo.errors import DataError, ModelError

SAMPLES = st.lists(st.lists(st.integers(3, 99), min_size=1, max_size=12), min_size=1, max_size=6)


def source_of(count: int, **more: Any) -> InstructionSource:
    return InstructionSource("mine", {"train": tuple(parse_instruction(r) for r in records(count))}, "mine", **more)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer([r.prompt + r.output for r in source_of(40).splits["train"]], 300, layout=GPT2_TOKENS)


def made(cache: Path, source: InstructionSource, tokenizer: TextTokenizer | None, **options: Any) -> InstructionData:
    return prepare_instructions(
        source, tokenizer, InstructionOptions(**{"sequence_length": 400, "cache_folder": cache, **options})
    )


def test_a_sample_is_prompt_answer_and_end(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    source = source_of(20)
    data = made(tmp_path, source, tokenizer, holdout_share=0.1)
    assert (len(data.train), len(data.held_out)) == (18, 2)
    whole = {record.prompt + record.output: record for record in source.splits["train"]}
    seen = set()
    for part in (data.train, data.held_out):
        for index in range(len(part)):
            sample = part[index]
            ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
            assert ids[-1] == tokenizer.eos_id
            text = tokenizer.decode(ids[:-1], skip_special_tokens=False)
            record = whole[text]
            prompt = [-100] * len(tokenizer.encode_batch([record.prompt])[0])
            assert labels == [*prompt, *ids[len(prompt) :]]
            assert tokenizer.decode([i for i in labels if i >= 0]) == record.output
            assert len(ids) == part.lengths[index]
            seen.add(text)
    assert seen == set(whole)
    assert data.held_out.lengths.tolist() == sorted(data.held_out.lengths.tolist())


def test_all_tokens_count_by_option(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    data = made(tmp_path, source_of(6), tokenizer, all_tokens=True)
    sample = data.train[0]
    assert torch.equal(sample["input_ids"], sample["labels"])


def test_what_begins_every_text_stands_once(tmp_path: Path) -> None:
    """OPT's tokenizers put `</s>` before a text: the answer goes on without another."""
    opt_like = train_tokenizer([r.prompt + r.output for r in source_of(10).splits["train"]], 300)
    data = made(tmp_path, source_of(10), opt_like)
    for index in range(len(data.train)):
        ids = data.train[index]["input_ids"].tolist()
        assert [place for place, token in enumerate(ids) if token == opt_like.bos_id] == [0, len(ids) - 1]


def test_what_is_too_long_is_cut_and_what_has_no_answer_left_is_left_out(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    source = source_of(30)
    prompts = [len(ids) for ids in tokenizer.encode_batch([r.prompt for r in source.splits["train"]])]
    limit = sorted(prompts)[15] + 3
    data = made(tmp_path, source, tokenizer, sequence_length=limit)
    expected = sum(length < limit for length in prompts)
    assert len(data.train) + len(data.held_out) == expected < 30
    for index in range(len(data.train)):
        sample = data.train[index]
        assert len(sample["input_ids"]) <= limit
        assert int((sample["labels"][1:] >= 0).sum()) >= 1
    assert any(line.startswith("cut ") for line in data.lines)
    assert any(
        line == f"left out   {30 - expected} whose prompt alone fills {limit} tokens: nothing in them would count"
        for line in data.lines
    )
    with pytest.raises(DataError, match="longer --sequence-length"):
        made(tmp_path, source, tokenizer, sequence_length=5)


def test_too_few_records_are_said(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one to train on and one to evaluate on"):
        made(tmp_path, source_of(1), tokenizer)
    data = made(tmp_path, source_of(2), tokenizer)
    assert (len(data.train), len(data.held_out)) == (1, 1)


def test_a_validation_part_is_what_is_held_out(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    parts = {"train": source_of(9).splits["train"], "validation": source_of(4).splits["train"]}
    data = made(tmp_path, InstructionSource("mine", parts, "mine"), tokenizer)
    assert (len(data.train), len(data.held_out)) == (9, 4)


def test_which_are_held_out_does_not_hang_on_the_run(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    first, again = (made(tmp_path / name, source_of(40), tokenizer, holdout_share=0.25) for name in ("a", "b"))
    assert len(first.held_out) == 10
    assert all(
        torch.equal(first.held_out[index]["input_ids"], again.held_out[index]["input_ids"]) for index in range(10)
    )


def test_a_tokenizer_is_trained_where_there_is_none_and_kept(tmp_path: Path) -> None:
    data = made(tmp_path, source_of(20), None, vocab_size=280)
    assert data.tokenizer.vocab_size <= 280
    assert (data.tokenizer.eos_id, data.tokenizer.bos_id, data.tokenizer.pad_id) == (0, 0, None)
    assert data.tokenizer.special_prefix == ()
    again = made(tmp_path, source_of(20), None, vocab_size=280)
    assert again.tokenizer.fingerprint() == data.tokenizer.fingerprint()
    assert len(list((tmp_path / "tokenizers").iterdir())) >= 1
    # Encoded once and found again; a damaged entry is made anew.
    entries = list((tmp_path / "instructions").rglob("tokens.safetensors"))
    assert len(entries) == 1
    entries[0].write_bytes(entries[0].read_bytes()[:-2])
    assert torch.equal(made(tmp_path, source_of(20), None, vocab_size=280).train[0]["labels"], data.train[0]["labels"])


def test_a_tokenizer_without_an_end_is_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    endless = TextTokenizer(tokenizer._tokenizer, SpecialTokens(), "mine")
    with pytest.raises(ModelError, match="no token that ends a text"):
        made(tmp_path, source_of(4), endless)


@given(rows=SAMPLES, pad_id=st.integers(0, 99))
def test_rows_are_filled_up_with_what_counts_for_nothing(rows: list[list[int]], pad_id: int) -> None:
    samples = [{"input_ids": torch.tensor(row), "labels": torch.tensor([-100, *row[1:]])} for row in rows]
    columns = pad_rows(samples, pad_id)
    longest = max(map(len, rows))
    assert columns["input_ids"].shape == columns["labels"].shape == (len(rows), longest)
    for row, ids, labels in zip(rows, columns["input_ids"].tolist(), columns["labels"].tolist(), strict=True):
        assert ids == [*row, *[pad_id] * (longest - len(row))]
        assert labels == [-100, *row[1:], *[-100] * (longest - len(row))]


def test_real_records(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "alpaca" / "alpaca_en_demo.json"
    source = open_instructions(str(path))
    assert len(source.splits["train"]) == len(json.loads(path.read_text())) == 999
    assert source.malformed == ()
    data = made(tmp_path, source, None, sequence_length=1024)
    assert len(data.train) + len(data.held_out) == 999


def test_a_file_is_written_as_a_user_has_it(tmp_path: Path) -> None:
    data = made(tmp_path / "cache", open_instructions(str(write_instructions(tmp_path / "a.jsonl", 12))), None)
    assert data.lines[0].endswith("a.jsonl: instructions: train 12")
