"""Publish: put the variant that passed the gate into an object store, then show it to one channel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slmops import artifacts
from slmops.artifacts import Sidecar, Summary
from slmops.errors import ArtifactError, GateError
from slmops.progress import log
from slmops.publish.config import PublishConfig
from slmops.release.build import build_manifest, variant_digest
from slmops.release.deposit import deposit
from slmops.release.format import (
    Ancestor,
    Gate,
    Manifest,
    Release,
    ReleaseVariant,
    Requirements,
)
from slmops.release.metadata import point_channel
from slmops.storage import open_store


@dataclass(frozen=True)
class _Prepared:
    """All that goes into the store, built before anything is written."""

    directory: Path
    manifest: Manifest
    release: Release


def run(config: PublishConfig, *, variants: Path, verdict: Path, release: Path) -> Sidecar:
    """Write blobs, manifest and release; check that all are there; then move the channel.

    Publishing the same release to the same channel again changes nothing. Killed at any point, it leaves readers with
    what they had, and the next run uploads only what is missing.

    Raises:
        GateError: the verdict is not `pass`, or judged another variant than this one.
        StoreError, StoreUnavailable: the store refuses, or does not answer.
    """
    variants_sidecar, verdict_sidecar = artifacts.expect(variants, "variants"), artifacts.expect(verdict, "verdict")
    name = _passed(verdict_sidecar, variants_sidecar)
    prepared = _prepare(variants / name, name, verdict_sidecar)
    store = open_store(config.store_uri)
    store.probe()
    bytes_uploaded = deposit(store, prepared.release, [prepared.manifest], lambda file: prepared.directory / file.path)
    channel, changed = point_channel(store, config.channel, prepared.release.digest)
    log.info(
        "channel %s of %s %s release %s, sequence %d",
        config.channel, store.uri, "now points to" if changed else "already points to",
        prepared.release.digest, channel.sequence,
    )  # fmt: skip
    parents = (variants_sidecar, verdict_sidecar)
    with artifacts.writing(release, kind="release", step="publish", config=config, parents=parents) as draft:
        (draft.path / "release.json").write_bytes(prepared.release.to_bytes())
        (draft.path / "manifest.json").write_bytes(prepared.manifest.to_bytes())
        draft.facts.update(
            release_digest=prepared.release.digest,
            channel=config.channel,
            sequence=channel.sequence,
            store_uri=store.uri,
            num_blobs=len({file.sha256 for file in prepared.manifest.files}),
            bytes_uploaded=bytes_uploaded,
        )
    assert draft.sidecar is not None  # noqa: S101
    return draft.sidecar


def _passed(verdict: Sidecar, variants: Sidecar) -> str:
    """The name of the variant that passed, after a check that it is the one in `variants`."""
    facts = verdict.facts
    if facts.get("verdict") != "pass":
        raise GateError(f"gate: {facts.get('verdict')}: {facts.get('reason')}")
    name, digest = facts.get("variant"), facts.get("candidate_digest")
    found = variants.facts.get("variants", {}).get(name)
    if found is None:
        names = ", ".join(sorted(variants.facts.get("variants", {})))
        raise GateError(f"gate: the verdict judged {name}, but the variants are {names}; judge one of these")
    if found["digest"] != digest:
        raise GateError(
            f"gate: the verdict judged another {name}: its digest is {digest}, here it is {found['digest']}; "
            "run evaluate, benchmark and gate on these variants"
        )
    return str(name)


def _prepare(directory: Path, name: str, verdict: Sidecar) -> _Prepared:
    manifest = build_manifest(directory, name, _requirements(verdict))
    digest, judged = variant_digest(manifest), verdict.facts["candidate_digest"]
    if digest != judged:
        raise ArtifactError(
            f"{directory} was changed after it was quantized: the digest of its files is {digest}, the gate judged "
            f"{judged}; quantize again"
        )
    release = Release(
        variants=(ReleaseVariant(name=name, manifest_digest=manifest.digest),),
        gate=Gate(verdict="pass", reason=verdict.facts["reason"], verdict_digest=verdict.digest),
        lineage=tuple(_ancestor(summary) for summary in (*verdict.ancestors, verdict.summary())),
    )
    return _Prepared(directory, manifest, release)


def _requirements(verdict: Sidecar) -> Requirements:
    """What the candidate's own benchmark measured: the runtime's version, and the memory it took."""
    candidate = verdict.facts["candidate_digest"]
    for summary in verdict.ancestors:
        facts = summary.facts
        if summary.kind == "benchmark" and facts.get("model_digest") == candidate:
            runtime, _, version = str(facts["runtime"]).partition(" ")
            if runtime != "onnxruntime-genai":
                raise ArtifactError(f"the candidate was measured with {runtime}; benchmark it with onnxruntime-genai")
            # The builder writes plain ONNX for CPUs, which both architectures of its runtime run.
            return Requirements(
                architectures=("aarch64", "x86_64"),
                runtime="onnxruntime-genai",
                runtime_version=version,
                ram_bytes=facts["peak_rss_bytes"],
            )
    raise ArtifactError(f"the verdict does not descend from a benchmark of {candidate}; run benchmark and gate again")


def _ancestor(summary: Summary) -> Ancestor:
    return Ancestor(kind=summary.kind, digest=summary.digest, step=summary.step, parents=summary.parents)
