"""A verdict, and what it descends from: what was measured of each variant, by digest."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from slmops import champion
from slmops.artifacts import Kind, Sidecar, Summary
from slmops.config import explain
from slmops.errors import ArtifactError
from slmops.verdicts import Pair, Verdict

Facts = dict[str, Any]


@dataclass(frozen=True)
class Evidence:
    """A verdict, and all that it descends from, but for the champion that it was held against."""

    verdict: Verdict
    summaries: tuple[Summary, ...]

    @classmethod
    def of(cls, sidecar: Sidecar) -> Evidence:
        """
        Raises:
            ArtifactError: there is no verdict.
        """
        found = [summary for summary in (*sidecar.ancestors, sidecar.summary()) if summary.kind == "verdict"]
        if not found:
            raise ArtifactError(f"a model card is made from a verdict or a release, this is a {sidecar.kind}")
        try:
            verdict = Verdict.model_validate_json(json.dumps(found[-1].facts))
        except ValidationError as error:
            raise ArtifactError(f"{explain(error, 'this verdict')}; run gate again") from None
        fetched = {summary.digest for summary in sidecar.ancestors if summary.step == champion.STEP}
        made = [s for s in sidecar.ancestors if s.step != champion.STEP and fetched.isdisjoint(s.parents)]
        return cls(verdict, (*made, sidecar.summary()))

    def all_of(self, *kinds: Kind) -> list[Summary]:
        return [summary for summary in self.summaries if summary.kind in kinds]

    @property
    def variants(self) -> list[Pair]:
        """One pair of each variant, in the order of judgement."""
        return list({pair.variant: pair for pair in reversed(self.verdict.pairs)}.values())[::-1]

    def evaluation(self, digest: str | None) -> Facts:
        """What was measured of a model's answers; nothing if it was not."""
        return self._measured("evaluation", digest, None)

    def benchmark(self, digest: str | None, device_class: str) -> Facts:
        """What was measured of a model's speed and memory on a class; nothing if it was not."""
        return self._measured("benchmark", digest, device_class)

    def _measured(self, kind: Kind, digest: str | None, device_class: str | None) -> Facts:
        for summary in self.all_of(kind):
            facts = summary.facts
            of_class = device_class is None or (facts.get("device_class") or "") == device_class
            was_measured = facts.get("status", "measured") == "measured"
            if digest and facts.get("model_digest") == digest and of_class and was_measured:
                return facts
        return {}

    def built(self, pair: Pair) -> Facts:
        """What quantize says of a variant."""
        for summary in self.all_of("variants"):
            found = summary.facts.get("variants", {}).get(pair.variant)
            if isinstance(found, dict) and found.get("digest") == pair.digest:
                return found
        return {}

    def rows(self, digest: str | None) -> Summary | None:
        """The rows that a model was evaluated on."""
        datasets = {summary.digest: summary for summary in self.all_of("chat_dataset")}
        for summary in self.all_of("evaluation"):
            if digest and summary.facts.get("model_digest") == digest:
                stated = summary.facts.get("test_digest")
                return next((datasets[d] for d in (stated, *summary.parents) if d in datasets), None)
        return None

    @property
    def licence(self) -> str | None:
        """What the models that all began with state, if they agree."""
        stated = {summary.facts.get("license") for summary in self.all_of("hf_model") if not summary.parents} - {None}
        found = stated.pop() if len(stated) == 1 else None
        return found if isinstance(found, str) else None


def number(facts: Facts, name: str) -> float | None:
    """A measured number; None if there is none, or none that is finite."""
    value = facts.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
