"""The Containerfiles, and `make images` with an engine that only takes notes; real builds are in tests/e2e."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
IMAGES = ("base", "train", "optimize", "edge")
DIGEST = "sha256:" + "0123456789abcdef" * 4

ENGINE = """#!/bin/sh
# Stands in for docker, which the tests may not need: takes notes, and fails where it is told to.
echo "$*" >> "$0.calls"
if [ -e "$0.fails" ] && echo "$*" | grep -q "$(cat "$0.fails")"; then echo "denied: no access"; exit 1; fi
case "$*" in
  *RepoDigests*) echo "[\\"${5%:*}@DIGEST\\"]" ;;
  *Size*) echo 1000000 ;;
esac
""".replace("DIGEST", DIGEST)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def requirements() -> ModuleType:
    return load(ROOT / "images" / "requirements.py")


def containerfile(image: str) -> str:
    return (ROOT / "images" / image / "Containerfile").read_text()


def test_hadolint_finds_nothing() -> None:
    files = [str(ROOT / "images" / image / "Containerfile") for image in IMAGES]
    program = Path(sys.executable).parent / "hadolint"
    checked = subprocess.run([str(program), *files], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_names_no_other_and_ends_as_the_fixed_user(image: str) -> None:
    text = containerfile(image)
    origins = re.findall(r"(?m)^FROM (\S+)", text)
    assert set(origins) == {"${BASE_IMAGE}"}, "images/digests.yaml is the only place that names an image"
    assert re.findall(r"(?m)^USER (.*)$", text) == ["10001:10001"]
    assert "ENTRYPOINT" not in text, "KFP's command must run as it is"
    assert "--mount" not in text, "Docker's first builder does not know it"
    assert "--chmod" not in text


def test_the_edge_image_is_for_every_architecture() -> None:
    lines = [line for line in containerfile("edge").splitlines() if not line.startswith("#")]
    found = re.findall(r"amd64|x86_64|arm64|aarch64|--platform|TARGETARCH", "\n".join(lines))
    assert found == []
    assert not [line for line in load_requirements("edge") if "platform_machine" in line]


def load_requirements(extra: str) -> list[str]:
    script = [sys.executable, str(ROOT / "images" / "requirements.py"), extra]
    return subprocess.run(script, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()


def test_an_image_installs_what_its_extra_names(requirements: ModuleType) -> None:
    train = load_requirements("train")
    assert {"torch", "peft", "kfp", "pydantic>=2.11"} <= set(train), "of train, of base, and of the project itself"
    assert not [line for line in train if "slmops" in line]
    assert "torch" not in load_requirements("edge")
    with pytest.raises(SystemExit, match="has no extra 'trian'; it has base"):
        requirements.requirements(ROOT / "pyproject.toml", "trian")


@pytest.mark.slow
def test_every_pinned_package_of_the_edge_has_a_wheel_for_arm64(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run(
        [*pip, "--retries", "0", "index", "versions", "pip"], capture_output=True, check=False
    ).returncode:
        pytest.skip("no package index answers here")
    wanted = tmp_path / "edge.txt"
    wanted.write_text("\n".join(load_requirements("edge")))
    platforms = [f"--platform=manylinux{tag}_aarch64" for tag in ("2014", "_2_17", "_2_27", "_2_28")]
    report = tmp_path / "report.json"
    arguments = ["--quiet", "--dry-run", "--ignore-installed", "--only-binary=:all:", "--python-version=3.11"]
    arguments += ["--target", str(tmp_path / "none"), "--report", str(report)]
    arguments += ["-c", str(ROOT / "constraints.txt"), "-r", str(wanted)]
    resolved = subprocess.run(
        [*pip, "install", *platforms, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert resolved.returncode == 0, resolved.stderr
    wheels = [entry["download_info"]["url"].rpartition("/")[2] for entry in json.loads(report.read_text())["install"]]
    assert any(wheel.startswith("onnxruntime_genai-") for wheel in wheels)
    assert not [wheel for wheel in wheels if not wheel.endswith(("_aarch64.whl", "-none-any.whl"))]


class Bench:
    """`make images` in a folder of its own, with an engine that takes notes and a registry that answers."""

    def __init__(self, folder: Path, registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.registry = registry
        self.tool = load(ROOT / "tools" / "images.py")
        self.digests = folder / "images" / "digests.yaml"
        self.digests.parent.mkdir()
        self.digests.write_text((ROOT / "images" / "digests.yaml").read_text())
        self.engine = folder / "engine"
        self.engine.write_text(ENGINE)
        self.engine.chmod(0o755)
        monkeypatch.setattr(self.tool, "ROOT", folder)
        monkeypatch.setattr(self.tool, "DIGESTS", self.digests)
        monkeypatch.setattr(self.tool, "recompile", lambda: 0)

    def run(self, *arguments: str) -> int:
        code: int = self.tool.main(["--registry", self.registry, "--engine", str(self.engine), *arguments])
        return code

    def fail_at(self, what: str) -> None:
        Path(f"{self.engine}.fails").write_text(what)

    def calls(self) -> list[str]:
        return Path(f"{self.engine}.calls").read_text().splitlines()


@pytest.fixture(scope="module")
def registry() -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/v2/" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}/team"
        server.shutdown()


@pytest.fixture
def bench(tmp_path: Path, registry: str, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, registry, monkeypatch)


def test_registry_and_digests_are_recorded_and_comments_stay(bench: Bench) -> None:
    before = bench.digests.read_text()
    assert bench.run("--torch-index", "https://wheels.example.com") == 0
    after = bench.digests.read_text()
    recorded = yaml.safe_load(after)
    assert recorded["registry"] == bench.registry
    assert recorded["digests"] == dict.fromkeys(IMAGES, DIGEST)
    assert recorded["base_image"] == yaml.safe_load(before)["base_image"]
    assert [line for line in before.splitlines() if line.startswith("#")] == [
        line for line in after.splitlines() if line.startswith("#")
    ]
    builds = [call for call in bench.calls() if call.startswith("build ")]
    torch = {image for image in IMAGES for call in builds if f"images/{image}/" in call and "TORCH_INDEX" in call}
    assert torch == {"train", "optimize"}
    assert all(f"BASE_IMAGE={recorded['base_image']}" in call for call in builds)


@pytest.mark.parametrize("what", ["build .*images/edge/", "push .*/edge:"])
def test_nothing_is_recorded_unless_all_four_are_pushed(
    bench: Bench, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bench.digests.read_text()
    bench.fail_at(what)
    assert bench.run() == 2
    assert bench.digests.read_text() == before
    errors = capsys.readouterr().err
    assert errors.startswith("error: edge: not ")
    assert "denied: no access" in errors, "the engine's own reason"


def test_a_registry_that_does_not_answer_is_said_before_anything_is_built(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.registry = "registry.invalid/team"
    assert bench.run() == 2
    assert "no registry answers at registry.invalid; give yours with REGISTRY=host/team" in capsys.readouterr().err
    assert not Path(f"{bench.engine}.calls").exists()


def test_an_address_of_another_form_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.registry = "https://registry.example.com/team"
    assert bench.run() == 2
    assert "a registry is host[:port][/team], without https://, found 'https://" in capsys.readouterr().err


def test_build_only_neither_pushes_nor_records(bench: Bench) -> None:
    before = bench.digests.read_text()
    assert bench.run("--build-only") == 0
    assert bench.digests.read_text() == before
    assert not [call for call in bench.calls() if call.startswith("push")]
