"""A training step on several nodes, through the real Kubernetes client, against a double of the API server."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import urllib3
from kfp.dsl import TaskConfig

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.errors import ConfigError, SlmopsError, TransientError, UserError
from slmops.finetune.config import FinetuneConfig
from slmops.finetune.run import run as finetune
from slmops.kubeflow import nodes, trainjob
from slmops.kubeflow.trainjob import DIGEST, QUEUE_LABEL
from slmops.training.config import TrainingConfig
from tests import crds
from tests.kubeflow.api_server import TRAINJOBS, ApiServer, api_server, run_for_real

pytestmark = pytest.mark.skipif(
    not (crds.CRDS / "trainer.kubeflow.org_trainjobs.yaml").is_file(),
    reason=f"the definition of TrainJob is not in {crds.CRDS}; set SLMOPS_CRDS",
)
SHM = "/dev/shm"  # noqa: S108 - where pods have shared memory
TWO_NODES = FinetuneConfig(num_nodes=2, dtype="float32", learning_rate=3e-3, method="full")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """A double that this process's client finds, and a work directory on its shared volume; all waits are short."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("SLMOPS_WORK_DIR", str(work))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(trainjob, "ROUND_S", 1)
    with api_server(tmp_path) as double:
        yield double


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What the step has logged so far."""
    caplog.set_level(logging.INFO, logger="slmops")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def task_config(work: Path, **fields: Any) -> TaskConfig:
    """What KFP's driver hands to a step whose task has a claim mounted and asks for two GPUs."""
    return TaskConfig(
        **{
            "resources": {"limits": {"nvidia.com/gpu": "2", "memory": "64Gi"}, "requests": {"cpu": "8"}},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "node_selector": {"accelerator": "h100"},
            "env": [
                {"name": "SLMOPS_TRANSIENT_RETRIES", "value": "3"},
                {"name": "PET_NNODES", "value": "9"},
                {
                    "name": "AWS_REGION",
                    "valueFrom": {"secretKeyRef": {"name": "slmops-object-store", "key": "AWS_REGION"}},
                },
            ],
            "volumes": [
                {"name": "slmops-work", "persistentVolumeClaim": {"claimName": "slmops-work"}},
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
            ],
            "volume_mounts": [
                {"name": "slmops-work", "mountPath": str(work)},
                {"name": "shm", "mountPath": SHM},
            ],
        }
        | fields
    )


class Step:
    """One finetune step of a pipeline."""

    def __init__(self, tmp_path: Path, inputs: dict[str, Path]) -> None:
        self.work, self.model, self.inputs = tmp_path / "work", tmp_path / "out" / "model", inputs
        self.model.parent.mkdir()

    def run(self, config: TrainingConfig = TWO_NODES, **fields: Any) -> Sidecar:
        return nodes.train(
            "finetune", config, task_config=task_config(self.work, **fields), model=self.model, **self.inputs
        )

    def exchange(self) -> Path:
        (found,) = self.work.glob("*.nodes")
        return found


@pytest.fixture
def step(tmp_path: Path, tiny_model: Path, train_rows: Path, held_out_rows: Path) -> Step:
    return Step(tmp_path, {"train": train_rows, "validation": held_out_rows, "base": tiny_model})


@pytest.fixture
def trained(step: Step, tiny_teacher: Path) -> Callable[[dict[str, Any]], None]:
    """Does what a TrainJob's first process does at its end: leaves a model in the exchange folder."""

    def leave_model(job: dict[str, Any]) -> None:
        (model,) = [a.partition("=")[2] for a in job["spec"]["trainer"]["args"] if a.startswith("--model=")]
        shutil.copytree(tiny_teacher, model)

    return leave_model


def soon(action: Callable[[], None], after_s: float = 0.3) -> None:
    timer = threading.Timer(after_s, action)
    timer.daemon = True
    timer.start()


def test_the_object_fits_the_published_schema_and_carries_the_tasks_settings(
    cluster: ApiServer, step: Step, trained: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "run-1-finetune")
    workflow = {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "name": "run-1",
        "uid": "u",
        "controller": True,
    }
    cluster.pods["run-1-finetune"] = {
        "metadata": {"name": "run-1-finetune", "uid": "p", "labels": {}, "ownerReferences": [workflow]},
        "spec": {"containers": [{"name": "wait", "image": "argo"}, {"name": "main", "image": "train@sha256:1"}]},
        "status": {"phase": "Running"},
    }
    created: list[dict[str, Any]] = []

    def complete(job: dict[str, Any]) -> None:
        created.append(json.loads(json.dumps(job)))
        trained(job)
        soon(lambda: cluster.finish(job["metadata"]["name"]))

    cluster.on_create = complete
    affinity = {
        "podAntiAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "kubernetes.io/hostname"}]
        }
    }
    step.run(affinity=affinity)

    (job,) = created
    assert crds.problems(job) == []
    assert crds.problems(job | {"spec": job["spec"] | {"trainner": {}}}), "unknown fields are refused"
    assert job["metadata"]["labels"][QUEUE_LABEL] == "slmops-gpu"
    assert job["metadata"]["ownerReferences"] == [{key: workflow[key] for key in ("apiVersion", "kind", "name", "uid")}]
    assert len(job["metadata"]["name"]) + len("-node-0-1023") <= 63, "pods get names of their own from it"
    spec = job["spec"]
    assert spec["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": "slmops-torch"
    }  # fmt: skip
    trainer = spec["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 2), "one process for each of a node's GPUs"
    assert trainer["image"] == "train@sha256:1", "the code that the step itself runs"
    assert trainer["command"] == ["torchrun"]
    assert trainer["args"][:2] == ["-m", "slmops.finetune"]
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "2", "memory": "64Gi"}
    assert [each["name"] for each in trainer["env"]] == ["AWS_REGION", "SLMOPS_WORK_DIR"], "reserved ones are left out"
    (patched,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = patched["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"accelerator": "h100"}
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert pod["affinity"] == affinity
    assert {volume["name"] for volume in pod["volumes"]} == {"slmops-work", "shm"}
    assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} == {str(step.work), SHM}


def test_the_result_is_taken_over_and_nothing_is_left_behind(
    cluster: ApiServer, step: Step, trained: Callable[[dict[str, Any]], None], tiny_teacher: Path
) -> None:
    seen: dict[str, Any] = {}

    def complete(job: dict[str, Any]) -> None:
        exchange = step.exchange()
        seen["config"] = json.loads((exchange / "config.json").read_text())
        seen["inputs"] = {name: artifacts.read(exchange / name).digest for name in ("train", "validation", "base")}
        trained(job)
        soon(lambda: cluster.finish(job["metadata"]["name"]))

    cluster.on_create = complete
    sidecar = step.run()
    assert sidecar == artifacts.read(tiny_teacher) == artifacts.read(step.model)
    assert FinetuneConfig.create(seen["config"]) == TWO_NODES
    assert seen["inputs"]["train"] == artifacts.read(step.inputs["train"]).digest
    assert not list(step.work.iterdir())
    assert not cluster.jobs, "nobody needs a TrainJob whose result is taken over"


def test_states_warnings_and_log_lines_are_shown_once(
    cluster: ApiServer, step: Step, trained: Callable[[dict[str, Any]], None], said: Callable[[], str]
) -> None:
    def life(job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]

        def go_on() -> None:
            cluster.set_condition(name, "Suspended", "Suspended", "no quota for 4 GPUs left")
            time.sleep(1.5)
            cluster.set_condition(name, "Suspended", "Resumed", on=False)
            pod = cluster.set_pod(name, 1, "Pending", state={"waiting": {"reason": "ImagePullBackOff", "message": "x"}})
            cluster.warn(pod, "Failed", "Error: ImagePullBackOff")
            cluster.warn("someone-elses-pod", "Failed", "not ours")
            time.sleep(1.5)
            cluster.set_pod(name, 1, "Running")
            first = cluster.set_pod(name, 0, "Running")
            for number in range(3):
                cluster.logs[first].add(f"12:00:0{number} finetune: {number}/3 steps")
                time.sleep(1.1)
            trained(job)
            cluster.finish(name)

        soon(go_on, 0.0)

    cluster.on_create = life
    step.run()
    lines = said().splitlines()
    for text in (
        "waiting in queue slmops-gpu (no quota for 4 GPUs left)",
        "ImagePullBackOff x",
        "Failed: Error: ImagePullBackOff",
        "node 0: 12:00:00 finetune: 0/3 steps",
        "node 0: 12:00:02 finetune: 2/3 steps",
        ": running",
    ):
        assert sum(text in line for line in lines) >= 1, text
    assert sum("Failed: Error: ImagePullBackOff" in line for line in lines) == 1
    assert sum("finetune: 1/3 steps" in line for line in lines) == 1
    assert "not ours" not in said()


@pytest.mark.parametrize(
    ("ended", "error", "message"),
    [
        (
            {"exitCode": 1, "reason": "Error", "message": "finetune: the loss of step 3 is nan\nexit code 2"},
            UserError,
            r"(?s)exit code 1 \(Error\): finetune: the loss of step 3 is nan; its last lines:.*line 24",
        ),
        (
            {"exitCode": 137, "reason": "Error", "message": "finetune: the store does not answer\nexit code 75"},
            TransientError,
            "the store does not answer",
        ),
        ({"exitCode": 137, "reason": "OOMKilled"}, UserError, "lower micro_batch_size"),
        ({"exitCode": 137, "reason": "Error"}, TransientError, r"exit code 137 \(Error\)"),
        ({"exitCode": 1, "reason": "Error"}, SlmopsError, r"exit code 1 \(Error\); its last lines"),
    ],
    ids=["user error", "transient error", "out of memory", "node lost", "defect"],
)
def test_a_failed_training_says_which_pod_why_and_its_last_lines(
    ended: dict[str, Any], error: type[SlmopsError], message: str, cluster: ApiServer, step: Step
) -> None:
    def fail(job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        # The other node ended later, because its partner was gone; it must not be blamed.
        other = cluster.set_pod(name, 0, "Failed", state={"terminated": {"exitCode": 1, "reason": "Error"}})
        cluster.logs[other].add("SignalException: Process 7 got signal: 15")
        pod = cluster.set_pod(name, 1, "Failed", state={"terminated": ended})
        for number in range(25):
            cluster.logs[pod].add(f"line {number}")
        soon(lambda: cluster.fail(name))

    cluster.on_create = fail
    with pytest.raises(error, match=message) as raised:
        step.run()
    assert type(raised.value) is error
    assert "-node-0-1-" in str(raised.value)
    assert "line 4\n" not in str(raised.value), "the last lines, and no more"
    assert cluster.jobs, "a failed TrainJob stays to be looked at"
    assert not step.model.exists()


def test_a_retried_step_replaces_a_failed_trainjob_and_keeps_what_it_laid_out(
    cluster: ApiServer, step: Step, trained: Callable[[dict[str, Any]], None]
) -> None:
    cluster.on_create = lambda job: soon(lambda: cluster.fail(job["metadata"]["name"]))
    with pytest.raises(SlmopsError, match="none of its pods is left to tell why"):
        step.run()
    laid_out = (step.exchange() / "base" / "model.safetensors").stat().st_ino

    def complete(job: dict[str, Any]) -> None:
        assert (step.exchange() / "base" / "model.safetensors").stat().st_ino == laid_out
        trained(job)
        soon(lambda: cluster.finish(job["metadata"]["name"]))

    cluster.on_create = complete
    step.run()
    assert [each for each in cluster.requests if each[0] == "POST"] == [("POST", TRAINJOBS)] * 3, "one met the old one"


def test_a_retried_step_finds_its_running_trainjob_again(
    cluster: ApiServer, step: Step, trained: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch,
    said: Callable[[], str],
) -> None:  # fmt: skip
    monkeypatch.setattr(trainjob, "SILENCE_S", 1.0)

    def fall_silent(job: dict[str, Any]) -> None:
        cluster.faults += [503] * 20

    cluster.on_create = fall_silent
    with pytest.raises(TransientError, match=r"API server answers 503 .*the same step finds it again"):
        step.run()
    cluster.faults.clear()
    (job,) = cluster.jobs.values()

    def complete() -> None:
        trained(job)
        cluster.finish(job["metadata"]["name"])

    soon(complete, 1.5)
    step.run()
    assert "is there already: following it" in said()
    assert sum(request == ("DELETE", f"{TRAINJOBS}/{job['metadata']['name']}") for request in cluster.requests) == 1


def test_a_finished_training_is_taken_over_and_not_started_again(
    cluster: ApiServer, step: Step, trained: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step was killed after the training ended, and before it had copied the result."""

    def complete(job: dict[str, Any]) -> None:
        trained(job)
        soon(lambda: cluster.finish(job["metadata"]["name"]))

    cluster.on_create = complete

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(trainjob.Cluster, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            step.run()
    assert cluster.jobs
    assert not step.model.exists()
    step.run()
    assert [request for request in cluster.requests if request[0] == "POST"] == [("POST", TRAINJOBS)]
    assert artifacts.read(step.model)
    assert not cluster.jobs


def test_another_trainjob_of_the_same_training_is_not_touched(cluster: ApiServer, step: Step) -> None:
    cluster.on_create = lambda job: soon(lambda: cluster.set_condition(job["metadata"]["name"], "Failed"), 0.2)
    with pytest.raises(SlmopsError):
        step.run()
    (job,) = cluster.jobs.values()
    job["metadata"]["annotations"][DIGEST] = "of another number of nodes"
    cluster.set_condition(job["metadata"]["name"], "Failed", on=False)
    with pytest.raises(
        UserError, match=r"other settings of its pods; wait .* kubectl -n team delete trainjob finetune-"
    ):
        step.run()
    assert cluster.jobs


@pytest.mark.parametrize("how", ["gone", "too old", "broken watches", "server errors", "dropped connections"])
def test_a_server_that_misbehaves_is_survived(
    how: str, cluster: ApiServer, step: Step, trained: Callable[[dict[str, Any]], None]
) -> None:
    def misbehave(job: dict[str, Any]) -> None:
        match how:
            case "gone":
                cluster.faults += [410]
            case "too old":
                cluster.oldest = 10_000
            case "broken watches":
                cluster.broken_watches = 3
            case "server errors":
                cluster.faults += [500, 503, 429]
            case "dropped connections":
                cluster.faults += [0, 0]
        trained(job)
        soon(lambda: cluster.finish(job["metadata"]["name"]), 1.0)

    cluster.on_create = misbehave
    step.run()
    assert artifacts.read(step.model)


def test_sigterm_deletes_the_trainjob(cluster: ApiServer, step: Step) -> None:
    before = signal.getsignal(signal.SIGTERM)
    cluster.on_create = lambda job: soon(lambda: os.kill(os.getpid(), signal.SIGTERM), 0.5)
    with pytest.raises(KeyboardInterrupt):
        step.run()
    assert not cluster.jobs
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_trainjob_that_finds_no_place_in_time_is_deleted(cluster: ApiServer, step: Step) -> None:
    cluster.on_create = lambda job: cluster.set_condition(
        job["metadata"]["name"], "Suspended", "Suspended", "no quota for 4 GPUs left"
    )
    config = TWO_NODES.model_copy(update={"pending_timeout_s": 0.5})
    with pytest.raises(TransientError, match=r"did not start in time: it was waiting in queue slmops-gpu .no quota"):
        step.run(config)
    assert not cluster.jobs


def test_a_trainjob_that_somebody_deletes_is_a_transient_error(cluster: ApiServer, step: Step) -> None:
    cluster.on_create = lambda job: soon(lambda: cluster.remove(job["metadata"]["name"]))
    with pytest.raises(TransientError, match="was deleted by somebody else; its checkpoint is kept"):
        step.run()


def test_an_old_trainjob_that_does_not_go_is_a_transient_error(
    cluster: ApiServer, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainjob, "DELETE_S", 1.0)
    cluster.stubborn = True
    cluster.on_create = lambda job: soon(lambda: cluster.fail(job["metadata"]["name"]))
    with pytest.raises(SlmopsError):
        step.run()
    with pytest.raises(TransientError, match="does not go away"):
        step.run()


def test_what_the_cluster_lacks_is_named(cluster: ApiServer, step: Step) -> None:
    cluster.knows_trainjobs = False
    with pytest.raises(
        UserError, match=r"does not know trainjobs\.trainer\.kubeflow\.org/v1alpha1; install Kubeflow Tr"
    ):
        step.run()
    cluster.knows_trainjobs = True
    cluster.forbidden = {"trainjobs"}
    with pytest.raises(UserError, match=r"(?s)refuses \(403\): User cannot post trainjobs; .*may create, get, list"):
        step.run()


def test_a_step_that_may_not_follow_leaves_no_training_behind(cluster: ApiServer, step: Step) -> None:
    cluster.forbidden = {"pods"}
    with pytest.raises(UserError, match=r"refuses \(403\): User cannot get pods"):
        step.run()
    assert not cluster.jobs


def test_a_step_in_a_cluster_uses_its_service_account(
    step: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in {"namespace": "slmops\n", "token": "t", "ca.crt": "c"}.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(trainjob, "NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    monkeypatch.setattr(trainjob, "SILENCE_S", 0.0)
    asked: list[tuple[str, str]] = []

    def answer(_: object, method: str, url: str, **options: Any) -> None:
        asked.append((url, options["headers"]["authorization"]))
        raise urllib3.exceptions.ProtocolError

    monkeypatch.setattr("urllib3.PoolManager.request", answer)
    cluster = trainjob.Cluster()
    with pytest.raises(TransientError, match="does not answer"):
        cluster.read("finetune-1")
    assert asked == [
        ("https://10.0.0.1:443/apis/trainer.kubeflow.org/v1alpha1/namespaces/slmops/trainjobs/finetune-1", "bearer t")
    ]


def test_a_result_that_this_step_does_not_see_is_a_user_error(
    cluster: ApiServer, step: Step, trained: Callable[[dict[str, Any]], None]
) -> None:
    cluster.on_create = lambda job: soon(lambda: cluster.finish(job["metadata"]["name"]))
    with pytest.raises(UserError, match=r"is complete, but .*mount the same claim"):
        step.run()

    def complete(job: dict[str, Any]) -> None:
        trained(job)
        soon(lambda: cluster.finish(job["metadata"]["name"]))

    cluster.on_create = complete
    assert step.run().kind == "hf_model", "once that is put right, it is trained again"


def test_several_nodes_need_the_right_component_and_a_shared_volume(
    step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="use the component finetune_on_nodes"):
        nodes.train("finetune", TWO_NODES, task_config=TaskConfig(), model=step.model, **step.inputs)
    monkeypatch.setenv("SLMOPS_WORK_DIR", "/var/lib/slmops/work")
    with pytest.raises(ConfigError, match="the task's mounts are: none"):
        step.run(volume_mounts=[])
    with pytest.raises(ConfigError, match="the task's mounts are: /var/lib/slmops/work"):
        step.run(
            volumes=[{"name": "w", "emptyDir": {}}], volume_mounts=[{"name": "w", "mountPath": "/var/lib/slmops/work"}]
        )


def test_the_number_of_nodes_does_not_change_what_is_trained(step: Step, cluster: ApiServer) -> None:
    """A training that began on two nodes goes on with four, or with one: they share the key of the unfinished work."""
    names = set()

    def fail(job: dict[str, Any]) -> None:
        names.add(job["metadata"]["name"])
        cluster.set_condition(job["metadata"]["name"], "Failed")

    cluster.on_create = fail
    for count in (2, 4):
        with pytest.raises(SlmopsError):
            step.run(TWO_NODES.model_copy(update={"num_nodes": count}))
    assert len(names) == 1


def test_a_trainjob_that_is_really_run_and_loses_a_node_gives_the_model_that_one_process_trains(
    cluster: ApiServer, step: Step, tmp_path: Path, said: Callable[[], str]
) -> None:
    """Two nodes of one process each, started from the object alone; the second is killed, and the step retried."""
    config = TWO_NODES.model_copy(update={"learning_rate": 1e-3, "checkpoint_interval_s": 0.01})
    finetune(config, **step.inputs, model=tmp_path / "alone")
    tries: list[list[subprocess.Popen[str]]] = []

    def start(job: dict[str, Any]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        tries.append(run_for_real(cluster, job, port, tmp_path))
        if len(tries) == 1:
            threading.Thread(target=kill_once_it_has_trained, args=(step.work, tries[0][1]), daemon=True).start()

    cluster.on_create = start
    with pytest.raises(TransientError, match=r"TrainJob finetune-\w+ failed .*: pod finetune-\w+-node-0-[01]-"):
        step.run(config, resources={"limits": {"cpu": "1"}})
    assert tries[0][1].returncode == -signal.SIGKILL

    sidecar = step.run(config, resources={"limits": {"cpu": "1"}})
    assert [process.returncode for process in tries[1]] == [0, 0]
    assert "going on after step" in said()
    expected = artifacts.read(tmp_path / "alone")
    for curve in ("loss_curve", "validation_curve"):
        torch.testing.assert_close(sidecar.facts[curve], expected.facts[curve], rtol=0, atol=2e-4)
    assert sidecar.facts["num_processes"] == 2
    assert sidecar.parents == expected.parents, "the lineage is that of the step's own inputs"
    assert not list(step.work.iterdir())


def kill_once_it_has_trained(work: Path, process: subprocess.Popen[str]) -> None:
    while not list(work.glob("*.work/checkpoint.json")) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
