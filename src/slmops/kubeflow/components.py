"""Finds the components: the folders `<category>/<step>` with a component.py."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slmops.config import Config

PACKAGE = "slmops_components"


@dataclass(frozen=True)
class ComponentFolder:
    """One component's folder; its name is the step's name, and so is the function's."""

    path: Path
    category: str
    step: str

    @property
    def metadata(self) -> dict[str, str]:
        """`metadata.yaml`: where the step wants to run, and how settled its interface is."""
        loaded: dict[str, str] = yaml.safe_load((self.path / "metadata.yaml").read_text())
        return loaded

    def load(self) -> Any:
        """The KFP component (a `kfp.dsl.base_component.BaseComponent`)."""
        return getattr(importlib.import_module(f"{PACKAGE}.{self.category}.{self.step}.component"), self.step)

    def config(self) -> type[Config]:
        """The Config of the component's step."""
        return config_of(self.step)


def config_of(step: str) -> type[Config]:
    """The Config of a step by the step's name: `prepare_data` has `PrepareDataConfig`."""
    module = importlib.import_module(f"slmops.{step}.config")
    config: type[Config] = getattr(module, camel_case(step) + "Config")
    return config


def camel_case(step: str) -> str:
    """`prepare_data` is `PrepareData`."""
    return step.title().replace("_", "")


def component_folders() -> list[ComponentFolder]:
    """All components, by category and name."""
    package = importlib.import_module(PACKAGE)
    root = Path(str(package.__file__)).parent
    files = sorted(root.glob("*/*/component.py"))
    return [ComponentFolder(f.parent, f.parent.parent.name, f.parent.name) for f in files]
