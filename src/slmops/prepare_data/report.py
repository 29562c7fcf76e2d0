"""The HTML page that shows what became of the rows."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from slmops.errors import explain_os_errors
from slmops.pages import formatting, page
from slmops.pages.charts import HELD_OUT, INK, MUTED, TRAIN, svg
from slmops.prepare_data.findings import Class, Findings, Histogram, Lengths, SetAside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PII_NAMES = {
    "email": "e-mail addresses",
    "phone": "phone numbers",
    "card": "payment cards",
    "iban": "IBANs",
    "ip": "IP addresses",
    "name": "names of persons",
}
POLICIES = {
    "redact": "Each value was replaced by its kind, such as [EMAIL]; the row stays.",
    "drop": "Rows with personal data were set aside.",
    "off": "Personal data were not looked for; what this page shows of rows is redacted all the same.",
}
MAX_REASONS = 20


@dataclass(frozen=True)
class Card:
    """A figure that says how it went."""

    title: str
    figure: str
    words: str
    more: str = ""


def write_report(path: Path, findings: Findings) -> None:
    """Render the page to `path`, whole or not at all."""
    text = render(findings)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        # What is no UTF-8 may only be shown, so it is shown as what it is.
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))
        os.replace(partial, path)


def render(findings: Findings) -> str:
    """The page, which needs nothing but itself."""
    num_kept = sum(findings.splits.values())
    reasons = sorted(findings.set_aside_reasons.items(), key=lambda reason: (-reason[1], reason[0]))
    return page.render(
        "slmops.prepare_data",
        findings=findings,
        cards=_cards(findings, num_kept),
        num_kept=num_kept,
        size=formatting.size,
        share=_share,
        squeeze=_squeeze,
        seconds=formatting.seconds,
        pii_names=PII_NAMES,
        policies=POLICIES,
        reasons=reasons[:MAX_REASONS],
        num_more_reasons=max(0, len(reasons) - MAX_REASONS),
        stages_aside=_by_stage(findings.set_aside),
        largest_class=max((one.num_rows for one in findings.classes), default=0),
        lacking=[one for one in findings.classes if lacks(one)],
        lacks=lacks,
        lengths=[(lengths, _length_chart(lengths), _quantiles(lengths)) for lengths in findings.lengths],
        longest_s=max(findings.durations_s.values(), default=0.0) or 1.0,
        total_s=sum(findings.durations_s.values()),
    )


def lacks(one: Class) -> str:
    """Which splits a class is not in, in words; empty if it is in all that matter."""
    return " and ".join(split for split, count in (("train", one.num_train), ("test", one.num_test)) if not count)


def _share(part: int, whole: int) -> str:
    if not part or not whole:
        return formatting.NOTHING
    return formatting.share(part / whole) if part / whole >= 0.0005 else f"< {formatting.share(0.001)}"


def _squeeze(text: str) -> str:
    """Without empty lines, for a narrow column."""
    return re.sub(r"\s*\n\s*", "\n", text.strip())


def _cards(findings: Findings, num_kept: int) -> list[Card]:
    def out(*names: str) -> int:
        return sum(stage.num_out for stage in findings.funnel if stage.name.startswith(names))

    num_exact, num_near = out("exact"), out("near")
    num_values = sum(found.num_values for found in findings.pii)
    num_out = findings.num_read - num_kept
    return [
        Card(
            "Rows in the splits",
            f"{num_kept:,}",
            f"{formatting.share(num_kept / findings.num_read)} of {findings.num_read:,} read." if findings.num_read
            else "Nothing was read.",
            f"{num_out:,} set aside." if num_out else "None set aside.",
        ),
        Card(
            "Personal data",
            "not looked for" if findings.pii_policy == "off" else f"{num_values:,}",
            f"Values in {findings.num_pii_rows:,} rows." if num_values else "",
            {"redact": "Redacted.", "drop": "The rows were set aside.", "off": ""}[findings.pii_policy]
            if num_values else "",
        ),
        Card(
            "Duplicates left out",
            f"{num_exact + num_near:,}",
            f"{num_exact:,} exact, {num_near:,} near.",
            f"{findings.num_clusters:,} clusters of near duplicates." if findings.num_clusters else "",
        ),
        Card(
            "Leaks left out",
            f"{out('leaked'):,}",
            "Rows whose prompt, or words of it, a split that judges has too." if out("leaked") else "None was found.",
            f"{findings.num_contradictions:,} prompts have more than one completion."
            if findings.num_contradictions else "",
        ),
    ]  # fmt: skip


def _by_stage(rows: Sequence[SetAside]) -> list[tuple[str, list[SetAside]]]:
    """The rows by stage, stages in the order of their first row."""
    order = {stage: place for place, stage in enumerate(dict.fromkeys(row.stage for row in rows))}
    ordered = sorted(rows, key=lambda row: order[row.stage])
    return [(stage, list(some)) for stage, some in groupby(ordered, key=lambda row: row.stage)]


def _quantiles(lengths: Lengths) -> str:
    """Figures of a histogram in a line."""
    found = lengths.histogram
    if not found.num_values:
        return "none"
    half, most = found.quantiles[0.5], found.quantiles[0.99]
    return (
        f"median {half:,}, mean {found.mean:,.0f}, 99 % up to {most:,}, longest {found.largest:,}; "
        f"{formatting.many(found.total)} {lengths.unit} in all"
    )


def _length_chart(lengths: Lengths) -> Markup | None:
    """Bars, with a line at the median and at the limit; what is longer than nearly all is in one bar at the end."""
    found = lengths.histogram
    if not found.num_values:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        lefts, width, has_rest = _bars(found)
        colors = [TRAIN] * (len(lefts) - has_rest) + [HELD_OUT] * has_rest
        axes.bar(lefts, found.counts, width=width * 0.92, align="edge", color=colors)
        axes.set_xlim(lefts[0], lefts[-1] + width)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.locator_params(axis="x", nbins=6)
        top = max(found.counts)
        axes.set_ylim(0, top * 1.14)
        marks = [(found.quantiles[0.5], f"median {found.quantiles[0.5]:,}", INK)]
        if lengths.limit is not None and lefts[0] <= lengths.limit <= lefts[-1] + width:
            marks.append((lengths.limit, f"limit {lengths.limit:,}", INK))
        for at, words, color in marks:
            axes.axvline(at, color=color, linewidth=1, linestyle=(0, (4, 3)))
            right = at > lefts[0] + 0.6 * (lefts[-1] + width - lefts[0])
            axes.annotate(
                words, (at, top * 1.13), xytext=(-4 if right else 4, 0), textcoords="offset points",
                ha="right" if right else "left", va="top", color=MUTED,
            )  # fmt: skip
        if has_rest:
            axes.annotate(
                f"≥ {found.edges[-2]:,}", (lefts[-1] + width / 2, found.counts[-1]), xytext=(0, 3),
                textcoords="offset points", ha="right", va="bottom", color=MUTED, annotation_clip=False,
            )  # fmt: skip
        axes.set_xlabel(lengths.unit)
        axes.set_ylabel("rows")
        axes.grid(visible=False, axis="x")

    label = f"{lengths.what} in {lengths.unit}: {_quantiles(lengths)}"
    return svg(draw, 420, 220, label)


def _bars(found: Histogram) -> tuple[list[int], int, int]:
    """Left edges of the bars, their width, and 1 if the last one holds the rest."""
    widths = [right - left for left, right in zip(found.edges, found.edges[1:], strict=False)]
    return list(found.edges[:-1]), widths[0], int(widths[-1] != widths[0])
