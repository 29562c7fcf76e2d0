"""The licence of a model directory: by its model card, its LICENSE file or its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from slmops.storage import Stat, Store

MODEL_CARD = "README.md"
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
MAX_FRONT_MATTER_BYTES = 65536
MAX_LICENSE_BYTES = 65536

_TEXTS = (
    ("Apache-2.0", ("apache license", "version 2.0")),
    ("MIT", ("permission is hereby granted, free of charge", 'the software is provided "as is"')),
    ("BSD-3-Clause", ("redistribution and use in source and binary forms", "neither the name")),
    ("BSD-2-Clause", ("redistribution and use in source and binary forms",)),
)
"""Words by which a licence's own text is known, by SPDX identifier; the first that fits counts."""


class Licence(NamedTuple):
    """A licence, and where it is stated."""

    name: str
    """An SPDX identifier where the model has one; a hub's own word, such as `llama3.2`, where it has not."""
    source: str


def find_licence(store: Store, files: Mapping[str, Stat], config: Mapping[str, Any]) -> Licence | None:
    """The first licence that is stated; None if there is none, or only one that is not known."""
    if MODEL_CARD in files and (name := _of_card(store.read_range(MODEL_CARD, 0, MAX_FRONT_MATTER_BYTES))):
        return Licence(name, "model card")
    for file in LICENSE_FILES:
        if file in files and (name := _of_text(store.read_range(file, 0, MAX_LICENSE_BYTES))):
            return Licence(name, f"file {file}")
    stated = config.get("license")
    return Licence(stated, "config.json") if isinstance(stated, str) and stated else None


def _of_card(content: bytes) -> str | None:
    """`license:` of the YAML between the two `---` lines that a model card begins with."""
    text = content.decode("utf-8", "replace").lstrip("\ufeff")
    if not text.startswith("---"):
        return None
    try:
        front = yaml.safe_load(text.removeprefix("---").partition("\n---")[0])
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that is none
        return None
    if not isinstance(front, dict):
        return None
    stated = front.get("license")
    if isinstance(stated, str) and stated.casefold() == "other":
        stated = front.get("license_name")
    return stated if isinstance(stated, str) and stated.casefold() not in {"", "unknown"} else None


def _of_text(content: bytes) -> str | None:
    text = " ".join(content.decode("utf-8", "replace").casefold().split())
    return next((name for name, words in _TEXTS if all(word in text for word in words)), None)
