"""Names of persons in text, by Presidio."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

from slmops.errors import ConfigError

LANGUAGE = "en"
MODELS = ("en_core_web_lg", "en_core_web_trf", "en_core_web_md", "en_core_web_sm")
"""spaCy's models for English, the best ones for names first."""
MIN_SCORE = 0.5
"""Presidio gives what spaCy finds 0.85, and less to what it doubts."""


_PLACEHOLDER = re.compile(r"\[[A-Z]{2,5}\]")


class NameFinder:
    """Presidio's recognizer of persons, with whichever of `MODELS` is installed.

    Raises:
        ConfigError: Presidio or a model for it is not installed.
    """

    def __init__(self) -> None:
        if find_spec("presidio_analyzer") is None:
            raise ConfigError(
                "names can only be found where Presidio is installed, and it is not; install presidio-analyzer and "
                f"{MODELS[0]}, or leave names out"
            )
        # Presidio would download a model that is missing, which a step must not do.
        model = next((model for model in MODELS if find_spec(model) is not None), None)
        if model is None:
            raise ConfigError(f"Presidio has no language model; install one of {', '.join(MODELS)}, or leave names out")
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import NlpEngineProvider

        provider = NlpEngineProvider(
            nlp_configuration={
                "nlp_engine_name": "spacy",
                "models": [{"lang_code": LANGUAGE, "model_name": model}],
            }
        )
        self._analyzer: Any = AnalyzerEngine(nlp_engine=provider.create_engine(), supported_languages=[LANGUAGE])

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where names stand, in order, without overlaps; nothing within a placeholder such as [EMAIL]."""
        if not text.strip():
            return []
        results = self._analyzer.analyze(text=text, language=LANGUAGE, entities=["PERSON"], score_threshold=MIN_SCORE)
        taken = [placeholder.span() for placeholder in _PLACEHOLDER.finditer(text)]
        spans: list[tuple[int, int]] = []
        for start, end in sorted((result.start, result.end) for result in results):
            if any(at < end and start < until for at, until in taken):
                continue
            if spans and start < spans[-1][1]:
                spans[-1] = (spans[-1][0], max(spans[-1][1], end))
            else:
                spans.append((start, end))
        return spans
