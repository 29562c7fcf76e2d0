"""Model cards: what was measured, as it was measured, in a form that the Hub reads; and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.errors import ArtifactError, ConfigError
from slmops.packaging.model_card import model_card
from slmops.verdicts import Check, Choice, Pair, Verdict

Facts = dict[str, Any]

EVALUATION: Facts = {
    "status": "measured",
    "variant": "cpu-int4",
    "num_rows": 200,
    "accuracy": 0.84,
    "accuracy_low": 0.78286,
    "accuracy_high": 0.88433,
    "exact_match": 0.8125,
    "perplexity": 1.2345,
    "valid_fraction": 0.995,
    "match": "json",
    "drift": {"answer_kl_mean": 0.0213, "answer_top1_agreement": 0.971},
}
BENCHMARK: Facts = {
    "status": "measured",
    "variant": "cpu-int4",
    "latency_ms_p50": 116.16,
    "latency_ms_p95": 123.86,
    "time_to_first_token_ms_p95": 53.43,
    "tokens_per_s": 263.8,
    "peak_rss_bytes": 169_553_920,
    "cpu": "EPYC 7763",
    "num_threads": 2,
    "runtime": "onnxruntime-genai 0.18.0",
}
NOT_RUN = {"status": "not_run", "reason": "this machine has no AVX512_VNNI", "variant": "cpu-int4"}


class Story:
    """The artifacts from a base model to a verdict, with facts of the test's choice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.evaluation: Facts = dict(EVALUATION)
        self.benchmarks: dict[str, Facts] = {"": dict(BENCHMARK)}
        self.base: Facts = {"source": "SmolLM2", "license": "Apache-2.0"}
        self.variant: Facts = {"precision": "int4", "algorithm": "rtn", "backend": "onnxruntime-genai"}
        self.word = "pass"

    def verdict(self) -> Sidecar:
        base = self._write("base", "hf_model", "import", self.base)
        train = self._write("train", "chat_dataset", "prepare_data", {"split": "train", "num_rows": 4980})
        test = self._write("test", "chat_dataset", "prepare_data", {"split": "test", "num_rows": 720})
        student = self._write("student", "hf_model", "distill", {"num_parameters": 49_552_704}, train, base)
        digest = "ab" * 32
        built = {"cpu-int4": {"digest": digest, "size_bytes": 36_666_123} | self.variant}
        variants = self._write("variants", "variants", "quantize", {"variants": built}, student)
        found = [
            self._write(
                "evaluation", "evaluation", "evaluate", {"model_digest": digest} | self.evaluation, variants, test
            )
        ]
        for device_class, facts in self.benchmarks.items():
            facts = {"model_digest": digest, "device_class": device_class} | facts
            found.append(self._write(f"bench-{device_class}", "benchmark", "benchmark", facts, variants, test))
        return self._write("verdict", "verdict", "gate", self._judged(digest), *found)

    def _judged(self, digest: str) -> Facts:
        pairs, choices = [], []
        for device_class, facts in self.benchmarks.items():
            word: Any = self.word if facts.get("status") == "measured" else "not_run"
            reason = facts.get("reason", "accuracy 0.84, at least 0.8 wanted")
            check = Check(name="accuracy", value=0.84, threshold=0.8, verdict=word, detail=reason)
            pair = Pair(
                variant="cpu-int4",
                device_class=device_class,
                digest=digest,
                verdict=word,
                reason=reason,
                checks=(check,),
            )
            gets = {"variant": "cpu-int4", "digest": digest} if word == "pass" else {"variant": None, "digest": None}
            pairs.append(pair)
            choices.append(
                Choice.model_validate(
                    {"device_class": device_class, "verdict": word, "reason": reason, "lost": {}} | gets
                )
            )
        passed = any(pair.verdict == "pass" for pair in pairs)
        return Verdict(
            verdict="pass" if passed else pairs[0].verdict, reason="as judged", variant="cpu-int4",
            candidate_digest=digest, device_class="", choices=tuple(choices), pairs=tuple(pairs),
        ).model_dump(mode="json")  # fmt: skip

    def _write(self, name: str, kind: Any, step: str, facts: Facts, *parents: Sidecar) -> Sidecar:
        with artifacts.writing(self.path / name, kind=kind, step=step, parents=parents) as draft:
            draft.facts |= facts
            artifacts.write_json(draft.path / "figures.json", {"name": name} | facts)
        return draft.sidecar


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def front_matter(card: str) -> Any:
    """As the Hub's own library reads it."""
    return ModelCard(card).data


def row_of(card: str, heading: str) -> dict[str, str]:
    """The first row of the table below a heading, by column."""
    lines = [line for line in card.partition(f"## {heading}\n")[2].splitlines() if line.startswith("|")]
    head, _, row = (re.split(r"(?<!\\) ?\| ?", line.strip("| ")) for line in lines[:3])
    return dict(zip(head, row, strict=True))


def test_front_matter_is_what_the_hub_reads(story: Story) -> None:
    verdict = story.verdict()
    card = model_card(
        verdict, name="building-commands", base_model="HuggingFaceTB/SmolLM2-135M-Instruct", languages=["en"]
    )
    data = front_matter(card)
    assert data.license == "apache-2.0"
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.pipeline_tag == "text-generation"
    assert data.library_name == "onnxruntime-genai"
    assert data.language == ["en"]
    assert data.model_name == "building-commands"
    measured = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in measured.items()} == {
        "accuracy": 0.84,
        "exact_match": 0.8125,
        "perplexity": 1.2345,
    }
    test = next(s for s in verdict.ancestors if s.facts.get("split") == "test")
    assert measured["accuracy"].dataset_revision == test.digest
    assert measured["accuracy"].metric_args == {
        "variant": "cpu-int4",
        "num_rows": 200,
        "match": "json",
        "interval_95": [0.78286, 0.88433],
    }


def test_figures_stand_where_they_belong(story: Story) -> None:
    story.benchmarks["x86-avx2"] = BENCHMARK | {"latency_ms_p95": 456.0, "num_threads": 1}
    card = model_card(story.verdict(), name="m")
    variant = row_of(card, "Variants")
    assert variant["size"] == "36.7\u00a0MB"
    assert variant["accuracy (95 % interval)"] == "0.840 (0.783\u20130.884)"
    assert variant["weights"] == "int4"
    assert variant["drift: KL, nats a token"] == "0.0213"
    assert variant["drift: same token first"] == "97.1\u00a0%"
    assert row_of(card, "Speed and memory") == {
        "variant": "`cpu-int4`",
        "device class": "the machine of the measurements",
        "verdict": "pass",
        "time per answer, p50": "116\u00a0ms",
        "p95": "124\u00a0ms",
        "first token, p95": "53.4\u00a0ms",
        "tokens/s": "264",
        "peak memory": "170\u00a0MB",
        "processor": "EPYC 7763",
        "threads": "2",
        "runtime": "onnxruntime-genai 0.18.0",
    }
    assert "| `cpu-int4` | `x86-avx2` | pass | 116\u00a0ms | 456\u00a0ms" in card
    assert "`cpu-int4` for `x86-avx2`" in card
    assert "evaluated on 200 held-out rows of the training data's task only" in card
    assert "49.6\u00a0M parameters" in card


def test_what_was_not_measured_is_not_written(story: Story) -> None:
    for name in ("drift", "perplexity", "exact_match", "valid_fraction", "accuracy_low", "accuracy_high"):
        del story.evaluation[name]
    story.benchmarks = {
        "": {"status": "measured", "variant": "cpu-int4", "latency_ms_p50": 100.0},
        "x86-vnni": dict(NOT_RUN),
    }
    story.base, story.variant = {"source": "somewhere"}, {}
    card = model_card(story.verdict(), name="m")
    assert set(row_of(card, "Variants")) == {"variant", "size", "accuracy (95 % interval)", "digest"}
    assert set(row_of(card, "Speed and memory")) == {"variant", "device class", "verdict", "time per answer, p50"}
    for word in ("drift", "Drift", "perplexity", "exact", "injection", "safety", "None", "nan", "Licence:"):
        assert word not in card
    data = front_matter(card)
    assert [result.metric_type for result in data.eval_results] == ["accuracy"]
    assert data.license is None
    assert data.base_model is None
    assert data.language is None
    assert "- `cpu-int4` on `x86-vnni` (not\\_run)" not in card
    assert "- `cpu-int4` on `x86-vnni` (not_run): this machine has no AVX512\\_VNNI" in card


def test_model_that_was_not_evaluated_has_no_figures(story: Story) -> None:
    story.evaluation, story.benchmarks = dict(NOT_RUN), {"": dict(NOT_RUN)}
    card = model_card(story.verdict(), name="m")
    assert front_matter(card).eval_results is None
    assert set(row_of(card, "Variants")) == {"variant", "weights", "algorithm", "size", "digest"}
    assert "Speed and memory" not in card
    assert "limits" not in card
    assert "The gate passed none" in card


def test_a_measurement_that_was_made_up_for_later_counts(story: Story) -> None:
    """The first machine was no such device, a node of a pool was."""
    sidecar = story.verdict()
    (measured,) = [summary for summary in sidecar.ancestors if summary.kind == "benchmark"]
    not_run = measured.model_copy(update={"facts": measured.facts | {"status": "not_run", "reason": "another machine"}})
    sidecar = sidecar.model_copy(update={"ancestors": (not_run, *sidecar.ancestors)})
    assert row_of(model_card(sidecar, name="x"), "Speed and memory")["tokens/s"]


def test_figures_of_other_files_do_not_count(story: Story) -> None:
    story.evaluation["model_digest"] = "cd" * 32
    card = model_card(story.verdict(), name="m")
    assert "0.840" not in card
    assert front_matter(card).eval_results is None


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("Apache-2.0", ("apache-2.0", None)),
        ("llama3.2", ("llama3.2", None)),
        ("LicenseRef-Ours", ("other", "licenseref-ours")),
    ],
)
def test_licence_as_the_hub_names_it(story: Story, stated: str, expected: tuple[str, str | None]) -> None:
    story.base["license"] = "MIT"
    data = front_matter(model_card(story.verdict(), name="m", licence=stated))
    assert (data.license, data.license_name) == expected


@pytest.mark.parametrize(
    "evil", ["x | y |\n\n# Owned\n<script>alert(1)</script>", "[click](javascript:x)", "`a` *b*\n---\nlicense: mit"]
)
def test_words_of_artifacts_are_no_markup(story: Story, evil: str) -> None:
    story.base["source"] = evil
    story.benchmarks[""]["cpu"] = evil
    story.benchmarks["x86-vnni"] = NOT_RUN | {"reason": evil}
    card = model_card(story.verdict(), name="m")
    assert "<script" not in card
    assert "\n# Owned" not in card
    assert "[click](" not in card
    assert front_matter(card).license == "apache-2.0"
    assert len(re.findall(r"(?<!\\)\|", card.partition("## Speed and memory\n")[2].strip().splitlines()[2])) == 12


def test_release_descends_from_its_verdict(story: Story) -> None:
    verdict = story.verdict()
    release = story._write("release", "release", "publish", {"channel": "default"}, verdict)
    card = model_card(release, name="m")
    assert row_of(card, "Variants")["accuracy (95 % interval)"].startswith("0.840")


def test_needs_a_verdict(story: Story) -> None:
    story.verdict()
    with pytest.raises(ArtifactError, match="from a verdict or a release"):
        model_card(artifacts.read(story.path / "variants"), name="m")
    with pytest.raises(ArtifactError, match="run gate again"):
        model_card(story._write("old", "verdict", "gate", {"verdict": "pass"}), name="m")


@pytest.mark.parametrize(
    "settings",
    [{"name": ""}, {"name": "a\nb"}, {"name": "m", "base_model": "no-owner"}, {"name": "m", "languages": ["English"]}],
)
def test_refuses_other_names(story: Story, settings: Facts) -> None:
    with pytest.raises(ConfigError):
        model_card(story.verdict(), **settings)


def test_card_of_what_the_real_steps_measured(
    tiny_model: Path, tiny_teacher: Path, tiny_variants: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    from slmops.benchmark.config import BenchmarkConfig
    from slmops.benchmark.run import run as benchmark
    from slmops.evaluate.config import EvaluateConfig
    from slmops.evaluate.run import run as evaluate
    from slmops.gate.config import GateConfig
    from slmops.gate.run import run as gate

    paths = {name: tmp_path / name for name in ("te", "tb", "se", "sb", "ce", "cb", "verdict")}
    few: Facts = {"max_new_tokens": 8}
    quick: Facts = few | {
        "num_requests": 2, "num_warmup": 0, "num_threads": 1, "num_repeats": 1, "prompt_lengths": [8], "streams": [1],
    }  # fmt: skip
    for model, variant, evaluation, measured in (
        (tiny_teacher, "full_precision", "te", "tb"),
        (tiny_model, "full_precision", "se", "sb"),
        (tiny_variants, "cpu-int4", "ce", "cb"),
    ):
        settings = EvaluateConfig(variant=variant, **few)
        reference = {"reference": tiny_model} if evaluation == "ce" else {}
        evaluate(settings, model=model, test=held_out_rows, evaluation=paths[evaluation], **reference)
        benchmark(
            BenchmarkConfig(variant=variant, **quick), model=model, prompts=held_out_rows, benchmark=paths[measured]
        )
    verdict = gate(
        GateConfig(min_rows=10),
        teacher_evaluation=paths["te"], teacher_benchmark=paths["tb"], student_evaluation=paths["se"],
        student_benchmark=paths["sb"], candidate_evaluations=[paths["ce"]], candidate_benchmarks=[paths["cb"]],
        verdict=paths["verdict"], report=tmp_path / "report.html",
    )  # fmt: skip
    card = model_card(verdict, name="tiny")
    facts = json.loads((paths["ce"] / "slmops.json").read_text())["facts"]
    data = front_matter(card)
    assert {r.metric_type: r.metric_value for r in data.eval_results}["accuracy"] == round(facts["accuracy"], 6)
    row = row_of(card, "Variants")
    assert row["accuracy (95 % interval)"].startswith(f"{facts['accuracy']:.3f} (")
    assert "drift: KL, nats a token" in row
    assert "peak memory" in row_of(card, "Speed and memory")
    teacher = row_of(card, "In full precision")
    assert teacher["made by"] in ("finetune", "import")
    assert "`finetune`, 20" in card
    assert "evaluated on 40 held-out rows" in card
