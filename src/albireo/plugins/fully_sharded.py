"""A model that FSDP2 shards (`torch.distributed.fsdp.fully_shard`), and which elements of it this rank has."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from albireo.distributed import World
from albireo.distributed.local_group import rank_mesh
from albireo.errors import ConfigError
from albireo.plugins.casting import compute_dtypes
from albireo.plugins.unused_as_zeros import UnusedAsZeros
from albireo.sharding import Cut, Fragment

__all__ = ["FullyShardedModule", "choose_blocks", "first_element", "local_part"]


class FullyShardedModule(nn.Module):
    """Shards a model in place, and calls it.

    Each block is a group whose weights are gathered for its forward and its backward; what lies in no block is the
    root's group. Parameters of the model become DTensors: each rank has some rows of each.

    Args:
        model: of parameters in fp32 with at least one dimension; it is changed.
        blocks: modules of it, none within another.
        world: the ranks.
        dtype: what computes; gradients are reduced in fp32 whatever it is.
        cpu_offload: keep weights, gradients and states in host memory.
        reshard_after_forward: let go of a block's whole weights between forward and backward.

    Attributes:
        module: the model.
        parts: its parameters that are sharded.
        fragments: by parameter, this rank's elements of it in fp32; a rank may have none of a parameter.
        used: parameters that are trained, and whether a backward since this was last cleared gave them a gradient on
            this rank; empty on one rank, where there is nothing to agree on.

    Raises:
        ConfigError: there is no process group, or a parameter has no dimension.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        world: World,
        *,
        dtype: torch.dtype,
        cpu_offload: bool,
        reshard_after_forward: bool,
    ) -> None:
        super().__init__()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 0:
                raise ConfigError(
                    f"torch's FSDP shards rows, and {name} has none: give it the shape (1,), or take LowLevelZeroPlugin"
                )
        how: dict[str, Any] = {
            "mesh": rank_mesh(world),
            "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
            if cpu_offload
            else OffloadPolicy(),
            # There is nothing to share out of a parameter without elements, and torch's kernels refuse it.
            "ignored_params": {parameter for parameter in model.parameters() if parameter.numel() == 0},
        }
        wide = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        policy = wide
        if dtype != torch.float32:
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            for norm in _modules_that_stay_wide(model, dtype):
                _shard(norm, reshard_after_forward=reshard_after_forward, mp_policy=wide, **how)
        for block in blocks:
            _shard(block, reshard_after_forward=reshard_after_forward, mp_policy=policy, **how)
        # The root's whole weights stay from forward to backward: it ends the one and begins the other.
        _shard(model, reshard_after_forward=False, mp_policy=policy, **how)
        self.module = model
        self.parts = frozenset(p for p in model.parameters() if isinstance(p, DTensor))
        self._groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
        if world.device.type == "cpu":
            for group in self._groups:
                group.set_force_sum_reduction_for_comms(True)  # gloo has not always had an average of its own
        self._of_group: dict[nn.Module, list[nn.Parameter]] = {}
        self._whole = self._gather_once()
        self.fragments: Mapping[torch.Tensor, Fragment] = {
            parameter: fragment
            for parameter in model.parameters()
            if (fragment := _fragment(parameter, world)) is not None
        }
        self._is_synchronous = True
        self._is_kept_local = False
        self.used: dict[nn.Parameter, bool] = {}
        self._unused: UnusedAsZeros | None = None
        if world.world_size > 1:
            self._watch_use()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        try:
            outputs = self.module(*args, **kwargs)
        except BaseException:
            self.recover()
            raise
        if not torch.is_grad_enabled():
            # The root keeps its whole weights for a backward, which will not come; they would soon be old ones.
            self.reshard()
        return outputs

    def reshard(self) -> None:
        """Have only this rank's rows, as it is between steps."""
        for group in self._groups:
            group.reshard()

    @contextmanager
    def kept_local(self) -> Iterator[None]:
        """Add whole gradients up on this rank, in fp32, and send nothing."""
        self._set_sync(on=False)
        self._is_kept_local = True
        try:
            yield
        finally:
            self._set_sync(on=True)

    def note_reduced(self) -> None:
        """Take note of a backward: unless it was within `kept_local`, nothing local is left."""
        if self._is_synchronous:
            self._is_kept_local = False

    def forget_local(self) -> None:
        """Forget gradients that were added up on this rank and have not been reduced."""
        if not self._is_kept_local:
            return
        self._is_kept_local = False
        for whole in self._whole.values():
            whole.grad = None
        for group in self._groups:
            # torch has no other way to take back a backward without a reduction: in 16 bits it keeps the sums itself.
            state = group._get_fsdp_state()  # noqa: SLF001
            found = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # noqa: SLF001
            for part in (part for held in found if held is not None for part in held.fsdp_params):
                part.unsharded_accumulated_grad = None

    def recover(self) -> None:
        """Begin anew after a forward or a backward that failed midway."""
        reset: Callable[[], None] | None = getattr(self.module, "reset_iter_state", None)  # torch 2.13
        if reset is not None:
            reset()
        if self._unused is not None:
            self._unused.forget()
        self.forget_local()

    def _set_sync(self, *, on: bool) -> None:
        self._is_synchronous = on
        for group in self._groups:
            group.set_requires_gradient_sync(on, recurse=False)

    def _gather_once(self) -> dict[nn.Parameter, nn.Parameter]:
        """Gather one group after another, so that each parameter's whole form is there, and return it.

        torch makes it at a group's first use and keeps it, without memory between uses. Where a group is not used in a
        step, or not on each rank, torch looks for it nevertheless.
        """
        parts = list(self.module.parameters())
        found: dict[nn.Parameter, nn.Parameter] = {}
        for group in self._groups:
            group.unshard()
            for part, whole in zip(parts, self.module.parameters(), strict=True):
                if part is not whole:
                    found[part] = whole
                    self._of_group.setdefault(group, []).append(whole)
            group.reshard()
        return found

    def _watch_use(self) -> None:
        """Note which parameters get a gradient on this rank, and have zeros reduced in place of the others'."""
        for part, whole in self._whole.items():
            if part.requires_grad:
                self.used[part] = False
                whole.register_post_accumulate_grad_hook(_noting(self.used, part))  # type: ignore[no-untyped-call]
        self._unused = UnusedAsZeros(self._of_group, reduces=lambda: self._is_synchronous)


def _shard(module: nn.Module, **how: Any) -> None:
    """Shard what is not sharded yet, and free the memory of the parameters from before, whoever still holds them."""
    ignored = how["ignored_params"]
    before = [p for p in module.parameters() if not isinstance(p, DTensor) and p not in ignored]
    try:
        fully_shard(module, **how)
    except RuntimeError as error:
        # torch 2.11 makes a trained parameter of each part first, and only then a frozen one: bytes cannot be trained.
        if "require gradients" in str(error) and any(not p.is_floating_point() for p in before):
            raise ConfigError(
                f"torch {torch.__version__}'s FSDP cannot shard a quantised base: take torch 2.13, or --plugin gemini or "
                "low_level_zero (GeminiPlugin, LowLevelZeroPlugin)"
            ) from error
        raise
    for parameter in before:
        parameter.grad = None
        parameter.data = parameter.data.new_empty(0)


def _modules_that_stay_wide(model: nn.Module, dtype: torch.dtype) -> list[nn.Module]:
    dtypes = compute_dtypes(model, dtype)
    return [
        module
        for module in model.modules()
        if (own := list(module.parameters(recurse=False))) and all(dtypes.get(p) == torch.float32 for p in own)
    ]


def choose_blocks(model: nn.Module, block_classes: Collection[type[nn.Module]] | None = None) -> list[nn.Module]:
    """Return the modules that are groups of their own.

    A parameter that two modules share has to lie in one group, so a block that shares one with what lies outside of
    it is left to the root.

    Args:
        model: any module.
        block_classes: blocks are instances of these; None: blocks are the members of each `nn.ModuleList`.

    Returns:
        Blocks in the order of the model, none within another, each with parameters.
    """
    found: list[nn.Module] = []
    _find_blocks(model, tuple(block_classes) if block_classes is not None else None, found, set())
    uses: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[parameter] = uses.get(parameter, 0) + 1
    return [block for block in found if _is_closed(block, uses)]


def _find_blocks(
    module: nn.Module, classes: tuple[type[nn.Module], ...] | None, found: list[nn.Module], seen: set[nn.Module]
) -> None:
    for child in module.children():
        if child in seen:
            continue
        seen.add(child)
        container = isinstance(child, nn.ModuleList | nn.ModuleDict)
        listed = isinstance(module, nn.ModuleList) if classes is None else isinstance(child, classes)
        if listed and not container and any(True for _ in child.parameters()):
            found.append(child)
        else:
            _find_blocks(child, classes, found, seen)


def _is_closed(block: nn.Module, uses: Mapping[nn.Parameter, int]) -> bool:
    """Return True if no module outside of a block has one of its parameters."""
    within: dict[nn.Parameter, int] = {}
    for module in block.modules():
        for parameter in module.parameters(recurse=False):
            within[parameter] = within.get(parameter, 0) + 1
    return all(uses[parameter] == count for parameter, count in within.items())


def first_element(shape: Sequence[int], rank: int, world_size: int) -> int:
    """Return where a rank's rows begin, in the tensor flattened in row-major order. torch deals rows as `torch.chunk`.

    Args:
        shape: the whole tensor's; at least one dimension.
        rank: whose rows.
        world_size: how many ranks share them.
    """
    rows = -(-shape[0] // world_size)
    return min(rank * rows, shape[0]) * math.prod(shape[1:])


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's elements of a tensor, 1-D, in the memory that they have; all, if it is not sharded."""
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()).view(-1)


def _fragment(parameter: nn.Parameter, world: World) -> Fragment | None:
    if not isinstance(parameter, DTensor):
        return None
    flat = local_part(parameter)
    if flat.numel() == 0:
        return None
    start = first_element(parameter.shape, world.rank, world.world_size)
    cut = Cut(segment=0, start=start, stop=start + flat.numel(), offset=0)
    master = nn.Parameter(flat, requires_grad=parameter.requires_grad)
    return Fragment(parameter, 0, cut, master, flat)


def _noting(used: dict[nn.Parameter, bool], part: nn.Parameter) -> Callable[[torch.Tensor], None]:
    def note(_: torch.Tensor) -> None:
        used[part] = True

    return note
