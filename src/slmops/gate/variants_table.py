"""What the report shows of all variants: the choice per device class, why others lost, and how far each has drifted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from slmops.device_classes import parse_device_classes
from slmops.gate import charts
from slmops.gate.config import GateConfig
from slmops.gate.matrix import Candidate, Matrix
from slmops.gate.subjects import Subject
from slmops.pages.formatting import NOTHING, fraction, milliseconds, plain, share, size, tokens_per_s
from slmops.verdicts import Choice, Word

HERE = "this machine"


@dataclass(frozen=True)
class ClassRow:
    """One device class, what it asks for, and what it gets."""

    name: str
    asks: str
    choice: Choice


@dataclass(frozen=True)
class PairRow:
    """One variant under the limits of one device class."""

    variant: str
    device_class: str
    verdict: Word
    cells: tuple[str, ...]
    why: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class VariantRow:
    """One variant, whatever the device."""

    variant: str
    digest: str
    cells: tuple[str, ...]


PAIR_COLUMNS = ("First token, p95", "Answer, p95", "Decoding", "Peak memory")
VARIANT_COLUMNS = (
    "Size",
    "Accuracy",
    "Against the student",
    "KL",
    "Same first token",
    "Perplexity",
    "Form",
    "Injections",
)


def classes(config: GateConfig, matrix: Matrix) -> list[ClassRow]:
    """The classes in the order of their declaration; none where variants were judged on this machine alone."""
    if not config.device_classes:
        return []
    declared = parse_device_classes(config.device_classes, "device_classes")
    rows = []
    for choice in matrix.choices:
        found = declared[choice.device_class]
        has = f"{found.num_cpus} cores, {found.ram_mib:,} MiB"
        first, answer = milliseconds(found.time_to_first_token_ms_p95), milliseconds(found.latency_ms_p95)
        asks = (
            f"{found.architecture}, {', '.join(found.instruction_sets)}, {found.execution_provider}; {has}; "
            f"first token in {first}, answer in {answer}, {tokens_per_s(found.tokens_per_s)}; "
            f"keeps {share(found.min_accuracy_kept)}"
        )
        rows.append(ClassRow(choice.device_class, asks, choice))
    return rows


def pairs(matrix: Matrix, candidates: Sequence[Candidate]) -> list[PairRow]:
    """Every pair, smallest variant first within a class."""
    by_name = {candidate.variant: candidate for candidate in candidates}
    rows = []
    for pair in matrix.pairs:
        candidate = by_name[pair.variant]
        benchmark = candidate.on_classes.get(pair.device_class) if pair.device_class else candidate.subject.benchmark
        on = Subject("candidate", candidate.subject.evaluation, benchmark)
        cells = (
            milliseconds(on.number("benchmark", "time_to_first_token_ms_p95")),
            milliseconds(on.number("benchmark", "latency_ms_p95")),
            tokens_per_s(on.number("benchmark", "tokens_per_s")),
            size(on.number("benchmark", "peak_rss_bytes_max")),
        )
        choice = next(found for found in matrix.choices if found.device_class == pair.device_class)
        why = "chosen: the smallest that passes" if choice.variant == pair.variant else choice.lost[pair.variant]
        notes = _notes(benchmark.facts if benchmark else {})
        rows.append(PairRow(pair.variant, pair.device_class or HERE, pair.judgement.verdict, cells, why, notes))
    return rows


def _notes(facts: dict[str, Any]) -> tuple[str, ...]:
    """What a reader has to know to weigh a benchmark."""
    notes = []
    if facts.get("noisy"):
        notes.append("noisy: its repeats differ by more than it allows")
    if more := facts.get("more_than_class"):
        notes.append(f"measured on a processor with more than the class has: {', '.join(map(str, more))}")
    if missing := facts.get("num_cpus_missing"):
        notes.append(f"measured with {missing} cores fewer than the class has")
    if facts.get("limits") == "judged":
        notes.append("memory was measured, not limited")
    return tuple(notes)


def variants(candidates: Sequence[Candidate]) -> list[VariantRow]:
    """Every variant, smallest first."""
    rows = []
    for candidate in sorted(candidates, key=lambda each: (each.size_bytes, each.variant)):
        subject = candidate.subject
        drift = _drift(subject)
        low, high = subject.number("evaluation", "accuracy_low"), subject.number("evaluation", "accuracy_high")
        around = f" ({low:.3f}–{high:.3f})" if low is not None and high is not None else ""
        against = candidate.paired.from_student
        moved = (
            NOTHING if isinstance(against, str) else f"{against.value:+.3f} ({against.low:+.3f} to {against.high:+.3f})"
        )
        agreement = drift.get("answer_top1_agreement")
        cells = (
            size(candidate.size_bytes if candidate.size_bytes != float("inf") else None),
            fraction(subject.number("evaluation", "accuracy")) + around,
            moved.replace("-", "−"),
            plain(drift.get("answer_kl_mean")),
            share(agreement),
            plain(subject.number("evaluation", "perplexity")),
            share(subject.number("evaluation", "valid_fraction")),
            share(subject.number("evaluation", "injections_resisted")),
        )
        digest = subject.text("evaluation", "model_digest") or subject.text("benchmark", "model_digest") or ""
        rows.append(VariantRow(candidate.variant, digest, cells))
    return rows


def _drift(subject: Subject) -> dict[str, Any]:
    found = subject.evaluation.facts.get("drift") if subject.evaluation else None
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class LayerDrift:
    """Where in each variant its drift comes from."""

    chart: Markup | None
    said: tuple[str, ...]
    """A sentence for each variant that was asked."""


def layer_drift(candidates: Sequence[Candidate]) -> LayerDrift:
    """Of all variants that were measured layer by layer, and why others were not though it was asked."""
    lines, said = {}, []
    for candidate in candidates:
        layers = _drift(candidate.subject).get("layers") or {}
        if "not_run" in layers:
            said.append(f"{candidate.variant}: not measured, {layers['not_run']}.")
        elif layers:
            parts = [(part["part"], part["kl_mean"]) for part in layers["parts"]]
            step = layers["largest_step"]
            whole = f"KL {plain(parts[-1][1])} on {layers['num_rows']} rows"
            said.append(f"{candidate.variant}: {whole}; the largest step is {plain(step['kl'])}, {step['part']}.")
            lines[candidate.variant] = parts
    return LayerDrift(charts.drift_chart(lines) if lines else None, tuple(said))


def size_against_quality(candidates: Sequence[Candidate], student: Subject, matrix: Matrix) -> Markup | None:
    """A chart of size and accuracy of each variant and of the student in full precision; None without figures."""
    passed = {pair.variant for pair in matrix.pairs if pair.judgement.verdict == "pass"}
    points = [
        charts.Point(name, taken, *figures, good)
        for name, subject, taken, good in (
            *((c.variant, c.subject, c.size_bytes, c.variant in passed) for c in candidates),
            ("full precision", student, student.number("benchmark", "size_bytes"), None),
        )
        if taken and taken != float("inf") and (figures := _figures(subject))
    ]
    return charts.quality_chart(points) if len(points) > 1 else None


def _figures(subject: Subject) -> tuple[float, float, float] | None:
    found = [subject.number("evaluation", name) for name in ("accuracy", "accuracy_low", "accuracy_high")]
    accuracy, low, high = found
    if accuracy is None or low is None or high is None:
        return None
    return accuracy, min(low, accuracy), max(high, accuracy)
