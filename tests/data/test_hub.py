from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from albireo.data import hub


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def refusing() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_an_address_answers_or_does_not(listening: str, refusing: str) -> None:
    assert hub.address_answers(listening, 5)
    assert not hub.address_answers(refusing, 5)
    assert not hub.address_answers("https://name.invalid", 5)


def test_a_name_that_is_looked_up_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, ended = threading.Event(), threading.Event()

    def look_up(*place: object, timeout: float) -> socket.socket:
        let_go.wait(30)
        ended.set()
        raise OSError

    monkeypatch.setattr(socket, "create_connection", look_up)
    begun = time.monotonic()
    assert not hub.address_answers("https://slow.invalid", 0.1)
    assert time.monotonic() - begun < 10
    let_go.set()
    assert ended.wait(30)


def test_the_endpoint_and_the_switch_are_honoured(
    monkeypatch: pytest.MonkeyPatch, listening: str, refusing: str
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", listening)
    assert hub.hub_is_reachable(5)
    monkeypatch.setattr(constants, "ENDPOINT", refusing)
    assert not hub.hub_is_reachable(5)
    monkeypatch.setattr(constants, "ENDPOINT", listening)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.hub_is_reachable(5)


def test_a_proxy_is_what_has_to_answer(monkeypatch: pytest.MonkeyPatch, listening: str, refusing: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(hub, "proxy_bypass", lambda _: False)
    for proxies, reached in (
        ({"https": listening}, True),
        ({"all": listening.removeprefix("http://")}, True),
        ({"https": refusing}, False),
        ({"http": listening}, False),
    ):
        monkeypatch.setattr(hub, "getproxies", lambda proxies=proxies: proxies)
        assert hub.hub_is_reachable(5) == reached
    monkeypatch.setattr(constants, "ENDPOINT", listening)
    monkeypatch.setattr(hub, "getproxies", lambda: {"http": refusing})
    monkeypatch.setattr(hub, "proxy_bypass", lambda host: host == "127.0.0.1")
    assert hub.hub_is_reachable(5)
