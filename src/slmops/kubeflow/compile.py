"""From a pipeline's name, a recipe and settings to a compiled pipeline and its arguments, all checked."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slmops.config import Config
from slmops.errors import ConfigError, explain_os_errors
from slmops.kubeflow import registry
from slmops.kubeflow.components import config_of
from slmops.kubeflow.recipe import Recipe, check_known, fields

INTO_LOOP = "pipelinechannel--"
"""KFP puts this before the name of a parameter that goes into a loop."""
SOURCE = "source_uri"
"""The setting of a step that names the rows which it reads."""


@dataclass(frozen=True)
class Task:
    """One task of a compiled pipeline."""

    display_name: str
    component: str
    """Its name as KFP's local runner uses it for directories and in its log."""
    cached: bool
    settings: dict[str, Any]
    """Its constant parameters."""
    wired: dict[str, str]
    """Its parameters that come from run-time parameters of the pipeline, by their names."""
    rounds: tuple[str, ...] = ()
    """What each round of the loop that it stands in is about; empty outside of loops."""


class Compiled:
    """A compiled pipeline, as far as it is looked into here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with explain_os_errors(path):
            text = path.read_text()
        try:
            self.spec: dict[str, Any] = next(yaml.safe_load_all(text))
            self.name: str = self.spec["pipelineInfo"]["name"]
            root = self.spec["root"]
            dags = [(root["dag"], ()), *self._loops()]
        except (yaml.YAMLError, KeyError, TypeError, StopIteration):
            raise ConfigError(f"{path} is no compiled pipeline; write one with `slmops compile`") from None
        self.parameters: dict[str, dict[str, Any]] = root.get("inputDefinitions", {}).get("parameters", {})
        self.tasks = {name: _task(name, task, rounds) for dag, rounds in dags for name, task in dag["tasks"].items()}

    def _loops(self) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
        """The graphs inside of the root's, each with what its rounds are about."""
        items = {
            task["componentRef"]["name"]: json.loads(task["parameterIterator"]["items"].get("raw", "[]"))
            for task in self.spec["root"]["dag"]["tasks"].values()
            if "parameterIterator" in task
        }
        for name, component in self.spec["components"].items():
            if "dag" in component:
                yield component["dag"], tuple(_round(item) for item in items.get(name, ()))

    @property
    def version(self) -> str:
        """Name of this content as a version of its pipeline: the same bytes, the same name."""
        return f"{self.name}-{hashlib.sha256(self.path.read_bytes()).hexdigest()[:12]}"

    def outputs_of_type(self, schema_title: str) -> set[tuple[str, str]]:
        """(component, output) of all artifacts of a KFP type such as `system.HTML`."""
        return {
            (key.removeprefix("comp-"), name)
            for key, component in self.spec["components"].items()
            for name, artifact in component.get("outputDefinitions", {}).get("artifacts", {}).items()
            if artifact["artifactType"].get("schemaTitle") == schema_title
        }

    def images(self) -> set[str]:
        """The images that its steps run in."""
        executors = self.spec["deploymentSpec"]["executors"].values()
        return {executor["container"]["image"] for executor in executors if "container" in executor}

    def cached_inputs(self) -> set[str]:
        """Run-time parameters that a cached task reads."""
        return {parameter for task in self.tasks.values() if task.cached for parameter in task.wired.values()}

    def sources_of_recipe(self) -> dict[str, str]:
        """Rows that are named in the recipe, and not by a parameter: `{"prepare-data-2.source_uri": "rows.csv"}`."""
        return {
            f"{task.component}.{name}": str(value)
            for task in self.tasks.values()
            for name, value in task.settings.items()
            if name == SOURCE
        }

    def step_of(self, task: Task) -> str | None:
        """The function that a task executes; None for an importer."""
        label = self.spec["components"][f"comp-{task.component}"].get("executorLabel")
        executor = self.spec["deploymentSpec"]["executors"].get(label, {})
        arguments = executor.get("container", {}).get("args", [])
        following = dict(itertools.pairwise(arguments))
        return following.get("--function_to_execute")

    def arguments(self, settings: Mapping[str, str]) -> dict[str, Any]:
        """`settings` with the types that the pipeline declares.

        Raises:
            ConfigError: some are unknown, some that are required are missing, or some are of another type.
        """
        check_known(settings, self.parameters, "run-time parameter")
        missing = [n for n, p in self.parameters.items() if n not in settings and not p.get("isOptional")]
        if missing:
            lines = (f"--set {n}=...   {self.parameters[n].get('description', '')}".rstrip() for n in sorted(missing))
            raise ConfigError(f"{self.name} needs more parameters; add\n  " + "\n  ".join(lines))
        return {n: _typed(n, value, self.parameters[n]["parameterType"]) for n, value in settings.items()}

    def check_settings(self, arguments: Mapping[str, Any]) -> None:
        """Validate each step's Config now, so that a long run does not end with a misspelt address.

        Raises:
            ConfigError: some settings do not fit, all of them together.
        """
        defaults = {n: p["defaultValue"] for n, p in self.parameters.items() if "defaultValue" in p}
        values = {**defaults, **arguments}
        problems = set()
        for task in self.tasks.values():
            config = _config_of(self.step_of(task))
            if config and values.keys() >= set(task.wired.values()):
                wired = {name: values[parameter] for name, parameter in task.wired.items()}
                try:
                    config.pick({**task.settings, **wired})
                except ConfigError as error:
                    problems.add(str(error))
        if problems:
            raise ConfigError("\n".join(sorted(problems)))


def without_cache(compiled: Compiled, target: Path) -> Compiled:
    """The same pipeline with the cache switched off for every task, written to `target`."""
    documents = list(yaml.safe_load_all(compiled.path.read_text()))
    spec = documents[0]
    for dag in [spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c)]:
        for task in dag["tasks"].values():
            task["cachingOptions"] = {}
    target.write_text(yaml.safe_dump_all(documents))
    return Compiled(target)


def prepare(
    pipeline: str, recipe: str | None, settings: Sequence[str], target: Path
) -> tuple[Compiled, dict[str, str]]:
    """Compile `pipeline` (a name, or the path of a compiled one) to `target`.

    Settings are `key=value`: with a dot in the key they change the recipe, without they are run-time parameters,
    which are returned as they came.

    Raises:
        ConfigError: a name or setting that does not exist or fit.
    """
    parameters, changes = split_settings(settings)
    if registry.is_compiled(pipeline):
        if recipe or changes:
            raise ConfigError(
                f"{pipeline} is compiled: its recipe is fixed. Give the pipeline's name to use a recipe or to set "
                + (", ".join(changes) or "one")
            )
        return Compiled(Path(pipeline)), parameters
    found = registry.find(pipeline)
    chosen = with_changes(found.recipe(recipe or registry.DEFAULT_RECIPE), changes)
    write(found, chosen, target)
    return Compiled(target), parameters


def write(pipeline: registry.Pipeline, recipe: Recipe, target: Path) -> None:
    """Compile `pipeline` with `recipe` into the file `target`."""
    from kfp.compiler import Compiler

    with explain_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        Compiler().compile(pipeline.build(recipe), str(target))


def write_manifest(pipeline: registry.Pipeline, recipe: Recipe, compiled: Compiled, target: Path) -> None:
    """Write `pipeline` as resources of kind Pipeline and PipelineVersion into the file `target`."""
    from kfp.compiler import Compiler
    from kfp.compiler.compiler_utils import KubernetesManifestOptions

    options = KubernetesManifestOptions(
        pipeline_name=compiled.name, pipeline_version_name=compiled.version, include_pipeline_manifest=True
    )
    with explain_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        Compiler().compile(
            pipeline.build(recipe),
            str(target),
            kubernetes_manifest_format=True,
            kubernetes_manifest_options=options,
        )


def split_settings(settings: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(run-time parameters, changes of the recipe) of `key=value` texts."""
    pairs = [setting.partition("=") for setting in settings]
    if wrong := [key for key, equals, _ in pairs if not (key and equals)]:
        raise ConfigError(f"--set takes key=value, got {', '.join(map(repr, wrong))}")
    values = {key: value for key, _, value in pairs}
    return (
        {key: value for key, value in values.items() if "." not in key},
        {key: value for key, value in values.items() if "." in key},
    )


def with_changes(recipe: Recipe, changes: Mapping[str, str]) -> Recipe:
    """`recipe` with changes such as `{"distill.num_epochs": "3"}`; lists and objects are JSON."""
    kinds = dict(fields(type(recipe)))
    check_known(changes, kinds, "field of the recipe")
    nested: dict[str, Any] = {}
    for key, text in changes.items():
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        is_json = (
            text.startswith(("[", "{")) and kinds[key] is not str
        )  # a template is a text that begins like an object
        place[name] = _json(key, text) if is_json else text
    return recipe.changed(nested)


def _round(item: object) -> str:
    """What an item of a loop is about: itself, or the values of its fields that are not empty."""
    return "-".join(str(value) for value in item.values() if value != "") if isinstance(item, dict) else str(item)


def _task(name: str, task: Mapping[str, Any], rounds: tuple[str, ...] = ()) -> Task:
    inputs = task.get("inputs", {}).get("parameters", {})
    return Task(
        display_name=task.get("taskInfo", {}).get("name", name),
        component=task["componentRef"]["name"].removeprefix("comp-"),
        cached=bool(task.get("cachingOptions", {}).get("enableCache")),
        settings={
            n: i["runtimeValue"]["constant"] for n, i in inputs.items() if "constant" in i.get("runtimeValue", {})
        },
        wired={
            n: i["componentInputParameter"].removeprefix(INTO_LOOP)
            for n, i in inputs.items()
            if "componentInputParameter" in i and "-loop-item" not in i["componentInputParameter"]
        },
        rounds=rounds,
    )


def _config_of(step: str | None) -> type[Config] | None:
    """The Config of a step of ours; None for any other component."""
    return config_of(step) if step and importlib.util.find_spec(f"slmops.{step}") else None


def _typed(name: str, text: str, kind: str) -> Any:
    try:
        match kind:
            case "NUMBER_INTEGER":
                return int(text)
            case "NUMBER_DOUBLE":
                return float(text)
            case "BOOLEAN":
                return {"true": True, "false": False}[text.lower()]
    except (ValueError, KeyError):
        raise ConfigError(f"{name}: must be of type {kind.lower()}, got {text!r}") from None
    return _json(name, text) if kind in {"LIST", "STRUCT"} else text


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name}: not JSON ({error}), got {text!r}") from None
