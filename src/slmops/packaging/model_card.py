"""A model card in the Hugging Face Hub's form, from a gate's verdict and the measurements that it descends from.

Front matter: huggingface.co/docs/hub/model-cards and hub-docs/modelcard.md (`model-index`). Each figure is one that a
step measured of the files that it names by digest; for what was not measured there is no line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from slmops.artifacts import Sidecar, Summary
from slmops.errors import ConfigError
from slmops.models import FULL_PRECISION
from slmops.packaging.evidence import Evidence, Facts, number
from slmops.pages import formatting
from slmops.pages.formatting import NOTHING
from slmops.verdicts import Pair

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

NAME = r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,95}"
HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
LANGUAGE = r"[a-z]{2,3}"
MAX_CELL = 240

HUB_LICENCES = frozenset(
    """apache-2.0 mit bsd-2-clause bsd-3-clause isc mpl-2.0 unlicense openrail gemma cc0-1.0 cc-by-4.0 cc-by-sa-4.0
    cc-by-nc-4.0 cc-by-nc-sa-4.0 gpl-2.0 gpl-3.0 agpl-3.0 lgpl-3.0 llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    """.split()  # noqa: SIM905 - a list of words reads better as words
)
"""Those of models that the Hub knows by an identifier (huggingface.co/docs/hub/repositories-licenses)."""

Column = tuple[str, Callable[[Any], str]]
"""A heading, and what stands below it; a column of nothing is left out."""


def model_card(
    sidecar: Sidecar,
    *,
    name: str,
    base_model: str | None = None,
    licence: str | None = None,
    languages: Sequence[str] = (),
) -> str:
    """The README.md of what a verdict judged.

    Args:
        sidecar: of a verdict, or of a release, which descends from one.
        name: of the model, as its title.
        base_model: the base model's name on the Hub, owner/name: no artifact knows it.
        licence: SPDX identifier; without one, what the base model's own sidecar states, if it does.
        languages: ISO 639 codes of what it was trained and evaluated on, such as en.

    Raises:
        ArtifactError: the sidecar is of something else.
        ConfigError: a name or a code is none.
    """
    _check_names(name, base_model, languages)
    evidence = Evidence.of(sidecar)
    licence = licence or evidence.licence
    parts = [
        _front_matter(evidence, name, base_model, licence, languages),
        f"# {name}\n\n{_opening(evidence)}",
        _variants(evidence),
        _devices(evidence),
        _compared(evidence),
        _made(evidence, base_model, licence),
        _limits(evidence),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _check_names(name: str, base_model: str | None, languages: Sequence[str]) -> None:
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"{name!r:.120} is no name for a model: give letters, digits, spaces, '.', '_' and '-'")
    if base_model is not None and not re.fullmatch(HUB_NAME, base_model):
        raise ConfigError(f"{base_model!r:.220} is no model of the Hub; give owner/name")
    for language in languages:
        if not re.fullmatch(LANGUAGE, language):
            raise ConfigError(f"{language!r:.20} is no code of a language; give two or three letters, such as en")


def _front_matter(
    evidence: Evidence, name: str, base_model: str | None, licence: str | None, languages: Sequence[str]
) -> str:
    from huggingface_hub import ModelCardData

    stated: dict[str, Any] = {}
    if licence:
        known = licence.casefold() in HUB_LICENCES
        stated = {"license": licence.casefold()} if known else {"license": "other", "license_name": licence.casefold()}
    if languages:
        stated["language"] = list(languages)
    backends = {str(evidence.built(pair).get("backend", "onnxruntime-genai")) for pair in evidence.variants}
    if len(backends) == 1:
        stated["library_name"] = backends.pop()
    if results := [result for pair in evidence.variants for result in _results(evidence, pair)]:
        stated |= {"model_name": name, "eval_results": results}
    if base_model:
        stated["base_model"] = base_model
    data = ModelCardData(pipeline_tag="text-generation", tags=["onnx", "slmops"], **stated)
    return f"---\n{data.to_yaml()}\n---"


def _results(evidence: Evidence, pair: Pair) -> list[EvalResult]:
    """The figures of a variant's answers for `model-index`, by the rows that they come from."""
    from huggingface_hub import EvalResult

    facts, rows = evidence.evaluation(pair.digest), evidence.rows(pair.digest)
    if rows is None:
        return []
    split = rows.facts.get("split")
    found = []
    for metric, title in (("accuracy", "Accuracy"), ("exact_match", "Exact match"), ("perplexity", "Perplexity")):
        value = number(facts, metric)
        if value is not None:
            arguments = {"variant": pair.variant, "num_rows": facts.get("num_rows"), "match": facts.get("match")}
            if metric == "accuracy" and number(facts, "accuracy_low") is not None:
                arguments |= {"interval_95": [round(facts["accuracy_low"], 6), round(facts["accuracy_high"], 6)]}
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type="held-out-rows",
                    dataset_name="held-out rows of the training data",
                    dataset_split=split if isinstance(split, str) else None,
                    dataset_revision=rows.digest,
                    metric_type=metric,
                    metric_value=round(value, 6),
                    metric_name=f"{title} ({pair.variant})",
                    metric_args={key: value for key, value in arguments.items() if value is not None},
                )
            )
    return found


def _opening(evidence: Evidence) -> str:
    verdict, names = evidence.verdict, [pair.variant for pair in evidence.variants]
    passed = [choice for choice in verdict.choices if choice.verdict == "pass"]
    what = f"{len(names)} quantized variant{'s' if len(names) > 1 else ''} of one language model for edge devices"
    gets = "; ".join(f"{_code(str(c.variant))} for {_class(c.device_class)}" for c in passed)
    return (
        f"{what}: {', '.join(f'{_code(name)}' for name in names)}. "
        + (f"The gate passed {gets}." if passed else f"The gate passed none: {_text(verdict.reason)}.")
        + f" Made by slmops {evidence.summaries[-1].slmops_version}; all figures are its steps' own measurements of "
        "these files. What is not here was not measured."
    )


def _variants(evidence: Evidence) -> str:
    def drift(pair: Pair, name: str) -> float | None:
        found = evidence.evaluation(pair.digest).get("drift")
        return number(found, name) if isinstance(found, dict) else None

    def fact(name: str, show: Callable[[float | None], str]) -> Callable[[Pair], str]:
        return lambda pair: show(number(evidence.evaluation(pair.digest), name))

    def built(name: str) -> Callable[[Pair], str]:
        return lambda pair: _text(evidence.built(pair).get(name)) or NOTHING

    columns: list[Column] = [
        ("variant", lambda pair: _code(pair.variant)),
        ("weights", built("precision")),
        ("algorithm", built("algorithm")),
        ("size", lambda pair: formatting.size(_size(evidence, pair))),
        ("accuracy (95 % interval)", lambda pair: _accuracy(evidence.evaluation(pair.digest))),
        ("exact match", fact("exact_match", formatting.fraction)),
        ("perplexity", fact("perplexity", formatting.plain)),
        ("answers of the right form", fact("valid_fraction", formatting.fraction)),
        ("drift: KL, nats a token", lambda pair: formatting.plain(drift(pair, "answer_kl_mean"))),
        ("drift: same token first", lambda pair: formatting.share(drift(pair, "answer_top1_agreement"))),
        ("injections resisted", fact("injections_resisted", formatting.fraction)),
        ("safety rows right", fact("safety_accuracy", formatting.fraction)),
        ("digest", lambda pair: f"`{pair.digest[:12]}`" if pair.digest else NOTHING),
    ]
    drifted = any(drift(pair, "answer_kl_mean") is not None for pair in evidence.variants)
    note = "\n\nDrift is from the full-precision model, on the tokens of the reference answers." if drifted else ""
    return f"## Variants\n\n{_table(columns, evidence.variants)}{note}"


def _devices(evidence: Evidence) -> str:
    def fact(name: str, show: Callable[[float | None], str]) -> Callable[[Pair], str]:
        return lambda pair: show(number(evidence.benchmark(pair.digest, pair.device_class), name))

    def said(name: str) -> Callable[[Pair], str]:
        return lambda pair: _text(evidence.benchmark(pair.digest, pair.device_class).get(name)) or NOTHING

    measured = [pair for pair in evidence.verdict.pairs if evidence.benchmark(pair.digest, pair.device_class)]
    columns: list[Column] = [
        ("variant", lambda pair: _code(pair.variant)),
        ("device class", lambda pair: _class(pair.device_class)),
        ("verdict", lambda pair: pair.verdict),
        ("time per answer, p50", fact("latency_ms_p50", formatting.milliseconds)),
        ("p95", fact("latency_ms_p95", formatting.milliseconds)),
        ("first token, p95", fact("time_to_first_token_ms_p95", formatting.milliseconds)),
        ("tokens/s", fact("tokens_per_s", formatting.plain)),
        ("peak memory", fact("peak_rss_bytes", formatting.size)),
        ("processor", said("cpu")),
        ("threads", fact("num_threads", formatting.count)),
        ("runtime", said("runtime")),
    ]
    lines = [f"## Speed and memory\n\n{_table(columns, measured)}"] if measured else []
    if noisy := [p for p in measured if evidence.benchmark(p.digest, p.device_class).get("noisy") is True]:
        names = ", ".join(f"{_code(pair.variant)} on {_class(pair.device_class)}" for pair in noisy)
        lines.append(f"Repeats differed by more than they should for {names}: these figures are rough.")
    others = [pair for pair in evidence.verdict.pairs if pair.verdict != "pass"]
    if others:
        lines.append("Did not pass:\n\n" + "\n".join(
            f"- {_code(pair.variant)} on {_class(pair.device_class)} ({pair.verdict}): {_text(pair.reason)}"
            for pair in others
        ))  # fmt: skip
    return "\n\n".join(lines)


def _compared(evidence: Evidence) -> str:
    """The full-precision models that were evaluated on the same rows."""
    made_by = {summary.digest: summary.step for summary in evidence.all_of("hf_model")}
    rows = {found.digest for pair in evidence.variants if (found := evidence.rows(pair.digest))}
    models = []
    for summary in evidence.all_of("evaluation"):
        on = evidence.rows(summary.facts.get("model_digest"))
        if summary.facts.get("variant") == FULL_PRECISION and on is not None and {on.digest} == rows:
            models.append(summary.facts)
    if not models:
        return ""

    def speed(name: str, show: Callable[[float | None], str]) -> Callable[[Facts], str]:
        return lambda facts: show(number(evidence.benchmark(facts.get("model_digest"), ""), name))

    columns: list[Column] = [
        ("made by", lambda facts: _text(made_by.get(str(facts.get("model_digest")))) or NOTHING),
        ("size", lambda facts: formatting.size(number(facts, "size_bytes"))),
        ("accuracy (95 % interval)", _accuracy),
        ("time per answer, p50", speed("latency_ms_p50", formatting.milliseconds)),
        ("peak memory", speed("peak_rss_bytes", formatting.size)),
        ("digest", lambda facts: _code(str(facts.get("model_digest"))[:12])),
    ]
    return f"## In full precision\n\nModels that these come from, on the same rows.\n\n{_table(columns, models)}"


def _made(evidence: Evidence, base_model: str | None, licence: str | None) -> str:
    steps = [s for s in evidence.summaries if s.kind not in ("evaluation", "benchmark", "comparison", "report")]
    lines = [f"{number}. {_step(summary)}" for number, summary in enumerate(steps, 1)]
    base = f"The base model is [{base_model}](https://huggingface.co/{base_model}). " if base_model else ""
    stated = f"Licence: {_text(licence)}." if licence else "No licence was stated in what this was made from."
    return "## How it was made\n\n" + "\n".join(lines) + f"\n\n{base}{stated}"


def _step(summary: Summary) -> str:
    """One artifact: who made it, when, what it is, and from what."""
    facts, about = summary.facts, []
    if isinstance(source := facts.get("source"), str):
        about.append(f"from {_text(source)}")
    if isinstance(split := facts.get("split"), str):
        about.append(f"{_text(split)} split")
    if (rows := number(facts, "num_rows")) is not None:
        about.append(f"{formatting.count(rows)} rows")
    if (parameters := number(facts, "num_parameters")) is not None:
        about.append(f"{formatting.many(parameters)} parameters")
    about += [
        f"{key} {_text(facts[key])}" for key in ("method", "objective", "teacher") if isinstance(facts.get(key), str)
    ]
    if isinstance(variants := facts.get("variants"), dict):
        about.append(", ".join(_text(name) for name in variants))
    if isinstance(verdict := facts.get("verdict"), str):
        about.append(_text(verdict))
    parents = ", ".join(f"`{parent[:12]}`" for parent in dict.fromkeys(summary.parents) if summary.kind != "verdict")
    made_from = f", made from {parents}" if parents else ""
    said = f" ({'; '.join(about)})" if about else ""
    kind = summary.kind.replace("_", " ")
    return f"{_code(summary.step)}, {summary.created_at:%Y-%m-%d}: {kind} `{summary.digest[:12]}`{said}{made_from}"


def _limits(evidence: Evidence) -> str:
    lines = []
    for pair in evidence.variants:
        facts, rows = evidence.evaluation(pair.digest), evidence.rows(pair.digest)
        num_rows = number(facts, "num_rows")
        if rows is not None and num_rows is not None:
            how = f", an answer is right by {_code(facts['match'])}" if isinstance(facts.get("match"), str) else ""
            lines.append(
                f"- {_code(pair.variant)} was evaluated on {formatting.count(num_rows)} held-out rows of the training "
                f"data's task only (`{rows.digest[:12]}`{how})."
            )
    if any(
        number(evidence.benchmark(pair.digest, pair.device_class), "latency_ms_p50") for pair in evidence.verdict.pairs
    ):
        lines.append("- Times and memory hold for the processors, threads and runtimes named above.")
    return "## Intended use and limits\n\n" + "\n".join(dict.fromkeys(lines)) if lines else ""


def _size(evidence: Evidence, pair: Pair) -> float | None:
    for facts in (evidence.built(pair), evidence.evaluation(pair.digest), evidence.benchmark(pair.digest, "")):
        if (size := number(facts, "size_bytes")) is not None:
            return size
    return None


def _accuracy(facts: Facts) -> str:
    value, low, high = (number(facts, name) for name in ("accuracy", "accuracy_low", "accuracy_high"))
    interval = "" if low is None or high is None else f" ({low:.3f}–{high:.3f})"
    return formatting.fraction(value) + interval


def _class(device_class: str) -> str:
    return _code(device_class) if device_class else "the machine of the measurements"


def _text(value: object) -> str:
    """A fact's words as plain Markdown in one line: they come from artifacts, and are no markup."""
    if not isinstance(value, str):
        return "" if value is None else str(value)
    line = formatting.shorten(" ".join(value.split()), MAX_CELL)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))


def _code(text: str) -> str:
    return "`" + formatting.shorten(" ".join(text.split()), MAX_CELL).replace("`", "'").replace("|", "\\|") + "`"


def _table(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """A Markdown table without the columns in which nothing stands."""
    lines = [[show(row) for _, show in columns] for row in rows]
    kept = [number for number in range(len(columns)) if any(line[number] != NOTHING for line in lines)]
    heads = [columns[number][0] for number in kept]
    shown = [heads, ["---"] * len(heads), *([line[number] for number in kept] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)
