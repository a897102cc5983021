import dataclasses

import pytest

from albireo.config import PluginConfig, RunConfig
from albireo.errors import ConfigError
from albireo.plugins import PLUGINS, TorchDDPPlugin, TorchFSDPPlugin, make_plugin


def test_every_choice_of_the_flag_is_a_plugin() -> None:
    choices = next(info for info in RunConfig.options() if info.name == "plugin").choices
    assert sorted(choices or ()) == sorted(PLUGINS)
    for name in choices or ():
        assert make_plugin(dataclasses.replace(PluginConfig(), plugin=name)).name == name.removesuffix("_fp16")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", None])
def test_the_precision_is_passed_on(precision: str | None) -> None:
    plugin = make_plugin(dataclasses.replace(PluginConfig(), precision=precision))
    assert isinstance(plugin, TorchDDPPlugin)
    assert plugin.precision == (precision or "fp32")


def test_offload_is_passed_on() -> None:
    config = dataclasses.replace(PluginConfig(), plugin="torch_fsdp", precision="bf16", cpu_offload=True)
    plugin = make_plugin(config)
    assert isinstance(plugin, TorchFSDPPlugin)
    assert (plugin.precision, plugin.cpu_offload) == ("bf16", True)


def test_an_unknown_plugin_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"--plugin is one of torch_ddp, .*torch_fsdp.*, not 'gemini'"):
        make_plugin(dataclasses.replace(PluginConfig(), plugin="gemini"))
