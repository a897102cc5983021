"""Weights, gradients and optimizer states in flat buffers, of which each rank owns its part: ZeRO stages 1 and 2."""

from albireo.sharding.bucket import Bucket, Fragment, make_buckets
from albireo.sharding.flat import ALIGNMENT, Cut, FlatLayout, Segment, plan_buckets
from albireo.sharding.flat_parameters import FlatParameters
from albireo.sharding.gradients import Gradients, LocalGradients
from albireo.sharding.offload import GradientOffload, OffloadedStep
from albireo.sharding.optimizer import ShardedOptimizer, steps_in_parts
from albireo.sharding.part_optimizer import PartOptimizer
from albireo.sharding.reduced_gradients import ReducedGradients
from albireo.sharding.state import fragment_slice, optimizer_slices, restore_optimizer
from albireo.sharding.weight_source import ParameterValues, WeightSource, WithOwnValues

__all__ = [
    "ALIGNMENT",
    "Bucket",
    "Cut",
    "FlatLayout",
    "FlatParameters",
    "Fragment",
    "GradientOffload",
    "Gradients",
    "LocalGradients",
    "OffloadedStep",
    "ParameterValues",
    "PartOptimizer",
    "ReducedGradients",
    "Segment",
    "ShardedOptimizer",
    "WeightSource",
    "WithOwnValues",
    "fragment_slice",
    "make_buckets",
    "optimizer_slices",
    "plan_buckets",
    "restore_optimizer",
    "steps_in_parts",
]
