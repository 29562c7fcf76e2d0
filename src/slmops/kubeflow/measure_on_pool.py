"""benchmark, in the step's own pod or on a node of an edge pool."""

from __future__ import annotations

import os
import uuid
from importlib import metadata
from pathlib import Path

from slmops.artifacts import Sidecar
from slmops.benchmark import run as step
from slmops.benchmark.config import BenchmarkConfig
from slmops.device_classes import DeviceClass
from slmops.edge.measure import pack_task
from slmops.errors import UserError
from slmops.kubeflow import pool_job
from slmops.kubeflow.nodes import POD_NAME, cancelled_by_signals, owner_of
from slmops.kubeflow.pool_job import Jobs, PoolJob
from slmops.measuring.process import Outcome, Task
from slmops.progress import Progress
from slmops.release.build import build_manifest
from slmops.release.format import Manifest, Requirements, blob_key, manifest_key
from slmops.storage import open_store
from slmops.variants import ModelFiles


def benchmark(config: BenchmarkConfig, *, model: Path, prompts: Path, benchmark: Path) -> Sidecar:
    """Run the step `benchmark` where its settings say.

    Raises:
        SlmopsError: as `slmops.benchmark.run`, or the Job on the pool came to no result.
    """
    if not config.pool:
        return step.run(config, model=model, prompts=prompts, benchmark=benchmark)

    def measure(files: ModelFiles, task: Task) -> Outcome:
        return _measure(config, files, task)

    return step.run(config, model=model, prompts=prompts, benchmark=benchmark, measure=measure)


def _measure(config: BenchmarkConfig, files: ModelFiles, task: Task) -> Outcome:
    if task.device_class is None or not task.by_token:
        raise UserError(f"{files.variant} is not measured on a pool: its nodes run variants for onnxruntime-genai only")
    jobs = Jobs()
    pod = jobs.own_pod(os.environ[POD_NAME]) if os.environ.get(POD_NAME) else {}
    wanted = PoolJob(
        name=f"slmops-measure-{uuid.uuid4().hex[:20]}",
        pool=config.pool,
        device_class=task.device_class,
        image=config.edge_image,
        store_uri=config.store_uri,
        store_secret=config.store_secret,
        manifest_digest=deposit_variant(config.store_uri, files, task.device_class),
        task=pack_task(task),
        pending_timeout_s=config.pending_timeout_s,
        timeout_s=config.pool_timeout_s,
        owner=owner_of(pod),
    )
    with cancelled_by_signals():
        return pool_job.measure(jobs, wanted)


def deposit_variant(store_uri: str, files: ModelFiles, device_class: DeviceClass) -> str:
    """Put a variant's blobs and a manifest into the store, unless they are there; return the manifest's digest.

    No channel and no release names them, so no node takes the variant before it is published; and `publish` finds its
    blobs there.

    Raises:
        DataError: it holds a file that no release may carry.
        StoreError, StoreUnavailable: the store refuses, or does not answer.
    """
    requirements = Requirements(
        architectures=(device_class.architecture,),
        runtime="onnxruntime-genai",
        runtime_version=metadata.version("onnxruntime-genai"),
        ram_bytes=0,  # it is what the measurement is to find
    )
    manifest: Manifest = build_manifest(files.directory, files.variant, requirements)
    store = open_store(store_uri)
    store.probe()
    with Progress("upload", manifest.size_bytes, "bytes") as progress:
        for file in manifest.files:
            key = blob_key(file.sha256)
            if store.stat(key) is None:
                store.create(key, files.directory / file.path)
            progress.advance(file.size_bytes)
    store.create(manifest_key(manifest.digest), manifest.to_bytes())
    return manifest.digest
