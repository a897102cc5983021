"""Data: sources of text, tokenizers, the token cache, packed blocks, the global order of samples, and batches."""

from __future__ import annotations

from albireo.data.blocks import RandomTokens, TokenBlocks, pack, split_blocks
from albireo.data.buckets import Buckets
from albireo.data.cache import tokenize, trained_tokenizer
from albireo.data.instruction import Instruction, parse_instruction
from albireo.data.instruction_data import InstructionData, InstructionOptions, pad_rows, prepare_instructions
from albireo.data.instruction_source import InstructionSource, check_instructions, open_instructions
from albireo.data.loader import (
    IGNORED_LABEL,
    AnyBatch,
    AnyDataset,
    Batch,
    Batching,
    Collate,
    StepLoader,
    evaluation_batches,
)
from albireo.data.order import BatchLayout, SampleOrder, epoch_of, epoch_permutation, samples_at, steps_for
from albireo.data.picture_data import (
    PictureBatch,
    PictureData,
    Pictures,
    evaluation_pictures,
    picture_batching,
    prepare_pictures,
)
from albireo.data.picture_form import PictureForm, load_picture_form
from albireo.data.picture_source import PictureSource, open_pictures
from albireo.data.prompt import prompt_of
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
    "AnyBatch",
    "AnyDataset",
    "Batch",
    "BatchLayout",
    "Batching",
    "Buckets",
    "Collate",
    "EpochSampler",
    "Instruction",
    "InstructionData",
    "InstructionOptions",
    "InstructionSource",
    "PictureBatch",
    "PictureData",
    "PictureForm",
    "PictureSource",
    "Pictures",
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
    "check_instructions",
    "check_source",
    "default_cache_folder",
    "epoch_of",
    "epoch_permutation",
    "evaluation_batches",
    "evaluation_pictures",
    "load_picture_form",
    "load_tokenizer",
    "open_instructions",
    "open_pictures",
    "open_source",
    "pack",
    "pad_rows",
    "parse_instruction",
    "picture_batching",
    "prepare_instructions",
    "prepare_pictures",
    "prepare_text",
    "prepare_tokenizer",
    "prompt_of",
    "samples_at",
    "split_blocks",
    "steps_for",
    "tokenize",
    "train_tokenizer",
    "trained_tokenizer",
]
