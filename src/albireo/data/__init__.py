"""Data: sources of text, tokenizers, the token cache, packed blocks, the global order of samples, and batches."""

from __future__ import annotations

from albireo.data.blocks import RandomTokens, TokenBlocks, pack, split_blocks
from albireo.data.cache import tokenize, trained_tokenizer
from albireo.data.loader import IGNORED_LABEL, AnyDataset, Batch, StepLoader, evaluation_batches
from albireo.data.order import BatchLayout, SampleOrder, epoch_of, epoch_permutation, samples_at, steps_for
from albireo.data.sampler import EpochSampler
from albireo.data.source import check_source, open_source
from albireo.data.store import default_cache_folder
from albireo.data.text import TextData, TextOptions, prepare_text, prepare_tokenizer
from albireo.data.text_source import TextSource
from albireo.data.tokenizer import SpecialTokens, TextTokenizer
from albireo.data.tokenizer_loading import load_tokenizer
from albireo.data.tokenizer_training import train_tokenizer
from albireo.data.tokens import TokenStream

__all__ = [
    "IGNORED_LABEL",
    "AnyDataset",
    "Batch",
    "BatchLayout",
    "EpochSampler",
    "RandomTokens",
    "SampleOrder",
    "SpecialTokens",
    "StepLoader",
    "TextData",
    "TextOptions",
    "TextSource",
    "TextTokenizer",
    "TokenBlocks",
    "TokenStream",
    "check_source",
    "default_cache_folder",
    "epoch_of",
    "epoch_permutation",
    "evaluation_batches",
    "load_tokenizer",
    "open_source",
    "pack",
    "prepare_text",
    "prepare_tokenizer",
    "samples_at",
    "split_blocks",
    "steps_for",
    "tokenize",
    "train_tokenizer",
    "trained_tokenizer",
]
