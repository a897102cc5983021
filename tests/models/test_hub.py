"""The hub's client against a small server on this machine, which answers as the hub does, or not at all.

The client reads its address when it is imported, so each case runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

ASK = """
import json, sys
from albireo.errors import ModelError
from albireo.models.hub import download_model
answers = []
for repository, weights in json.loads(sys.argv[1]):
    try:
        folder = download_model(repository, weights=weights, patience_seconds=0.5)
        answers.append(sorted(path.name for path in folder.iterdir()))
    except ModelError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def ask(cases: list[tuple[str, bool]], home: Path, **environment: str) -> list[str | list[str]]:
    """Download each model in one fresh process, and return the names of the files it got, or what it said."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    result = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(cases)],
        env={**kept, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return json.loads(result.stdout.splitlines()[-1])


Repositories = Mapping[str, Mapping[str, Mapping[str, bytes]]]


FAILURES = {"some/gated": (403, "GatedRepo"), "some/broken": (500, ""), "some/absent": (404, "RepoNotFound")}


class HubServer(ThreadingHTTPServer):
    """Repositories {name: {revision: {file: content}}}, and a few that fail."""

    def __init__(self, repositories: Repositories) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories = repositories

    def answer(self, path: list[str]) -> tuple[int, bytes, dict[str, str]]:
        """Return status, content and headers for a path."""
        api = path[:2] == ["api", "models"]
        path = path[2:] if api else path
        name, rest = "/".join(path[:2]), path[2:]
        if name not in self.repositories:
            status, code = FAILURES.get(name, (404, ""))  # the client may ask for other things than models
            return status, b"{}", {"X-Error-Code": code} if code else {}
        revisions = self.repositories[name]
        if rest[:1] == ["discussions"]:
            return 200, json.dumps(discussions(revisions)).encode(), {}
        revision = next((r for r in revisions if commit(r) in rest or r in "/".join(rest)), "main")
        return (self.described if api else self.file)(name, revision, rest)

    def file(self, name: str, revision: str, rest: list[str]) -> tuple[int, bytes, dict[str, str]]:
        content = self.repositories[name][revision][rest[-1]]
        return 200, content, {"ETag": f'"{oid(content)}"', "X-Repo-Commit": commit(revision)}

    def described(self, name: str, revision: str, rest: list[str]) -> tuple[int, bytes, dict[str, str]]:
        files = self.repositories[name][revision]
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": file, "size": len(c), "oid": oid(c)} for file, c in files.items()]
            return 200, json.dumps(tree).encode(), {}
        siblings = [{"rfilename": file} for file in files]
        info = {"id": name, "sha": commit(revision), "siblings": siblings, "private": False, "tags": [], "downloads": 0}
        return 200, json.dumps(info).encode(), {}


class HubHandler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        status, content, headers = self.server.answer(unquote(urlsplit(self.path).path).strip("/").split("/"))
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def hub(repositories: Repositories) -> Iterator[str]:
    """Serve repositories and yield the address."""
    with HubServer(repositories) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def discussions(revisions: Mapping[str, object]) -> dict[str, object]:
    """The pull requests of a repository: those of the hub's robot, and one of a stranger."""
    robot = {"name": "SFconvertbot", "type": "user"}
    common = {
        "status": "open",
        "isPullRequest": True,
        "createdAt": "2024-01-01T00:00:00.000Z",
        "repo": {"name": "a/b", "type": "model"},
    }
    title = "Adding `safetensors` variant of this model"
    entries = [
        {**common, "num": int(name.rsplit("/", 1)[1]), "title": title, "author": robot}
        for name in revisions
        if name != "main"
    ]
    entries.append({**common, "num": 99, "title": title, "author": {**robot, "name": "stranger"}})
    return {"discussions": entries, "count": len(entries), "start": 0}


def commit(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def files(saved: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in saved.iterdir()} | {"vocab.json": b"{}", "merges.txt": b""}


def test_a_model_is_fetched_kept_and_found_again_without_the_hub(files: dict[str, bytes], tmp_path: Path) -> None:
    main = {**files, "pytorch_model.bin": b"pickled", "tf_model.h5": b"other"}
    pickled = {name: content for name, content in main.items() if name != "model.safetensors"}
    repositories = {
        "some/opt": {"main": main},
        "some/old": {"main": pickled, "refs/pr/3": main, "refs/pr/12": {**main, "vocab.json": b"{ }"}},
        "some/pickled": {"main": pickled},
        "some/sharded": {
            "main": {**pickled, "model.safetensors.index.json": b"{}", "model-00001-of-00001.safetensors": b"x"}
        },
    }
    described = ["config.json", "merges.txt", "vocab.json"]
    whole = sorted([*described, "model.safetensors"])
    cases = [
        ("some/opt", False),
        ("some/opt", True),
        ("some/old", True),
        ("some/pickled", True),
        ("some/sharded", True),
        ("some/absent", True),
        ("some/gated", True),
        ("some/broken", True),
    ]
    with hub(repositories) as address:
        answers = ask(cases, tmp_path, HF_ENDPOINT=address)
    assert answers[:3] == [described, whole, whole]
    assert "pickled weights only, which can run any code" in answers[3]
    assert answers[4] == sorted([*described, "model.safetensors.index.json", "model-00001-of-00001.safetensors"])
    assert "there is no model some/absent on the hub that you may read" in answers[5]
    assert "its owner must let you in first" in answers[6]
    assert "the hub refused the model some/broken" in answers[7]
    snapshots = list((tmp_path / "hub").glob("models--some--old/snapshots/*/vocab.json"))
    assert [path.read_bytes() for path in snapshots] == [b"{ }"], "the robot's newest, and no stranger's"
    assert not list(tmp_path.rglob("*.bin"))

    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": address}):
        answers = ask([*cases[:4], ("some/absent", False)], tmp_path, **environment)
        assert answers[:3] == [whole, whole, whole]
        assert "cannot be reached for the model some/pickled" in answers[3]
        assert "cannot be reached for the model some/absent" in answers[4]
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_a_hub_that_cannot_be_reached_is_said_in_one_line(tmp_path: Path, environment: dict[str, str]) -> None:
    (answer,) = ask([("facebook/opt-125m", True)], tmp_path, **environment)
    assert answer.startswith("the hub cannot be reached for the model facebook/opt-125m (")
    assert answer.endswith("): use --init random with a named size, or give a local folder")


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        (answer,) = ask(
            [("facebook/opt-125m", True)], tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}"
        )
    assert "cannot be reached" in answer
    assert time.monotonic() - started < 30, "a moment's patience, and a process's start"
