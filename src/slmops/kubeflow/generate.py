"""Writes everything that follows from the code: `python -m slmops.kubeflow.generate` in a checkout.

component.yaml and README.md of each component, the compiled pipelines, the reference below docs/, and the kustomize
components that follow from images/digests.yaml and manifests/edge/device-classes.yaml.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable
from pathlib import Path

from pydantic.fields import FieldInfo

import slmops
from slmops.errors import UserError
from slmops.kubeflow import compile as compiling
from slmops.kubeflow import manifests, registry
from slmops.kubeflow.components import ComponentFolder, component_folders

NOTE = "<!-- Written by `make compile`; change the code instead. -->"
SYMBOLS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "pattern": "matches"}
HELP_WIDTH = 100

_KUSTOMIZATION = """\
# Written by `make compile`. A version's name comes from its content, so a change is a new version beside the old ones;
# pruning leaves those alone, because runs refer to them.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: slmops
commonAnnotations:
  argocd.argoproj.io/sync-options: Prune=false
  kustomize.toolkit.fluxcd.io/prune: disabled
resources:
{}
"""


def main() -> None:
    """Write all generated files of this checkout."""
    root = checkout()
    manifests.write(root)  # first: recipes read the copy of the device classes that it makes
    for folder in component_folders():
        write_component(folder)
    write_reference(root, "components.md", components_page(component_folders()))
    write_reference(
        root, "pipelines.md", write_pipelines(root / "pipelines" / "compiled", root / "manifests" / "pipelines")
    )
    write_reference(root, "command.md", command_page())


def checkout() -> Path:
    """The root of the checkout that slmops is imported from.

    Raises:
        UserError: it is installed from a wheel.
    """
    root = Path(slmops.__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        raise UserError("this works only in a checkout of slmops; clone it and install it with `pip install -e .`")
    return root


def write_reference(root: Path, name: str, page: str) -> Path:
    """One page of docs/reference; returns its path."""
    path = root / "docs" / "reference" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    return path


def write_component(folder: ComponentFolder) -> None:
    """component.yaml and README.md."""
    from kfp.compiler import Compiler

    Compiler().compile(folder.load(), str(folder.path / "component.yaml"))
    (folder.path / "README.md").write_text(component_readme(folder))


def component_readme(folder: ComponentFolder) -> str:
    """What a person who wants to use the component in a pipeline of their own needs to know."""
    component, fields = folder.load(), folder.config().model_fields
    spec, docs = component.component_spec, _argument_docs(component)
    artifacts = {n: i for n, i in (spec.inputs or {}).items() if n not in fields}
    given = [name for name, artifact in artifacts.items() if not artifact.optional]
    needed = [f"{name}=..." for name in (*given, *(n for n, f in fields.items() if f.is_required()))]
    metadata = folder.metadata
    parts = [
        NOTE,
        f"# {folder.step}",
        spec.description,
        f"Category {folder.category}; image `{spec.implementation.container.image}`; runs on {metadata['place']}; "
        f"{metadata['stability']}. Settings are checked by `slmops.{folder.step}.config.{folder.config().__name__}`.",
        "## Inputs",
        _artifact_table(artifacts, docs),
        "## Outputs",
        _artifact_table(spec.outputs, docs),
        "## Parameters",
        _table(("name", "type", "default", "range", "meaning"), (_field_row(n, f) for n, f in fields.items())),
        "## Use",
        "```python\n"
        f"from slmops_components.{folder.category}.{folder.step}.component import {folder.step}\n\n"
        f"task = {folder.step}({', '.join(needed)})  # inside a @dsl.pipeline\n"
        "```",
        "Without slmops installed: `kfp.components.load_component_from_file` on the `component.yaml` beside this file.",
    ]
    return "\n\n".join(parts) + "\n"


def components_page(folders: Iterable[ComponentFolder]) -> str:
    """All components on one page."""
    rows = (
        (
            f"[{folder.step}](../../components/{folder.category}/{folder.step}/README.md)",
            folder.category,
            folder.load().description,
            folder.metadata["place"],
            folder.metadata["stability"],
        )
        for folder in folders
    )
    table = _table(("component", "category", "what it does", "place", "stability"), rows)
    return f"{NOTE}\n\n# Components\n\n{table}\n"


def write_pipelines(directory: Path, manifests: Path) -> str:
    """Compile every pipeline with its default recipe; return the page that describes them.

    `directory` takes what `slmops run` and `submit` read, `manifests` the same as Kubernetes resources for kustomize.
    """
    parts = [NOTE, "# Pipelines"]
    for name in registry.names():
        pipeline, target = registry.find(name), directory / f"{name}.yaml"
        recipe = pipeline.recipe(registry.DEFAULT_RECIPE)
        compiling.write(pipeline, recipe, target)
        compiled = compiling.Compiled(target)
        compiling.write_manifest(pipeline, recipe, compiled, manifests / f"{name}.yaml")
        parameters = (
            (f"`{n}`", _shown(p["defaultValue"]) if "defaultValue" in p else "required", p.get("description", ""))
            for n, p in compiled.parameters.items()
        )
        recipes = ((f"`{n}`", recipe.__doc__ or "") for n, recipe in sorted(pipeline.recipes.items()))
        parts += [
            f"## {name}",
            compiled.spec["pipelineInfo"].get("description", ""),
            _table(("run-time parameter", "default", "meaning"), parameters),
            _table(("recipe", "meaning"), recipes),
        ]
    (manifests / "kustomization.yaml").write_text(
        _KUSTOMIZATION.format("\n".join(f"  - {n}.yaml" for n in registry.names()))
    )
    return "\n\n".join(parts) + "\n"


def command_page() -> str:
    """The help of every command."""
    import typer.main

    from slmops.cli import app

    parts = [NOTE, "# The command"]
    waiting = [("slmops", typer.main.get_command(app))]
    while waiting:
        name, command = waiting.pop(0)
        context = command.context_class(command, info_name=name, terminal_width=HELP_WIDTH)
        parts += [f"## {name}", f"```\n{command.get_help(context)}\n```"]
        waiting += [(f"{name} {key}", sub) for key, sub in getattr(command, "commands", {}).items()]
    return "\n\n".join(parts) + "\n"


def _artifact_table(artifacts: typing.Mapping[str, typing.Any] | None, docs: dict[str, str]) -> str:
    if not artifacts:
        return "None."
    rows = ((f"`{n}`", a.type.removeprefix("system.").partition("@")[0], docs[n]) for n, a in artifacts.items())
    return _table(("name", "type", "meaning"), rows)


def _field_row(name: str, field: FieldInfo) -> tuple[str, ...]:
    default = "required" if field.is_required() else _shown(field.default)
    return f"`{name}`", _type(field.annotation), default, _range(field), field.description or ""


def _type(annotation: typing.Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(_shown(choice) for choice in inner)
    if origin is list:
        return f"list of {_type(inner[0])}"
    return str(annotation.__name__)


def _range(field: FieldInfo) -> str:
    limits = []
    for constraint in field.metadata:
        for attribute, symbol in SYMBOLS.items():
            value = getattr(constraint, attribute, None)
            if value is not None:
                limits.append(f"{symbol} {_shown(value) if isinstance(value, str) else format(value, ',')}")
    return ", ".join(limits)


def _shown(value: object) -> str:
    return f"`{value!r}`" if isinstance(value, str | list | dict | bool) else f"{value:,}"


def _argument_docs(component: typing.Any) -> dict[str, str]:
    import docstring_parser

    parsed = docstring_parser.parse(component.python_func.__doc__)
    return {p.arg_name: " ".join((p.description or "").split()) for p in parsed.params}


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head)]
    lines += [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
