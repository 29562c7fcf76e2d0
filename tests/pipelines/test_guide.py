"""The guide's pages: code compiles as it stands there, and commands have the options that are shown."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from slmops.cli import app
from slmops.kubeflow.generate import checkout

GUIDE = checkout() / "docs" / "guide"
PAGES = sorted([*GUIDE.glob("*.md"), checkout() / "README.md"])
WITHOUT_SLMOPS = "import sys; sys.modules.update(dict.fromkeys(('slmops', 'slmops_components', 'slmops_images')))\n"


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in some languages; the language of a block without one is empty."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in languages]


def compiled(code: str, folder: Path, name: str) -> dict[str, Any]:
    """The pipeline that `code` writes to `<name>.yaml`, when it is run in `folder`."""
    (folder / "ours.py").write_text(code)
    ran = subprocess.run([sys.executable, "ours.py"], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    spec: dict[str, Any] = yaml.safe_load((folder / f"{name}.yaml").read_text())
    return spec


def test_a_component_is_reused_by_import(tmp_path: Path) -> None:
    code, _ = blocks(GUIDE / "reuse-a-component.md", "python")
    spec = compiled(code, tmp_path, "shrink-our-model")
    assert spec["root"]["dag"]["tasks"].keys() == {"importer", "prepare-data", "quantize", "evaluate", "evaluate-2"}
    images = {e["container"]["image"] for e in spec["deploymentSpec"]["executors"].values() if "container" in e}
    assert all("slmops/" in image for image in images)


def test_a_component_is_reused_without_slmops(tmp_path: Path) -> None:
    _, code = blocks(GUIDE / "reuse-a-component.md", "python")
    shutil.copy(checkout() / "components/data_processing/prepare_data/component.yaml", tmp_path)
    spec = compiled(WITHOUT_SLMOPS + code, tmp_path, "count-our-rows")
    assert spec["root"]["dag"]["tasks"].keys() == {"prepare-data", "count-rows"}
    executor = spec["deploymentSpec"]["executors"]["exec-prepare-data"]["container"]
    assert "slmops/base" in executor["image"]
    assert "pip install" not in " ".join(executor["command"]), "nothing is installed when it runs"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_commands_have_the_options_that_are_shown(page: Path) -> None:
    text = "\n".join(blocks(page, "", "sh")).replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("slmops "):
            command: Any = typer.main.get_command(app)
            rest = shlex.split(line, comments=True)[1:]
            while hasattr(command, "commands"):
                command, rest = command.commands[rest[0]], rest[1:]
            command.make_parser(command.context_class(command)).parse_args(rest)
