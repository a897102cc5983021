import dataclasses

import pytest

from albireo.config import MachineFacts, PluginConfig, RunConfig, merge, resolve
from albireo.errors import ConfigError
from albireo.plugins import PLUGINS, LowLevelZeroPlugin, TorchDDPPlugin, TorchFSDPPlugin, make_plugin


def test_every_choice_of_the_flag_is_a_plugin() -> None:
    choices = next(info for info in RunConfig.options() if info.name == "plugin").choices
    assert sorted(choices or ()) == sorted(PLUGINS)
    for name in choices or ():
        # torch_ddp_fp16 is another name for torch_ddp in fp16.
        wanted = {"torch_ddp_fp16": "torch_ddp"}.get(name, name)
        assert make_plugin(dataclasses.replace(PluginConfig(), plugin=name)).name == wanted


def test_fp16_in_the_name_is_fp16() -> None:
    machine = MachineFacts("cpu", 1, bf16_is_native=False)
    plugin = make_plugin(resolve(merge(RunConfig(), {"plugin": "torch_ddp_fp16"}), machine).plugin)
    assert isinstance(plugin, TorchDDPPlugin)
    assert (plugin.name, plugin.precision) == ("torch_ddp", "fp16")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", None])
def test_the_precision_is_passed_on(precision: str | None) -> None:
    plugin = make_plugin(dataclasses.replace(PluginConfig(), precision=precision))
    assert isinstance(plugin, TorchDDPPlugin)
    assert plugin.precision == (precision or "fp32")


@pytest.mark.parametrize(("given", "stage"), [(None, 2), (1, 1), (2, 2)])
def test_the_stage_is_passed_on(given: int | None, stage: int) -> None:
    config = dataclasses.replace(PluginConfig(), plugin="low_level_zero", precision="bf16", zero_stage=given)
    plugin = make_plugin(config)
    assert isinstance(plugin, LowLevelZeroPlugin)
    assert (plugin.stage, plugin.precision) == (stage, "bf16")


def test_offload_is_passed_on() -> None:
    config = dataclasses.replace(PluginConfig(), plugin="torch_fsdp", precision="bf16", cpu_offload=True)
    plugin = make_plugin(config)
    assert isinstance(plugin, TorchFSDPPlugin)
    assert (plugin.precision, plugin.cpu_offload) == ("bf16", True)


def test_an_unknown_plugin_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"--plugin is one of torch_ddp, .*torch_fsdp.*, not 'pipeline'"):
        make_plugin(dataclasses.replace(PluginConfig(), plugin="pipeline"))
