"""Checkpoints: named slices of named tensors in safetensors files, and JSON; written whole or not at all.

Read in this order: `slices` and `manifest` (what a checkpoint is: pure), `tensor_file` and `documents` (its two kinds
of file), `writer`, `housekeeping`, `reader`, `catalog`. `folder`
swaps any other folder in with the same care. Nothing here knows of process groups: other ranks are a `Ranks`.
"""

from __future__ import annotations

from albireo.checkpoint.catalog import newest_whole
from albireo.checkpoint.documents import JSON, NewerFormatError
from albireo.checkpoint.folder import replace_folder, settle_folder
from albireo.checkpoint.housekeeping import tidy
from albireo.checkpoint.ranks import OneRank, Ranks
from albireo.checkpoint.reader import Checkpoint, open_checkpoint
from albireo.checkpoint.slices import TensorInfo, TensorSlice, whole
from albireo.checkpoint.writer import Snapshot, save_checkpoint

__all__ = [
    "JSON",
    "Checkpoint",
    "NewerFormatError",
    "OneRank",
    "Ranks",
    "Snapshot",
    "TensorInfo",
    "TensorSlice",
    "newest_whole",
    "open_checkpoint",
    "replace_folder",
    "save_checkpoint",
    "settle_folder",
    "tidy",
    "whole",
]
