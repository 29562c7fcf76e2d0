"""The HTML page that shows what became of the rows."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from slmops.errors import explain_os_errors
from slmops.prepare_data.findings import Findings


def write_report(path: Path, findings: Findings) -> None:
    """Render the page to `path`, whole or not at all."""
    page = render(findings)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)


def render(findings: Findings) -> str:
    """The page, which needs nothing but itself."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = (files("slmops.prepare_data") / "report.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(findings=findings)
