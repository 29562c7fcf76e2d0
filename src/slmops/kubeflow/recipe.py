"""A recipe: everything about a pipeline that is fixed when it is compiled, as one validated value."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel

from slmops.config import Config
from slmops.errors import ConfigError


class Recipe(Config):
    """Base of the recipes. A section has the name and the fields of a step's Config.

    A recipe is derived from another with `changed`, and `--set section.field=value` on the command line does the same.
    """

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """A copy with some fields of some sections changed: `changed({"distill": {"num_epochs": 3}})`.

        Raises:
            ConfigError: fields that do not exist, or values that do not fit, all of them together.
        """
        return self.create(_merged(self.model_dump(), changes))


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names that `--set` takes, each with its type."""
    for name, field in model.model_fields.items():
        optional = isinstance(field.annotation, types.UnionType)  # `Section | None`
        choices = typing.get_args(field.annotation) if optional else (field.annotation,)
        sections = [c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)]
        if sections:
            yield from fields(sections[0], f"{prefix}{name}.")
        else:
            yield prefix + name, field.annotation


def check_known(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise a ConfigError that names all of `names` that are not `known`, each with what was probably meant."""
    known = sorted(known)
    lines = []
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            section = f"{name.partition('.')[0]}." if "." in name else ""
            choices = [k for k in known if k.startswith(section)] or sorted({k.partition(".")[0] + ".*" for k in known})
            hint = f"did you mean {close[0]}? " if close else ""
            lines.append(f"{name}: no such {what}; {hint}There are: {', '.join(choices)}")
    if lines:
        raise ConfigError("\n".join(lines))


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, change in changes.items():
        section = merged.get(name)
        both = isinstance(section, Mapping) and isinstance(change, Mapping)
        merged[name] = _merged(section, change) if both else change  # type: ignore[arg-type]
    return merged
