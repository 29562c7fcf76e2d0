"""preflight: what a user sees before a pipeline has cost anything."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.config import TEACHER_API_KEY
from slmops.errors import ConfigError, TransientError, UserError
from slmops.preflight.config import PreflightConfig
from slmops.preflight.run import REPORT, run
from slmops.s3 import S3Store
from slmops.storage import open_store

ROW = b'{"prompt": "a", "completion": "b"}\n'


class Place:
    """Data, base model and store in one folder, all of them as they should be."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.data, self.store = folder, folder / "rows.jsonl", folder / "store"
        self.base = shutil.copytree(model, folder / "base")
        self.data.write_bytes(ROW)

    def check(self, **settings: Any) -> Sidecar:
        uris = {"data_uri": self.data, "base_model_uri": self.base, "store_uri": self.store}
        config = PreflightConfig.create({name: str(uri) for name, uri in uris.items()} | settings)
        return run(config, report=self.folder / "out" / "report")

    def problems(self, **settings: Any) -> list[str]:
        """Its lines, each about one thing that is wrong."""
        with pytest.raises(UserError) as error:
            self.check(**settings)
        return [line.strip() for line in str(error.value).splitlines() if not line.endswith("wrong:")]

    def change(self, file: str, **entries: Any) -> None:
        """Change entries of one of the model's JSON files."""
        path = self.base / file
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture
def place(tiny_model: Path, tmp_path: Path) -> Place:
    return Place(tmp_path, tiny_model)


def upload(folder: Path, uri: str) -> str:
    for path in folder.iterdir():
        open_store(uri).create(path.name, path)
    return uri


def test_what_was_found_is_written_down(place: Place) -> None:
    place.check()

    sidecar = artifacts.expect(place.folder / "out" / "report", "report")
    found = json.loads((place.folder / "out" / "report" / REPORT).read_text())
    weights = place.base / "model.safetensors"
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["weights"] == {weights.name: weights.stat().st_size}
    assert found["num_parameters"] * 4 == pytest.approx(weights.stat().st_size, rel=0.01), "float32"
    assert found["data_bytes"] == len(ROW)
    assert found["free_disk_bytes"] > 1e9
    assert len(found["model_identity"]) == 64
    assert sidecar.metadata()["license"] == "unknown"
    assert "add `license:` to the front matter" in found["warnings"][0]


def test_everything_that_is_wrong_is_said_at_once_and_nothing_is_left(place: Place) -> None:
    place.change("config.json", auto_map={"AutoModelForCausalLM": "modeling.Mine"}, vocab_size=10)
    (place.base / "model.safetensors").unlink()
    problems = place.problems(
        data_uri=str(place.folder / "rosw.jsonl"),
        store_uri="gs://bucket",
        require_license=True,
        min_free_disk_gib=1e9,
        min_free_memory_gib=1e9,
        min_gpus=1000,
        teacher_endpoint="http://127.0.0.1:9/v1",
    )
    expected = [
        r"data: .*rosw.jsonl does not exist",
        r"base model: .* brings code of its own \(auto_map",
        r"base model: .* a tokenizer of 1,024 tokens and an embedding of 10",
        r"base model: .* has no model.safetensors",
        r"licence: .* names no licence",
        r"store: a store is s3://bucket/prefix or a local folder, found gs://",
        r"disk: .* min_free_disk_gib asks for 1e\+09",
        r"memory: .* min_free_memory_gib asks for 1e\+09",
        r"GPU: min_gpus asks for 1000, found \d",
        r"teacher endpoint: http://127.0.0.1:9/v1 does not answer",
    ]
    assert len(problems) == len(expected)
    for line, pattern in zip(problems, expected, strict=True):
        assert re.match(pattern, line), line
    assert not (place.folder / "out" / "report").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p.base / "config.json").unlink(), "has no config.json"),
        (lambda p: (p.base / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda p: (p.base / "config.json").write_text("[" * 100_000), "config.json is not JSON"),
        (lambda p: p.change("config.json", architectures=None), "names no model_type and architecture"),
        (lambda p: p.change("config.json", model_type="llama99"), "'llama99', which transformers 5"),
        (lambda p: p.change("config.json", model_type="vit"), "has as no causal language model"),
        (lambda p: p.change("config.json", hidden_size="wide"), "does not fit transformers"),
        (lambda p: (p.base / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda p: p.change("tokenizer.json", model={"type": "None"}), "tokenizer.json cannot be loaded"),
        (lambda p: (p.base / "chat_template.jinja").unlink(), "has no chat template; add chat_template.jinja"),
        (lambda p: (p.base / "model.safetensors").rename(p.base / "pytorch_model.bin"), "found pytorch_model.bin"),
        (lambda p: (p.base / "model.safetensors").write_bytes(b"short"), "no valid safetensors header"),
        (lambda p: _truncate(p.base / "model.safetensors"), "bytes where its header says"),
        (lambda p: _index(p, "model-2-of-2.safetensors"), "has no model-2-of-2.safetensors (1 of 2 files are missing)"),
        (lambda p: _index(p, None), "has no weight_map"),
        (lambda p: shutil.rmtree(p.base), "is no directory"),
    ],
)
def test_a_base_model_that_cannot_be_used(place: Place, damage: Callable[[Place], None], words: str) -> None:
    damage(place)
    (problem,) = place.problems()
    assert problem.startswith("base model: ")
    assert words in problem


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _index(place: Place, missing: str | None) -> None:
    weight_map = {"a": "model.safetensors", "b": missing} if missing else {}
    (place.base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_chat_template_may_be_in_the_tokenizers_config(place: Place) -> None:
    template = (place.base / "chat_template.jinja").read_text()
    (place.base / "chat_template.jinja").unlink()
    place.change("tokenizer_config.json", chat_template=template)
    place.check()


def test_a_model_that_slmops_wrote_is_held_against_its_sidecar(tiny_teacher: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, tiny_teacher)
    assert place.check().facts["model_digest"] == artifacts.read(tiny_teacher).digest
    (place.base / "generation_config.json").unlink()
    (problem,) = place.problems()
    assert "generation_config.json is missing, slmops.json says" in problem


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("README.md", "---\nlicense: apache-2.0\ntags: [a]\n---\n# A model\n", ("apache-2.0", "model card")),
        ("README.md", "---\nlicense: other\nlicense_name: acme-1\n---\n", ("acme-1", "model card")),
        ("README.md", "license: mit, says the text\n", ("unknown", None)),
        ("README.md", "---\nlicense: [\n---\n", ("unknown", None)),
        ("README.md", "---\nlicense: mit\ndate: 2026-99-99\n---\n", ("unknown", None)),
        ("LICENSE", "Apache License\n   Version 2.0, January 2004\n", ("Apache-2.0", "file LICENSE")),
        ("LICENSE.txt", "All rights reserved.", ("unknown", None)),
    ],
)
def test_the_licence_is_recorded(place: Place, file: str, content: str, expected: tuple[str, str | None]) -> None:
    (place.base / file).write_text(content)
    facts = place.check().facts
    assert (facts["license"], facts.get("license_source")) == expected


def test_only_an_allowed_licence_passes(place: Place) -> None:
    assert "names no licence" in place.problems(allowed_licenses=["MIT"])[0]
    (place.base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert "is under apache-2.0 (by its model card), and allowed_licenses are MIT" in place.problems(
        allowed_licenses=["MIT"]
    )[0].removeprefix("licence: ")
    place.check(allowed_licenses=["MIT", "Apache-2.0"], require_license=True)


def test_another_tokenizer_is_refused_and_the_same_one_is_not(place: Place, tiny_model: Path) -> None:
    place.check(same_tokenizer_uris=[str(tiny_model)])
    other = shutil.copytree(tiny_model, place.folder / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["added_tokens"][0]["content"] = "<another>"
    (other / "tokenizer.json").write_text(json.dumps(content))
    (problem,) = place.problems(same_tokenizer_uris=[str(other)])
    assert "has another tokenizer than" in problem


@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (None, "is empty")])
def test_data_that_cannot_be_read(place: Place, content: bytes | None, words: str) -> None:
    place.data.unlink()
    place.data.mkdir() if content is None else place.data.write_bytes(content)
    (problem,) = place.problems()
    assert words in problem


def test_the_version_of_the_data_follows_a_file(place: Place) -> None:
    first = place.check().facts["data_version"]
    assert place.check().facts["data_version"] == first
    place.data.write_bytes(ROW.upper())
    assert place.check().facts["data_version"] != first


def test_the_version_of_the_data_follows_the_files_of_a_folder(place: Place) -> None:
    place.data.unlink()
    place.data.mkdir()
    (place.data / "train.jsonl").write_bytes(ROW)
    first = place.check().facts
    assert first["data_bytes"] == len(ROW)
    assert place.check().facts["data_version"] == first["data_version"]
    (place.data / "test.jsonl").write_bytes(ROW)
    assert place.check().facts["data_version"] != first["data_version"]


@pytest.mark.slow
def test_all_of_it_behind_s3(place: Place, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.base / "README.md").write_text("---\nlicense: mit\n---\n")
    uris = {
        "data_uri": f"{bucket}/in/rows.jsonl",
        "base_model_uri": upload(place.base, f"{bucket}/models/tiny"),
        "store_uri": f"{bucket}/releases",
    }
    store = open_store(bucket)
    store.create("in/rows.jsonl", ROW)
    taken = _count_reads(monkeypatch)

    first = place.check(**uris).facts

    assert first["license"] == "mit"
    assert first["weights_bytes"] == (place.base / "model.safetensors").stat().st_size
    assert taken["model.safetensors"] < 0.01 * first["weights_bytes"], "only the header of the weights is read"
    assert place.check().facts["model_identity"] == first["model_identity"], "a copy of it is the same model"
    for content, same in ((ROW, True), (ROW.upper(), False)):
        found = store.stat("in/rows.jsonl")
        assert found
        assert store.replace("in/rows.jsonl", content, if_match=found.etag)
        assert (place.check(**uris).facts["data_version"] == first["data_version"]) is same

    problems = place.problems(data_uri=f"{bucket}/in/other.jsonl", base_model_uri=f"{bucket}/models/other")
    assert f"data: {bucket}/in/other.jsonl does not exist; check bucket and key" in problems
    assert f"base model: {bucket}/models/other has no files; check the URI" in problems


def _count_reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that are read from S3, by key."""
    taken: dict[str, int] = {}
    real = S3Store._body

    def body(self: S3Store, response: Any, key: str) -> bytes:
        data = real(self, response, key)
        taken[key] = taken.get(key, 0) + len(data)
        return data

    monkeypatch.setattr(S3Store, "_body", body)
    return taken


def test_a_store_that_is_down_may_be_tried_again_if_nothing_else_is_wrong(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(TransientError, match=r"store: s3://edge does not answer at http://127\.0\.0\.1:9"):
        place.check(store_uri="s3://edge")
    place.data.unlink()
    data, store = place.problems(store_uri="s3://edge")
    assert "does not exist" in data
    assert "does not answer" in store


@contextmanager
def endpoint(status: int, body: str, headers: dict[str, str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """A double of an OpenAI-compatible server's /v1/models: its base URL, and the keys that it was shown."""
    keys: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("Authorization", ""))
            self.send_response(status if self.path == "/v1/models" else 404)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", keys
    finally:
        server.shutdown()
        server.server_close()


def test_a_teachers_endpoint_is_asked_with_the_key_of_the_environment(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TEACHER_API_KEY, "the-key")
    with endpoint(200, '{"object": "list", "data": [{"id": "teacher-70b"}]}') as (url, keys):
        assert place.check(teacher_endpoint=url).facts["teacher_models"] == ["teacher-70b"]
    assert keys == ["Bearer the-key"]


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (401, "", UserError, f"answered 401; put a valid key into ${TEACHER_API_KEY}"),
        (404, "", UserError, "is it the base URL of an OpenAI-compatible server"),
        (200, "<html>", UserError, "with no list of models"),
        (302, "", UserError, "answered 302"),
        (503, "", TransientError, "answered 503; try again later"),
    ],
)
def test_an_endpoint_that_refuses(place: Place, status: int, body: str, kind: type[Exception], words: str) -> None:
    with endpoint(status, body, {"Location": "http://127.0.0.1:9/"}) as (url, _), pytest.raises(kind) as error:
        place.check(teacher_endpoint=url)
    assert words in str(error.value)


def test_gpus_are_counted_and_measured(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a double of what torch says of two GPUs: the machines that run tests have none."""
    device = SimpleNamespace(name="L4", total_memory=22 * 1024**3)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: device)
    assert place.check(min_gpus=2, min_gpu_memory_gib=20).facts["gpus"] == ["L4, 22.0 GiB"] * 2
    assert "min_gpus asks for 3, found 2" in place.problems(min_gpus=3)[0]
    assert "min_gpu_memory_gib asks for 40, found L4, 22.0 GiB" in place.problems(min_gpus=1, min_gpu_memory_gib=40)[0]


def test_the_work_directory_must_be_writable(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLMOPS_WORK_DIR", str(place.data / "below-a-file"))
    (problem,) = place.problems()
    assert problem.startswith(f"disk: {place.data}/below-a-file cannot be written (Not a directory)")


def test_memory_of_no_gpu_is_a_contradiction(place: Place) -> None:
    with pytest.raises(ConfigError, match="min_gpu_memory_gib needs min_gpus of 1 or more"):
        place.check(min_gpu_memory_gib=10)
