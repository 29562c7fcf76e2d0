"""The HTML page that shows what became of the rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmops.errors import explain_os_errors
from slmops.prepare_data.chats import Messages
from slmops.prepare_data.splitting import SPLITS, Chat, Split

MAX_STRATA = 30
MAX_BAD_ROWS = 30
NUM_SAMPLES = 5


def write_report(
    path: Path, parts: Mapping[Split, Sequence[Chat]], bad_rows: Sequence[Mapping[str, Any]], **facts: Any
) -> None:
    """Render `report.html` to `path`, whole or not at all. `facts` go into the page as they are."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    chats = [chat for split in SPLITS for chat in parts[split]]
    strata = _strata(parts)
    page = environment.get_template("report.html").render(
        strata=strata[:MAX_STRATA],
        num_more_strata=max(0, len(strata) - MAX_STRATA),
        lengths=[
            ("prompts", _histogram([_length(chat.messages[:-1]) for chat in chats])),
            ("completions", _histogram([_length(chat.messages[-1:]) for chat in chats])),
        ],
        samples=[chat.messages for chat in parts["train"][:NUM_SAMPLES]],
        bad_rows=[(bad["where"], bad["reason"]) for bad in bad_rows[:MAX_BAD_ROWS]],
        num_more_bad=max(0, len(bad_rows) - MAX_BAD_ROWS),
        **facts,
    )
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)


def _strata(parts: Mapping[Split, Sequence[Chat]]) -> list[tuple[str, int, int, int]]:
    """Rows of each stratum by split, the largest first; empty if there is only one."""
    counted = {split: Counter(chat.stratum for chat in parts[split]) for split in SPLITS}
    names = set().union(*counted.values())
    if len(names) < 2:
        return []
    rows = [(name, counted["train"][name], counted["validation"][name], counted["test"][name]) for name in names]
    return sorted(rows, key=lambda row: (-sum(row[1:]), row[0]))


def _length(messages: Messages) -> int:
    return sum(len(content) for _, content in messages)


def _histogram(lengths: Sequence[int]) -> list[tuple[str, int, float]]:
    """(range, count, percent) with ranges that double: lengths of texts spread over orders of magnitude."""
    counted = Counter(length.bit_length() for length in lengths)
    bits = range(min(counted), max(counted) + 1)
    return [(f"{2 ** (b - 1):,} to {2**b - 1:,}", counted[b], 100 * counted[b] / len(lengths)) for b in bits]
