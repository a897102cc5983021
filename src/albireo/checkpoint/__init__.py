"""Checkpoints: named slices of named tensors in safetensors files, and JSON; written whole or not at all.

Read in this order: `slices` and `manifest` (what a checkpoint is: pure), `tensor_file` and `documents` (its two kinds
of file), `writer`, `housekeeping`, `reader`, `catalog`. `folder`
swaps any other folder in with the same care. `tensor_files` and `saved_tensors` write and read weights as Hugging Face
has them. Nothing here knows of process groups: other ranks are a `Ranks`.
"""

from __future__ import annotations

from albireo.checkpoint.catalog import newest_whole
from albireo.checkpoint.documents import JSON, NewerFormatError, decode_document, encode_document
from albireo.checkpoint.folder import replace_folder, settle_folder
from albireo.checkpoint.housekeeping import tidy
from albireo.checkpoint.module_names import tensor_names
from albireo.checkpoint.ranks import OneRank, Ranks
from albireo.checkpoint.reader import Checkpoint, open_checkpoint
from albireo.checkpoint.saved_tensors import SavedTensors, TensorSource, open_saved_tensors, refuse_pickle
from albireo.checkpoint.slices import DTYPE_CODES, Piece, TensorInfo, TensorSlice, check_coverage, whole
from albireo.checkpoint.tensor_file import ReadElements
from albireo.checkpoint.tensor_files import write_file, write_saved_tensors, write_sharded_tensors
from albireo.checkpoint.values import decode_value, encode_value
from albireo.checkpoint.writer import Snapshot, save_checkpoint

__all__ = [
    "DTYPE_CODES",
    "JSON",
    "Checkpoint",
    "NewerFormatError",
    "OneRank",
    "Piece",
    "Ranks",
    "ReadElements",
    "SavedTensors",
    "Snapshot",
    "TensorInfo",
    "TensorSlice",
    "TensorSource",
    "check_coverage",
    "decode_document",
    "decode_value",
    "encode_document",
    "encode_value",
    "newest_whole",
    "open_checkpoint",
    "open_saved_tensors",
    "refuse_pickle",
    "replace_folder",
    "save_checkpoint",
    "settle_folder",
    "tensor_names",
    "tidy",
    "whole",
    "write_file",
    "write_saved_tensors",
    "write_sharded_tensors",
]
