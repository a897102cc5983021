"""JSON and tensors come to the main rank as they are."""

from __future__ import annotations

from typing import Any

import torch

from albireo.distributed import World
from albireo.distributed.host_gather import gather_json, receive_tensor, send_to_main


def gather_case(world: World) -> Any:
    return gather_json({"rank": world.rank, "text": "ä" * (1 + 1000 * world.rank), "none": None}, world)


def test_values_come_in_rank_order_to_the_main_rank_alone(two_ranks: Any) -> None:
    first, second = two_ranks.run(gather_case)
    assert [(value["rank"], len(value["text"]), value["none"]) for value in first] == [(0, 1, None), (1, 1001, None)]
    assert second is None


def test_one_rank_has_its_own_value() -> None:
    assert gather_json([1], World(0, 1, 0, torch.device("cpu"))) == [[1]]


def tensors_case(world: World) -> list[Any]:
    sent = [
        torch.arange(5, dtype=torch.bfloat16),
        torch.empty(0),
        torch.tensor([2.0**-149, float("inf")]),
        torch.tensor([True, False, True]),
    ]
    if not world.is_main:
        for tensor in sent:
            send_to_main(tensor)
        return []
    received = []
    for tensor in sent:
        target = torch.zeros_like(tensor)
        receive_tensor(target, 1)
        received.append(torch.equal(target, tensor))
    return received


def test_tensors_come_in_their_order_and_to_the_bit(two_ranks: Any) -> None:
    assert two_ranks.run(tensors_case) == [[True] * 4, []]
