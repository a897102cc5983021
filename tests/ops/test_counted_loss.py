from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from albireo.errors import ConfigError
from albireo.ops import count_terms, sum_of_loss

PLAIN = nn.Linear(1, 1)


def model(**attributes: Any) -> nn.Module:
    module = nn.Linear(1, 1)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


TEXT = torch.tensor([[5, 6, -100, 8], [-100, -100, 7, -100]])
CLASSES = torch.tensor([0, 2, -100, 1])


@pytest.mark.parametrize(
    ("batch", "module", "criterion", "count"),
    [
        ({"labels": TEXT}, PLAIN, None, 3),
        ({"labels": TEXT}, model(loss_type="ForCausalLM"), None, 3),
        ({"labels": TEXT}, model(loss_type="ForMaskedLM"), None, 4),
        ({"labels": TEXT}, model(loss_type="ForTokenClassification"), None, 4),
        (
            {"labels": TEXT},
            model(loss_type="ForConditionalGeneration", config=SimpleNamespace(is_encoder_decoder=True)),
            None,
            4,
        ),
        ({"labels": TEXT}, PLAIN, lambda outputs, _: outputs, 3),
        ({"labels": TEXT}, PLAIN, nn.CrossEntropyLoss(), 4),
        ({"labels": CLASSES}, PLAIN, None, 3),
        ({"labels": CLASSES}, PLAIN, F.cross_entropy, 3),
        ({"labels": torch.tensor([1, 7, 7])}, PLAIN, nn.CrossEntropyLoss(ignore_index=7), 1),
        ({"labels": torch.zeros(4, 3)}, PLAIN, nn.MSELoss(), 12),
        ({"labels": torch.zeros(2, 5, 5, dtype=torch.int64)}, model(loss_type="ForSemanticSegmentation"), None, 50),
        ({"x": torch.zeros(4, 3)}, PLAIN, None, 4),
        ({"note": "text", "scale": torch.tensor(1.0), "x": torch.zeros(4, 3)}, PLAIN, None, 4),
        ({"x": torch.zeros(4, 3), "labels": None}, PLAIN, None, 4),
    ],
)
def test_what_a_mean_is_taken_over(batch: dict[str, Any], module: nn.Module, criterion: Any, count: int) -> None:
    assert count_terms(batch, module, criterion) == count


def test_what_cannot_be_counted_is_named() -> None:
    with pytest.raises(ConfigError, match="give train_step tokens"):
        count_terms({"text": "words"}, PLAIN)
    with pytest.raises(ConfigError, match="reduction='sum'"):
        count_terms({"labels": CLASSES}, PLAIN, nn.CrossEntropyLoss(weight=torch.ones(3)))
    assert count_terms({"labels": CLASSES}, PLAIN, nn.CrossEntropyLoss(weight=torch.ones(3), reduction="sum")) == 3


def test_sums_of_all_forms_of_a_loss() -> None:
    mean = torch.tensor(1.5, dtype=torch.bfloat16)
    for output in (mean, SimpleNamespace(loss=mean)):
        loss = sum_of_loss(output, 4)
        assert (loss.item(), loss.dtype) == (6.0, torch.float32)
    assert sum_of_loss((torch.tensor(7.0), torch.tensor(3)), 3).item() == 7.0
    assert sum_of_loss(torch.tensor(7.0), 3, nn.MSELoss(reduction="sum")).item() == 7.0
    assert sum_of_loss(torch.tensor(7.0, dtype=torch.float64), 3).dtype == torch.float64


def test_a_mean_over_nothing_is_a_sum_of_nothing() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    loss = sum_of_loss(F.cross_entropy(logits, torch.full((2,), -100)), 0)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(
    "output", [None, {"logits": 1}, SimpleNamespace(loss=None), (torch.tensor(1.0), torch.ones(2))]
)
def test_what_is_no_loss_is_refused(output: Any) -> None:
    with pytest.raises(ConfigError, match="put labels into the batch"):
        sum_of_loss(output, 4)


def test_what_is_no_mean_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(3,\)"):
        sum_of_loss(torch.ones(3), 3)
