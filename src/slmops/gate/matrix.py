"""Every variant on every device class: a verdict for each pair, and for each class the smallest variant that passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops import verdicts
from slmops.artifacts import Sidecar
from slmops.device_classes import NOT_BUILDABLE, DeviceClass, parse_device_classes
from slmops.errors import ArtifactError
from slmops.gate.config import GateConfig
from slmops.gate.judge import Judgement, candidate_digest, conclude, judge, judge_on
from slmops.gate.subjects import Paired, Subject
from slmops.verdicts import Choice, Word

THIS_MACHINE = ""
"""In place of a device class: this machine, as it is."""


@dataclass(frozen=True)
class Candidate:
    """One variant, and what was measured of it."""

    variant: str
    execution_provider: str
    subject: Subject
    """Its evaluation, and its benchmark on this machine as it is."""
    on_classes: Mapping[str, Sidecar]
    """Its benchmarks under the limits of device classes, by their names."""
    paired: Paired
    answers: Path | None = None
    """Where its evaluation and with it its predictions are; None if it was not evaluated."""

    @property
    def sidecars(self) -> list[Sidecar]:
        """Of all that was measured."""
        found = (self.subject.evaluation, self.subject.benchmark, *self.on_classes.values())
        return [sidecar for sidecar in found if sidecar]

    @property
    def size_bytes(self) -> float:
        size = self.subject.number("evaluation", "size_bytes") or self.subject.number("benchmark", "size_bytes")
        return size or float("inf")


@dataclass(frozen=True)
class Pair:
    """One variant on one device class."""

    variant: str
    device_class: str
    digest: str | None
    judgement: Judgement


@dataclass(frozen=True)
class Matrix:
    """All of it."""

    verdict: Word
    reason: str
    pairs: tuple[Pair, ...]
    choices: tuple[Choice, ...]

    @property
    def headline(self) -> Pair:
        """The pair to look at first: the first choice, else the smallest variant on the first class that could run it.

        Raises:
            ArtifactError: no class can run any variant, so there is none.
        """
        for choice in self.choices:
            for pair in self.pairs:
                if choice.variant and (pair.variant, pair.device_class) == (choice.variant, choice.device_class):
                    return pair
        if not self.pairs:
            raise ArtifactError(f"nothing to judge: {self.reason}")
        return min(self.pairs, key=lambda pair: ("fail", "not_run").index(pair.judgement.verdict))

    def facts(self) -> dict[str, Any]:
        """As the verdict's file holds it."""
        head = self.headline
        pairs = tuple(
            verdicts.Pair(
                variant=pair.variant,
                device_class=pair.device_class,
                digest=pair.digest,
                verdict=pair.judgement.verdict,
                reason=pair.judgement.reason,
                checks=pair.judgement.checks,
            )
            for pair in self.pairs
        )
        verdict = verdicts.Verdict(
            verdict=self.verdict,
            reason=self.reason,
            variant=head.variant,
            candidate_digest=head.digest,
            device_class=head.device_class,
            choices=self.choices,
            pairs=pairs,
        )
        return verdict.model_dump(mode="json")


def judge_all(config: GateConfig, teacher: Subject, student: Subject, candidates: Sequence[Candidate]) -> Matrix:
    """`pass` if at least one device class gets a variant; else `fail` if any pair failed, else `not_run`.

    Without device classes, a variant passes on this machine as it is by what `judge` finds alone.
    """
    by_size = sorted(candidates, key=lambda candidate: (candidate.size_bytes, candidate.variant))
    general = {
        candidate.variant: judge(config, teacher, student, candidate.subject, candidate.paired) for candidate in by_size
    }
    if not config.device_classes:
        pairs = [_pair(candidate, THIS_MACHINE, general[candidate.variant]) for candidate in by_size]
        choices = [_choose(THIS_MACHINE, pairs, by_size, "")]
    else:
        pairs, choices = [], []
        # KFP hands objects over in any order.
        for name, device_class in sorted(parse_device_classes(config.device_classes, "device_classes").items()):
            found = [
                _pair(candidate, name, _on(name, device_class, candidate, general[candidate.variant]))
                for candidate in by_size
                if candidate.execution_provider == device_class.execution_provider
            ]
            pairs += found
            choices.append(_choose(name, found, by_size, device_class.execution_provider))
    return Matrix(*_overall(choices, pairs), tuple(pairs), tuple(choices))


def _on(name: str, device_class: DeviceClass, candidate: Candidate, general: Judgement) -> Judgement:
    benchmark = candidate.on_classes.get(name)
    return conclude((*general.checks, *judge_on(device_class, name, candidate.subject, benchmark, candidate.paired)))


def _pair(candidate: Candidate, device_class: str, judgement: Judgement) -> Pair:
    return Pair(candidate.variant, device_class, candidate_digest(candidate.subject), judgement)


def _choose(device_class: str, pairs: Sequence[Pair], by_size: Sequence[Candidate], provider: str) -> Choice:
    """The first of `pairs`, which are in the order of their size, that passes."""
    chosen = next((pair for pair in pairs if pair.judgement.verdict == "pass" and pair.digest), None)
    lost = {pair.variant: _why_not(pair, chosen) for pair in pairs if pair is not chosen}
    lost |= {
        c.variant: f"it is built for {c.execution_provider}"
        for c in by_size
        if c.variant not in {p.variant for p in pairs}
    }
    if chosen:
        others = f"; of {len(pairs)} that were judged" if len(pairs) > 1 else ""
        reason = f"{chosen.variant} is the smallest that passes: {chosen.judgement.reason}{others}"
        return Choice(
            device_class=device_class,
            verdict="pass",
            variant=chosen.variant,
            digest=chosen.digest,
            reason=reason,
            lost=lost,
        )
    if not pairs:
        reason = NOT_BUILDABLE.get(provider, f"no variant for {provider} was built; add one to quantize's variants")
        return Choice(device_class=device_class, verdict="not_run", variant=None, digest=None, reason=reason, lost=lost)
    verdict: Word = "fail" if any(pair.judgement.verdict == "fail" for pair in pairs) else "not_run"
    reasons = dict.fromkeys(pair.judgement.reason for pair in pairs)
    reason = (
        next(iter(reasons)) if len(reasons) == 1 else "; ".join(f"{p.variant}: {p.judgement.reason}" for p in pairs)
    )
    return Choice(device_class=device_class, verdict=verdict, variant=None, digest=None, reason=reason, lost=lost)


def _why_not(pair: Pair, chosen: Pair | None) -> str:
    if pair.judgement.verdict != "pass":
        return f"{pair.judgement.verdict.replace('_', ' ')}: {pair.judgement.reason}"
    return f"it passes, but {chosen.variant} is smaller" if chosen else "its measurements are of different models"


def _overall(choices: Sequence[Choice], pairs: Sequence[Pair]) -> tuple[Word, str]:
    served = [choice for choice in choices if choice.verdict == "pass"]
    if len(choices) == 1:
        (only,) = choices
        judgement = next((p.judgement for p in pairs if p.variant == only.variant), None)
        return only.verdict, judgement.reason if judgement else only.reason
    if served:
        gets = ", ".join(f"{choice.device_class} gets {choice.variant}" for choice in served)
        return "pass", f"{len(served)} of {len(choices)} device classes have a variant: {gets}"
    verdict: Word = "fail" if any(choice.verdict == "fail" for choice in choices) else "not_run"
    told = dict.fromkeys(f"{choice.device_class}: {choice.reason}" for choice in choices if choice.verdict == verdict)
    return verdict, f"no device class has a variant; {'; '.join(told)}"
