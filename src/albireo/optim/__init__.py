"""What turns gradients into new weights: groups, AdamW, the norm, the loss scale, the schedule, and their states."""

from albireo.optim.adam import HybridAdam, adamw
from albireo.optim.adam_values import AdamValues
from albireo.optim.fused_step import fused_step
from albireo.optim.group_state import complete_names, named_groups, restore_named_groups
from albireo.optim.groups import decay_groups
from albireo.optim.host_rate import HostAdamRate, measure_host_adam
from albireo.optim.host_stepper import HostStepper, stepper_threads
from albireo.optim.host_ticket import Ticket
from albireo.optim.loss_scale import LossScale, LossScalePolicy
from albireo.optim.norm import clip_by_norm, global_norm, norms_of, sum_of_squared_norms, sum_of_squares
from albireo.optim.schedule import learning_rate_factor, scheduler_for, set_scheduler_step, warmup_steps_of
from albireo.optim.state import named_state, restore_named_state
from albireo.optim.wrapper import OptimizerWrapper, ScaledOptimizer

__all__ = [
    "AdamValues",
    "HostAdamRate",
    "HostStepper",
    "HybridAdam",
    "LossScale",
    "LossScalePolicy",
    "OptimizerWrapper",
    "ScaledOptimizer",
    "Ticket",
    "adamw",
    "clip_by_norm",
    "complete_names",
    "decay_groups",
    "fused_step",
    "global_norm",
    "learning_rate_factor",
    "measure_host_adam",
    "named_groups",
    "named_state",
    "norms_of",
    "restore_named_groups",
    "restore_named_state",
    "scheduler_for",
    "set_scheduler_step",
    "stepper_threads",
    "sum_of_squared_norms",
    "sum_of_squares",
    "warmup_steps_of",
]
