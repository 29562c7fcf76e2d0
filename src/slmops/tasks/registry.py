"""Finds tasks by name.

A task is an entry point of the group `slmops.tasks`: a class derived from `slmops.tasks.interface.Task`. A package that
is installed beside slmops adds its own by naming them in its pyproject.toml.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from slmops.errors import ConfigError
from slmops.records import ChatRecord
from slmops.tasks.interface import Task

GROUP = "slmops.tasks"


def names() -> list[str]:
    """The names of all tasks that are installed."""
    return sorted({point.name for point in metadata.entry_points(group=GROUP)})


def find(name: str) -> type[Task]:
    """The task called `name`.

    Raises:
        ConfigError: there is none, or it is no task, or two packages bring it.
    """
    points = {(point.name, point.value): point for point in metadata.entry_points(group=GROUP) if point.name == name}
    if not points:
        raise ConfigError(
            f"no task is called {name!r:.80}; the tasks are: {', '.join(names()) or 'none'}. A task of your own is an "
            f"entry point of the group {GROUP}; install the package that brings it"
        )
    if len(points) > 1:
        where = ", ".join(sorted(value for _, value in points))
        raise ConfigError(f"several tasks are called {name}: {where}; rename all but one")
    (point,) = points.values()
    try:
        task = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"task {name} cannot be loaded from {point.value}: {error}; install it again") from None
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise ConfigError(f"task {name} ({point.value}) is no class derived from slmops.tasks.interface.Task")
    return task


class Tasks:
    """The tasks of a run, each with its settings; a task that the settings do not name has its defaults."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Take settings by task's name, such as `{"classification": {"labels": ["yes", "no"]}}`.

        Raises:
            ConfigError: a task is unknown, or one of its settings is wrong.
        """
        self._tasks: dict[str, Task] = {}
        for name, fields in settings.items():
            if not isinstance(fields, Mapping):
                raise ConfigError(f"task_settings of {name} must be an object of its settings, got {fields!r:.80}")
            self._tasks[name] = find(name).create(fields)

    def of(self, record: ChatRecord) -> Task:
        """The task of `record`.

        Raises:
            ConfigError: it is unknown.
        """
        return self.named(record.task)

    def named(self, name: str) -> Task:
        """The task called `name`.

        Raises:
            ConfigError: it is unknown.
        """
        if name not in self._tasks:
            self._tasks[name] = find(name)()
        return self._tasks[name]
