"""What lm_eval found, as files and as flat facts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slmops.artifacts import write_json
from slmops.errors import explain_os_errors

RESULTS = "results.json"
SAMPLES = "samples"
"""Folder with one `<task>.jsonl` for each task."""


def write_results(directory: Path, results: dict[str, Any]) -> None:
    """Write lm_eval's results as they are, and each task's samples, which are part of them, into its own file."""
    from lm_eval.utils import handle_non_serializable

    samples = results["samples"]
    rest = {name: value for name, value in results.items() if name != "samples"}
    rest["lm_eval_version"] = version("lm_eval")
    write_json(directory / RESULTS, json.loads(json.dumps(rest, default=handle_non_serializable)))
    for task, rows in samples.items():
        path = directory / SAMPLES / f"{plain(task)}.jsonl"
        with explain_os_errors(path):
            path.parent.mkdir(exist_ok=True)
            with open(path, "w", encoding="utf-8") as lines:
                lines.writelines(
                    json.dumps(row, ensure_ascii=False, default=handle_non_serializable) + "\n" for row in rows
                )


def facts_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """`<task>_<metric>`, `<task>_<metric>_stderr` and `<task>_num_rows` of each task and group.

    A metric behind a filter other than lm_eval's `none` has the filter's name in its own: `<task>_<metric>_<filter>`.
    """
    facts: dict[str, Any] = {"num_tasks": len(results["samples"]), "lm_eval_version": version("lm_eval")}
    for task, figures in (results["results"] | results.get("groups", {})).items():
        for key, value in numbers(figures).items():
            metric, _, filtered = key.partition(",")
            name, error = metric.removesuffix("_stderr"), "_stderr" if metric.endswith("_stderr") else ""
            behind = "" if filtered == "none" else f"_{filtered}"
            facts[plain(f"{task}_{name}{behind}{error}")] = value
    for task, count in results["n-samples"].items():
        facts[plain(f"{task}_num_rows")] = count["effective"]
    return facts


def numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a task by lm_eval's keys, `<metric>,<filter>`; a standard error that it has not is left out."""
    return {
        key: float(value)
        for key, value in figures.items()
        if "," in key and isinstance(value, int | float) and not isinstance(value, bool)
    }


def plain(name: str) -> str:
    """`name` as a file and a metric can be called."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name)
