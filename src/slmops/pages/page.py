"""A report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from markupsafe import Markup

from slmops.pages import formatting


def render(package: str, **shown: Any) -> str:
    """`report.html` of a package with what is to be shown, under the common style and its own `report.css`.

    Everything is escaped but what is marked as safe.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shorten"] = formatting.shorten
    here = files(package)
    css = [(folder / name).read_text(encoding="utf-8") for folder, name in
           ((files("slmops.pages"), "page.css"), (here, "report.css"))]  # fmt: skip
    template = environment.from_string((here / "report.html").read_text(encoding="utf-8"))
    return template.render(css=Markup("".join(css)), NOTHING=formatting.NOTHING, **shown)  # noqa: S704 - our own files
