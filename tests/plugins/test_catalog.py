import dataclasses

import pytest

from albireo.config import MachineFacts, PluginConfig, RunConfig, merge, resolve
from albireo.errors import ConfigError
from albireo.memory import PlacementPolicy
from albireo.plugins import PLUGINS, GeminiPlugin, LowLevelZeroPlugin, TorchDDPPlugin, TorchFSDPPlugin, make_plugin


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


def test_placement_and_caps_are_passed_on() -> None:
    machine = MachineFacts("cpu", 1, bf16_is_native=False)

    def made(**options: object) -> GeminiPlugin:
        plugin = make_plugin(resolve(merge(RunConfig(), {"plugin": "gemini", **options}), machine).plugin)
        assert isinstance(plugin, GeminiPlugin)
        return plugin

    assert made()._policy == PlacementPolicy("auto", prefetch=2)
    assert made(prefetch=0)._policy == PlacementPolicy("auto", prefetch=0)
    assert made(placement="static")._policy == PlacementPolicy("static", 0.0, 0.0, 1.0)
    shares = {"offload_optim_frac": 0.5, "offload_param_frac": 0.25, "shard_param_frac": 0.75}
    assert made(**shares, prefetch=5)._policy == PlacementPolicy("static", 0.5, 0.25, 0.75, 5)
    plugin = made(mem_cap=1.5, host_cap=2.0, precision="bf16")
    assert (plugin._mem_cap_bytes, plugin._host_cap_bytes) == (3 * 2**29, 2**31)
    assert (plugin.name, plugin.precision) == ("gemini", "bf16")
    assert (made()._mem_cap_bytes, made()._host_cap_bytes) == (None, None)


def test_an_unknown_plugin_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"--plugin is one of torch_ddp, .*torch_fsdp.*gemini, not 'gemnii'"):
        make_plugin(dataclasses.replace(PluginConfig(), plugin="gemnii"))
