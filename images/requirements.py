"""Prints what an extra of pyproject.toml installs, one requirement a line: `python3 requirements.py train`.

An image installs exactly this. Only the standard library: it runs before anything is installed.
"""

import re
import sys
import tomllib
from pathlib import Path

_OWN = re.compile(r"^slmops\[(?P<extras>[\w,-]+)\]$")


def requirements(pyproject: Path, extra: str) -> list[str]:
    """The project's own requirements and those of `extra`, with `slmops[...]` replaced by what it stands for."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    if extra not in extras:
        raise SystemExit(f"error: {pyproject} has no extra {extra!r}; it has {', '.join(sorted(extras))}")

    def expanded(requirement: str) -> list[str]:
        own = _OWN.match(requirement)
        names = own["extras"].split(",") if own else []
        return [found for name in names for line in extras[name] for found in expanded(line)] or [requirement]

    lines = [*project["dependencies"], *extras[extra]]
    return sorted({found for line in lines for found in expanded(line)})


if __name__ == "__main__":
    print("\n".join(requirements(Path("pyproject.toml"), sys.argv[1])))
