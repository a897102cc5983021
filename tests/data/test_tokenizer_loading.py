from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from albireo.data import load_tokenizer
from albireo.errors import ModelError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
OPT = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}


def write(folder: Path, first: dict[str, int], last: tuple[str, ...] = ()) -> Path:
    """A byte-level vocabulary with one merge, as vocab.json and merges.txt."""
    tokens = [*first, *ALPHABET, "he", *last]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n")
    return folder


def offline() -> bool:
    return False


def test_opts_layout_is_told_by_its_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, OPT, ("<|endoftext|>",)))
    he = tokenizer.encode_batch(["he"])[0][1]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 2, 1)
    assert tokenizer.special_prefix == (2,)
    assert tokenizer.encode_batch(["he</s>he<pad>"]) == [[2, he, 2, he, 1]]
    assert tokenizer.vocab_size == 4 + 256 + 2
    # OPT's own tokenizer knows no other special tokens: these are text.
    assert len(tokenizer.encode_batch(["<unk>"])[0]) == 1 + 5


def test_gpt2s_layout_has_no_prefix(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, {}, ("<|endoftext|>",)))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (257, 257, None)
    assert tokenizer.special_prefix == ()
    assert tokenizer.encode_batch(["he<|endoftext|>"]) == [[256, 257]]
    assert tokenizer.decode(tokenizer.encode_batch([" wörld he"])[0]) == " wörld he"


def test_a_vocabulary_without_special_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, {}))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, None, None)
    assert tokenizer.encode_batch(["", "he"]) == [[], [256]]


def test_a_folder_as_opts_on_the_hub_gives_the_same_ids(tmp_path: Path) -> None:
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "pad_token": "<pad>"}
    config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    plain, named = write(tmp_path / "plain", OPT), write(tmp_path / "named", OPT)
    (named / "tokenizer_config.json").write_text(json.dumps(config))
    texts = ["he said <s> </s> <unk>\n", "", " he"]
    one, other = load_tokenizer(plain), load_tokenizer(named)
    assert one.encode_batch(texts) == other.encode_batch(texts)
    assert (one.bos_id, one.eos_id, one.pad_id) == (other.bos_id, other.eos_id, other.pad_id)
    # And once saved, transformers gives these ids, whichever way it came.
    other.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode_batch(texts) == one.encode_batch(texts)


def word_level(folder: Path, config: dict[str, object] | None = None) -> Path:
    tokenizer = Tokenizer(models.WordLevel({"<a>": 0, "</s>": 1, "<pad>": 2, "he": 3, "?": 4}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_tokenizer_json_is_read_as_it_is(tmp_path: Path) -> None:
    guessed = load_tokenizer(word_level(tmp_path))
    assert (guessed.bos_id, guessed.eos_id, guessed.pad_id) == (1, 1, 2)
    assert guessed.encode_batch(["he"]) == [[3]]
    config = {"bos_token": {"content": "<a>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    named = load_tokenizer(word_level(tmp_path, config))
    assert (named.bos_id, named.eos_id, named.pad_id) == (0, 1, None)
    assert load_tokenizer(tmp_path / "tokenizer.json").bos_id == 0


def test_tokenizer_json_rules_over_the_configuration_as_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<a>", "add_bos_token": True}
    folder = word_level(tmp_path, config)
    expected = AutoTokenizer.from_pretrained(folder, local_files_only=True)("he </s>")["input_ids"]
    assert load_tokenizer(folder).encode_batch(["he </s>"]) == [expected]


def test_a_special_token_that_only_the_configuration_names(tmp_path: Path) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "[PAD]"}
    tokenizer = load_tokenizer(word_level(tmp_path, config))
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (5, 6)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab.json": "{", "merges.txt": ""}, r"vocab\.json is not JSON: Expecting property name"),
        ({"vocab.json": "[1]", "merges.txt": ""}, r"vocab\.json does not hold a JSON object"),
        ({"vocab.json": "{}", "merges.txt": ""}, r"vocab\.json is not a vocabulary"),
        ({"vocab.json": '{"a": "0"}', "merges.txt": ""}, r"vocab\.json is not a vocabulary"),
        ({"vocab.json": '{"a": -1}', "merges.txt": ""}, r"vocab\.json is not a vocabulary"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\na b c\n"}, r"merges\.txt line 2 is not a merge: .* not 'a b c'"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, r"merges\.txt does not go with .*vocab\.json"),
        ({"vocab.json": b"\xff", "merges.txt": ""}, r"vocab\.json is not UTF-8 text: byte at offset 0"),
        ({"vocab.json": '{"a": 0}'}, r"merges\.txt is missing: a byte-level tokenizer needs vocab\.json and merges\.txt"),
        ({"merges.txt": ""}, r"vocab\.json is missing"),
        ({"tokenizer.json": "{}"}, r"tokenizer\.json is not a tokenizer that can be read"),
        ({"tokenizer.json": "{"}, r"tokenizer\.json is not a tokenizer that can be read"),
        ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json is not JSON"),
        ({}, "no tokenizer can be loaded from .*"),
        ({"config.json": '{"model_type": "opt"}'}, r"holds no tokenizer: expected tokenizer\.json, or vocab\.json"),
    ],
)  # fmt: skip
def test_files_that_are_missing_or_malformed_are_named(
    tmp_path: Path, files: dict[str, str | bytes], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./gone", "/gone/away", "a/b/c", "", "~/gone"])
def test_a_path_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="there is no tokenizer folder"):
        load_tokenizer(name, reachable=lambda: pytest.fail("the hub was asked for"))
    with pytest.raises(ModelError, match="there is no tokenizer folder"):
        load_tokenizer(Path(name) / "gone", reachable=lambda: pytest.fail("the hub was asked for"))


def test_a_name_on_the_hub_without_a_network() -> None:
    with pytest.raises(
        ModelError,
        match="no tokenizer can be loaded from nobody/nothing-of-this-name: the Hugging Face hub cannot be reached",
    ):
        load_tokenizer("nobody/nothing-of-this-name", reachable=offline)


def test_the_real_vocabulary_of_opt(shared_data: Path, tmp_path: Path) -> None:
    from transformers import GPT2Tokenizer

    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(shared_data / "tokenizer-opt" / name, tmp_path / name)
    tokenizer = load_tokenizer(tmp_path)
    reference = GPT2Tokenizer.from_pretrained(
        tmp_path, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>", add_bos_token=True
    )
    lines = (
        (shared_data / "wikitext-2-raw" / "wiki.test.raw").read_text(encoding="utf-8").splitlines(keepends=True)[:200]
    )
    lines += ["<unk> <s> </s> <pad>", "", "  \n\n", "ﬁ 𝛌 日本"]
    assert tokenizer.encode_batch(lines) == reference(lines)["input_ids"]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (50265, 2, 2, 1)
