"""benchmark on an edge pool, through the real Kubernetes client, against a double of the API server."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.benchmark.config import BenchmarkConfig
from slmops.demo.object_store import ObjectStore
from slmops.device_classes import this_architecture
from slmops.edge.measure import MAX_PACKED_BYTES, TASK, pack_task, unpack_task
from slmops.errors import ConfigError, SlmopsError, TransientError, UserError
from slmops.kubeflow import measure_on_pool, pool_job
from slmops.measuring.process import Task
from slmops.release.format import blob_key
from slmops.storage import open_store
from tests.kubeflow.api_server import api_server
from tests.kubeflow.pool_api import NODE, PoolApi, run_for_real, wait_for
from tests.limited import SMALL
from tests.manifests import policies
from tests.manifests.rendering import CHECKOUT, Resource

DEVICE = SMALL | {"num_cpus": 2, "ram_mib": 600}
IMAGE = f"registry.example/slmops/edge@sha256:{'0' * 64}"
RESULT = json.dumps({"facts": {"status": "measured", "latency_ms_p50": 9.5, "peak_rss_bytes": 7, "tokens_per_s": 2.0},
                     "requests": [{"first_s": 0.1, "total_s": 0.2, "num_tokens": 3}]})  # fmt: skip


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PoolApi]:
    """A double that this process's client finds; all waits are short."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("SLMOPS_TEST_POD_FILES", str(tmp_path))
    monkeypatch.setattr(pool_job, "POLL_S", 0.05)
    double = PoolApi()
    with api_server(tmp_path, double):
        yield double


@pytest.fixture
def benchmark(tiny_variants: Path, held_out_rows: Path, tmp_path: Path, bucket: str) -> Callable[..., Sidecar]:
    """The step as its component runs it, on a pool unless `settings` say otherwise."""

    def run(device: Mapping[str, Any] = MappingProxyType({}), **settings: Any) -> Sidecar:
        config = BenchmarkConfig.create(
            {
                "variant": "cpu-int4", "num_requests": 2, "num_warmup": 0, "max_new_tokens": 4, "num_repeats": 1,
                "prompt_lengths": [16], "streams": [2], "device_class": "small", "pool": "berlin",
                "device_classes": {"small": {**DEVICE, **device}}, "store_uri": f"{bucket}/models", "edge_image": IMAGE,
            }
            | settings
        )  # fmt: skip
        return measure_on_pool.benchmark(
            config, model=tiny_variants, prompts=held_out_rows, benchmark=tmp_path / "benchmark"
        )

    return run


def test_a_variant_is_fetched_and_measured_by_the_pods_own_command(
    cluster: PoolApi, benchmark: Callable[..., Sidecar], bucket: str, s3: ObjectStore, tiny_variants: Path
) -> None:
    cluster.on_create = run_for_real(cluster, s3.environment())
    facts = benchmark().facts
    assert (facts["status"], facts["device_class"]) == ("measured", "small")
    assert (facts["pool"], facts["node"]) == ("berlin", NODE)
    assert facts["runtime"].startswith("onnxruntime")
    assert facts["model_digest"] == artifacts.read(tiny_variants).facts["variants"]["cpu-int4"]["digest"]
    assert [entry["streams"] for entry in facts["decode_by_streams"]] == [2]
    assert not cluster.jobs, "the Job is deleted"
    # What publish would upload is in the store already.
    store = open_store(f"{bucket}/models")
    for path in (tiny_variants / "cpu-int4").iterdir():
        assert store.stat(blob_key(artifacts.file_digest(path)))


def test_the_pod_is_placed_sized_and_locked_down_as_the_pools_servers_are(
    cluster: PoolApi, benchmark: Callable[..., Sidecar], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run", "uid": "u", "controller": True}
    cluster.pods["step"] = {"metadata": {"name": "step", "uid": "p", "labels": {}, "ownerReferences": [owner]}}
    monkeypatch.setenv("KFP_POD_NAME", "step")
    cluster.on_create = lambda job: cluster.set_pod_of(job["metadata"]["name"], "Succeeded", log=RESULT)
    assert benchmark().facts["latency_ms_p50"] == 9.5
    (job,) = cluster.created
    assert job["metadata"]["ownerReferences"] == [{k: owner[k] for k in ("apiVersion", "kind", "name", "uid")}]
    spec = job["spec"]
    assert spec["backoffLimit"] == 0
    assert spec["activeDeadlineSeconds"] == 600 + 1800
    pod = spec["template"]["spec"]
    arch = {"x86_64": "amd64", "aarch64": "arm64"}[this_architecture()]
    assert pod["nodeSelector"].items() >= {"slmops/pool": "berlin", "kubernetes.io/arch": arch}.items()
    assert any(label.startswith("feature.node.kubernetes.io/cpu-cpuid.") for label in pod["nodeSelector"])
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {
        "cpu": "2",
        "memory": "600Mi",
        "ephemeral-storage": "1024Mi",
    }
    assert container["envFrom"] == [{"secretRef": {"name": "slmops-release-reader"}}]
    resource = Resource("step", {**job, "metadata": {**job["metadata"], "namespace": "slmops"}})
    for policy in (
        policies.pods_meet_pod_security_restricted,
        policies.root_file_systems_are_read_only,
        policies.images_are_named_by_digest,
        policies.containers_state_requests_and_limits,
        policies.tokens_are_mounted_only_where_used,
        policies.secrets_are_named_never_given,
    ):
        assert not list(policy([resource])), policy.__name__


def test_a_class_with_a_gpu_gets_one(cluster: PoolApi, benchmark: Callable[..., Sidecar]) -> None:
    cluster.on_create = lambda job: cluster.set_pod_of(job["metadata"]["name"], "Succeeded", log=RESULT)
    benchmark(device={"execution_provider": "cuda"})
    pod = cluster.created[0]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def test_a_container_that_is_ended_for_its_memory_is_a_result(
    cluster: PoolApi, benchmark: Callable[..., Sidecar]
) -> None:
    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    cluster.on_create = lambda job: cluster.set_pod_of(job["metadata"]["name"], "Failed", container=killed)
    facts = benchmark().facts
    assert (facts["status"], facts["reason"]) == ("failed", "killed by its memory limit of 600 MiB")
    assert (facts["limits"], facts["node"]) == ("cgroup", NODE)
    assert not cluster.jobs


def test_the_pods_own_error_is_the_steps(cluster: PoolApi, benchmark: Callable[..., Sidecar], s3: ObjectStore) -> None:
    cluster.on_create = run_for_real(cluster, s3.environment() | {"AWS_SECRET_ACCESS_KEY": "wrong"})
    with pytest.raises(UserError, match=r"ended with exit code 2 \(Error\): measure: s3://.*"):
        benchmark()
    assert not cluster.jobs


def failed(exit_code: int, **more: Any) -> dict[str, Any]:
    return {"phase": "Failed", "container": {"terminated": {"exitCode": exit_code, "reason": "Error", **more}}}


@pytest.mark.parametrize(
    ("pod", "error", "message"),
    [
        (
            {
                "phase": "Pending",
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                     "message": "0/3 nodes are available: 3 Insufficient memory."}
                ],
            },
            UserError,
            r"no node of pool berlin .* within 0 s: Unschedulable: 0/3 nodes are available: 3 Insufficient memory\.; "
            r"it wants .*slmops/pool=berlin",
        ),
        (
            {"phase": "Pending", "container": {"waiting": {"reason": "ImagePullBackOff", "message": "not found: x"}}},
            UserError,
            "cannot start: ImagePullBackOff: not found: x",
        ),
        (
            {"phase": "Pending", "container": {"waiting": {"reason": "CreateContainerConfigError",
                                                           "message": 'secret "slmops-release-reader" not found'}}},
            UserError,
            'secret "slmops-release-reader" not found',
        ),
        (failed(75, message="measure: the store is away\nexit code 75"), TransientError, "the store is away"),
        (failed(1) | {"log": "Traceback\nKeyError: 'x'"}, SlmopsError, "KeyError: 'x'"),
        (failed(137), TransientError, "exit code 137"),
        ({"phase": "Failed", "reason": "Evicted", "message": "disk pressure"}, TransientError, r"\(Evicted\): disk pr"),
        ({"phase": "Succeeded", "log": "hello"}, SlmopsError, "is no result .* is registry.example/slmops/edge"),
        ({"phase": "Succeeded", "log": '{"facts": {"status": "fine"}, "requests": []}'}, SlmopsError, "'fine'"),
        ({"phase": "Succeeded", "log": "x" * 5_000_000}, SlmopsError, "5,000,000 characters"),
    ],
)  # fmt: skip
def test_what_is_no_result_is_an_error_that_says_why(
    cluster: PoolApi,
    benchmark: Callable[..., Sidecar],
    tmp_path: Path,
    pod: dict[str, Any],
    error: type[SlmopsError],
    message: str,
) -> None:
    cluster.on_create = lambda job: cluster.set_pod_of(job["metadata"]["name"], **pod)
    with pytest.raises(error, match=message) as raised:
        benchmark(pending_timeout_s=0.3)
    assert type(raised.value) is error
    assert not cluster.jobs, "the Job is deleted, however it ended"
    assert not (tmp_path / "benchmark").exists()


def test_a_job_that_gets_no_pod_says_what_the_namespace_refuses(
    cluster: PoolApi, benchmark: Callable[..., Sidecar]
) -> None:
    cluster.on_create = lambda job: cluster.warn(job["metadata"]["name"], "FailedCreate", "exceeded quota: steps")
    with pytest.raises(UserError, match="FailedCreate: exceeded quota: steps"):
        benchmark(pending_timeout_s=0.3)


def test_a_job_over_its_deadline_says_what_to_change(cluster: PoolApi, benchmark: Callable[..., Sidecar]) -> None:
    def overdue(job: dict[str, Any]) -> None:
        found = {"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "was active too long"}
        job["status"] = {"conditions": [found]}

    cluster.on_create = overdue
    with pytest.raises(TransientError, match=r"DeadlineExceeded: was active too long.*raise pool_timeout_s"):
        benchmark()


def test_a_step_that_is_cancelled_takes_its_job_along(cluster: PoolApi, benchmark: Callable[..., Sidecar]) -> None:
    def cancel() -> None:
        wait_for(lambda: bool(cluster.created))
        os.kill(os.getpid(), signal.SIGTERM)

    cluster.on_create = lambda job: cluster.set_pod_of(job["metadata"]["name"], "Running", container={"running": {}})
    cancelling = threading.Thread(target=cancel)
    cancelling.start()
    with pytest.raises(KeyboardInterrupt):
        benchmark()
    cancelling.join()
    assert not cluster.jobs


def test_rights_that_are_missing_are_named(cluster: PoolApi, benchmark: Callable[..., Sidecar]) -> None:
    cluster.forbidden = {"jobs"}
    with pytest.raises(UserError, match="measuring on a pool needs a service account that may create, get and delete"):
        benchmark()


def test_the_steps_account_may_do_what_is_asked_and_with_jobs_no_more(
    cluster: PoolApi, benchmark: Callable[..., Sidecar], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the real client has sent, held against the role in manifests/."""
    cluster.pods["step"] = {"metadata": {"name": "step", "uid": "p", "labels": {}}}
    monkeypatch.setenv("KFP_POD_NAME", "step")

    def unschedulable_at_first(job: dict[str, Any]) -> None:
        succeed = threading.Timer(0.3, lambda: cluster.set_pod_of(job["metadata"]["name"], "Succeeded", log=RESULT))
        succeed.start()

    cluster.on_create = unschedulable_at_first
    benchmark()
    asked = {right_of(method, path) for method, path in cluster.requests}
    allowed = rights_of_steps()
    assert asked <= allowed
    assert {right for right in allowed if right[0] == "jobs"} == {("jobs", v) for v in ("create", "get", "delete")}
    assert {resource for resource, _ in asked} == {"jobs", "pods", "pods/log", "events"}


def right_of(method: str, path: str) -> tuple[str, str]:
    """(resource, verb) of a request, as the API server asks of a role."""
    resource, *rest = path.partition("/namespaces/team/")[2].partition("?")[0].split("/")
    verb = {"POST": "create", "DELETE": "delete"}.get(method, "get" if rest else "list")
    return "/".join([resource, *rest[1:]]), verb


def rights_of_steps() -> set[tuple[str, str]]:
    documents = yaml.safe_load_all((CHECKOUT / "manifests" / "base" / "steps.yaml").read_text())
    (role,) = (document for document in documents if document["kind"] == "Role")
    return {
        (resource, verb)
        for rule in role["rules"]
        if "resourceNames" not in rule
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_without_a_cluster_the_other_place_is_named(
    benchmark: Callable[..., Sidecar], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="or leave pool empty"):
        benchmark()


def test_the_same_entry_measures_here(benchmark: Callable[..., Sidecar], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="slmops")
    facts = benchmark(pool="").facts
    assert facts["status"] == "measured"
    assert "pool" not in facts


def test_a_task_reaches_the_pod_as_it_is_or_not_at_all() -> None:
    task = Task(quantized=True, num_threads=1, max_new_tokens=1, prompts=[[{"role": "user", "content": "é"}]])
    assert unpack_task(pack_task(task)) == task
    long = task.model_copy(update={"prompts": [[{"role": "user", "content": os.urandom(MAX_PACKED_BYTES).hex()}]]})
    with pytest.raises(ConfigError, match="lower num_requests"):
        pack_task(long)
    for wrong in ("", "%", "aGVsbG8=", pack_task(task)[:-8]):
        with pytest.raises(ConfigError, match=TASK):
            unpack_task(wrong)
