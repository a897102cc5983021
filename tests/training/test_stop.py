"""Ctrl-C asks, a second one insists, and whoever listened before listens again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from albireo.training.stop import StopRequest

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


def test_nothing_is_asked_for_unasked() -> None:
    with StopRequest() as stop:
        assert not stop.requested


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_gives_the_handlers_back(number: int) -> None:
    before = handlers()
    with StopRequest() as stop:
        assert handlers() != before
        signal.raise_signal(number)
        assert stop.requested
        assert handlers() == before
    assert handlers() == before


def test_the_second_ctrl_c_stops_at_once() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested


def test_a_signal_of_the_other_kind_counts_as_the_second() -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: heard.append(number))
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    assert heard == [signal.SIGTERM]


def test_handlers_are_put_back_after_a_failure() -> None:
    before = handlers()
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert handlers() == before


def test_one_may_listen_within_another() -> None:
    with StopRequest() as outer:
        with StopRequest() as inner:
            signal.raise_signal(signal.SIGINT)
        assert (inner.requested, outer.requested) == (True, False)
        signal.raise_signal(signal.SIGINT)
        assert outer.requested


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_was_ignored_stays_so(number: int) -> None:
    """A shell has its background jobs ignore Ctrl-C, which is meant for what runs in front."""
    signal.signal(number, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(number)
        assert not stop.requested
        assert signal.getsignal(number) == signal.SIG_IGN
        other = next(one for one in SIGNALS if one != number)
        signal.raise_signal(other)
        assert stop.requested
    assert signal.getsignal(number) == signal.SIG_IGN


def replace_signal(monkeypatch: pytest.MonkeyPatch, replacement: Callable[[int, Any], Any]) -> None:
    """Give the file under test another `signal.signal`, and nobody else."""
    names = {name: getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIG_DFL", "SIG_IGN", "default_int_handler")}
    monkeypatch.setattr(
        "albireo.training.stop.signal", SimpleNamespace(signal=replacement, getsignal=signal.getsignal, **names)
    )


class Foreign:
    """What `signal` does where a handler was not installed from Python: it returns None, and takes no None."""

    def __init__(self) -> None:
        self.handlers: dict[int, Any] = dict.fromkeys(SIGNALS)

    def signal(self, number: int, handler: Any) -> Any:
        if handler is None:
            raise TypeError("signal handler must be signal.SIG_IGN, signal.SIG_DFL, or a callable object")
        before = self.handlers[number]
        self.handlers[number] = handler
        return before


def test_a_handler_that_is_not_pythons_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = Foreign()
    replace_signal(monkeypatch, foreign.signal)
    with StopRequest() as stop:
        foreign.handlers[signal.SIGINT](signal.SIGINT, None)
        assert stop.requested
        # Python cannot put a foreign handler back; a second signal must stop all the same.
        assert foreign.handlers == {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    foreign.handlers = dict.fromkeys(SIGNALS)
    with StopRequest():
        pass
    assert foreign.handlers == {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


def test_a_signal_while_the_handlers_are_put_back_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may send one at any moment, between two of these calls too."""
    before = handlers()
    original = signal.signal
    stop = StopRequest()
    came: list[int] = []

    def signal_and_more(number: int, handler: Any) -> Any:
        result = original(number, handler)
        if not came:
            came.append(number)
            stop._hear(signal.SIGTERM, None)
        return result

    with stop:
        replace_signal(monkeypatch, signal_and_more)
    assert stop.requested
    assert came == [signal.SIGINT]
    assert handlers() == before


def test_outside_the_main_thread_nobody_listens() -> None:
    """Python lets only the main thread listen; a run in another thread goes on without."""
    before = handlers()
    outcome: list[Any] = []

    def work() -> None:
        try:
            with StopRequest() as stop:
                outcome.append(stop.requested)
        except BaseException as error:  # noqa: BLE001
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcome == [False]
    assert handlers() == before
