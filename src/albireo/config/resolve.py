"""Fill in what was left open, from the model and the machine. Pure: the same inputs give the same configuration."""

from __future__ import annotations

import dataclasses

from albireo.config.facts import MachineFacts
from albireo.config.run import PLUGIN_OPTIONS, PluginConfig, RunConfig
from albireo.errors import ConfigError

__all__ = ["resolve"]


def resolve(config: RunConfig, machine: MachineFacts) -> RunConfig:
    """Return the configuration with every default decided that does not need the data.

    Args:
        config: what the user said.
        machine: facts about the device.

    Returns:
        The configuration; of its fields only `steps`, `epochs`, `eval_every` and `save_every` may still be None.

    Raises:
        ConfigError: options that cannot go together, or that this machine cannot serve.
    """
    tiny = config.model.is_tiny
    _check(config, machine, tiny=tiny)
    init = config.model.init or ("random" if tiny else "pretrained")
    precision = config.plugin.precision
    if precision is None and config.plugin.plugin == "torch_ddp_fp16":
        precision = "fp16"
    if precision is None:
        if machine.device_type != "cuda":
            precision = "fp32"
        else:
            precision = "bf16" if machine.bf16_is_native else "fp16"
    optimizer = config.optimizer
    schedule = config.schedule
    batch_size = optimizer.batch_size or 8
    if schedule.epochs is None and schedule.steps is None:
        schedule = dataclasses.replace(schedule, epochs=1.0 if tiny else 3.0)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, init=init),
        data=config.data.resolved(tiny=tiny, samples_per_step=batch_size * optimizer.accumulate * config.plugin.gpus),
        adapter=config.adapter.resolved(),
        optimizer=dataclasses.replace(
            optimizer,
            learning_rate=(1e-3 if tiny else 3e-4 if config.adapter.is_on else 5e-5)
            if optimizer.learning_rate is None
            else optimizer.learning_rate,
            batch_size=batch_size,
        ),
        schedule=schedule,
        plugin=_resolved_plugin(dataclasses.replace(config.plugin, precision=precision)),
    )


def _resolved_plugin(plugin: PluginConfig) -> PluginConfig:
    """Decide what the chosen plugin alone has."""
    if plugin.plugin == "low_level_zero":
        return dataclasses.replace(plugin, zero_stage=plugin.zero_stage or 2)
    if plugin.plugin != "gemini":
        return plugin
    prefetch = 2 if plugin.prefetch is None else plugin.prefetch
    shares = (plugin.offload_optim_frac, plugin.offload_param_frac, plugin.shard_param_frac)
    if plugin.placement != "static" and all(share is None for share in shares):
        return dataclasses.replace(plugin, placement="auto", prefetch=prefetch)
    return dataclasses.replace(
        plugin,
        placement="static",
        prefetch=prefetch,
        offload_optim_frac=plugin.offload_optim_frac or 0.0,
        offload_param_frac=plugin.offload_param_frac or 0.0,
        shard_param_frac=1.0 if plugin.shard_param_frac is None else plugin.shard_param_frac,
    )


def _check_plugin(config: RunConfig) -> None:
    """Refuse options of other plugins than the chosen one."""
    chosen = config.plugin
    if chosen.plugin == "torch_ddp_fp16" and chosen.precision not in (None, "fp16"):
        raise ConfigError(
            f"--plugin torch_ddp_fp16 computes in fp16, not in {chosen.precision}: take --precision fp16, or --plugin "
            f"torch_ddp --precision {chosen.precision}"
        )
    for name, owner in PLUGIN_OPTIONS.items():
        if getattr(chosen, name) != getattr(PluginConfig, name) and chosen.plugin != owner:
            flag = "--" + name.replace("_", "-")
            lacks = "has no stages" if name == "zero_stage" else "has no such option"
            raise ConfigError(f"{flag} is for --plugin {owner}, and --plugin {chosen.plugin} {lacks}: leave it out")
    for name in ("offload_optim_frac", "offload_param_frac", "shard_param_frac"):
        if chosen.placement == "auto" and getattr(chosen, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} is for --placement static: with auto the cap decides what moves, so leave one of them out"
            )
    if chosen.cpu_offload and chosen.plugin not in ("low_level_zero", "torch_fsdp"):
        raise ConfigError(
            f"--cpu-offload is for --plugin low_level_zero or torch_fsdp, and --plugin {chosen.plugin} keeps all on the "
            "device: leave it out, or give --no-cpu-offload if a file or an older run has it"
        )


def _check(config: RunConfig, machine: MachineFacts, *, tiny: bool) -> None:
    if tiny and config.model.init == "pretrained":
        raise ConfigError("--model tiny has no pretrained weights: leave --init out, or take another --model")
    config.data.check(config.model)
    _check_plugin(config)
    steps, warmup = config.schedule.steps, config.schedule.warmup
    # A share of all steps, or steps that follow from the data, cannot be judged yet.
    if steps is not None and warmup >= max(2, steps):
        raise ConfigError(
            f"--warmup {warmup:g} is no shorter than the run of {steps} steps: give less of it, or more --steps"
        )
    gpus = config.plugin.gpus
    if machine.device_type == "cuda" and gpus > machine.device_count:
        have = "1 GPU" if machine.device_count == 1 else f"{machine.device_count} GPUs"
        raise ConfigError(f"--gpus {gpus} asks for more than this machine has: {have}")
    if config.plugin.mem_cap > 0 and machine.device_type != "cuda" and config.plugin.plugin != "gemini":
        raise ConfigError(
            "--mem-cap bounds a GPU's memory, and this run would be on the CPU, where there is no device "
            "memory to bound: leave --mem-cap out"
        )
    if config.plugin.precision == "bf16" and machine.device_type == "cuda" and not machine.bf16_is_native:
        raise ConfigError("--precision bf16 is not native on this GPU: take fp16 or fp32")
