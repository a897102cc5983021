"""A small OPT model, and a folder as `save_pretrained` writes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import OPTForCausalLM, PreTrainedModel

from albireo.models import OPT


@pytest.fixture(scope="session")
def trained() -> PreTrainedModel:
    """A tiny model whose weights stand for trained ones: all differ, biases and norms too."""
    torch_state = torch.get_rng_state()
    torch.manual_seed(1)
    config = OPT.config_for("tiny", vocab_size=96)
    config.max_position_embeddings = 32
    model = OPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    torch.set_rng_state(torch_state)
    return model.eval()


@pytest.fixture(scope="session")
def saved(trained: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    trained.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "model"))
