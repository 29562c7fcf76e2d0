"""Real images, really run: by `make e2e-containers`, which builds them and says where in $SLMOPS_E2E_CHECKOUT."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slmops import __version__
from slmops.demo import building_commands
from slmops.demo.object_store import ObjectStore
from slmops.demo.run import CHANNEL, SYSTEM_PROMPT
from tests.manifests.policies import POLICIES
from tests.manifests.rendering import render, targets

CHECKOUT = Path(os.environ.get("SLMOPS_E2E_CHECKOUT", ""))
IMAGE_USER = 10001
EDGE_LIMIT_BYTES = 450 * 1000**2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif("SLMOPS_E2E_CHECKOUT" not in os.environ, reason="needs the images: run `make e2e-containers`"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # the docker client leaves its sockets to the collector
]


@dataclass(frozen=True)
class Images:
    """The names by which the checkout refers to its images."""

    base: str
    train: str
    optimize: str
    edge: str


@pytest.fixture(scope="module")
def images() -> Images:
    """From the checkout's own Python: this one may have another digests.yaml."""
    code = "import json, slmops_images as i; print(json.dumps([i.BASE, i.TRAIN, i.OPTIMIZE, i.EDGE]))"
    printed = subprocess.run([python(), "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT).stdout
    return Images(*json.loads(printed))


@pytest.fixture(scope="module")
def docker_client() -> Iterator[Any]:
    import docker

    client = docker.from_env()
    yield client
    client.close()


def python() -> str:
    return str(CHECKOUT / ".venv" / "bin" / "python")


def command(*arguments: str) -> list[str]:
    return [python(), "-m", "slmops.cli", *arguments]


@contextmanager
def watching(client: Any) -> Iterator[dict[str, dict[str, Any]]]:
    """What Docker says about every container that a run starts, by its id."""
    seen: dict[str, dict[str, Any]] = {}
    events = client.events(decode=True, filters={"label": "slmops.run", "event": "start"})

    def look() -> None:
        for event in events:
            with suppress(Exception):  # it may be gone already
                seen[event["id"]] = client.api.inspect_container(event["id"])

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        events.close()
        watcher.join(5)


class Finished:
    """A run of the whole pipeline in containers."""

    def __init__(self, folder: Path, store: ObjectStore, tiny_model: Path) -> None:
        self.folder, self.output, self.store = folder, folder / "run", store
        self.store_uri = f"{store.make_bucket()}/models"
        rows = building_commands.write(folder / "rows.jsonl", num_rows=1500)
        self.settings = {
            "data_uri": rows.name,  # a relative path, as a user may give it
            "base_model_uri": str(tiny_model),
            "store_uri": self.store_uri,
            "channel": CHANNEL,
            "prompt_template": "{request}",
            "completion_template": "{command}",
            "system_prompt": SYSTEM_PROMPT,
        }
        self.containers: dict[str, dict[str, Any]] = {}

    def run(self) -> subprocess.CompletedProcess[str]:
        settings = [part for name, value in self.settings.items() for part in ("--set", f"{name}={value}")]
        where = ["--output-dir", str(self.output)]
        return subprocess.run(
            command("run", "distill_to_edge", "--runner", "docker", "--recipe", "smoke", *where, *settings),
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env=os.environ | self.store.environment() | {"OMP_NUM_THREADS": "1"},  # the model is tiny
        )

    def record(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.output / "run.json").read_text())
        return loaded


@pytest.fixture(scope="module")
def finished(
    s3: ObjectStore, tiny_model: Path, docker_client: Any, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    run = Finished(tmp_path_factory.mktemp("containers"), s3, tiny_model)
    started = time.monotonic()
    with watching(docker_client) as seen:
        ran = run.run()
    assert ran.returncode == 0, ran.stdout + ran.stderr
    print(f"\nthe pipeline in containers took {time.monotonic() - started:.0f} s\n{ran.stdout}")
    run.containers = seen
    return run


def test_every_step_ran_in_its_own_image_and_locked_in(finished: Finished, images: Images) -> None:
    place = {
        "preflight": images.train,
        "prepare_data": images.base,
        "finetune": images.train,
        "generate_responses": images.train,
        "distill": images.train,
        "quantize": images.optimize,
        "evaluate": images.optimize,
        "benchmark": images.optimize,
        "fetch_champion": images.optimize,
        "gate": images.base,
        "publish": images.base,
    }
    seen = {c["Args"][c["Args"].index("--function_to_execute") + 1]: c for c in finished.containers.values()}
    assert seen.keys() >= place.keys()
    for step, container in seen.items():
        host = container["HostConfig"]
        if step in place:
            assert container["Config"]["Image"] == place[step], step
        assert container["Config"]["User"] == f"{IMAGE_USER}:{IMAGE_USER}"
        assert host["ReadonlyRootfs"] is True
        assert host["NetworkMode"] == "none"
        assert host["CapDrop"] == ["ALL"]
        assert host["SecurityOpt"] == ["no-new-privileges"]
        assert host["Privileged"] is False


def test_only_steps_that_name_the_store_hold_its_keys(finished: Finished) -> None:
    for container in finished.containers.values():
        step = container["Args"][container["Args"].index("--function_to_execute") + 1]
        has_keys = any(entry.startswith("AWS_") for entry in container["Config"]["Env"])
        assert has_keys == any(finished.store_uri in argument for argument in container["Args"]), step


def test_all_is_recorded_and_belongs_to_the_images_user(finished: Finished) -> None:
    record = finished.record()
    assert record["status"] == "succeeded"
    assert {task["status"] for task in record["tasks"].values()} == {"succeeded"}
    assert Path(record["reports"]["gate"]).is_file()
    owners = {path.stat().st_uid for path in (finished.output / "artifacts").rglob("*") if path.is_file()}
    assert owners == {IMAGE_USER if os.getuid() == 0 else os.getuid()}
    assert not list((finished.output / "work").glob("*.work")), "unfinished work was left"


def test_no_container_is_left(finished: Finished, docker_client: Any) -> None:
    assert docker_client.containers.list(all=True, filters={"label": "slmops.run"}) == []


def test_a_second_run_takes_the_results_of_the_first(finished: Finished, docker_client: Any) -> None:
    before = finished.record()
    with watching(docker_client) as seen:
        ran = finished.run()
    assert ran.returncode == 0, ran.stderr
    states = {name: task["status"] for name, task in finished.record()["tasks"].items()}
    uncached = {"preflight", "publish", "import-base-model", "fetch-champion", "evaluate-champion"} | {
        name for name in states if name.startswith("benchmark-")
    }
    # The first run's release is the champion of the second, and gate judges that.
    assert {name for name, state in states.items() if state == "cached"} >= before["tasks"].keys() - uncached - {"gate"}
    assert len(seen) < len(finished.containers)


def test_the_edge_image_serves_the_release(
    finished: Finished, images: Images, docker_client: Any, tmp_path: Path
) -> None:
    node = tmp_path / "node"
    pulled = subprocess.run(
        command("edge", "pull", "--store", finished.store_uri, "--channel", CHANNEL, "--root", str(node)),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | finished.store.environment(),
    )
    assert pulled.returncode == 0, pulled.stderr
    tmp_path.chmod(0o755)
    server = docker_client.containers.run(
        images.edge,
        detach=True,
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        tmpfs={"/tmp": "rw,noexec,nosuid,nodev"},
        volumes={str(node): {"bind": "/var/lib/slmops", "mode": "ro"}},
        ports={"8080/tcp": ("127.0.0.1", None)},
    )
    try:
        deadline = time.monotonic() + 90
        while (health := docker_client.api.inspect_container(server.id)["State"]["Health"]["Status"]) != "healthy":
            assert time.monotonic() < deadline, (health, server.logs().decode())
            time.sleep(0.2)
        server.reload()
        port = server.ports["8080/tcp"][0]["HostPort"]
        question = {"model": "any", "messages": [{"role": "user", "content": "turn on the light"}], "max_tokens": 8}
        base_url = f"http://127.0.0.1:{port}/v1"
        with urllib.request.urlopen(f"{base_url}/models", timeout=30) as answer:
            question["model"] = json.load(answer)["data"][0]["id"]
        request = urllib.request.Request(
            f"{base_url}/chat/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] > 0
        assert server.exec_run(["python3", "-c", "import os; print(os.getuid())"]).output == b"10001\n"
    finally:
        server.remove(force=True)


class Looking:
    """Runs of the one-step pipeline of container_steps.py."""

    def __init__(self, folder: Path, image: str) -> None:
        spec = importlib.util.spec_from_file_location("container_steps", Path(__file__).parent / "container_steps.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.folder, self.output = folder, folder / "runs"
        self.pipeline = module.compile_looking(folder, image)
        (folder / "rows").write_text("some rows")

    def command(self, **settings: str) -> list[str]:
        settings = {"data_uri": "rows", **settings}
        given = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        where = ["--output-dir", str(self.output)]
        return command("run", str(self.pipeline), "--runner", "docker", *where, *given)

    def run(self, environment: dict[str, str] | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(**settings),
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            timeout=120,
            env=os.environ | (environment or {}),
        )

    def found(self) -> dict[str, Any]:
        outputs = json.loads((self.output / "run.json").read_text())["tasks"]["look"]["outputs"]
        loaded: dict[str, Any] = json.loads(Path(outputs["found"]).read_text())
        return loaded

    def start(self) -> subprocess.Popen[str]:
        """A run whose step sleeps, once it does."""
        running = subprocess.Popen(
            self.command(how="sleep"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=self.folder
        )
        deadline = time.monotonic() + 60
        while not (self.output / "work" / "began").exists():
            assert time.monotonic() < deadline
            assert running.poll() is None, running.communicate()[1]
            time.sleep(0.05)
        return running


@pytest.fixture
def looking(tmp_path: Path, images: Images) -> Looking:
    return Looking(tmp_path, images.base)


@pytest.fixture(scope="module")
def listener() -> Iterator[int]:
    """The port of a server on all addresses of this machine."""
    with socket.create_server(("0.0.0.0", 0), backlog=64) as server:
        yield int(server.getsockname()[1])


def own_addresses(docker_client: Any) -> list[str]:
    """Addresses of this machine that a container might reach it by."""
    bridges = [
        c["Gateway"] for n in docker_client.networks.list() for c in n.attrs["IPAM"]["Config"] or () if "Gateway" in c
    ]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        bridges.append(probe.getsockname()[0])
    return ["127.0.0.1", *bridges]


def test_a_step_sees_the_store_and_nothing_else(
    looking: Looking, images: Images, docker_client: Any, s3: ObjectStore, listener: int
) -> None:
    addresses = [f"{host}:{listener}" for host in own_addresses(docker_client)]
    door = s3.endpoint_url.removeprefix("http://")
    store_uri = s3.make_bucket()
    ran = looking.run(s3.environment(), store_uri=store_uri, addresses=json.dumps([*addresses, door]))
    assert ran.returncode == 0, ran.stderr
    found = looking.found()
    assert found["stored"] == "from a container"
    assert found["reached"] == [door]
    assert found["interfaces"] == ["lo"]

    ran = looking.run(s3.environment(), addresses=json.dumps([*addresses, door]))
    assert ran.returncode == 0, ran.stderr
    assert looking.found()["reached"] == []
    assert looking.found()["credentials"] == []

    bridged = docker_client.containers.run(  # what the addresses are worth: a container with a network reaches one
        images.base,
        ["python3", "-c", "import socket, sys\nfor a in sys.argv[1:]:\n h, p = a.split(':')\n"
         " try: socket.create_connection((h, p), 3); print(a)\n except OSError: pass", *addresses],
        remove=True,
    )  # fmt: skip
    assert bridged.split(), "no address could be reached from any container, so the above proves nothing"


def test_a_step_is_locked_in(looking: Looking) -> None:
    ran = looking.run()
    assert ran.returncode == 0, ran.stderr
    assert "the step begins" in ran.stdout
    found = looking.found()
    assert found["ids"] == [IMAGE_USER, IMAGE_USER]
    assert set(found["capabilities"]) == {"0000000000000000"}
    assert found["no_new_privileges"] == "1"
    assert found["writable"] == ["/tmp", "/dev/shm"]
    assert (found["data"], found["data_writable"]) == ("some rows", False)


@pytest.mark.parametrize(
    ("how", "exit_code", "reason"),
    [
        ("DataError", 2, "what is wrong, what was found, what to do"),
        ("GateError", 3, "what is wrong, what was found, what to do"),
        ("StoreUnavailable", 75, "what is wrong, what was found, what to do"),
        ("crash", 1, "ValueError: a defect"),
        ("kill", 1, "the system killed it"),
    ],
)
def test_a_failed_step_gives_its_reason_and_exit_code(looking: Looking, how: str, exit_code: int, reason: str) -> None:
    ran = looking.run(how=how)
    assert ran.returncode == exit_code, ran.stdout + ran.stderr
    assert ran.stderr.splitlines()[-1].startswith(f"error: look: {reason}")
    assert json.loads((looking.output / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_container_and_goes_on(
    looking: Looking, docker_client: Any, how: signal.Signals
) -> None:
    running = looking.start()
    running.send_signal(how)
    _, errors = running.communicate(timeout=30)
    if how != signal.SIGKILL:
        assert running.returncode == 130
        assert errors.splitlines()[-1] == "interrupted; the same command goes on from here"
    deadline = time.monotonic() + 20
    while docker_client.containers.list(filters={"label": "slmops.run"}):
        assert time.monotonic() < deadline, "a container outlived its run"
        time.sleep(0.2)

    ran = looking.run(how="sleep")
    assert ran.returncode == 0, ran.stderr


def test_an_absent_image_is_said_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    ran = Looking(tmp_path, "registry.invalid/slmops/base:none").run()
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: not on this machine: registry.invalid/slmops/base:none; build the images with")
    assert time.monotonic() - started < 30


def test_what_cannot_be_read_or_written_is_said_before_the_run(looking: Looking) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, whose files the images' user may not read")
    (looking.folder / "rows").chmod(0o600)
    refused = looking.run()
    assert refused.returncode == 2
    assert "data_uri: rows cannot be read by user 10001, who runs the steps; chmod -R a+rX rows" in refused.stderr

    (looking.folder / "rows").chmod(0o644)
    (looking.folder / "store").mkdir()
    refused = looking.run(store_uri="./store")
    assert "store cannot be written by user 10001" in refused.stderr


def test_the_edge_image_is_slim(images: Images, docker_client: Any) -> None:
    below = docker_client.images.get(json.loads(inspect_base())["base_image"]).attrs["Size"]
    above = docker_client.images.get(images.edge).attrs["Size"] - below
    print(f"\nedge: {above / 1e6:.0f} MB above its base")
    assert above < EDGE_LIMIT_BYTES
    for package in ("torch", "kfp", "transformers"):
        found = docker_client.containers.run(
            images.edge,
            ["python3", "-c", f"import importlib.util as u; print(u.find_spec({package!r}))"],
            network_mode="none",
            remove=True,
        )
        assert found == b"None\n"


def inspect_base() -> str:
    code = "import json, yaml, slmops_images as i; print(json.dumps(yaml.safe_load(i.DIGESTS.read_text())))"
    return subprocess.run([python(), "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT).stdout


@pytest.mark.parametrize("name", ["base", "train", "optimize", "edge"])
def test_no_image_holds_a_compiler_a_pip_cache_or_the_right_to_be_root(
    images: Images, docker_client: Any, name: str
) -> None:
    image = docker_client.images.get(getattr(images, name))
    config = image.attrs["Config"]
    assert config["User"] == f"{IMAGE_USER}:{IMAGE_USER}"
    assert config["Entrypoint"] is None, "KFP's command must run as it is"
    assert config["Labels"]["org.opencontainers.image.title"] == f"slmops {name}"
    assert config["Labels"]["org.opencontainers.image.version"]
    # --version needs the package, `command -v` says which of these programs are there.
    script = (
        "slmops --version && ls -A / /root /tmp 2>/dev/null | grep -x .cache; command -v gcc cc c++ clang make; true"
    )
    said = docker_client.containers.run(
        image.id, ["sh", "-c", script], network_mode="none", read_only=True, remove=True
    ).decode()
    assert said.startswith("slmops ")
    assert said.count("\n") == 1, said


def test_what_is_applied_is_pinned_to_what_was_pushed(images: Images) -> None:
    """The policies again, on manifests that `make images` has pinned to a real registry."""
    namespace_of_pools = render(CHECKOUT, "manifests/clusters/production/edge")
    for target in targets(CHECKOUT):
        resources = render(CHECKOUT, target)
        before = namespace_of_pools if "/pools/" in target else []
        found = [finding for policy in POLICIES for finding in policy([*resources, *before])]
        assert [str(finding) for finding in found if finding.resource.target == target] == []
        named = {value for r in resources for field, value in r.fields if field.endswith(".image")}
        assert named <= {images.base, images.train, images.optimize, images.edge}


def test_pipelines_are_found_in_an_image(images: Images, docker_client: Any) -> None:
    said = docker_client.containers.run(
        images.base, ["slmops", "compile"], network_mode="none", read_only=True, tmpfs={"/tmp": ""}, remove=True
    )
    assert b"distill_to_edge: recipes" in said


def test_a_change_of_code_alone_installs_no_package_again(images: Images, docker_client: Any) -> None:
    """Only the last layer is made anew; how long that takes is printed, because the machine decides it."""

    def layers() -> list[list[str]]:
        return [docker_client.images.get(tag).attrs["RootFS"]["Layers"] for tag in tags]

    tags = [f"slmops/{image}:{__version__}" for image in vars(images)]
    before = layers()
    changed = CHECKOUT / "src" / "slmops" / "progress.py"
    changed.write_text(f"{changed.read_text()}\n# {time.time()}\n")
    started = time.monotonic()
    built = subprocess.run(
        [python(), "tools/images.py", "--build-only", *json.loads(os.environ["SLMOPS_E2E_BUILD_OPTIONS"])],
        capture_output=True,
        text=True,
        check=False,
        cwd=CHECKOUT,
    )
    took = time.monotonic() - started
    assert built.returncode == 0, built.stdout + built.stderr
    print(f"\nall four images built again in {took:.1f} s after a change of code\n{built.stdout}")
    after = layers()
    assert [image[:-1] for image in after] == [image[:-1] for image in before]
    assert all(new[-1] != old[-1] for new, old in zip(after, before, strict=True))
