"""All that takes long to import, for the process that cases are forked from. It must not touch a GPU: CUDA does not survive a fork."""

from __future__ import annotations

import os

# Asking CUDA itself whether there is a GPU would be touching it.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import albireo.bench.worker  # noqa: F401
