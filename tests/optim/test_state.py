import pytest
import torch
from torch import nn

from albireo.errors import CheckpointError
from albireo.optim import adamw, decay_groups, named_state, restore_named_state


def make() -> tuple[nn.Module, torch.optim.Optimizer, dict[nn.Parameter, str]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    optimizer = adamw(decay_groups(model.named_parameters(), 0.1), 0.01)
    return model, optimizer, {parameter: name for name, parameter in model.named_parameters()}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    model(inputs).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_biases_and_norms_do_not_decay() -> None:
    _, optimizer, names = make()
    decaying, plain = optimizer.param_groups
    assert sorted(names[parameter] for parameter in decaying["params"]) == ["0.weight", "2.weight"]
    assert sorted(names[parameter] for parameter in plain["params"]) == ["0.bias", "1.bias", "1.weight", "2.bias"]
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_a_frozen_parameter_is_in_no_group() -> None:
    model, _, _ = make()
    model[0].weight.requires_grad_(False)
    groups = decay_groups(model.named_parameters(), 0.1)
    assert all(parameter is not model[0].weight for group in groups for parameter in group["params"])


def test_an_optimizer_goes_on_from_its_named_state_to_the_bit() -> None:
    model, optimizer, names = make()
    for seed in range(3):
        step(model, optimizer, seed)
    saved = {name: tensor.clone() for name, tensor in named_state(optimizer, names).items()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step(model, optimizer, 9)

    other, other_optimizer, other_names = make()
    other.load_state_dict(weights)
    infos = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in saved.items()}
    restore_named_state(other_optimizer, other_names, infos, lambda name, tensor: tensor.copy_(saved[name]))
    step(other, other_optimizer, 9)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_states_of_unknown_parameters_are_refused() -> None:
    _, optimizer, names = make()
    with pytest.raises(CheckpointError, match=r"states of 7\.weight"):
        restore_named_state(optimizer, names, {"exp_avg/7.weight": ((1,), torch.float32)}, lambda *_: None)
