from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from albireo.data import SpecialTokens, TextTokenizer, load_tokenizer, train_tokenizer
from albireo.errors import ModelError

TEXTS = ["Hello <unk> </s> <s> wörld\n", "", "a  b hello hello", "<pad>"]


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    return train_tokenizer(["Hello hello world, hello hello\n"] * 3, 300)


def words(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_a_saved_folder_gives_the_same_tokenizer(trained: TextTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert loaded.fingerprint() == trained.fingerprint()
    assert loaded.encode_batch(TEXTS) == trained.encode_batch(TEXTS)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (2, 2, 1)


@pytest.mark.parametrize("with_model", [False, True])
def test_transformers_loads_a_saved_folder(trained: TextTokenizer, tmp_path: Path, with_model: bool) -> None:
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    if with_model:  # beside a model of OPT, whose own tokenizer class would build others
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert loaded(TEXTS)["input_ids"] == trained.encode_batch(TEXTS)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token_id) == (2, 2, 1, 3)
    assert len(loaded) == trained.vocab_size


def test_transformers_takes_any_kind_as_it_is(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    TextTokenizer(words({"a": 0, "b": 1, "?": 2}), SpecialTokens(eos="b"), "x").save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)("a c b")["input_ids"] == [0, 2, 1]


def test_a_text_is_never_shortened_or_filled_up() -> None:
    tokenizer = words({"a": 0, "b": 1, "?": 2})
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    assert TextTokenizer(tokenizer, SpecialTokens(), "x").encode_batch(["a b a b", "b"]) == [[0, 1, 0, 1], [1]]
    assert tokenizer.truncation is not None


def test_ids_with_holes_need_rows_up_to_the_largest() -> None:
    assert TextTokenizer(words({"a": 0, "?": 1, "b": 9}), SpecialTokens(), "x").vocab_size == 10


def test_the_fingerprint_tells_all_that_decides_the_ids(trained: TextTokenizer) -> None:
    plain, other = words({"a": 0, "?": 1}), words({"a": 1, "?": 0})
    prints = {TextTokenizer(kind, SpecialTokens(), "x").fingerprint() for kind in (plain, other)}
    prints.add(TextTokenizer(plain, SpecialTokens(eos="a"), "x").fingerprint())
    assert len(prints) == 3
    assert trained.renamed("other").fingerprint() == trained.fingerprint()
    assert trained.renamed("other").describe() == f"{trained.vocab_size} tokens, other"


def test_what_cannot_be(tmp_path: Path, trained: TextTokenizer) -> None:
    with pytest.raises(ModelError, match="the tokenizer of x has an empty vocabulary"):
        TextTokenizer(Tokenizer(models.BPE()), SpecialTokens(), "x")
    with pytest.raises(ModelError, match=r"the tokenizer of x cannot encode the text: .*UNK"):
        TextTokenizer(words({"a": 0}), SpecialTokens(), "x").encode_batch(["b"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot be written to .*file: File exists"):
        trained.save(tmp_path / "file")
