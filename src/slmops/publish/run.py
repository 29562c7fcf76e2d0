"""Publish: put the variants that passed the gate into an object store, then show them to one channel."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slmops import artifacts
from slmops.artifacts import Sidecar, Summary
from slmops.device_classes import DeviceClass, parse_device_classes
from slmops.errors import ArtifactError, GateError
from slmops.packaging.model_card import model_card
from slmops.progress import log
from slmops.publish.config import PublishConfig
from slmops.release.build import build_manifest, hash_evidence, variant_digest
from slmops.release.deposit import deposit
from slmops.release.format import (
    MAX_REASON,
    Ancestor,
    Gate,
    Manifest,
    Release,
    ReleaseVariant,
    Requirements,
)
from slmops.release.metadata import point_channel
from slmops.storage import open_store
from slmops.verdicts import VERDICT, Choice, Verdict, read_verdict

MODEL_CARD = "README.md"


@dataclass(frozen=True)
class _Prepared:
    """All that goes into the store, built before anything is written."""

    release: Release
    manifests: tuple[Manifest, ...]
    paths: dict[str, Path]
    """Where the bytes of each digest are."""


def run(config: PublishConfig, *, variants: Path, verdict: Path, release: Path) -> Sidecar:
    """Write blobs, manifests and release; check that all are there; then move the channel.

    Each device class that the verdict chose a variant for gets that one. Publishing the same release to the same
    channel again changes nothing. Killed at any point, it leaves readers with what they had, and the next run uploads
    only what is missing.

    Raises:
        ArtifactError: the verdict or a variant was changed after it was written.
        GateError: the verdict is not `pass`, or judged other variants than these.
        StoreError, StoreUnavailable: the store refuses, or does not answer.
    """
    variants_sidecar = artifacts.expect(variants, "variants")
    judged, verdict_sidecar = read_verdict(verdict)
    if judged.verdict != "pass":
        raise GateError(f"gate: {judged.verdict}: {judged.reason}")
    with tempfile.TemporaryDirectory(prefix="slmops-publish-") as scratch:
        evidence = [verdict / VERDICT, Path(scratch) / MODEL_CARD]
        card = model_card(verdict_sidecar, name=f"slmops {verdict_sidecar.digest[:12]}")
        evidence[1].write_text(card, encoding="utf-8")
        prepared = _prepare(variants, variants_sidecar, judged, verdict_sidecar, evidence)
        store = open_store(config.store_uri)
        store.probe()
        bytes_uploaded = deposit(store, prepared.release, prepared.manifests, lambda file: prepared.paths[file.sha256])
    channel, changed = point_channel(store, config.channel, prepared.release.digest)
    log.info(
        "channel %s of %s %s release %s, sequence %d",
        config.channel, store.uri, "now points to" if changed else "already points to",
        prepared.release.digest, channel.sequence,
    )  # fmt: skip
    parents = (variants_sidecar, verdict_sidecar)
    with artifacts.writing(release, kind="release", step="publish", config=config, parents=parents) as draft:
        (draft.path / "release.json").write_bytes(prepared.release.to_bytes())
        for number, manifest in enumerate(prepared.manifests):
            (draft.path / f"manifest-{number}.json").write_bytes(manifest.to_bytes())
        draft.facts.update(
            release_digest=prepared.release.digest,
            variants=", ".join(dict.fromkeys(variant.name for variant in prepared.release.variants)),
            channel=config.channel,
            sequence=channel.sequence,
            store_uri=store.uri,
            num_blobs=len({file.sha256 for manifest in prepared.manifests for file in manifest.files}),
            bytes_uploaded=bytes_uploaded,
        )
    return draft.sidecar


def _prepare(
    variants: Path, sidecar: Sidecar, judged: Verdict, verdict: Sidecar, evidence: Sequence[Path]
) -> _Prepared:
    """The release with what each device class gets, the classes that ask for most of a machine first."""
    classes = _classes(verdict)
    chosen = [choice for choice in judged.choices if choice.verdict == "pass"]
    chosen.sort(key=lambda choice: _how_special(classes.get(choice.device_class)), reverse=True)
    manifests = [_manifest(variants, sidecar, choice, classes, verdict) for choice in chosen]
    hashed = {hash_evidence(file): file for file in evidence}
    release = Release(
        variants=tuple(
            ReleaseVariant(name=manifest.variant, manifest_digest=manifest.digest, device_class=choice.device_class)
            for choice, manifest in zip(chosen, manifests, strict=True)
        ),
        gate=Gate(verdict="pass", reason=judged.reason[:MAX_REASON], verdict_digest=verdict.digest),
        lineage=tuple(_ancestor(summary) for summary in (*verdict.ancestors, verdict.summary())),
        evidence=tuple(hashed),
    )
    paths = {file.sha256: variants / manifest.variant / file.path for manifest in manifests for file in manifest.files}
    return _Prepared(release, tuple(manifests), paths | {entry.sha256: file for entry, file in hashed.items()})


def _classes(verdict: Sidecar) -> dict[str, DeviceClass]:
    declared = verdict.config.get("device_classes")
    return parse_device_classes(declared, "the verdict's device_classes") if declared else {}


def _how_special(device_class: DeviceClass | None) -> tuple[int, int, int]:
    """A node takes the first variant that it can run: what few machines can run stands before what many can."""
    if device_class is None:
        return (0, 0, 0)
    return (device_class.execution_provider != "cpu", len(device_class.instruction_sets), device_class.ram_mib)


def _manifest(
    variants: Path, sidecar: Sidecar, choice: Choice, classes: Mapping[str, DeviceClass], verdict: Sidecar
) -> Manifest:
    """The manifest of what a class gets, after a check that it is what was judged, byte for byte."""
    name, found = str(choice.variant), sidecar.facts.get("variants", {}).get(choice.variant)
    if found is None:
        names = ", ".join(sorted(sidecar.facts.get("variants", {})))
        raise GateError(f"gate: the verdict judged {name}, but the variants are {names}; judge one of these")
    if found["digest"] != choice.digest:
        raise GateError(
            f"gate: the verdict judged another {name}: its digest is {choice.digest}, here it is {found['digest']}; "
            "run evaluate, benchmark and gate on these variants"
        )
    requirements = _requirements(verdict, choice, classes.get(choice.device_class))
    manifest = build_manifest(variants / name, name, requirements)
    digest = variant_digest(manifest)
    if digest != choice.digest:
        raise ArtifactError(
            f"{variants / name} was changed after it was quantized: the digest of its files is {digest}, the gate "
            f"judged {choice.digest}; quantize again"
        )
    return manifest


def _requirements(verdict: Sidecar, choice: Choice, device_class: DeviceClass | None) -> Requirements:
    """What the variant's own benchmark measured (the runtime's version, the memory it took), and what its class has."""
    for summary in verdict.ancestors:
        facts = summary.facts
        of_class = (facts.get("device_class") or "") == choice.device_class
        if summary.kind == "benchmark" and facts.get("model_digest") == choice.digest and of_class:
            runtime, version, *_ = str(facts["runtime"]).split()
            if runtime != "onnxruntime-genai":
                raise ArtifactError(f"the candidate was measured with {runtime}; benchmark it with onnxruntime-genai")
            common = {"runtime": runtime, "runtime_version": version, "ram_bytes": facts["peak_rss_bytes_max"]}
            if device_class is None:
                # The builder writes plain ONNX for CPUs, which both architectures of its runtime run.
                return Requirements.model_validate(common | {"architectures": ("aarch64", "x86_64")})
            return Requirements.model_validate(
                common
                | {
                    "architectures": (device_class.architecture,),
                    "instruction_sets": tuple(device_class.instruction_sets),
                    "execution_provider": device_class.execution_provider,
                }
            )
    what = f"{choice.digest} on {choice.device_class or 'this machine'}"
    raise ArtifactError(f"the verdict does not descend from a benchmark of {what}; run benchmark and gate again")


def _ancestor(summary: Summary) -> Ancestor:
    return Ancestor(kind=summary.kind, digest=summary.digest, step=summary.step, parents=summary.parents)
