"""Finds pipelines and their recipes by name.

A pipeline is an entry point of the group `slmops.pipelines`: a function that takes a recipe and returns the KFP
pipeline. Its recipes are the functions of the module that defines its recipe's class which return that class.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from slmops.errors import ConfigError
from slmops.kubeflow.recipe import Recipe

GROUP = "slmops.pipelines"
DEFAULT_RECIPE = "default"


@dataclass(frozen=True)
class Pipeline:
    """A pipeline that can be compiled with any of its recipes."""

    name: str
    build: Callable[[Any], Any]
    """Takes a recipe, returns a `kfp.dsl.graph_component.GraphComponent`."""
    recipes: dict[str, Callable[[], Recipe]]

    def recipe(self, name: str) -> Recipe:
        """The recipe called `name`.

        Raises:
            ConfigError: there is none.
        """
        if name not in self.recipes:
            raise ConfigError(f"{self.name} has no recipe {name}; its recipes are: {', '.join(sorted(self.recipes))}")
        return self.recipes[name]()


def names() -> list[str]:
    """The names of all pipelines that are installed."""
    return sorted({point.name for point in metadata.entry_points(group=GROUP)})


def find(name: str) -> Pipeline:
    """The pipeline called `name`.

    Raises:
        ConfigError: there is none.
    """
    points = {point.name: point for point in metadata.entry_points(group=GROUP)}
    if name not in points:
        raise ConfigError(
            f"no pipeline is called {name}; the pipelines are: {', '.join(sorted(points)) or 'none'}. "
            "A path to a compiled pipeline must end in .yaml"
        )
    build = points[name].load()
    return Pipeline(name, build, _recipes(build))


def is_compiled(pipeline: str) -> bool:
    """Whether `pipeline` is the path of a compiled pipeline, and not a name."""
    return Path(pipeline).suffix in {".yaml", ".yml"}


def _recipes(build: Callable[[Any], Any]) -> dict[str, Callable[[], Recipe]]:
    recipe_class = typing.get_type_hints(build)["recipe"]
    module = sys.modules[recipe_class.__module__]
    return {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and not name.startswith("_")
        and typing.get_type_hints(function).get("return") is recipe_class
    }
