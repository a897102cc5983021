import threading
import weakref

import torch

from albireo.distributed.host_collectives import run_settled


def test_it_returns_when_no_thread_holds_a_tensor_any_more() -> None:
    asked = threading.Event()
    held: list[torch.Tensor] = []
    seen: list[weakref.ref[torch.Tensor]] = []

    def let_go() -> None:
        asked.wait()
        held.clear()

    def collective(tensor: torch.Tensor, other: torch.Tensor) -> None:
        tensor.add_(other)
        held.extend((tensor, other))
        seen.append(weakref.ref(tensor))
        asked.set()

    thread = threading.Thread(target=let_go)
    thread.start()
    values = torch.zeros(3)
    run_settled(collective, values, torch.ones(3))
    assert seen[0]() is None
    assert values.tolist() == [1.0, 1.0, 1.0]
    thread.join()
