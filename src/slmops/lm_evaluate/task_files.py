"""Task files of one's own. A folder of them is data: without `allow_code` it runs nothing and reads nothing else.

lm_eval trusts its task files. They name Python functions (`!function`), metrics that are fetched and imported, data
files anywhere, and templates that Jinja runs outside its sandbox. So what a file says is checked before lm_eval sees
it, and templates run in the sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import yaml

from slmops.errors import ArtifactError, ConfigError, explain_os_errors

READERS = ("arrow", "csv", "json", "parquet", "text")
"""Formats of `datasets` that hold no code; of its others, `pandas` unpickles."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PATHS = ("data_files", "data_dir", "cache_dir")
"""Arguments of `datasets.load_dataset` that name files."""


FUNCTION = "!function"
"""The tag by which a task file names Python code."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, and FUNCTION as the text behind it."""


_Loader.add_constructor(FUNCTION, lambda loader, node: str(loader.construct_scalar(cast(yaml.ScalarNode, node))))


def check_task_files(folder: Path, *, allow_code: bool) -> None:
    """Check every task file below `folder`, and what they include.

    Raises:
        ArtifactError: there is no such folder.
        ConfigError: it holds no task file, a broken one, or one that may do what is not allowed.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is no folder; give a folder with task files (*.yaml) and their data")
    folder = folder.resolve()
    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise ConfigError(f"{folder} holds no .yaml file; put lm_eval's task files there, or leave the input out")
    if not allow_code and (
        outside := [path for path in folder.rglob("*") if not path.resolve().is_relative_to(folder)]
    ):
        raise ConfigError(f"{outside[0]} links out of the folder; put the file itself there, or set allow_code=true")
    for file in files:
        _check(file, folder, allow_code, ())


@contextmanager
def sandboxed_templates(allow_code: bool) -> Iterator[None]:
    """Let lm_eval fill its templates in Jinja's sandbox, unless code is allowed anyway."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    plain = utils.env
    sandbox = SandboxedEnvironment(undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline)
    sandbox.filters.update(plain.filters)
    utils.env = plain if allow_code else sandbox
    try:
        yield
    finally:
        utils.env = plain


def _check(file: Path, folder: Path, allow_code: bool, included_by: tuple[Path, ...]) -> None:
    task, functions = _read(file)
    if file in included_by:
        raise ConfigError(f"{file} includes itself by way of {included_by[-1].name}; remove one include")
    problems = (
        [] if allow_code else [f"names the function {name}" for name in functions] + list(_problems(task, folder))
    )
    if problems:
        raise ConfigError(
            f"{file}: {'; '.join(problems)}. That may run code or read other files: take it out, or set "
            "allow_code=true if you trust whoever wrote this folder"
        )
    includes = task.get("include", [])
    for name in includes if isinstance(includes, list) else [includes]:
        included = (file.parent / str(name)).resolve()
        if not included.is_file():
            raise ConfigError(
                f"{file} includes {name!r}, which is not there; correct the path, it counts from the file"
            )
        if not allow_code and not included.is_relative_to(folder):
            raise ConfigError(f"{file} includes {name!r}, outside of the folder; copy it there, or set allow_code=true")
        _check(included, folder, allow_code, (*included_by, file))


def _read(file: Path) -> tuple[dict[str, Any], list[str]]:
    """What a task file says, and the functions that it names anywhere: also in keys and in what is said twice."""
    with explain_os_errors(file):
        text = file.read_bytes()
    try:
        functions = [str(getattr(e, "value", e)) for e in yaml.parse(text, _Loader) if getattr(e, "tag", 0) == FUNCTION]
        task = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is no YAML that can be read: {_one_line(error)}; correct it") from None
    if not isinstance(task, dict):
        raise ConfigError(f"{file} holds {type(task).__name__}, not a mapping; write `task: name` and its settings")
    return task, functions


def _problems(task: dict[str, Any], folder: Path) -> Iterator[str]:
    """What of a task file may run code or read outside of its folder, functions aside."""
    for value in _all(task):
        if not isinstance(value, dict):
            continue
        if "dataset_path" in value and not _is_data(value["dataset_path"], folder):
            known = ", ".join(READERS)
            yield f"dataset_path is {value['dataset_path']!r}, not {known} or owner/name of a hub"
        for name in PATHS:
            for path in _all(value.get(name)):
                if isinstance(path, str) and not _is_inside(path, folder):
                    yield f"{name} names {path!r}, which is not in the folder"
        if "metric" in value and not _is_known_metric(value):
            yield f"metric {value['metric']!r} is none of lm_eval's own"
        if "use_prompt" in value:
            yield "use_prompt reads another file"
        if value is not task and "metadata" in value:
            yield "metadata of another task is changed"


def _all(value: Any) -> Iterator[Any]:
    """`value`, and everything in it."""
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inner:
        yield from _all(part)


def _is_data(name: Any, folder: Path) -> bool:
    if not isinstance(name, str):
        return False
    return name in READERS or (HUB_NAME.fullmatch(name) is not None and not (folder / name).exists())


def _is_inside(path: str, folder: Path) -> bool:
    return "::" not in path and "://" not in path and (folder / path).resolve().is_relative_to(folder)


def _is_known_metric(metric: dict[str, Any]) -> bool:
    import lm_eval.api.metrics  # noqa: F401 - fills the registry
    from lm_eval.api.registry import metric_registry

    name = metric["metric"]
    return isinstance(name, str) and name in metric_registry and not metric.get("hf_evaluate")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
