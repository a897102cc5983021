import pytest

from albireo.config import MachineFacts, RunConfig, merge, resolve
from albireo.errors import ConfigError

CPU = MachineFacts("cpu", 1, bf16_is_native=False)
HOPPER = MachineFacts("cuda", 2, bf16_is_native=True)
TURING = MachineFacts("cuda", 1, bf16_is_native=False)


def test_tiny_has_its_own_defaults() -> None:
    config = resolve(RunConfig(), CPU)
    assert config.model.init == "random"
    assert config.data.sequence_length == 128
    assert config.optimizer.batch_size == 8
    assert config.optimizer.learning_rate == 1e-3
    assert config.schedule.epochs == 1.0


def test_everything_else_is_fine_tuned_from_pretrained_weights() -> None:
    config = resolve(merge(RunConfig(), {"model": "125m"}), CPU)
    assert config.model.init == "pretrained"
    assert config.data.sequence_length == 1024
    assert config.optimizer.learning_rate == 5e-5


@pytest.mark.parametrize(("machine", "precision"), [(CPU, "fp32"), (HOPPER, "bf16"), (TURING, "fp16")])
def test_precision_follows_the_machine(machine: MachineFacts, precision: str) -> None:
    assert resolve(RunConfig(), machine).plugin.precision == precision


def test_what_is_given_stays() -> None:
    given = {"learning_rate": 0.0, "sequence_length": 64, "batch_size": 3, "precision": "fp32", "steps": 5}
    config = resolve(merge(RunConfig(), given), HOPPER)
    assert config.optimizer.learning_rate == 0.0
    assert config.data.sequence_length == 64
    assert config.plugin.precision == "fp32"
    assert (config.schedule.steps, config.schedule.epochs) == (5, None)


def test_a_stage_is_decided_for_the_plugin_that_has_stages() -> None:
    def stage(**options: object) -> int | None:
        return resolve(merge(RunConfig(), options), CPU).plugin.zero_stage

    assert stage(plugin="low_level_zero") == 2
    assert stage(plugin="low_level_zero", zero_stage=1) == 1
    assert [stage(plugin=name) for name in ("torch_ddp", "torch_ddp_fp16", "torch_fsdp")] == [None] * 3


def test_placement_is_decided_for_the_plugin_that_has_one() -> None:
    def placed(**options: object) -> list[object]:
        plugin = resolve(merge(RunConfig(), options), CPU).plugin
        shares = [plugin.offload_optim_frac, plugin.offload_param_frac, plugin.shard_param_frac]
        return [plugin.placement, *shares, plugin.prefetch]

    assert placed(plugin="gemini") == ["auto", None, None, None, 2]
    assert placed(plugin="gemini", placement="auto", prefetch=0) == ["auto", None, None, None, 0]
    assert placed(plugin="gemini", placement="static") == ["static", 0.0, 0.0, 1.0, 2]
    assert placed(plugin="gemini", offload_optim_frac=0.5) == ["static", 0.5, 0.0, 1.0, 2]
    assert placed(plugin="gemini", offload_param_frac=0.0) == ["static", 0.0, 0.0, 1.0, 2]
    assert placed(plugin="gemini", shard_param_frac=0.25, prefetch=3) == ["static", 0.0, 0.0, 0.25, 3]
    assert placed(plugin="torch_fsdp") == [None] * 5


def test_a_cap_on_a_cpu_is_for_the_device_that_gemini_simulates() -> None:
    assert resolve(merge(RunConfig(), {"plugin": "gemini", "mem_cap": 1.0}), CPU).plugin.mem_cap == 1.0


@pytest.mark.parametrize("machine", [CPU, HOPPER, TURING])
def test_the_plugin_that_says_fp16_in_its_name_computes_in_it(machine: MachineFacts) -> None:
    for given in ({}, {"precision": "fp16"}):
        config = resolve(merge(RunConfig(), {"plugin": "torch_ddp_fp16", **given}), machine)
        assert config.plugin.precision == "fp16"


@pytest.mark.parametrize("plugin", ["low_level_zero", "torch_fsdp"])
def test_what_shards_offloads_in_every_precision(plugin: str) -> None:
    for precision in ("fp32", "fp16", "bf16"):
        given = {"plugin": plugin, "cpu_offload": True, "precision": precision, "gpus": 2}
        config = resolve(merge(RunConfig(), given), HOPPER)
        assert (config.plugin.cpu_offload, config.plugin.precision) == (True, precision)


def test_what_is_resolved_stays_as_it_is() -> None:
    for name in ("torch_ddp", "torch_ddp_fp16", "torch_fsdp", "low_level_zero", "gemini"):
        config = resolve(merge(RunConfig(), {"plugin": name}), HOPPER)
        assert resolve(config, HOPPER) == config
    config = resolve(merge(RunConfig(), {"plugin": "gemini", "offload_param_frac": 0.5, "host_cap": 3.0}), HOPPER)
    assert resolve(config, HOPPER) == config


@pytest.mark.parametrize(
    ("options", "machine", "message"),
    [
        ({"zero_stage": 1}, CPU, "--zero-stage is for --plugin low_level_zero, and --plugin torch_ddp has no stages"),
        ({"zero_stage": 2, "plugin": "torch_fsdp"}, CPU, "and --plugin torch_fsdp has no stages: leave it out"),
        ({"cpu_offload": True}, CPU, "--cpu-offload is for --plugin low_level_zero or torch_fsdp, .*--no-cpu-offload"),
        ({"cpu_offload": True, "plugin": "torch_ddp_fp16"}, HOPPER, "--plugin torch_ddp_fp16 keeps all on the device"),
        ({"zero_stage": 1, "plugin": "gemini"}, CPU, "--plugin gemini has no stages"),
        ({"cpu_offload": True, "plugin": "gemini"}, CPU, "--cpu-offload is for --plugin low_level_zero or torch_fsdp"),
        ({"placement": "auto"}, CPU, "--placement is for --plugin gemini, and --plugin torch_ddp has no such option"),
        ({"prefetch": 1, "plugin": "low_level_zero"}, CPU, "--prefetch is for --plugin gemini"),
        ({"prefetch": 0, "plugin": "low_level_zero"}, CPU, "--prefetch is for --plugin gemini"),
        ({"offload_optim_frac": 0.0}, CPU, "--offload-optim-frac is for --plugin gemini"),
        ({"shard_param_frac": 0.5, "plugin": "torch_fsdp"}, CPU, "--shard-param-frac is for --plugin gemini"),
        ({"host_cap": 4.0}, CPU, "--host-cap is for --plugin gemini"),
        (
            {"plugin": "gemini", "placement": "auto", "offload_param_frac": 0.5},
            CPU,
            "--offload-param-frac is for --placement static: with auto the cap decides",
        ),
        (
            {"plugin": "torch_ddp_fp16", "precision": "bf16"},
            HOPPER,
            "computes in fp16, not in bf16: take --precision fp16, or --plugin torch_ddp --precision bf16",
        ),
        ({"gpus": 3}, HOPPER, "--gpus 3 asks for more than this machine has: 2 GPUs"),
        ({"mem_cap": 4.0}, CPU, "--mem-cap bounds a GPU's memory"),
        ({"init": "pretrained"}, CPU, "tiny has no pretrained weights"),
        ({"precision": "bf16"}, TURING, "bf16 is not native on this GPU"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], machine: MachineFacts, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(merge(RunConfig(), options), machine)
