"""A report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from slmops.errors import explain_os_errors
from slmops.pages import formatting

MACROS = "macros.html"


def render(package: str, **shown: Any) -> str:
    """`report.html` of a package with what is to be shown, under the common style and its own `report.css`.

    It may import macros from `macros.html`. Everything is escaped but what is marked as safe.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined

    shared, here = files("slmops.pages"), files(package)
    environment = Environment(
        loader=DictLoader({MACROS: (shared / MACROS).read_text(encoding="utf-8")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shorten"] = formatting.shorten
    environment.globals["NOTHING"] = formatting.NOTHING
    css = [(folder / name).read_text(encoding="utf-8") for folder, name in ((shared, "page.css"), (here, "report.css"))]
    template = environment.from_string((here / "report.html").read_text(encoding="utf-8"))
    return template.render(css=Markup("".join(css)), **shown)  # noqa: S704 - our own files


def write(path: Path, text: str) -> None:
    """Write a page to `path`, whole or not at all."""
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        # What is no UTF-8 may only be shown, so it is shown as what it is.
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))
        os.replace(partial, path)
