"""What a family of models is, which model a name means, and how it comes into memory."""

from __future__ import annotations

from albireo.models.build import build_model, build_model_lazily, configure_model, materialise
from albireo.models.checkpointing import enable_activation_checkpointing
from albireo.models.choice import ModelChoice, fetch_model, resolve_model
from albireo.models.compiling import compile_blocks
from albireo.models.families import FAMILIES, count_parameters, family_of
from albireo.models.family import Family, Size
from albireo.models.gpt2 import GPT2
from albireo.models.initialise import InitialValues, initial_values, initialise, initialise_module
from albireo.models.kept_blocks import ActivationRoom, KeptBlocks
from albireo.models.lazy import LazyInitContext, LazyWeights, lazy_source_of
from albireo.models.opt import OPT
from albireo.models.pretrained import check_weights, load_weights, weight_files
from albireo.models.quantised_weights import QuantisedWeights
from albireo.models.vit import VIT
from albireo.models.vocabulary import Init, Vocabulary, reconcile_vocabulary
from albireo.models.weight_sources import FolderWeights, RandomWeights

__all__ = [
    "FAMILIES",
    "GPT2",
    "OPT",
    "VIT",
    "ActivationRoom",
    "Family",
    "FolderWeights",
    "Init",
    "InitialValues",
    "KeptBlocks",
    "LazyInitContext",
    "LazyWeights",
    "ModelChoice",
    "QuantisedWeights",
    "RandomWeights",
    "Size",
    "Vocabulary",
    "build_model",
    "build_model_lazily",
    "check_weights",
    "compile_blocks",
    "configure_model",
    "count_parameters",
    "enable_activation_checkpointing",
    "family_of",
    "fetch_model",
    "initial_values",
    "initialise",
    "initialise_module",
    "lazy_source_of",
    "load_weights",
    "materialise",
    "reconcile_vocabulary",
    "resolve_model",
    "weight_files",
]
