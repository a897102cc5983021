"""An optimizer over the fragments that this rank owns: the user's own, stepped a bounded number of elements at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from albireo.distributed import World
from albireo.distributed.collectives import Transfer, sum_in_rank_order
from albireo.errors import ConfigError
from albireo.optim import HybridAdam, LossScale
from albireo.optim.overflow import flagged, leaves_out_by_flag
from albireo.optim.split_adam import SplitAdam, SplitStep
from albireo.sharding.bucket import Fragment
from albireo.sharding.flat import ALIGNMENT
from albireo.sharding.flat_parameters import FlatParameters
from albireo.sharding.gradients import Gradients
from albireo.sharding.offload import GradientOffload, OffloadedStep
from albireo.sharding.part_optimizer import PartOptimizer

__all__ = ["ShardedOptimizer", "steps_in_parts"]

# What is stepped at a time, in elements: 16-bit gradients are cast into a scratch of so many fp32 numbers (128 MB).
_STEP_ELEMENTS = 2**25
_IN_PARTS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop)


class ShardedOptimizer(PartOptimizer):
    """Wraps an element-wise torch optimizer; its groups come to hold this rank's fragments.

    Args:
        optimizer: over the parameters of the buckets.
        gradients: takes and keeps their gradients.
        world: the ranks.
        loss_scale: for fp16.
        max_norm: clip to this norm in `step`, if it has not been done before; 0 does not.
        overlap_gather: fetch the new weights of a bucket while the next is stepped.
        host_step: steps fragments on the host, if their gradients are offloaded; None steps by the optimizer itself.

    Raises:
        ConfigError: the optimizer is not element-wise, or has states already; or weights are kept in halves and it cannot
            step them in parts.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        gradients: Gradients,
        world: World,
        *,
        loss_scale: LossScale | None = None,
        max_norm: float = 0.0,
        overlap_gather: bool = True,
        host_step: OffloadedStep | None = None,
    ) -> None:
        # Before the wrapper adds a hook of its own.
        self._in_parts = steps_in_parts(optimizer)
        super().__init__(optimizer, world, loss_scale)
        in_halves = any(bucket.rest is not None for bucket in gradients.buckets)
        one_pass = in_halves and SplitAdam.can_step(optimizer, world.device)
        self._split_adam = SplitAdam(optimizer) if one_pass else None
        self._gradients = gradients
        self._max_norm = max_norm
        self._overlap_gather = overlap_gather
        self._host_step = host_step
        self._scaled = False
        # What the gradients have been multiplied by to bound their norm since they came.
        self._clipped: torch.Tensor | None = None
        if in_halves and not self._in_parts:
            raise ConfigError(
                "weights in halves are joined a part at a time, and this optimizer steps all at once: keep them in fp32"
            )
        fragments: dict[torch.Tensor, Fragment] = {
            fragment.parameter: fragment for bucket in gradients.buckets for fragment in bucket.fragments
        }
        for fragment in fragments.values():
            _cut_state(optimizer, fragment)
        for parameter in (p for group in self.model_groups for p in group):
            optimizer.state.pop(parameter, None)
        self._take_parts(fragments)

    @property
    def fragments(self) -> Iterator[Fragment]:
        """What this rank steps, in the buckets' order."""
        for bucket in self._gradients.buckets:
            yield from bucket.fragments

    def gradients(self) -> list[torch.Tensor]:
        """Return this rank's gradients as they are kept: 1-D, in fp32 or narrower."""
        return [gradient for _, gradient in self._gradients.kept()]

    def exported_gradients(self) -> Iterator[tuple[Fragment, torch.Tensor]]:
        """Yield each fragment that has a gradient, and the gradient in fp32 without the loss scale."""
        unscaled = self._gradients.is_scaled or not self._scaled
        for fragment, gradient in self._gradients.kept():
            wide = gradient
            if self._gradients.is_to_be_cast(fragment, gradient):
                wide = torch.empty_like(gradient, dtype=torch.float32)
                self._gradients.cast([gradient], [wide])
            yield (
                fragment,
                wide if unscaled or self._loss_scale is None else wide / self._loss_scale.value.to(wide.device),
            )

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradients, and average them over ranks unless they are kept local.

        Args:
            loss: a scalar.

        Raises:
            AlbireoError: it failed on another rank.
            RuntimeError: the gradients so far have been clipped.
        """
        self._grad_norm = self._clipped = None
        if self._loss_scale is not None:
            self._scaled = True
            loss = loss * self._loss_scale.value
        with self._gradients.backward():
            torch.autograd.backward(loss)
        self._gradients.finish()

    def clip_grad_by_norm(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Unscale the gradients, and clip them by their global norm; see the base class."""
        if norm_type != 2.0:
            raise ConfigError(f"gradients are clipped by their Euclidean norm: norm_type is 2, not {norm_type}")
        # Without a bound nothing is done to them yet: the step may have one.
        return self._clip(max_norm) if max_norm > 0 else self._norm_now()

    def clip_grad_by_value(self, clip_value: float) -> None:
        """Refuse: 16-bit gradients cannot hold what was clipped.

        Raises:
            ConfigError: always; it says what to call.
        """
        raise ConfigError(f"sharded gradients are clipped by their norm: call clip_grad_by_norm, not by {clip_value:g}")

    def get_grad_norm(self) -> float | None:
        """Return the gradients' global norm; waits for the device, and for no other rank.

        Returns:
            The norm before clipping of what was last clipped or stepped; None if there are no gradients, or if over
            several ranks they have not been clipped yet.
        """
        if self._grad_norm is None and self._world.world_size == 1 and any(True for _ in self._gradients.kept()):
            self._norm()
        return None if self._grad_norm is None else float(self._grad_norm)

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step the fragments, and bring the new weights to all ranks.

        Raises:
            ConfigError: a closure is given.
            RuntimeError: in fp16, there was no backward through this optimizer, so that the gradients are not scaled; or
                somebody else has written to the weights.
        """
        if closure is not None:
            raise ConfigError("a sharded optimizer takes no closure: run backward first, then step")
        if self._loss_scale is not None and not self._scaled:
            raise RuntimeError("there are no scaled gradients: call booster.backward(loss, optimizer) before the step")
        for bucket in self._gradients.buckets:
            bucket.check_untouched()
        if self._gradients.has_unsent:
            self._gradients.finish()
        if not self._gradients.is_scaled:
            self._clip(self._max_norm)
        overflow = None
        if self._loss_scale is not None:
            # Exactly 1 or 0: a fused kernel takes any other number for no overflow.
            overflow = (~torch.isfinite(self._norm())).float()
        if overflow is None:
            self._step_all()
        elif self._steps_on_device and leaves_out_by_flag(self.optim, (f.master for f, _ in self._gradients.kept())):
            with flagged(self.optim, overflow):
                self._step_all()
        elif not bool(overflow):
            self._step_all()
        if self._loss_scale is not None and overflow is not None:
            self._loss_scale.update(overflow)
        self._scaled = False
        # A step that was left out for an overflow is a step to a schedule: torch is not to warn of a wrong order.
        vars(self.optim)["_opt_called"] = True

    def abandon_step(self, *, reduced: bool = False) -> None:
        """Forget a step that failed on this rank, so that it fails on all."""
        if reduced:
            # No rank waits for this one's gradients any more.
            self._gradients.clear()
        else:
            self._gradients.abandon()
        self._grad_norm = self._clipped = None
        self._scaled = False

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002  gradients are never kept as zeros
        """Forget the gradients."""
        self._gradients.clear()
        self._grad_norm = self._clipped = None
        self._scaled = False

    def gradient_scale(self) -> torch.Tensor | None:
        """See the base class."""
        if self._loss_scale is None or not self._scaled or self._gradients.is_scaled:
            return None
        return self._loss_scale.value

    @property
    def _steps_on_device(self) -> bool:
        """True if all that is stepped lies where the flag of an overflow does."""
        return self._host_step is None

    def _clip(self, max_norm: float) -> torch.Tensor:
        """Unscale the gradients and clip them, and return their norm of before."""
        norm = self._norm_now()
        factor = None
        if max_norm > 0:
            # The same small addend as torch.nn.utils.clip_grad_norm_.
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            self._clipped = factor if self._clipped is None else self._clipped * factor
        self._scale_gradients(factor)
        return norm

    def _norm_now(self) -> torch.Tensor:
        """Return the gradients' norm as they are after the clips so far."""
        norm = self._norm()
        return norm if self._clipped is None else norm * self._clipped

    def _norm(self) -> torch.Tensor:
        """Return the true global norm of the step's gradients as they were before clipping."""
        if self._grad_norm is None:
            squares = sum_in_rank_order(self._gradients.sum_of_squares(), self._world)
            norm = squares.sqrt().float()
            self._grad_norm = norm / self._loss_scale.value if self._loss_scale is not None and self._scaled else norm
        return self._grad_norm

    def _scale_gradients(self, factor: torch.Tensor | None) -> None:
        """Clip, and take the loss scale off, in one."""
        if self._loss_scale is not None and self._scaled and not self._gradients.is_scaled:
            unscale = self._loss_scale.value.reciprocal()
            factor = unscale if factor is None else factor * unscale
        if factor is not None:
            self._gradients.scale(factor)

    def _step_all(self) -> None:
        """Step the buckets that forward needs first, first."""
        if self._host_step is not None and self._gradients.offload is not None:
            self._step_on_host(self._host_step, self._gradients.offload)
        else:
            self._step_where_states_are(list(reversed(self._gradients.buckets)))

    def _step_where_states_are(self, buckets: Sequence[FlatParameters]) -> None:
        """Step buckets by the optimizer itself, and bring their new weights to all ranks.

        Args:
            buckets: in the order in which they are stepped.
        """
        groups = [group["params"] for group in self.optim.param_groups]
        settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optim.param_groups
        ]
        group_of = {master: number for number, params in enumerate(groups) for master in params}
        gathers: list[Transfer] = []
        try:
            for batch in self._batches(buckets):
                # An optimizer that counts its steps in a group is to count one, however many calls it takes.
                for group, before in zip(self.optim.param_groups, settings, strict=True):
                    group.update(before)
                self._step_some(batch, group_of)
                for bucket in batch:
                    gathers.append(bucket.publish())
                    if not self._overlap_gather:
                        gathers.pop().wait()
        finally:
            for group, params in zip(self.optim.param_groups, groups, strict=True):
                group["params"] = params
            for gather in gathers:
                gather.wait()

    def _step_on_host(self, host_step: OffloadedStep, offload: GradientOffload) -> None:
        fragments = [
            fragment
            for bucket in reversed(self._gradients.buckets)
            for fragment in bucket.fragments
            if self._gradients.has(fragment)
        ]
        factor = self._gradients.factor
        host_step.run(fragments, offload, 1.0 if factor is None else float(factor))
        for gather in [bucket.publish(is_cast=True) for bucket in reversed(self._gradients.buckets)]:
            gather.wait()

    def _batches(self, buckets: Sequence[FlatParameters]) -> Iterator[list[FlatParameters]]:
        """Yield buckets, as many at a time as may be stepped at once."""
        # One pass takes no scratch; alone, there is no other rank to send to meanwhile.
        at_once = self._split_adam is not None and self._world.world_size == 1
        batch: list[FlatParameters] = []
        elements = 0
        for bucket in buckets:
            if self._in_parts and not at_once and batch and elements + bucket.layout.partition_numel > _STEP_ELEMENTS:
                yield batch
                batch, elements = [], 0
            batch.append(bucket)
            elements += bucket.layout.partition_numel
        if batch:
            yield batch

    def _step_some(self, buckets: Sequence[FlatParameters], group_of: Mapping[nn.Parameter, int]) -> None:
        found = [
            (fragment, gradient)
            for bucket in buckets
            for fragment in bucket.fragments
            if fragment.master in group_of and (gradient := self._gradients.of(fragment)) is not None
        ]
        with ExitStack() as stack:
            if self._split_adam is not None:
                found = self._step_in_one_pass(self._split_adam, found, group_of)
            else:
                for bucket in buckets:
                    stack.enter_context(bucket.joined())
            for fragment, gradient in found:
                if not self._gradients.is_to_be_cast(fragment, gradient):
                    fragment.master.grad = gradient
            self._cast_gradients(found)
            try:
                for number, group in enumerate(self.optim.param_groups):
                    group["params"] = [fragment.master for fragment, _ in found if group_of[fragment.master] == number]
                self._stepping = True
                self.optim.step()
            finally:
                self._stepping = False
                for fragment, _ in found:
                    fragment.master.grad = None

    def _step_in_one_pass(
        self,
        kernel: SplitAdam,
        found: Sequence[tuple[Fragment, torch.Tensor]],
        group_of: Mapping[nn.Parameter, int],
    ) -> list[tuple[Fragment, torch.Tensor]]:
        """Step what is kept in halves, and return the others."""
        chosen: dict[tuple[int, torch.dtype], list[SplitStep]] = defaultdict(list)
        others = []
        for fragment, gradient in found:
            if fragment.rest is None:
                others.append((fragment, gradient))
            else:
                step = SplitStep(fragment.master, fragment.compute, fragment.rest, gradient)
                chosen[group_of[fragment.master], gradient.dtype].append(step)
        for (number, dtype), steps in chosen.items():
            # Gradients in fp32 have been multiplied already.
            factor = None if dtype == torch.float32 else self._gradients.factor
            kernel.step(self.optim.param_groups[number], steps, factor)
        return others

    def _cast_gradients(self, found: Sequence[tuple[Fragment, torch.Tensor]]) -> None:
        """Give narrow gradients to the masters in fp32."""
        narrow = [
            (fragment, gradient) for fragment, gradient in found if self._gradients.is_to_be_cast(fragment, gradient)
        ]
        if not narrow:
            return
        room = [-(-gradient.numel() // ALIGNMENT) * ALIGNMENT for _, gradient in narrow]
        scratch = torch.empty(sum(room), dtype=torch.float32, device=narrow[0][1].device)
        wide = [part[: g.numel()] for part, (_, g) in zip(torch.split(scratch, room), narrow, strict=True)]
        for (fragment, _), gradient in zip(narrow, wide, strict=True):
            fragment.master.grad = gradient
        self._gradients.cast([gradient for _, gradient in narrow], wide)


def _cut_state(optimizer: torch.optim.Optimizer, fragment: Fragment) -> None:
    """Give a fragment its part of what an optimizer keeps of the parameter already: Adagrad has states from the start."""
    cut, parameter = fragment.cut, fragment.parameter
    for key, value in optimizer.state.get(parameter, {}).items():
        part = value
        if isinstance(value, torch.Tensor):
            # A parameter that is one number has states of one number too, beside its count of steps.
            if value.shape == parameter.shape and (value.dim() > 0 or key != "step"):
                part = value.reshape(-1)[cut.start : cut.stop].clone().to(fragment.master.device)
            elif value.numel() == 1:
                part = value.clone()
            else:
                raise ConfigError(
                    f"the optimizer keeps {key} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}, which cannot be sharded: take an element-wise optimizer"
                )
        optimizer.state[fragment.master][key] = part


def steps_in_parts(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if several calls on parts of the parameters are one step: known of torch's own, without hooks."""
    hooks = (vars(optimizer).get(f"_optimizer_step_{when}_hooks") for when in ("pre", "post"))
    return (isinstance(optimizer, HybridAdam) or type(optimizer) in _IN_PARTS) and not any(hooks)
