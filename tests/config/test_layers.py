import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.config import (
    MachineFacts,
    PluginConfig,
    RunConfig,
    config_from_mapping,
    config_to_mapping,
    merge,
    read_config_file,
    resolve,
)
from albireo.errors import ConfigError


def test_a_configuration_comes_back_from_json() -> None:
    config = merge(RunConfig(), {"model": "125m", "batch_size": 4, "steps": 7, "precision": "bf16"})
    text = json.dumps(config_to_mapping(config))
    assert config_from_mapping(json.loads(text), where="test") == config


def test_later_layers_win_and_leave_the_rest() -> None:
    config = merge(merge(RunConfig(), {"batch_size": 4, "clip": 0.5}), {"batch_size": 2})
    assert config.optimizer.batch_size == 2
    assert config.optimizer.clip == 0.5


@given(st.integers(1, 1000), st.floats(0.1, 100))
def test_steps_and_epochs_replace_each_other(steps: int, epochs: float) -> None:
    config = merge(merge(RunConfig(), {"epochs": epochs}), {"steps": steps})
    assert (config.schedule.steps, config.schedule.epochs) == (steps, None)
    config = merge(merge(RunConfig(), {"steps": steps}), {"epochs": epochs})
    assert (config.schedule.steps, config.schedule.epochs) == (None, epochs)


def test_another_plugin_begins_without_the_stage_of_the_one_before() -> None:
    begun = merge(RunConfig(), {"plugin": "low_level_zero", "zero_stage": 1})
    assert merge(begun, {"plugin": "torch_fsdp"}).plugin.zero_stage is None
    assert merge(begun, {"plugin": "low_level_zero"}).plugin.zero_stage == 1
    assert merge(begun, {"batch_size": 2}).plugin.zero_stage == 1
    # What is said together is kept, to be refused.
    assert merge(begun, {"plugin": "torch_fsdp", "zero_stage": 2}).plugin.zero_stage == 2


def test_another_plugin_begins_without_the_placement_of_the_one_before() -> None:
    begun = resolve(
        merge(RunConfig(), {"plugin": "gemini", "offload_optim_frac": 0.5, "prefetch": 3, "host_cap": 2.0}),
        MachineFacts("cpu", 1, bf16_is_native=False),
    )
    then = merge(begun, {"plugin": "torch_fsdp"}).plugin
    assert (then.placement, then.offload_optim_frac, then.offload_param_frac, then.shard_param_frac) == (None,) * 4
    assert (then.prefetch, then.host_cap) == (None, 0.0)
    assert merge(begun, {"plugin": "gemini"}).plugin == begun.plugin
    assert merge(begun, {"offload_param_frac": 1.0}).plugin.offload_optim_frac == 0.5
    # What is said together is kept, to be refused.
    assert merge(begun, {"plugin": "torch_fsdp", "prefetch": 1}).plugin.prefetch == 1


def test_a_share_and_an_automatic_placement_replace_each_other() -> None:
    machine = MachineFacts("cpu", 1, bf16_is_native=False)

    def resumed(begun: dict[str, object], then: dict[str, object]) -> PluginConfig:
        """A run goes on by what was resolved, as its file has it, and by the flags."""
        told = config_to_mapping(resolve(merge(RunConfig(), {"plugin": "gemini", **begun}), machine))
        return resolve(merge(config_from_mapping(told, where="test"), then), machine).plugin

    now = resumed({}, {"offload_optim_frac": 0.5})
    assert (now.placement, now.offload_optim_frac, now.shard_param_frac) == ("static", 0.5, 1.0)
    now = resumed({"offload_param_frac": 0.25}, {"placement": "auto"})
    assert (now.placement, now.offload_optim_frac, now.offload_param_frac, now.shard_param_frac) == (
        "auto",
        None,
        None,
        None,
    )
    now = resumed({"offload_param_frac": 0.25}, {"offload_optim_frac": 0.5})
    assert (now.placement, now.offload_optim_frac, now.offload_param_frac) == ("static", 0.5, 0.25)
    assert resumed({"offload_param_frac": 0.25}, {"placement": "static"}).offload_param_frac == 0.25
    # What is said together is refused.
    with pytest.raises(ConfigError, match="leave one of them out"):
        resumed({}, {"placement": "auto", "offload_optim_frac": 0.5})


def test_a_file_that_holds_both_keeps_both() -> None:
    config = config_from_mapping({"schedule": {"steps": 10, "epochs": 0.5}}, where="test")
    assert (config.schedule.steps, config.schedule.epochs) == (10, 0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"optimizer": {"batchsize": 3}}', "unknown key optimizer.batchsize; did you mean 'batch_size'?"),
        ('{"optimiser": {}}', "unknown section 'optimiser'; did you mean 'optimizer'?"),
        ('{"optimizer": 3}', "section 'optimizer' must be an object, not 3"),
        ('{"optimizer": {"batch_size": "8"}}', "--batch-size takes a whole number, not '8'"),
        ('{"recipe": "vit"}', "is for the recipe 'vit', and this is 'opt'"),
        ("[1]", "must hold a JSON object"),
        ('{"optimizer": }', "is not JSON: Expecting value at line 1 column 15"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_config_file(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: No such file"):
        read_config_file(tmp_path / "nowhere.json")
