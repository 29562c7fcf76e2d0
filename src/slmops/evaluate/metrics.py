"""Figures that follow from kept predictions alone: rates, overlap with the reference, calibration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slmops.tasks.overlap import rouge_l, words

Prediction = dict[str, Any]
"""A line of predictions.jsonl: `reference`, `prediction`, `correct`, `confidence` and more."""

Loss = tuple[float, int]
"""Negative log-likelihood of an answer in nats, summed over its tokens, and how many tokens that are."""

MAX_CLASSES = 80
MAX_CLASS_CHARS = 100
MIN_ROWS_PER_CLASS = 3
OTHER = "(other)"

NUM_BINS = 10
"""As in Guo et al. 2017, so that figures can be compared."""

Z_95 = 1.959963984540054
"""Quantile of the normal distribution for a two-sided 95 % interval."""


@dataclass(frozen=True)
class Bin:
    """The predictions whose confidence is above `low` and at most `high`."""

    low: float
    high: float
    num_rows: int
    confidence: float
    """Mean over the rows, 0 to 1."""
    accuracy: float
    """Share of the rows that are right."""


def wilson_interval(num_correct: int, num_rows: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    share = num_correct / num_rows
    spread = Z_95**2 / num_rows
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / num_rows + spread / (4 * num_rows))
    return max(0.0, centre - half), min(1.0, centre + half)


def perplexity(losses: Sequence[Loss]) -> float:
    """exp of the mean negative log-likelihood per token."""
    return math.exp(min(sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses), 700.0))


def confusion_matrix(predictions: Sequence[Prediction]) -> tuple[list[str], list[list[int]]]:
    """Classes, and how many rows of each class (first index) were answered with which class (second index).

    Classes are the most frequent short reference answers and, last, OTHER: every other reference, and every answer that
    is none of them. A right answer counts for its reference's class, however it is written.
    """
    references = Counter(row["reference"].strip() for row in predictions)
    short = [name for name, _ in references.most_common() if len(name) <= MAX_CLASS_CHARS]
    classes = [*sorted(short[:MAX_CLASSES]), OTHER]
    index = {name: number for number, name in enumerate(classes)}
    matrix = [[0] * len(classes) for _ in classes]
    for row in predictions:
        reference = row["reference"].strip()
        matrix[index.get(reference, -1)][index.get(_class_of_answer(row), -1)] += 1
    return classes, matrix


def macro_f1(predictions: Sequence[Prediction]) -> float | None:
    """F1 of each reference answer, all alike; None where the references are no classes.

    They are classes if there are 2 to MAX_CLASSES different ones, none is longer than MAX_CLASS_CHARS characters, and
    each stands for at least MIN_ROWS_PER_CLASS rows on average. An answer that is none of them is of no class.
    """
    from sklearn.metrics import f1_score

    references = [row["reference"].strip() for row in predictions]
    classes = sorted(set(references))
    few = 2 <= len(classes) <= MAX_CLASSES and len(references) >= MIN_ROWS_PER_CLASS * len(classes)
    if not few or max(map(len, classes)) > MAX_CLASS_CHARS:
        return None
    index = {name: number for number, name in enumerate(classes)}
    wanted = [index[reference] for reference in references]
    found = [index.get(_class_of_answer(row), len(classes)) for row in predictions]
    return float(f1_score(wanted, found, labels=range(len(classes)), average="macro", zero_division=0.0))


def _class_of_answer(row: Prediction) -> str:
    """A right answer is of its reference's class, however it is written; a wrong one is never."""
    reference, answer = row["reference"].strip(), row["prediction"].strip()
    if row["correct"]:
        return str(reference)
    return OTHER if answer == reference else str(answer)


def overlap(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """ROUGE-1, -2 and -L as mean F1, 0 to 1; corpus BLEU and chrF, 0 to 100 as they are published.

    ROUGE (Lin 2004, https://aclanthology.org/W04-1013) counts words as `slmops.tasks.overlap` does, because the
    library's own sees none outside the Latin alphabet. ROUGE-n is over the rows whose reference has n words, and absent
    if none has. BLEU (Papineni et al. 2002, doi:10.3115/1073083.1073135) leaves out the orders that no answer is long
    enough for; where words are not written apart, chrF (Popović 2015, doi:10.18653/v1/W15-3049) is the one to read.
    The signatures say how both were counted (Post 2018, doi:10.18653/v1/W18-6319).
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    answers = [row["prediction"] for row in predictions]
    references = [row["reference"] for row in predictions]
    facts: dict[str, Any] = _rouge(answers, references)
    for name, metric in (("bleu", BLEU(effective_order=True)), ("chrf", CHRF())):
        facts[name] = min(100.0, metric.corpus_score(answers, [references]).score)  # 100 and a hair, in binary
        facts[f"{name}_signature"] = str(metric.get_signature())
    return facts


class _Words:
    """`slmops.tasks.overlap.words` in the form that rouge_score takes."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def _rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2"], tokenizer=_Words())
    found: dict[str, list[float]] = {"rouge_1": [], "rouge_2": [], "rouge_l": []}
    for answer, reference in zip(answers, references, strict=True):
        num_words = len(words(reference))
        scores = scorer.score(reference, answer)
        if num_words >= 1:
            found["rouge_1"].append(scores["rouge1"].fmeasure)
            found["rouge_l"].append(rouge_l(answer, reference))  # the library's figure, in a fraction of the time
        if num_words >= 2:
            found["rouge_2"].append(scores["rouge2"].fmeasure)
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def confidence(loss: Loss | None) -> float | None:
    """The probability of a whole answer, its end included; None where its loss is not known."""
    return min(1.0, math.exp(-loss[0])) if loss and math.isfinite(loss[0]) else None


def calibration(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Whether the model is right as often as it is sure, over the predictions whose confidence is known.

    Expected calibration error over NUM_BINS bins of equal width (Guo et al. 2017, arXiv:1706.04599) and Brier score
    (Brier 1950), both 0 at best; `reliability` has the bins that hold rows, lowest first. Empty if nothing is known.
    """
    pairs = [(row["confidence"], bool(row["correct"])) for row in predictions if row["confidence"] is not None]
    if not pairs:
        return {}
    bins = _bins(pairs)
    return {
        "num_confidences": len(pairs),
        "mean_confidence": sum(sure for sure, _ in pairs) / len(pairs),
        "expected_calibration_error": sum(b.num_rows * abs(b.accuracy - b.confidence) for b in bins) / len(pairs),
        "brier_score": sum((sure - right) ** 2 for sure, right in pairs) / len(pairs),
        "reliability": [asdict(one) for one in bins],
    }


def _bins(pairs: Sequence[tuple[float, bool]]) -> list[Bin]:
    grouped: dict[int, list[tuple[float, bool]]] = {}
    for pair in pairs:
        grouped.setdefault(max(0, math.ceil(pair[0] * NUM_BINS) - 1), []).append(pair)
    return [
        Bin(
            low=number / NUM_BINS,
            high=(number + 1) / NUM_BINS,
            num_rows=len(rows),
            confidence=sum(sure for sure, _ in rows) / len(rows),
            accuracy=sum(right for _, right in rows) / len(rows),
        )
        for number, rows in sorted(grouped.items())
    ]
