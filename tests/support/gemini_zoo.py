"""Small models of all kinds that Gemini's tests train, with their batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import small_opt
from torch import nn
from torch.utils.checkpoint import checkpoint

from albireo.models import FAMILIES
from albireo.training.causal_lm import CausalLanguageModel

Batch = dict[str, Any]

WIDTH, ROWS = 24, 41


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        build: makes it; the same weights each time, if the seed is the same.
        batch: its batch of a step, a rank and a micro-batch. Its forward takes that by name, and returns the mean loss as
            `loss`, or the loss's sum and a count.
        terms: how many terms the loss of a batch is a mean of.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int, int, int], Batch]
    terms: Callable[[Batch], int]


def built(kind: str) -> nn.Module:
    """Return a model in training mode, whatever the process has drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return KINDS[kind].build().train()


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Blocks(nn.Module):
    """Blocks between an embedding and a head, called as a subclass has it."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ROWS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, ROWS)

    def forward(self, ids: torch.Tensor, *, branch: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.middle(self.embedding(ids), branch)
        loss = nn.functional.cross_entropy(self.head(hidden)[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        count = torch.tensor(ids[:, 1:].numel())
        return loss * count, count

    def middle(self, x: torch.Tensor, branch: bool) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Branched(Blocks):
    """One block is left out of some batches; another is never called, and neither is a layer of the root."""

    def __init__(self) -> None:
        super().__init__(5)
        self.never = nn.Linear(3, 5)

    def middle(self, x: torch.Tensor, branch: bool) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            if number != 4 and (number != 1 or branch):
                x = block(x)
        return x


class Sided(Blocks):
    """A layer of the root that only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(WIDTH, WIDTH)

    def middle(self, x: torch.Tensor, branch: bool) -> torch.Tensor:
        x = super().middle(x, branch)
        return x + self.side(x).tanh() if branch else x


class Twice(Blocks):
    """Blocks that are called twice in a forward, one of them twice in a row."""

    def middle(self, x: torch.Tensor, branch: bool) -> torch.Tensor:
        for number in (0, 1, 1, 2, 0, 3):
            x = self.blocks[number](x)
        return x


class Shuffled(Blocks):
    """Blocks that are called in another order than the one of registration."""

    def middle(self, x: torch.Tensor, branch: bool) -> torch.Tensor:
        for number in (2, 0, 3, 1):
            x = self.blocks[number](x)
        return x


class Tied(Blocks):
    """Two blocks that share a weight, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.head.weight = self.embedding.weight


class Frozen(Blocks):
    """Whole blocks that are frozen, the first among them, and a part of another."""

    def __init__(self) -> None:
        super().__init__()
        for part in (self.embedding, self.blocks[0], self.blocks[2], self.blocks[3].up):
            part.requires_grad_(requires_grad=False)


class LoRA(nn.Module):
    """A frozen layer and what is learnt beside it."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Adapted(Blocks):
    """Adapters on a frozen base."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(requires_grad=False)
        for block in self.blocks:
            block.up, block.down = LoRA(block.up), LoRA(block.down)


class Recomputed(Blocks):
    """Blocks whose activations are computed again in backward."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def middle(self, x: torch.Tensor, branch: bool) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class Odd(Blocks):
    """Parameters without elements, of integers, and scalars: in blocks and in the root."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.table = nn.Parameter(torch.tensor([3, 1, 2]), requires_grad=False)
        self.blocks[1].empty = nn.Parameter(torch.zeros(0))
        self.blocks[1].factor = nn.Parameter(torch.tensor(0.5))
        self.blocks[2].shift = nn.Parameter(torch.tensor([2, 1]), requires_grad=False)
        self.register_buffer("offset", torch.full((WIDTH,), 0.25))

    def middle(self, x: torch.Tensor, branch: bool) -> torch.Tensor:
        x = x * self.scale + self.offset.to(x.dtype) + self.empty.sum()
        return super().middle(x, branch) * self.table[1]


class Nested(nn.Module):
    """Lists within lists, dictionaries, entries without parameters, and outputs of tuples and dicts."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"both": (self.left(x), [self.right(x)]), "number": 3}

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ROWS, WIDTH)
        self.stages = nn.ModuleList(
            [nn.Sequential(Block(), nn.Dropout(0.0), Block()), nn.ModuleDict({"pair": self.Pair()})]
        )
        self.head = nn.Linear(WIDTH, ROWS)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.stages[1]["pair"](self.stages[0](self.embedding(ids)))
        hidden = found["both"][0] + found["both"][1][0].tanh()
        loss = nn.functional.cross_entropy(self.head(hidden)[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        count = torch.tensor(ids[:, 1:].numel())
        return loss * count, count


class Conv(nn.Module):
    """A convolutional net whose norms keep means."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.stem(images)
        for stage in self.stages:
            x = x + stage(x)
        logits = self.head(x.mean((2, 3)))
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        return loss, torch.tensor(len(labels))


def opt(*, tied: bool = True) -> nn.Module:
    model = small_opt(num_hidden_layers=3, hidden_size=WIDTH, vocab_size=ROWS, tie_word_embeddings=tied)
    return CausalLanguageModel(model, FAMILIES["opt"])


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": ROWS, "n_positions": 16, "n_embd": WIDTH, "n_layer": 3, "n_head": 2}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    return GPT2LMHeadModel(GPT2Config(**sizes, **off, bos_token_id=1, eos_token_id=1))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=5,
    )  # fmt: skip
    return ViTForImageClassification(config)


def checkpointed_opt(*, reentrant: bool) -> nn.Module:
    model = small_opt(num_hidden_layers=3, hidden_size=WIDTH, vocab_size=ROWS)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        # The inputs of a reentrant block must have a gradient, or nothing in it has.
        model.enable_input_require_grads()
    return CausalLanguageModel(model, FAMILIES["opt"])


def _draw(step: int, rank: int, micro: int) -> torch.Generator:
    return torch.Generator().manual_seed(10_000 * step + 100 * rank + micro)


def _ids(step: int, rank: int, micro: int) -> Batch:
    return {"ids": torch.randint(0, ROWS, (2, 9), generator=_draw(step, rank, micro))}


def _branch(step: int, rank: int, micro: int) -> Batch:
    """The branch is taken in odd steps, and there on the main rank alone."""
    return {**_ids(step, rank, micro), "branch": step % 2 == 1 and rank == 0}


def _text(step: int, rank: int, micro: int) -> Batch:
    ids = torch.randint(2, ROWS, (2, 10), generator=_draw(step, rank, micro))
    labels = ids.clone()
    labels[0, 10 - (step + rank + micro) % 4 :] = -100
    return {"input_ids": ids, "labels": labels}


def _padded(step: int, rank: int, micro: int) -> Batch:
    batch = _text(step, rank, micro)
    mask = (batch["labels"] != -100).long()
    return {"input_ids": batch["input_ids"] * mask, "labels": batch["labels"], "attention_mask": mask}


def _images(name: str) -> Callable[[int, int, int], Batch]:
    def batch(step: int, rank: int, micro: int) -> Batch:
        draw = _draw(step, rank, micro)
        return {name: torch.randn(4, 3, 8, 8, generator=draw), "labels": torch.randint(0, 5, (4,), generator=draw)}

    return batch


def _next_tokens(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] >= 0).sum())


def _blocks(build: Callable[[], nn.Module], batch: Callable[[int, int, int], Batch] = _ids) -> Kind:
    return Kind(build, batch, lambda batch: batch["ids"][:, 1:].numel())


KINDS: Mapping[str, Kind] = {
    "opt": Kind(opt, _text, _next_tokens),
    "opt untied": Kind(lambda: opt(tied=False), _text, _next_tokens),
    "opt checkpointed": Kind(lambda: checkpointed_opt(reentrant=False), _text, _next_tokens),
    "opt checkpointed reentrant": Kind(lambda: checkpointed_opt(reentrant=True), _text, _next_tokens),
    "gpt2 padded": Kind(gpt2, _padded, _next_tokens),
    "vit": Kind(vit, _images("pixel_values"), lambda batch: len(batch["labels"])),
    "conv": Kind(Conv, _images("images"), lambda batch: len(batch["labels"])),
    "plain": _blocks(Blocks),
    "branch": _blocks(Branched, _branch),
    "side": _blocks(Sided, _branch),
    "twice": _blocks(Twice),
    "shuffled": _blocks(Shuffled),
    "tied blocks": _blocks(Tied),
    "frozen": _blocks(Frozen),
    "lora": _blocks(Adapted),
    "recomputed": _blocks(lambda: Recomputed(reentrant=False)),
    "recomputed reentrant": _blocks(lambda: Recomputed(reentrant=True)),
    "odd": _blocks(Odd),
    "nested": _blocks(Nested),
}
