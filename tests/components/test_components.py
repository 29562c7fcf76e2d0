"""Every component: thin, equal to its Config, and described by files that are up to date."""

from __future__ import annotations

import ast
import inspect
import typing
import warnings
from pathlib import Path

import pytest
from kfp.compiler import Compiler
from kfp.components import load_component_from_file
from kfp.dsl import OutputPath, TaskConfig

from slmops.config import Config
from slmops.kubeflow.components import ComponentFolder, component_folders
from slmops.kubeflow.generate import component_readme

FOLDERS = component_folders()
MAX_STATEMENTS = 8
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.TryStar, ast.Match, ast.comprehension, ast.BoolOp)

every_component = pytest.mark.parametrize("folder", FOLDERS, ids=[folder.step for folder in FOLDERS])


def test_all_steps_are_found() -> None:
    steps = {folder.step for folder in FOLDERS}
    assert {"prepare_data", "finetune", "generate_responses", "distill", "quantize"} <= steps
    assert {"evaluate", "benchmark", "fetch_champion", "gate", "publish"} <= steps


@every_component
def test_parameters_are_the_fields_of_the_config(folder: ComponentFolder) -> None:
    signature = inspect.signature(folder.load().python_func).parameters.values()
    scalars = [p for p in signature if not _is_wired(p.annotation)]
    fields = folder.config().model_fields

    assert [p.name for p in scalars] == list(fields), "same names, same order"
    for parameter in scalars:
        field = fields[parameter.name]
        assert parameter.annotation == _plain(field.annotation), parameter.name
        default = inspect.Parameter.empty if field.is_required() else field.default
        assert parameter.default == default, parameter.name
        assert type(parameter.default) is type(default), parameter.name


@every_component
def test_what_is_wired_comes_before_parameters(folder: ComponentFolder) -> None:
    parameters = inspect.signature(folder.load().python_func).parameters.values()
    # Python wants what may be left out behind what may not.
    for optional in (False, True):
        kinds = [_is_wired(p.annotation) for p in parameters if (p.default is not inspect.Parameter.empty) is optional]
        assert kinds == sorted(kinds, reverse=True)


@every_component
def test_holds_no_logic(folder: ComponentFolder) -> None:
    module = ast.parse((folder.path / "component.py").read_text())
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    assert [function.name for function in functions] == [folder.step]
    statements = [n for statement in functions[0].body[1:] for n in ast.walk(statement) if isinstance(n, ast.stmt)]
    assert len(statements) <= MAX_STATEMENTS, [ast.unparse(statement) for statement in statements]
    found = [ast.unparse(n) for n in ast.walk(functions[0]) if isinstance(n, BRANCHES)]
    assert not found, "a component does not branch: put it into the library"


@every_component
def test_needs_no_package_at_run_time_and_names_no_image_itself(folder: ComponentFolder) -> None:
    source = (folder.path / "component.py").read_text()
    assert "install_kfp_package=False" in source
    assert "packages_to_install" not in source
    assert "base_image=images." in source


@every_component
def test_every_argument_is_documented(folder: ComponentFolder) -> None:
    readme = component_readme(folder)
    for name in inspect.signature(folder.load().python_func).parameters:
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}` |"))
        assert len(row.split("|")[-2].strip()) > 10, row


@every_component
def test_component_yaml_is_up_to_date_and_loads(folder: ComponentFolder, tmp_path: Path) -> None:
    fresh = tmp_path / "component.yaml"
    Compiler().compile(folder.load(), str(fresh))
    stored = folder.path / "component.yaml"
    assert stored.read_text() == fresh.read_text(), "run `make compile`"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_component_from_file(str(stored))
    assert loaded.component_spec.inputs.keys() == folder.load().component_spec.inputs.keys()


@every_component
def test_readme_is_up_to_date(folder: ComponentFolder) -> None:
    assert (folder.path / "README.md").read_text() == component_readme(folder), "run `make compile`"


@every_component
def test_metadata_says_where_it_runs(folder: ComponentFolder) -> None:
    assert folder.metadata.keys() == {"place", "stability"}
    assert folder.metadata["place"] in {"CPU", "GPU"}
    assert folder.metadata["stability"] in {"alpha", "beta", "stable"}


def _is_wired(annotation: object) -> bool:
    """Whether the pipeline or KFP fills in an argument: an artifact, an output parameter, the settings of the pod."""
    return (
        typing.get_origin(annotation) is typing.Annotated
        or isinstance(annotation, OutputPath)
        or annotation is TaskConfig
    )


def _plain(annotation: typing.Any) -> typing.Any:
    """The type that KFP can carry: a Literal is the type of its choices, settings within settings are a dict."""
    if typing.get_origin(annotation) is typing.Literal:
        (kind,) = {type(choice) for choice in typing.get_args(annotation)}
        return kind
    if typing.get_origin(annotation) is list:
        return list[_plain(typing.get_args(annotation)[0])]  # type: ignore[misc]
    if typing.get_origin(annotation) is dict or (isinstance(annotation, type) and issubclass(annotation, Config)):
        return dict
    return annotation
