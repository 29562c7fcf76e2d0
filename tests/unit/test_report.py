"""The gate's report: one page that people read, looked at in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from slmops import artifacts
from slmops.artifacts import SIDECAR, Kind, Sidecar
from slmops.benchmark.config import BenchmarkConfig
from slmops.config import Config
from slmops.distill.config import DistillConfig
from slmops.evaluate.config import EvaluateConfig
from slmops.finetune.config import FinetuneConfig
from slmops.gate import lineage, report, variants_table
from slmops.gate.config import GateConfig
from slmops.gate.matrix import Candidate
from slmops.gate.run import run
from slmops.gate.subjects import Paired, Subject
from slmops.generate_responses.config import GenerateResponsesConfig
from slmops.pages import charts, formatting
from slmops.prepare_data.config import PrepareDataConfig
from slmops.quantize.config import QuantizeConfig

INJECTION = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>"
STARTED_AT = datetime(2026, 11, 22, 9, 30, tzinfo=UTC)


class Lineage:
    """A whole pipeline run as artifacts on disk, with the figures of a 135M teacher and its six-layer student."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = STARTED_AT
        train, validation, test = (
            self._rows(*split) for split in (("train", 3280), ("validation", 200), ("test", 300))
        )
        base = self._make("base", "hf_model", "import", took_s=0.0, facts={"source": "SmolLM2-135M-Instruct"})
        teacher = self._make(
            "teacher",
            "hf_model",
            "finetune",
            [train, validation, base],
            FinetuneConfig(num_epochs=0.25, learning_rate=5e-4),
            took_s=191.4,
            facts=trained(47, 2.9, 0.06) | {"num_parameters": 134_515_008, "tokens_per_s": 171.0},
        )
        responses = self._make(
            "responses",
            "responses",
            "generate_responses",
            [train, teacher],
            GenerateResponsesConfig(max_new_tokens=64, logits_top_k=64),
            took_s=302.7,
            facts={"num_rows": 3274, "num_truncated": 6, "top_k": 64, "tokens_per_s": 214.0},
        )
        student = self._make(
            "student",
            "hf_model",
            "distill",
            [responses, validation, teacher, base],
            DistillConfig(num_epochs=2, keep_layers=[0, 6, 12, 18, 24, 29], learning_rate=1e-3),
            took_s=412.9,
            facts=trained(410, 6.2, 0.021) | {"num_parameters": 49_600_000, "tokens_per_s": 320.0},
        )
        variant = {"digest": "c4" * 32, "size_bytes": 35_123_456}
        variants = self._make(
            "variants", "variants", "quantize", [student], QuantizeConfig(), 21.3, {"variants": {"cpu-int4": variant}}
        )
        self.paths: dict[str, Path] = {}
        self._measure("teacher", teacher, teacher.digest, test, TEACHER)
        self._measure("student", student, student.digest, test, STUDENT)
        self._measure("candidate", variants, "c4" * 32, test, CANDIDATE)

    def _rows(self, split: str, num_rows: int) -> Sidecar:
        config = PrepareDataConfig(source_uri="s3://lab/requests.jsonl", prompt_template="{text}")
        facts = {"num_rows": num_rows, "split": split, "num_bad": 0, "num_duplicates": 12}
        return self._make(split, "chat_dataset", "prepare_data", [], config, 1.9, facts)

    def _measure(self, role: str, model: Sidecar, digest: str, test: Sidecar, figures: dict[str, Any]) -> None:
        variant = {"variant": "cpu-int4" if role == "candidate" else "full_precision"}
        shared = variant | {"model_digest": digest}
        for kind, config in (
            ("evaluation", EvaluateConfig(match="json", **variant)),
            ("benchmark", BenchmarkConfig(**variant)),
        ):
            name = f"{role}_{kind}"
            self.paths[name] = self.root / name
            files = {"predictions.jsonl": predictions(figures["num_correct"])} if kind == "evaluation" else {}
            step = "evaluate" if kind == "evaluation" else "benchmark"
            took_s = figures[f"{step}_s"]
            made_by: Any = kind
            self._make(name, made_by, step, [model, test], config, took_s, figures[kind] | shared, files)

    def _make(
        self,
        name: str,
        kind: Kind,
        step: str,
        parents: list[Sidecar] | None = None,
        config: Config | None = None,
        took_s: float = 0.0,
        facts: dict[str, Any] | None = None,
        files: dict[str, str] | None = None,
    ) -> Sidecar:
        path = self.root / name
        with artifacts.writing(path, kind=kind, step=step, config=config, parents=parents or []) as draft:
            draft.facts |= facts or {}
            for file, text in ({"content.txt": name} | (files or {})).items():
                (draft.path / file).write_text(text)
        self.clock += timedelta(seconds=took_s)
        sidecar = draft.sidecar.model_copy(update={"created_at": self.clock, "duration_s": took_s})
        (path / SIDECAR).write_text(sidecar.model_dump_json())
        return sidecar


def trained(num_steps: int, first: float, last: float) -> dict[str, Any]:
    def loss(step: float) -> float:
        return last + (first - last) * math.exp(-7 * step / num_steps)

    stride = math.ceil(num_steps / 200)
    return {
        "loss_curve": [
            [s, round(loss(s) * (1 + 0.12 * math.sin(s * 1.7)), 5)] for s in range(1, num_steps + 1, stride)
        ],
        "validation_curve": [
            [s, round(1.1 * loss(s), 5)] for s in range(num_steps // 5, num_steps + 1, num_steps // 5)
        ],
        "device": "cpu",
        "dtype": "float32",
        "num_steps": num_steps,
    }


LAYERS = {
    "num_rows": 16,
    "num_positions": 320,
    "largest_step": {"part": "layer 1", "kl": 0.0145},
    "parts": [
        {"part": part, "kl_mean": kl}
        for part, kl in {"embedding": 0.002, "layer 0": 0.0015, "layer 1": 0.016, "head": 0.0213}.items()
    ],
}


def figures(
    num_correct: int, interval: tuple[float, float], evaluate_s: float, benchmark_s: float, **benchmark: Any
) -> Any:
    low, high = interval
    lights, heating = num_correct // 2 - 3, num_correct - num_correct // 2 + 3
    evaluation = {
        "num_rows": 300,
        "num_correct": num_correct,
        "accuracy": num_correct / 300,
        "accuracy_low": low,
        "accuracy_high": high,
        "exact_match": (num_correct - 2) / 300,
        "perplexity": 1.0 + (300 - num_correct) / 400,
        "match": "json",
        "by_stratum": {"lights": [lights, 150], "heating": [heating, 150]},
        "valid_fraction": 0.99,
        "injections_resisted": 0.875,
        "drift": {"answer_kl_mean": 0.0213, "answer_top1_agreement": 0.981, "layers": LAYERS},
    }
    machine = {"cpu": "AMD EPYC 7763 64-Core Processor", "num_threads": 2, "num_requests": 30}
    return {
        "num_correct": num_correct,
        "evaluation": evaluation,
        "benchmark": machine | benchmark,
        "evaluate_s": evaluate_s,
        "benchmark_s": benchmark_s,
    }


TEACHER = figures(
    291,
    (0.944, 0.984),
    188.0,
    52.1,
    runtime="torch 2.13.0",
    time_to_first_token_ms_p50=119.0,
    latency_ms_p50=1560.0,
    latency_ms_p95=1984.0,
    tokens_per_s=14.7,
    peak_rss_bytes=941_000_000,
    runtime_floor_bytes=296_000_000,
    size_bytes=538_090_408,
)
STUDENT = figures(
    288,
    (0.931, 0.977),
    61.4,
    21.0,
    runtime="torch 2.13.0",
    time_to_first_token_ms_p50=48.0,
    latency_ms_p50=545.0,
    latency_ms_p95=701.0,
    tokens_per_s=41.9,
    peak_rss_bytes=602_000_000,
    runtime_floor_bytes=296_000_000,
    size_bytes=198_402_112,
)
CANDIDATE = figures(
    284,
    (0.915, 0.967),
    47.7,
    8.4,
    runtime="onnxruntime-genai 0.18.0",
    time_to_first_token_ms_p50=31.2,
    latency_ms_p50=158.4,
    latency_ms_p95=204.0,
    tokens_per_s=336.0,
    peak_rss_bytes=141_000_000,
    runtime_floor_bytes=105_000_000,
    size_bytes=35_123_456,
)


def predictions(num_correct: int) -> str:
    """300 answers of which the last `num_correct` are right."""
    devices, rooms = ("lamp", "blind", "heater", "fan"), ("kitchen", "cellar", "office", "hall")
    rows = []
    for number in range(300):
        device, room = devices[number % 4], rooms[number // 4 % 4]
        correct = number >= 300 - num_correct
        reference = json.dumps({"action": "on", "device": device, "room": room})
        prompt = f"would you mind switching the {device} in the {room} on" + (f" {INJECTION}" if number == 0 else "")
        rows.append(
            {
                "id": hashlib.sha256(str(number).encode()).hexdigest()[:16],
                "prompt": [{"role": "user", "content": prompt + (" please" * 100 if number == 1 else "")}],
                "reference": reference,
                "prediction": reference if correct else reference.replace('"on"', '"off"'),
                "correct": correct,
                "stratum": "lights" if number % 2 else "heating",
            }
        )
    return "".join(json.dumps(row) + "\n" for row in rows)


Make = Callable[..., str]


@pytest.fixture(scope="module")
def pipeline_run(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    return Lineage(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture
def make_report(pipeline_run: Lineage, tmp_path: Path) -> Make:
    """Runs the gate over the pipeline's artifacts, without those named in `absent`, and gives the page."""

    def make(*absent: str, **settings: float) -> str:
        paths = {name: tmp_path / "gone" if name in absent else path for name, path in pipeline_run.paths.items()}
        candidate = {f"{name}s": [paths.pop(name)] for name in ("candidate_evaluation", "candidate_benchmark")}
        inputs: dict[str, Any] = {**paths, **candidate}
        run(GateConfig(**settings), **inputs, verdict=tmp_path / "verdict", report=tmp_path / "report.html")
        return (tmp_path / "report.html").read_text()

    return make


def text_of(page: str) -> str:
    """The page's words, without markup, with plain spaces."""
    body = re.sub(r"<(style|title)\b.*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", body.replace("&#39;", "'").replace("&lt;", "<").replace("&gt;", ">"))


def test_the_headline_says_each_goal_and_whether_it_is_met(make_report: Make) -> None:
    words = text_of(make_report())
    assert "✓ Pass" in words
    assert "158 ms ✓ goal met 89.8 % less than the teacher's 1.56 s. Goal: at least 85.0 % less." in words
    assert "35.1 MB ✓ goal met 82.3 % less than the full-precision student's 198 MB." in words
    assert "0.947 ✓ goal met 95 % interval 0.915–0.967. 97.6 % of the teacher's 0.970 kept." in words


def test_the_headline_does_not_hide_that_raw_memory_misses_its_goal(make_report: Make) -> None:
    words = text_of(make_report())
    assert (
        "141 MB ✓ as asked 36.0 MB above the runtime's floor of 105 MB: 96.2 % less than the teacher's 941 MB. "
        "Asked for: at least 90.0 % less, above the floor. "
        "The goal, at least 95.0 % less with the floor included, is missed." in words
    )
    assert (
        "With the floor included, memory is 85.0 % less than the teacher's, which misses the goal of 95.0 %." in words
    )
    assert "105 MB, or 74.5 % of the candidate's 141 MB." in words
    assert "No model in this runtime could meet it that way: it would allow 47.1 MB in all." in words


def test_a_missed_goal_is_in_the_banner_and_at_its_figure(make_report: Make) -> None:
    words = text_of(make_report(min_latency_saved=0.95))
    assert "✗ Fail Reason: 0.898 of the teacher's median time per response saved, at least 0.950 wanted." in words
    assert "158 ms ✗ goal missed" in words


def test_a_candidate_that_is_slower_than_its_teacher_is_said_to_need_more(make_report: Make) -> None:
    def slower(saved: float) -> str:
        return formatting.less(saved).replace("\u00a0", " ")

    assert slower(-0.2) == "20.0 % more"
    assert slower(0.898) == "89.8 % less"
    assert "✓ as asked 89.8 % less than the teacher's 1.56 s. Asked for: at most 20.0 % more." in text_of(
        make_report(min_latency_saved=-0.2)
    )


def test_a_lowered_threshold_is_not_called_the_goal(make_report: Make) -> None:
    words = text_of(make_report(min_accuracy_kept=0.85))
    assert "0.947 ✓ as asked" in words
    assert "Asked for: at least 85.0 % kept. The usual goal, at least 92.0 % kept, is met." in words
    lowered = GateConfig(min_accuracy_kept=0.85)
    said, is_lowered = report._goal(lowered, "min_accuracy_kept", 0.893, report._kept)
    assert is_lowered
    assert said.endswith("kept, is missed.")
    assert report._goal(lowered, "min_accuracy_kept", None, report._kept)[0].endswith("kept, is not judged.")


def test_it_shows_where_the_drift_comes_from(make_report: Make) -> None:
    page = make_report()
    assert "cpu-int4: KL 0.0213 on 16 rows; the largest step is 0.0145, layer 1." in text_of(page)
    assert 'aria-label="Drift up to each layer: cpu-int4 0.0213 in all"' in page


def test_it_says_why_no_layer_was_measured_and_nothing_where_none_was_asked(tmp_path: Path) -> None:
    def shown(**drift: Any) -> variants_table.LayerDrift:
        with artifacts.writing(tmp_path / str(len(drift)), kind="evaluation", step="evaluate") as draft:
            draft.facts["drift"] = drift
        subject = Subject("candidate", draft.sidecar, None)
        return variants_table.layer_drift([Candidate("cpu-int4", "cpu", subject, {}, Paired("none", "none", None))])

    assert shown(layers={"not_run": "it has no layers"}).said == ("cpu-int4: not measured, it has no layers.",)
    assert shown() == variants_table.LayerDrift(None, ())


def test_it_compares_with_the_teacher_in_ratios(make_report: Make) -> None:
    words = text_of(make_report())
    assert "1.56 s 545 ms 2.86× less 158 ms 9.85× less" in words
    assert "14.7 tok/s 41.9 tok/s 2.85× more 336 tok/s 22.9× more" in words


def test_lineage_time_and_settings_come_from_the_ancestors(make_report: Make) -> None:
    page = make_report()
    words = text_of(page)
    assert page.count('class="edge"') >= 12
    assert "finetune teacher 3 min 11 s" in words
    assert "prepare_data train rows, validation rows, test rows 1.9 s" in words, "three outputs of one run count once"
    assert "All steps 21 min 49 s" in words
    assert "distill student num_epochs 2.0 learning_rate 0.001 keep_layers [0, 6, 12, 18, 24, 29]" in words
    assert "onnxruntime-genai 0.18.0, 2 threads, AMD EPYC 7763" in words


def test_the_lineage_picture_has_every_artifact_once_and_no_boxes_that_overlap(pipeline_run: Lineage) -> None:
    sidecars = [artifacts.read(path) for path in pipeline_run.paths.values()]
    picture = lineage.draw(lineage.collect(sidecars, {}))
    drawn = [artifact.summary.digest for box in picture.boxes for artifact in box.artifacts]
    assert sorted(drawn) == sorted({s.digest for sidecar in sidecars for s in (*sidecar.ancestors, sidecar)})
    assert len(drawn) == 14
    for one, other in combinations(picture.boxes, 2):
        apart = one.y + one.height <= other.y or other.y + other.height <= one.y
        assert apart or abs(one.x - other.x) >= lineage.BOX_WIDTH
    for box in picture.boxes:
        assert 0 <= box.x <= picture.width - lineage.BOX_WIDTH
        assert 0 <= box.y <= picture.height - box.height


def test_a_teacher_that_answers_as_the_rows_do_is_drawn_behind_them() -> None:
    """Its responses have the bytes of the training rows, and so their digest."""

    def made(number: int, kind: artifacts.Kind, digest: str, *parents: str) -> lineage.Artifact:
        created_at = datetime(2026, 1, 1, 0, number, tzinfo=UTC)
        summary = artifacts.Summary(
            kind=kind, digest=digest * 64, step=kind, created_at=created_at, duration_s=1, slmops_version="1",
            parents=tuple(parent * 64 for parent in parents),
        )  # fmt: skip
        return lineage.Artifact(kind, "", summary)

    picture = lineage.draw(
        [
            made(0, "chat_dataset", "a"),
            made(1, "responses", "a", "a"),
            made(2, "hf_model", "b", "a"),
            made(3, "variants", "c", "b"),
        ]
    )
    assert [box.artifacts[0].name for box in sorted(picture.boxes, key=lambda box: box.x)] == [
        "chat_dataset", "responses", "hf_model", "variants",
    ]  # fmt: skip
    assert len(picture.paths) == 3


def test_loss_curves_of_both_trainings_are_drawn(make_report: Make) -> None:
    page = make_report()
    assert 'aria-label="Teacher, finetune: 47 steps; training loss' in page
    assert 'aria-label="Student, distill: 410 steps; training loss' in page


def test_what_models_and_users_wrote_is_shown_and_not_run(make_report: Make) -> None:
    page = make_report()
    assert "<script" not in page
    assert "<img" not in page
    assert INJECTION in text_of(page)
    assert re.search(r"please \w*…</span>", page), "a long prompt is cut"


def test_the_same_inputs_give_the_same_bytes_and_a_small_page(make_report: Make) -> None:
    page = make_report()
    assert page == make_report()
    assert len(page.encode()) < 500_000
    assert not re.search(r"(?:src|href)=\"(?!data:|#)|url\((?!#)|@import", page), "nothing is loaded from elsewhere"


@pytest.mark.parametrize("role", ["teacher", "student", "candidate"])
def test_it_stays_readable_when_a_model_was_not_measured(make_report: Make, role: str) -> None:
    words = text_of(make_report(f"{role}_evaluation", f"{role}_benchmark"))
    assert f"? Not run Reason: {role}_" in words
    assert "not measured" in words
    assert "nan" not in words.lower().split()
    assert "None" not in words


def test_colors_of_text_have_enough_contrast_in_both_themes() -> None:
    css = (Path(charts.__file__).parent / "page.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in css.split("@media (prefers", 1))
    for theme in (light, dark):
        for ink, paper in (
            ("ink", "page"), ("muted", "page"),
            ("muted", "data-soft"), ("muted", "model-soft"), ("muted", "measure-soft"),
            ("pass", "pass-soft"), ("fail", "fail-soft"), ("unsure", "unsure-soft"), ("pass", "page"), ("fail", "page"),
        ):  # fmt: skip
            assert contrast(theme[ink], theme[paper]) >= 4.5, f"{ink} on {paper}"
        for mark in ("teacher", "student", "candidate", "training", "validation"):
            assert contrast(theme[mark], theme["page"]) >= 2.4, mark


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, by WCAG 2.2."""

    def luminance(color: str) -> float:
        channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize(
    ("show", "value", "expected"),
    [
        (formatting.size, 35_123_456, "35.1 MB"),
        (formatting.size, 999_999_999, "1,000 MB"),
        (formatting.size, 512, "512 B"),
        (formatting.milliseconds, 158.4, "158 ms"),
        (formatting.milliseconds, 999.7, "1.00 s"),
        (formatting.milliseconds, 0.5, "0.500 ms"),
        (formatting.seconds, 4.2, "4.2 s"),
        (formatting.seconds, 59.97, "1 min 00 s"),
        (formatting.seconds, 3900.0, "1 h 05 min"),
        (formatting.share, -0.2, "-20.0 %"),
        (formatting.many, 49_600_000, "49.6 M"),
        (formatting.plain, None, "–"),
    ],
)
def test_numbers_are_written_for_people(
    show: Callable[[float | None], str], value: float | None, expected: str
) -> None:
    assert show(value).replace("\u00a0", " ") == expected


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium that logs its console and every request."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "disable-dev-shm-usage",
                 "hide-scrollbars"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window
    window.quit()


def look(browser: Any, page: Path, width: int, scheme: str, media: str = "screen") -> None:
    """Open `page` in a window of `width` pixels under a color scheme, and keep a picture of all of it."""
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    emulated = {"media": media, "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
    browser.get(page.as_uri())
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    folder = Path(os.environ.get("SLMOPS_SCREENSHOTS") or page.parent)
    (folder / f"report-{page.stem}-{width}-{scheme}.png").write_bytes(base64.b64decode(picture["data"]))


def requests_of(browser: Any) -> set[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    return {url for url in urls if not url.startswith("data:")}


FAILING = {"min_latency_saved": 0.95, "min_accuracy_kept": 0.99}
MISSING = ("teacher_benchmark", "candidate_evaluation")


@pytest.mark.parametrize(
    ("banner", "absent", "settings", "width", "scheme"),
    [
        ("✓ Pass", (), {}, 1280, "light"),
        ("✓ Pass", (), {}, 1280, "dark"),
        ("✓ Pass", (), {}, 400, "light"),
        ("✓ Pass", (), {}, 400, "dark"),
        ("✗ Fail", (), FAILING, 1280, "light"),
        ("✗ Fail", (), FAILING, 400, "dark"),
        ("? Not run", MISSING, {}, 1280, "dark"),
        ("? Not run", MISSING, {}, 400, "light"),
    ],
)
def test_a_browser_shows_it_whole(
    browser: Any,
    make_report: Make,
    tmp_path: Path,
    banner: str,
    absent: tuple[str, ...],
    settings: dict[str, float],
    width: int,
    scheme: str,
) -> None:
    page = tmp_path / f"{banner[2:].lower().replace(' ', '-')}.html"
    page.write_text(make_report(*absent, **settings))
    look(browser, page, width, scheme)

    assert browser.find_element("css selector", ".banner .verdict").text == banner
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert requests_of(browser) == {page.as_uri()}
    assert browser.title == f"{banner[2:]}: cpu-int4 – slmops gate", "no script of a prompt has run"
    overflow = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0, "the page itself never scrolls sideways"
    charts_shown = browser.find_elements("css selector", "svg")
    assert len(charts_shown) == (4 if absent == MISSING else 5)
    for chart in charts_shown:
        assert chart.is_displayed()
        assert chart.size["width"] >= 300
        assert chart.size["height"] >= 100
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (scheme == "dark")


def test_on_paper_no_table_is_cut_off(browser: Any, make_report: Make, tmp_path: Path) -> None:
    page = tmp_path / "paper.html"
    page.write_text(make_report())
    look(browser, page, 720, "light", media="print")
    for region in browser.find_elements("css selector", ".scroll"):
        cut_off = browser.execute_script("return arguments[0].scrollWidth - arguments[0].clientWidth", region)
        assert cut_off <= 0, region.get_attribute("aria-label")
