"""A tokenizer trained on the data itself, with OPT's layout of special tokens or GPT-2's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from albireo.data.tokenizer import SpecialTokens, TextTokenizer
from albireo.errors import ModelError

__all__ = [
    "GPT2_TOKENS",
    "OPT_SPECIAL_TOKENS",
    "OPT_TOKENS",
    "SMALLEST_VOCABULARY",
    "TokenLayout",
    "byte_level",
    "train_tokenizer",
    "with_prefix",
]

OPT_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
"""Ids 0 to 3. OPT begins a text with `</s>`, which is also what ends one; `<s>` only holds its place."""


@dataclass(frozen=True)
class TokenLayout:
    """Which special tokens a tokenizer that is trained has.

    Attributes:
        name: of the layout.
        tokens: all of them; they have the first ids.
        special: what each is for.
        prefix: the one that begins every text, or None.
    """

    name: str
    tokens: tuple[str, ...]
    special: SpecialTokens
    prefix: str | None


OPT_TOKENS = TokenLayout(
    "opt", OPT_SPECIAL_TOKENS, SpecialTokens(bos="</s>", eos="</s>", pad="<pad>", unk="<unk>"), prefix="</s>"
)
GPT2_TOKENS = TokenLayout(
    "gpt2", ("<|endoftext|>",), SpecialTokens(bos="<|endoftext|>", eos="<|endoftext|>"), prefix=None
)

SMALLEST_VOCABULARY = 256 + len(OPT_SPECIAL_TOKENS)
_PROGRESS_EVERY = 256


def byte_level(model: models.BPE) -> Tokenizer:
    """Return a tokenizer that cuts text as GPT-2 and OPT do: a byte-level pair encoding that can express any text."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def with_prefix(tokenizer: Tokenizer, token: str, token_id: int) -> None:
    """Make every text begin with a special token, as OPT's do."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, token_id)]
    )


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    progress: Callable[[int, int | None], None] | None = None,
    layout: TokenLayout = OPT_TOKENS,
) -> TextTokenizer:
    """Train a byte-level pair encoding: the same text gives the same tokenizer.

    A small text has fewer pairs than were asked for; then the vocabulary is smaller than `vocab_size`.

    Args:
        documents: the text; read once, not held.
        vocab_size: the most entries, special tokens included.
        progress: told the bytes read so far, and None for their number.
        layout: its special tokens.

    Raises:
        ModelError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    smallest = 256 + len(layout.tokens)
    if vocab_size < smallest:
        raise ModelError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and {len(layout.tokens)} special tokens need "
            f"at least {smallest}"
        )
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(layout.tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_counted(documents, progress), trainer=trainer)
    if layout.prefix is not None:
        with_prefix(tokenizer, layout.prefix, layout.tokens.index(layout.prefix))
    return TextTokenizer(tokenizer, layout.special, "trained on the data")


def _counted(documents: Iterable[str], progress: Callable[[int, int | None], None] | None) -> Iterator[str]:
    done_bytes = 0
    for number, document in enumerate(documents):
        yield document
        done_bytes += len(document.encode())
        if progress is not None and number % _PROGRESS_EVERY == 0:
            progress(done_bytes, None)
    if progress is not None:
        progress(done_bytes, done_bytes)
