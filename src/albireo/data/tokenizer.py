"""A tokenizer as the rest needs it: text to ids, the ids of special tokens, and a folder that transformers can load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from albireo.errors import ModelError

__all__ = ["SpecialTokens", "TextTokenizer"]


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens that stand for something other than text; None where there is no such token.

    Attributes:
        bos: begins a text.
        eos: ends one.
        pad: fills up what is too short.
        unk: stands for what cannot be expressed.
    """

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None


class TextTokenizer:
    """Wraps a `tokenizers.Tokenizer`; immutable.

    Truncation and padding that the given tokenizer has set are not taken over: a text is never shortened here.

    Args:
        tokenizer: what turns text into ids; its post-processor puts special tokens before or after a text.
        special: which of its tokens are special.
        name: where it is from, for messages.

    Attributes:
        name: as above.
        vocab_size: rows that an embedding needs: the largest id there is, plus 1.
        bos_id: id that begins a text, or None.
        eos_id: id that ends one, or None.
        pad_id: id that fills up, or None.

    Raises:
        ModelError: the vocabulary is empty, or a special token is not in it.
    """

    def __init__(self, tokenizer: Tokenizer, special: SpecialTokens, name: str) -> None:
        own = Tokenizer.from_str(tokenizer.to_str())
        own.no_truncation()
        own.no_padding()
        vocabulary = own.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ModelError(f"the tokenizer of {name} has an empty vocabulary; give a folder with a whole tokenizer")
        for role, token in asdict(special).items():
            if token is not None and token not in vocabulary:
                raise ModelError(f"the tokenizer of {name} names {token!r} as its {role} token, but does not hold it")
        self.name = name
        self.vocab_size = max(vocabulary.values()) + 1
        self.bos_id = None if special.bos is None else vocabulary[special.bos]
        self.eos_id = None if special.eos is None else vocabulary[special.eos]
        self.pad_id = None if special.pad is None else vocabulary[special.pad]
        self._special = special
        self._tokenizer = own

    @property
    def special_prefix(self) -> tuple[int, ...]:
        """The ids that every text comes out with, whatever it holds: those of an empty text."""
        return tuple(self._tokenizer.encode("").ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, special tokens included. Texts are encoded in parallel.

        Raises:
            ModelError: a text cannot be expressed in this vocabulary.
        """
        try:
            return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
        except Exception as error:  # tokenizers raises plain Exception
            raise ModelError(f"the tokenizer of {self.name} cannot encode the text: {error}") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def fingerprint(self) -> str:
        """Return a SHA-256, in hexadecimal, of all that decides the ids."""
        content = json.dumps([self._tokenizer.to_str(), asdict(self._special)])
        return hashlib.sha256(content.encode()).hexdigest()

    def renamed(self, name: str) -> TextTokenizer:
        """Return the same tokenizer with another name for messages."""
        return TextTokenizer(self._tokenizer, self._special, name)

    def describe(self) -> str:
        """Return one line for the user."""
        return f"{self.vocab_size:,} tokens, {self.name}"

    def save(self, folder: Path) -> None:
        """Write the files that `transformers.AutoTokenizer.from_pretrained(folder)` loads, without a network.

        Raises:
            ModelError: the folder cannot be written.
        """
        # This class, unlike one that is named after a model, takes tokenizer.json as it is: special tokens, byte-level
        # rules and the prefix. It is also the name that transformers 4 knows.
        config: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        config |= {f"{role}_token": token for role, token in asdict(self._special).items() if token is not None}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "tokenizer.json").write_text(self._tokenizer.to_str(), encoding="utf-8")
            (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ModelError(f"the tokenizer cannot be written to {folder}: {error.strerror or error}") from error
