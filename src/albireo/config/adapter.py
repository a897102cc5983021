"""The section of adapters: a few trained weights beside a frozen model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from albireo.config.option import option
from albireo.errors import ConfigError

__all__ = ["AdapterConfig"]


@dataclass(frozen=True)
class AdapterConfig:
    """Whether all of the model is trained, or an adapter beside it."""

    adapter: Literal["none", "lora", "qlora8", "qlora4"] = option(
        "none",
        "Train all of the model (none), or thin matrices beside its frozen ones (lora), which are in 8 or 4 bits "
        "(qlora8, qlora4).",
    )
    lora_rank: int | None = option(None, "lora: the rank of the adapters. Default: 8.", minimum=1, maximum=65536)
    lora_alpha: float | None = option(
        None,
        "lora: adapters are multiplied by this over the rank. Default: twice the rank.",
        minimum=0.0,
        exclusive_minimum=True,
    )
    lora_dropout: float | None = option(
        None, "lora: dropout of the adapters' inputs. Default: 0.", minimum=0.0, maximum=0.95
    )
    lora_targets: str | None = option(
        None,
        "lora: the modules that get one, by the last parts of their names, with commas. Default: c_attn for GPT-2, "
        "q_proj,v_proj for OPT.",
        metavar="NAMES",
    )

    @property
    def is_on(self) -> bool:
        """An adapter is trained, and the model itself is frozen."""
        return self.adapter != "none"

    @property
    def bits(self) -> int | None:
        """How many bits a weight of the frozen layers has; None where they are not quantised."""
        return {"qlora8": 8, "qlora4": 4}.get(self.adapter)

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of `lora_targets`; none where they are left to the family.

        Raises:
            ConfigError: they are nothing but commas.
        """
        if self.lora_targets is None:
            return ()
        names = tuple(dict.fromkeys(name.strip() for name in self.lora_targets.split(",") if name.strip()))
        if not names:
            raise ConfigError(
                f"--lora-targets needs at least one name, with commas between more, not {self.lora_targets!r}"
            )
        return names

    def resolved(self) -> AdapterConfig:
        """Return the section with every default decided that does not hang on the family.

        Raises:
            ConfigError: an option of an adapter is given, and there is none.
        """
        if self.is_on:
            rank = self.lora_rank or 8
            return dataclasses.replace(
                self, lora_rank=rank, lora_alpha=self.lora_alpha or 2.0 * rank, lora_dropout=self.lora_dropout or 0.0
            )
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"):
            if getattr(self, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} is for --adapter lora, and --adapter {self.adapter} has none: leave it out")
        return self
