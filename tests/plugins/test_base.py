import copy

import torch
from torch import nn

from albireo.plugins import ModelWrapper


def test_a_wrapped_model_is_called_like_itself_and_counts_once() -> None:
    original = nn.Linear(3, 2)
    outer = nn.Sequential(original)
    wrapper = ModelWrapper(outer, original, evaluation_module=original)
    inputs = torch.ones(1, 3)
    assert torch.equal(wrapper(inputs), original(inputs))
    assert wrapper.unwrap() is original
    assert wrapper.evaluation_module is original
    assert [name for name, _ in wrapper.named_parameters(remove_duplicate=False)] == [
        "module.0.weight",
        "module.0.bias",
    ]


def test_without_another_one_the_module_itself_is_evaluated() -> None:
    module = nn.Linear(3, 2)
    wrapper = ModelWrapper(module, module)
    assert wrapper.evaluation_module is module


def test_the_mode_reaches_the_original() -> None:
    original = nn.Dropout(0.5)
    wrapper = ModelWrapper(nn.Sequential(original), original)
    wrapper.eval()
    assert not original.training
    wrapper.train()
    assert original.training


def test_a_copy_is_whole() -> None:
    original = nn.Linear(3, 2)
    twin = copy.deepcopy(ModelWrapper(nn.Sequential(original), original))
    assert twin.unwrap() is twin.module[0]  # type: ignore[index]
    assert twin.unwrap() is not original
