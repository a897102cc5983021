"""Building one's own modules without memory for their parameters: `LazyInitContext`.

The constructors run as they are. All that they compute is computed, so buffers are real and numbers can be looked at,
but a parameter that a module registers is replaced by one on the meta device, by a hook of torch's for just that. What
was done to its values before, and is done after, is written down (`models/recording`), whoever does it: a module's
`reset_parameters`, the model's own `_init_weights`, a line in a constructor, `copy.deepcopy`. So each parameter can be
made alone, later, in any order. A rule such as "call reset_parameters" would be simpler, and wrong without a word for
every model that has a rule of its own.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from albireo.errors import ConfigError, ModelError
from albireo.models.disguise import Disguise
from albireo.models.recording import Origin, Recording, origin_of
from albireo.sharding.weight_source import check_range

__all__ = ["LazyInitContext", "LazyWeights", "lazy_source_of"]

_ORIGIN = "_albireo_origin"
_REPLACED_BY = "_albireo_replaced_by"


class LazyInitContext:
    """A context in which models are built on the meta device, and remember how their parameters begin.

        with LazyInitContext():
            model = MyModel(...)

    A plugin then gives each part of the model memory and values where it belongs. What is drawn is decided by the
    seed and by the order of the draws in the constructors, and so is the same on every rank and in whatever order
    parameters are made; torch's global random state is neither used nor changed, and a generator that is passed to a
    draw is not looked at. Until the context ends, parameters look as if they were in host memory. Those that are not
    of floating point, or of a class of their own, keep their memory. Parameters may be cast after the context too;
    deep copies must be made within.

    Args:
        default_device: where everything but parameters is made; host memory if None.
        seed: decides all that is drawn. Ranks must be given the same.

    Raises:
        ConfigError: the context is entered a second time.
    """

    def __init__(self, default_device: torch.device | str | None = None, *, seed: int = 1024) -> None:
        self._device = torch.device("cpu" if default_device is None else default_device)
        self._recording = Recording(seed)
        self._stack: ExitStack | None = None

    def __enter__(self) -> Self:
        if self._stack is not None:
            raise ConfigError("a LazyInitContext is entered once: make another one for the next model")
        with ExitStack() as stack:
            # torch's types know of no hook that returns something; its documentation does.
            stack.callback(register_module_parameter_registration_hook(cast("Any", self._send_away)).remove)
            stack.callback(register_module_buffer_registration_hook(cast("Any", self._keep_real)).remove)
            stack.enter_context(self._device)
            stack.enter_context(self._recording)
            stack.enter_context(Disguise(self._recording))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stack is not None:
            self._stack.close()

    def _send_away(self, _module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        """Return what a module is to register in place of a parameter; None if that is the parameter itself."""
        with self._recording.paused():
            if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.is_floating_point():
                return None
            if parameter.layout != torch.strided:
                return None
            away: nn.Parameter | None = getattr(parameter, _REPLACED_BY, None)
            if away is None:
                away = nn.Parameter(self._recording.send_away(parameter), requires_grad=parameter.requires_grad)
                away.__dict__.update(parameter.__dict__)
                # A parameter that is cast later has other memory, and still begins like this.
                setattr(away, _ORIGIN, origin_of(away))
                setattr(parameter, _REPLACED_BY, away)
            return away

    def _keep_real(self, _module: nn.Module, _name: str, buffer: Tensor | None) -> Tensor | None:
        """Return what a module is to register in place of a buffer: the values, if they came of a parameter."""
        if buffer is None or not self._recording.has_away(buffer):
            return None
        with self._recording.paused():
            return self._recording.values_of(buffer).to(self._device)


class LazyWeights:
    """The first values of a model that was built within `LazyInitContext`. A `WeightSource`.

    A parameter is made whole, and is kept until another one is asked for.

    Args:
        origins: where the values of parameters come from.
    """

    def __init__(self, origins: dict[nn.Parameter, Origin | None]) -> None:
        self._origins = origins
        self._numels = {parameter: parameter.numel() for parameter in origins}
        self._made: tuple[nn.Parameter, Tensor] | None = None

    def fill(self, parameter: nn.Parameter, start: int, out: Tensor) -> None:
        """Make a parameter, and copy a range of it; see `WeightSource.fill`.

        Raises:
            ConfigError: the parameter is not the model's, or has no such elements.
            ModelError: it was made from a tensor from outside that has changed since.
        """
        if parameter not in self._origins:
            raise ConfigError(f"a parameter of shape {tuple(parameter.shape)} is none of the lazily built model's")
        check_range(self._numels[parameter], start, out)
        origin = self._origins[parameter]
        with torch.no_grad():
            if origin is None:
                flat = parameter.detach().reshape(-1)
            elif self._made is not None and self._made[0] is parameter:
                flat = self._made[1]
            else:
                self._made = None  # before there is another one
                flat = origin.recording.values(origin.view).reshape(-1)
                self._made = (parameter, flat)
            out.copy_(flat[start : start + out.numel()])

    def close(self) -> None:
        """Let go of the last parameter."""
        self._made = None


def lazy_source_of(model: nn.Module) -> LazyWeights | None:
    """Return where the values of a lazily built model come from; None if no parameter is waiting for any.

    Parameters that have memory, such as those of adapters that were added since, are their own source.

    Args:
        model: any module.

    Raises:
        ModelError: a parameter would begin with no values, because nothing ever gave it any, or because it was copied
            after the context.
    """
    origins: dict[nn.Parameter, Origin | None] = {}
    lost: str | None = None
    for name, parameter in model.named_parameters():
        origins[parameter] = origin = origin_of(parameter) or (
            getattr(parameter, _ORIGIN, None) if parameter.is_meta else None
        )
        if parameter.is_meta and origin is None:
            lost = lost or name
        if origin is not None and parameter.numel() > 0 and not origin.recording.is_given(origin.view):
            owner = model.get_submodule(name.rpartition(".")[0])
            raise ModelError(
                f"the parameter {name} of a {type(owner).__name__} never gets a value: give it one in the module's "
                "constructor or in its reset_parameters, within LazyInitContext"
            )
    if all(origin is None for origin in origins.values()):
        return None
    if lost is not None:
        raise ModelError(
            f"nothing says how the parameter {lost} begins: it came to the meta device outside LazyInitContext; build, "
            "copy and change the model's modules within"
        )
    return LazyWeights(origins)
