"""A tokenizer out of files, or from the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from albireo.data.hub import hub_is_reachable
from albireo.data.tokenizer import SpecialTokens, TextTokenizer
from albireo.data.tokenizer_training import byte_level, with_prefix
from albireo.errors import ModelError

__all__ = ["load_tokenizer"]

_ROLES = ("bos", "eos", "pad", "unk")
_SMALLEST_PLAUSIBLE = 4


def load_tokenizer(path_or_id: str | Path, *, reachable: Callable[[], bool] = hub_is_reachable) -> TextTokenizer:
    """Load a tokenizer.

    A folder with `tokenizer.json` is read as it is, whatever else lies beside it, as transformers does. `vocab.json` and `merges.txt` are a byte-level pair encoding as
    GPT-2's and OPT's; the vocabulary tells which: with `</s>` and `<pad>` a text begins with `</s>`, as OPT's do, with
    `<|endoftext|>` alone it has no prefix, as GPT-2's. With `tokenizer_config.json` beside them, and whatever else there
    is, goes through transformers, without code from the hub.

    Args:
        path_or_id: a folder, a `tokenizer.json`, or a name on the Hugging Face hub.
        reachable: tells whether the hub can be reached; asked only for a name on the hub.

    Raises:
        ModelError: there is no such tokenizer, or a file of it is malformed; it names the file.
    """
    path = Path(path_or_id).expanduser()
    if path.is_file():
        return _from_json(path, str(path_or_id))
    if not path.is_dir() or not str(path_or_id).strip():
        return _from_hub(path_or_id, reachable)
    name = str(path_or_id)
    if (path / "tokenizer.json").is_file():
        return _from_json(path / "tokenizer.json", name)
    config = _read_object(path / "tokenizer_config.json")
    parts = [path / "vocab.json", path / "merges.txt"]
    present = [part for part in parts if part.is_file()]
    if len(present) == len(parts) and not config:
        return _from_vocabulary(parts[0], parts[1], name)
    if len(present) == 1:
        missing = next(part for part in parts if part not in present)
        raise ModelError(f"{missing} is missing: a byte-level tokenizer needs vocab.json and merges.txt")
    if not any(path.iterdir()):
        raise ModelError(
            f"no tokenizer can be loaded from {name}, which is empty: name a folder with tokenizer.json, or with vocab.json "
            "and merges.txt"
        )
    return _through_transformers(path, name, local=True)


def _from_json(file: Path, name: str) -> TextTokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{file} is not a tokenizer that can be read: {error}") from error
    config = _read_object(file.with_name("special_tokens_map.json")) | _read_object(
        file.with_name("tokenizer_config.json")
    )
    named = {role: _content(config.get(f"{role}_token")) for role in _ROLES}
    if not any(named.values()):
        return TextTokenizer(tokenizer, _guessed(tokenizer.get_vocab()), name)
    if file.name == "tokenizer.json" and any(
        token and tokenizer.token_to_id(token) is None for token in named.values()
    ):
        return _through_transformers(file.parent, name, local=True)  # it adds such tokens to the vocabulary
    return TextTokenizer(tokenizer, SpecialTokens(**named), name)


def _content(token: object) -> str | None:
    """A special token is written as a string, or as an object with rules about the space around it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _guessed(vocabulary: dict[str, int]) -> SpecialTokens:
    """Which special tokens a vocabulary has, by the names in it. OPT's holds GPT-2's `<|endoftext|>` as well."""
    if "</s>" in vocabulary and "<pad>" in vocabulary:
        return SpecialTokens(bos="</s>", eos="</s>", pad="<pad>")
    if "<|endoftext|>" in vocabulary:
        return SpecialTokens(bos="<|endoftext|>", eos="<|endoftext|>")
    return SpecialTokens()


def _from_vocabulary(vocabulary_file: Path, merges_file: Path, name: str) -> TextTokenizer:
    vocabulary = _read_object(vocabulary_file)
    if not vocabulary or not all(type(token_id) is int and token_id >= 0 for token_id in vocabulary.values()):
        raise ModelError(f"{vocabulary_file} is not a vocabulary: expected one object of tokens and their ids")
    merges = _read_merges(merges_file)
    try:
        tokenizer = byte_level(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{merges_file} does not go with {vocabulary_file}: {error}") from error
    special = _guessed(vocabulary)
    tokenizer.add_special_tokens([token for token in (special.eos, special.pad) if token is not None])
    if special.pad is not None and special.bos is not None:
        with_prefix(tokenizer, special.bos, vocabulary[special.bos])
    return TextTokenizer(tokenizer, special, name)


def _read_merges(file: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line or line.startswith("#version"):
            continue
        parts = line.removesuffix("\r").split(" ")
        if len(parts) != 2 or not all(parts):
            raise ModelError(f"{file} line {number} is not a merge: expected two parts and a space, not {line[:40]!r}")
        merges.append((parts[0], parts[1]))
    return merges


def _read_object(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing where there is no such file."""
    if not file.exists():
        return {}
    try:
        content = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} does not hold a JSON object")
    return content


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{file} is not UTF-8 text: byte at offset {error.start}") from error


def _from_hub(path_or_id: str | Path, reachable: Callable[[], bool]) -> TextTokenizer:
    name = str(path_or_id)
    if isinstance(path_or_id, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise ModelError(
            f"there is no tokenizer folder {name!r}; expected one with tokenizer.json, or vocab.json and merges.txt"
        )
    return _through_transformers(name, name, local=not reachable())


def _through_transformers(where: str | Path, name: str, *, local: bool) -> TextTokenizer:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(where, trust_remote_code=False, local_files_only=local)
        tokenizer = loaded.backend_tokenizer
    except Exception as error:  # whatever a malformed file makes transformers stumble over
        unreachable = (
            "" if Path(where).is_dir() or not local else "the Hugging Face hub cannot be reached, and in its cache: "
        )
        raise ModelError(
            f"no tokenizer can be loaded from {name}: {unreachable}{_first_line(error)}; "
            f"name a folder with tokenizer.json, or with vocab.json and merges.txt"
        ) from error
    # A folder with a model's config.json alone makes an empty tokenizer there, without an error.
    if tokenizer.get_vocab_size(with_added_tokens=True) < _SMALLEST_PLAUSIBLE:
        raise ModelError(
            f"{name} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt; "
            f"name another by --tokenizer, or let one be trained on the data"
        )
    special = SpecialTokens(**{role: _content(getattr(loaded, f"{role}_token", None)) for role in _ROLES})
    return TextTokenizer(tokenizer, special, name)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
