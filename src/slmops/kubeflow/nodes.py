"""A training step on several nodes: the KFP step creates a TrainJob, follows it, and takes over its result.

Step and TrainJob exchange files on the volume that keeps unfinished work, which both mount (see docs/adr/0011):

    finetune-<key>.nodes/      of the step, the settings and the inputs; the same again when the step is retried
        config.json
        train/ validation/ base/
        model/                 written by the TrainJob, whole or not at all
    finetune-<key>.work/       the training's checkpoint, the same as of a training in the step's own pod
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops import artifacts, models
from slmops.artifacts import SIDECAR, Sidecar
from slmops.errors import ArtifactError, ConfigError, UserError, explain_os_errors
from slmops.kubeflow.follow_trainjob import NotStarted, follow
from slmops.kubeflow.trainjob import Cluster, Refused, Wanted
from slmops.progress import log
from slmops.resume import MOUNTED_WORK_DIR, WORK_DIR, work_key, work_root
from slmops.step import RUNNER_PID, TERMINATION_LOG, TRANSIENT_RETRIES
from slmops.training.config import TrainingConfig

if TYPE_CHECKING:
    from kfp.dsl import TaskConfig

POD_NAME = "KFP_POD_NAME"
"""Environment variable: KFP tells a step the name of its pod."""
STEP_CONTAINER = "main"
"""The container of a step's pod that runs the step."""
NOT_FORWARDED = {TRANSIENT_RETRIES, RUNNER_PID, TERMINATION_LOG, WORK_DIR}


def train(step: str, config: TrainingConfig, *, task_config: TaskConfig, model: Path, **inputs: Path | None) -> Sidecar:
    """Run a training step: in this process, or in a TrainJob if KFP forwarded the task's pod settings to this step.

    Args:
        step: `finetune` or `distill`.
        config: its settings.
        task_config: what KFP was told about the task's pods; KFP fills it in for a component that asks for it.
        model: where the trained model goes.
        inputs: the other paths of the step, by name; None for one that it goes without.

    Raises:
        ConfigError: several nodes are asked for where there are none.
        SlmopsError: the training failed.
    """
    forwarded = {name: value for name, value in vars(task_config).items() if value}
    given = {name: path for name, path in inputs.items() if path is not None}
    if forwarded:
        return _train_on_nodes(step, config, forwarded, model, given)
    if config.num_nodes > 1:
        raise ConfigError(
            f"num_nodes is {config.num_nodes}, but this step trains in its own pod; use the component {step}_on_nodes "
            f"in a pipeline on a cluster, with a shared volume at {MOUNTED_WORK_DIR}, or set num_nodes=1"
        )
    sidecar: Sidecar = importlib.import_module(f"slmops.{step}.run").run(config, model=model, **given)
    return sidecar


def _train_on_nodes(
    step: str, config: TrainingConfig, forwarded: dict[str, Any], model: Path, inputs: Mapping[str, Path]
) -> Sidecar:
    work_dir = _shared_work_dir(forwarded, model)
    parents = {name: _open(path) for name, path in inputs.items()}
    name = f"{step}-{work_key(step, config, list(parents.values()))}"
    exchange = work_dir / f"{name}.nodes"
    cluster = Cluster()
    if not _is_complete(exchange / "model"):
        _lay_out(exchange, config, inputs, parents)
        wanted = _wanted(name, step, config, forwarded, exchange, list(inputs), cluster)
        with cancelled_by_signals():
            _run(cluster, wanted, config.pending_timeout_s)
        _expect_result(exchange / "model", name, cluster)
    cluster.delete(name)
    _copy(exchange / "model", model)
    sidecar = artifacts.expect(model, "hf_model")
    shutil.rmtree(exchange)
    return sidecar


def _run(cluster: Cluster, wanted: Wanted, pending_timeout_s: float) -> None:
    """Create and follow the TrainJob.

    It is deleted if this step is cancelled, or may not follow it. If the API server is silent, it goes on, and a retry
    finds it again; if it failed, it stays to be looked at until the run is deleted.
    """
    try:
        cluster.create(wanted)
        follow(cluster, wanted, pending_timeout_s)
    except (KeyboardInterrupt, NotStarted, Refused):
        log.warning("deleting TrainJob %s", wanted.name)
        with suppress(Refused):
            cluster.delete(wanted.name)
        raise


def _shared_work_dir(forwarded: Mapping[str, Any], model: Path) -> Path:
    """Where unfinished work is kept: on a claim that the TrainJob's pods mount at the same place.

    Raises:
        ConfigError: it does not.
    """
    work_dir = work_root(model)
    claims = {v["name"] for v in forwarded.get("volumes", ()) if v.get("persistentVolumeClaim") or v.get("ephemeral")}
    mounts = [m for m in forwarded.get("volume_mounts", ()) if work_dir.is_relative_to(m["mountPath"])]
    if not any(mount["name"] in claims for mount in mounts):
        found = ", ".join(sorted(m["mountPath"] for m in forwarded.get("volume_mounts", ()))) or "none"
        raise ConfigError(
            f"training on several nodes needs a ReadWriteMany claim mounted on the task (kfp.kubernetes.mount_pvc) at "
            f"{MOUNTED_WORK_DIR}, or where ${WORK_DIR} points; this step keeps its work in {work_dir}, and the task's "
            f"mounts are: {found}"
        )
    return work_dir


def _open(path: Path) -> Sidecar:
    """The sidecar of an input; only a model may come without one."""
    return artifacts.read(path) if (path / SIDECAR).exists() else models.open_model(path)


def _lay_out(
    exchange: Path, config: TrainingConfig, inputs: Mapping[str, Path], parents: Mapping[str, Sidecar]
) -> None:
    """Put settings and inputs where the TrainJob's pods see them; what an earlier try has put there stays."""
    with explain_os_errors(exchange):
        exchange.mkdir(parents=True, exist_ok=True)
        partial = exchange / "config.json.partial"
        partial.write_text(config.model_dump_json(indent=1) + "\n")
        partial.rename(exchange / "config.json")
        for name, source in inputs.items():
            if not _is_complete(exchange / name):
                _copy(source, exchange / name, parents[name])


def _copy(source: Path, target: Path, sidecar: Sidecar | None = None) -> None:
    """Copy an artifact so that it appears whole or not at all: by hard links where source and target share a volume.

    A model that came without a sidecar gets the given one, so that the processes of the training need not hash it.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with explain_os_errors(partial):
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            place = partial / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(file.resolve(), place)
        if sidecar and not (partial / SIDECAR).exists():
            (partial / SIDECAR).write_text(sidecar.model_dump_json(indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another volume, or one without hard links
        shutil.copyfile(source, target)


def _is_complete(path: Path) -> bool:
    try:
        artifacts.read(path)
    except ArtifactError:
        return False
    return True


def _expect_result(model: Path, name: str, cluster: Cluster) -> None:
    """Raise a UserError if the pods wrote their model where this step does not see it; the next try trains again."""
    try:
        artifacts.expect(model, "hf_model")
    except ArtifactError as error:
        cluster.delete(name)
        raise UserError(
            f"TrainJob {name} is complete, but {error}. Do its pods mount the same claim as this step, "
            "and does the training runtime leave their command alone?"
        ) from error


def _wanted(
    name: str,
    step: str,
    config: TrainingConfig,
    forwarded: Mapping[str, Any],
    exchange: Path,
    inputs: list[str],
    cluster: Cluster,
) -> Wanted:
    """The TrainJob: the image of this step's own pod, and the run that the pod belongs to as its owner."""
    paths = {each: exchange / each for each in [*inputs, "model"]} | {"config": exchange / "config.json"}
    pod = cluster.own_pod(os.environ[POD_NAME]) if os.environ.get(POD_NAME) else {}
    containers = pod.get("spec", {}).get("containers", [])
    env = [each for each in forwarded.get("env", ()) if not _is_reserved(each["name"])]
    return Wanted(
        name=name,
        args=["-m", f"slmops.{step}", *(f"--{each}={path}" for each, path in sorted(paths.items()))],
        num_nodes=config.num_nodes,
        runtime=config.training_runtime,
        queue_name=config.queue_name,
        image=next((c["image"] for c in containers if c["name"] == STEP_CONTAINER), None),
        owner=owner_of(pod),
        env=[*env, {"name": WORK_DIR, "value": str(exchange.parent)}],
        **{field: value for field, value in forwarded.items() if field != "env"},
    )


def _is_reserved(variable: str) -> bool:
    """Whether a variable means something else, or is refused, in a pod of the training."""
    return variable in NOT_FORWARDED or variable.startswith("PET_")


def owner_of(pod: Mapping[str, Any]) -> dict[str, Any] | None:
    """The object that owns the step's pod (the run), or else the pod: when it is deleted, so is the TrainJob."""
    if not pod:
        return None
    metadata = pod["metadata"]
    of_pod = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
    owners = [o for o in metadata.get("ownerReferences", ()) if o.get("controller")]
    owner = owners[0] if owners else of_pod
    return {key: owner[key] for key in ("apiVersion", "kind", "name", "uid")}


@contextmanager
def cancelled_by_signals() -> Iterator[None]:
    """SIGTERM, with which a cluster ends a step that was cancelled, is a KeyboardInterrupt inside the block."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt("SIGTERM")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
