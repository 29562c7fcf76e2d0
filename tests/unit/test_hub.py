"""Names of data sets on a hub, and what is said where one is not there.

The hub cannot be reached from a test: a server on loopback gives its answers to one question: at which commit a data
set is now.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from slmops import hub
from slmops.errors import StoreError, TransientError
from slmops.preflight.sources import check_data

constants = pytest.importorskip("huggingface_hub.constants")

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Answers(BaseHTTPRequestHandler):
    """What a hub answers to `GET /api/datasets/<name>[/revision/<revision>]`."""

    def do_GET(self) -> None:
        name, _, revision = self.path.removeprefix("/api/datasets/").partition("/revision/")
        commit = COMMITS.get(revision or "main")
        status = {"team/private": 401, "team/down": 503}.get(name, 200 if name == "team/bank" and commit else 404)
        self.send_response(status)
        body = json.dumps({"id": name, "sha": commit}).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Be silent."""


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Answers) as found:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{found.server_port}")
        Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def test_a_name_has_owner_revision_and_config() -> None:
    assert hub.parse("hf://datasets/team/bank@v1#en") == hub.HubDataset("team/bank", "v1", "en")
    assert hub.parse("hf://datasets/squad") == hub.HubDataset("squad", None, None)
    for wrong in ("hf://datasets/", "hf://models/team/bank", "hf://datasets/a/b/c.csv", "hf://datasets/a b"):
        with pytest.raises(StoreError, match="a data set of a hub is hf://datasets/owner/name"):
            hub.parse(wrong)


def test_the_commit_is_the_version_of_the_data() -> None:
    assert hub.commit_of("hf://datasets/team/bank") == "a" * 40
    first, second = (check_data(f"hf://datasets/team/bank{end}") for end in ("", "@v1"))
    assert not first.problems
    assert "data_bytes" not in first.facts
    assert first.facts["data_version"] != second.facts["data_version"]


def test_what_is_not_there_or_does_not_answer_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("team/absent", "team/private", "team/bank@v9"):
        with pytest.raises(StoreError, match=rf"{name} does not exist or may not be read \(the hub answered 40[14]\)"):
            hub.commit_of(f"hf://datasets/{name}")
    with pytest.raises(TransientError, match="the hub answered 503; try again later"):
        hub.commit_of("hf://datasets/team/down")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TransientError, match="the hub does not answer"):
        hub.commit_of("hf://datasets/team/bank")
