"""merge_responses: the shards of generate_responses become one dataset, in the order of their prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.cached_logits import merge_cached_logits
from slmops.errors import ArtifactError, DataError
from slmops.merge_responses.config import MergeResponsesConfig
from slmops.records import ROWS, TOP_LOGPROBS, concatenate

STEP = "merge_responses"
ALIKE = ("num_shards", "top_k", "logits_temperature", "tokenizer_digest", "template_digest")
"""Facts that must be the same in all shards, and are those of the whole."""


def run(config: MergeResponsesConfig, *, shards: Sequence[Path], responses: Path) -> Sidecar:
    """Join rows and logits of `shards`, in whatever order they are given; nothing of them is held in memory.

    Raises:
        ArtifactError: a shard is missing, half-written, there twice, or belongs to another run.
        DataError: there are too few rows.
    """
    parts = _in_order(shards)
    sidecars = [sidecar for sidecar, _ in parts]
    paths = [path for _, path in parts]
    num_rows = sum(sidecar.facts["num_rows"] for sidecar in sidecars)
    if num_rows < config.min_rows:
        raise DataError(
            f"{len(parts)} shards have {num_rows:,} rows, less than min_rows={config.min_rows:,}; dropped were "
            f"{_summed(sidecars)['dropped'] or 'none'}"
        )
    with artifacts.writing(responses, kind="responses", step=STEP, config=config, parents=sidecars) as draft:
        concatenate([path / ROWS for path in paths], draft.path / ROWS)
        if any((path / TOP_LOGPROBS).exists() for path in paths):
            concatenate([path / TOP_LOGPROBS for path in paths], draft.path / TOP_LOGPROBS)
        if "top_k" in sidecars[0].facts:
            merge_cached_logits(paths, draft.path)
        draft.facts |= {name: value for name, value in sidecars[0].facts.items() if name in ALIKE} | _summed(sidecars)
    return draft.sidecar


def _in_order(shards: Sequence[Path]) -> list[tuple[Sidecar, Path]]:
    """The shards by their number.

    Raises:
        ArtifactError: they are not the parts of one whole, each once.
    """
    parts = sorted(
        ((artifacts.expect(path, "responses"), path) for path in shards),
        key=lambda part: part[0].facts.get("shard", -1),
    )
    found = [sidecar.facts.get("shard") for sidecar, _ in parts]
    first = parts[0][0]
    if found != list(range(int(first.facts.get("num_shards", 0)))):
        raise ArtifactError(
            f"shards {found} are no complete set of {first.facts.get('num_shards')}; give each output of "
            "generate_responses with this num_shards once"
        )
    for sidecar, path in parts:
        for name in ("parents", "config"):
            if _without_shard(getattr(sidecar, name)) != _without_shard(getattr(first, name)):
                raise ArtifactError(
                    f"{path} was made from other {name} than {parts[0][1]}; merge shards of one run only"
                )
        for name in ALIKE:
            if sidecar.facts.get(name) != first.facts.get(name):
                raise ArtifactError(f"{path} has {name} {sidecar.facts.get(name)}, others {first.facts.get(name)}")
    return parts


def _without_shard(value: Any) -> Any:
    return {name: item for name, item in value.items() if name != "shard"} if isinstance(value, dict) else value


def _summed(sidecars: Sequence[Sidecar]) -> dict[str, Any]:
    """Counts of all shards together, by reason where they are by reason."""
    dropped: Counter[str] = Counter()
    for sidecar in sidecars:
        dropped.update(sidecar.facts["dropped"])
    counts = [name for name in sidecars[0].facts if name.startswith("num_") and name not in ALIKE]
    teachers = {name for sidecar in sidecars for name in str(sidecar.facts["teacher"]).split(", ") if name}
    return {
        **{name: sum(sidecar.facts[name] for sidecar in sidecars) for name in counts},
        "dropped": dict(sorted(dropped.items())),
        "teacher": ", ".join(sorted(teachers)),
    }
