"""`slmops new`: the files of a step that does nothing yet, but runs and passes all checks."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from slmops.errors import ConfigError, UserError
from slmops.kubeflow.components import ComponentFolder, camel_case, component_folders
from slmops.kubeflow.generate import checkout, components_page, write_component, write_reference

_NAME = re.compile(r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$")

CONFIG = '''"""Settings of {step}."""

from __future__ import annotations

from pydantic import Field

from slmops.config import Config


class {Step}Config(Config):
    """One line that says what {step} does."""

    max_rows: int = Field(default=1_000_000, ge=1)
    """Keep at most this many rows: the first ones."""
'''

RUN = '''"""{step}: one line that says what it does."""

from __future__ import annotations

from pathlib import Path

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.{step}.config import {Step}Config
from slmops.records import ROWS, read_records, write_jsonl


def run(config: {Step}Config, *, dataset: Path, result: Path) -> Sidecar:
    """Write the first rows of `dataset` to `result`.

    Raises:
        ArtifactError, DataError: `dataset` is no complete dataset.
    """
    source = artifacts.expect(dataset, "chat_dataset")
    records = read_records(dataset)[: config.max_rows]
    with artifacts.writing(result, kind="chat_dataset", step="{step}", config=config, parents=[source]) as draft:
        draft.facts["num_rows"] = write_jsonl(draft.path / ROWS, records)
    return artifacts.read(result)
'''

COMPONENT = '''"""KFP interface of {step}."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output
import slmops_images as images
from slmops_components.documented import documented

from slmops.{step}.config import {Step}Config


@dsl.component(base_image=images.BASE, install_kfp_package=False)
@documented({Step}Config)
def {step}(
    dataset: Input[Dataset],
    result: Output[Dataset],
    max_rows: int = 1_000_000,
) -> None:
    """One line that says what {step} does.

    Args:
        dataset: Chat records.
        result: The rows that were kept.
    """
    from pathlib import Path

    from slmops.{step} import config, run
    from slmops.step import step

    with step("{step}"):
        sidecar = run.run(
            config.{Step}Config.pick(locals()),
            dataset=Path(dataset.path),
            result=Path(result.path),
        )
        result.metadata.update(sidecar.metadata())
'''

METADATA = """place: CPU  # the kind of node that the step wants
stability: alpha
"""

TEST = '''"""{step}: what a user sees of it."""

from __future__ import annotations

from pathlib import Path

from slmops import artifacts
from slmops.{step}.config import {Step}Config
from slmops.{step}.run import run
from slmops.records import ROWS, read_records, write_jsonl


def test_keeps_the_first_rows(tmp_path: Path) -> None:
    turns = [{{"role": "user", "content": "Hi"}}, {{"role": "assistant", "content": "Hello"}}]
    with artifacts.writing(tmp_path / "dataset", kind="chat_dataset", step="test") as draft:
        write_jsonl(draft.path / ROWS, ({{"id": f"{{n:016x}}", "messages": turns}} for n in range(3)))

    sidecar = run({Step}Config(max_rows=2), dataset=tmp_path / "dataset", result=tmp_path / "result")

    assert [record.id for record in read_records(tmp_path / "result")] == [f"{{n:016x}}" for n in range(2)]
    assert sidecar.facts["num_rows"] == 2
'''


def scaffold(step: str, category: str) -> list[Path]:
    """Write a new step's files into this checkout, generated ones too; return their paths.

    Raises:
        ConfigError: a name that is no name of a step or category.
        UserError: not a checkout, or there is a step of that name already.
    """
    root = checkout()
    for what, name in (("STEP", step), ("--category", category)):
        if not _NAME.match(name):
            raise ConfigError(
                f"{what} must be lowercase words joined by _, such as prune or data_processing, got {name!r}"
            )
    library, component = root / "src" / "slmops" / step, root / "components" / category / step
    test = root / "tests" / "unit" / f"test_{step}.py"
    taken = [library, test, *(root / "components").glob(f"*/{step}")]
    if found := [str(path) for path in taken if path.exists()]:
        raise UserError(f"{', '.join(found)} exists already; choose another name, or remove it")
    files = {
        library / "__init__.py": "",
        library / "config.py": CONFIG,
        library / "run.py": RUN,
        component / "__init__.py": "",
        component / "component.py": COMPONENT,
        component / "metadata.yaml": METADATA,
        test: TEST,
    }
    if not (component.parent / "__init__.py").exists():
        files[component.parent / "__init__.py"] = ""
    for path, template in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template.format(step=step, Step=camel_case(step)))
    importlib.invalidate_caches()
    write_component(ComponentFolder(component, category, step))
    page = write_reference(root, "components.md", components_page(component_folders()))
    return [*files, component / "component.yaml", component / "README.md", page]
