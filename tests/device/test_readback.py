import torch

from albireo.device import Readback

CPU = torch.device("cpu")


def test_numbers_come_back_in_order_and_late() -> None:
    readback = Readback(CPU, lag=2)
    seen = []
    for step in range(5):
        readback.push(step, torch.tensor([float(step), 1.0]))
        seen.append([key for key, _, _ in readback.pop()])
    assert seen == [[], [], [0], [1], [2]]
    rest = readback.pop(everything=True)
    assert [(key, values) for key, values, _ in rest] == [(3, [3.0, 1.0]), (4, [4.0, 1.0])]
    assert rest[1][2].seconds_since(rest[0][2]) >= 0


def test_what_was_pushed_is_what_comes_back() -> None:
    readback = Readback(CPU, lag=0)
    values = torch.tensor([1.0])
    readback.push(0, values)
    values.fill_(9.0)
    assert [numbers for _, numbers, _ in readback.pop()] == [[1.0]]
