"""Quantized variants and the gate's verdict on them, as the real steps write them, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.gate.config import GateConfig
from slmops.verdicts import VERDICT, Check, Choice, Pair, Verdict, Word

CANDIDATE = "cpu-int4"


def write_variants(path: Path, variants: Mapping[str, Mapping[str, bytes]]) -> Sidecar:
    """A variants artifact with these files, by name of variant and of file."""
    with artifacts.writing(path, kind="variants", step="quantize") as draft:
        built = {}
        for name, files in variants.items():
            (draft.path / name).mkdir()
            for file, content in files.items():
                (draft.path / name / file).write_bytes(content)
            entries = list(artifacts.list_files(draft.path / name))
            built[name] = {"digest": artifacts.digest_of(entries), "size_bytes": sum(e.size_bytes for e in entries)}
        draft.facts["variants"] = built
    return draft.sidecar


def write_verdict(
    path: Path,
    variants: Sidecar,
    *,
    verdict: Word = "pass",
    digest: str | None = None,
    classes: Mapping[str, str] | None = None,
) -> Path:
    """A verdict on variants of `variants`, with their benchmarks as its parents.

    Args:
        digest: of the variant that was judged, if it is to be another than the one in `variants`.
        classes: device classes, as device-classes.yaml declares them, and the variant that each gets.
    """
    chosen = classes or {"": CANDIDATE}
    parents = []
    pairs, choices = [], []
    for number, (device_class, variant) in enumerate(chosen.items()):
        found = digest or variants.facts["variants"][variant]["digest"]
        benchmark = path.with_name(f"benchmark-{number}")
        with artifacts.writing(benchmark, kind="benchmark", step="benchmark", parents=[variants]) as draft:
            draft.facts |= {"model_digest": found, "variant": variant, "device_class": device_class}
            draft.facts |= {"runtime": "onnxruntime-genai 0.10.0", "peak_rss_bytes_max": 1_000_000 + number}
            artifacts.write_json(draft.path / "figures.json", draft.facts)
        parents.append(draft.sidecar)
        check = Check(name="accuracy", value=0.5, threshold=0.9, verdict=verdict, detail="accuracy 0.5 < 0.9")
        common = {"variant": variant, "device_class": device_class, "verdict": verdict, "reason": check.detail}
        pairs.append(Pair.model_validate(common | {"digest": found, "checks": [check]}))
        gets = common if verdict == "pass" else common | {"variant": None}
        choices.append(Choice.model_validate(gets | {"digest": found if verdict == "pass" else None, "lost": {}}))
    first = pairs[0]
    judged = Verdict(
        verdict=verdict,
        reason=first.reason,
        variant=first.variant,
        candidate_digest=first.digest,
        device_class=first.device_class,
        choices=tuple(choices),
        pairs=tuple(pairs),
    )
    declared = yaml.safe_load(Path("manifests/edge/device-classes.yaml").read_text()) if classes else {}
    config = GateConfig.create({"device_classes": {name: declared[name] for name in classes or ()}})
    with artifacts.writing(path, kind="verdict", step="gate", config=config, parents=parents) as draft:
        draft.facts |= judged.model_dump(mode="json")
        artifacts.write_json(draft.path / VERDICT, draft.facts)
    return path
