"""Base of every step's Config: typed, frozen, and complete in its complaints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slmops.errors import ConfigError

TEACHER_API_KEY = "SLMOPS_TEACHER_API_KEY"
"""Environment variable: the key of the teacher's endpoint, if it wants one. It is never a setting: those are public."""
TEACHER_API_KEY_FILE = "SLMOPS_TEACHER_API_KEY_FILE"
"""Environment variable: a file with that key, such as a mounted secret. It comes before the key's own variable."""

StoreUri = Annotated[str, Field(min_length=1, pattern=r"^(s3://[^/]+(/.*)?|/.*|\.{1,2}/.*)$")]
"""Where releases lie: s3://bucket/prefix, or a local folder."""
Channel = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
"""Name of a channel, which a pool of edge nodes follows."""


class Config(BaseModel):
    """Settings of one step. Every field is a plain scalar or a list of them, as a KFP parameter can carry it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )

    PLACE: ClassVar[frozenset[str]] = frozenset()
    """Fields that say where the step runs and change nothing of its result."""

    @classmethod
    def create(cls, settings: Mapping[str, Any]) -> Self:
        """Validate `settings`.

        Raises:
            ConfigError: with one line per setting that is wrong, all of them together.
        """
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            raise ConfigError(explain(error, cls.__name__)) from None

    @classmethod
    def pick(cls, arguments: Mapping[str, Any]) -> Self:
        """Build the Config of a component from its `locals()`: fields by name, artifacts left aside."""
        return cls.create({name: arguments[name] for name in cls.model_fields if name in arguments})

    def parameters(self, *without: str) -> dict[str, Any]:
        """The fields as KFP parameters, except those that the pipeline wires itself."""
        return self.model_dump(mode="json", exclude=set(without))


def explain(error: ValidationError, subject: str) -> str:
    """One line per problem: `field: what is wrong, got what`."""
    lines = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"]) or "settings"
        message = problem["msg"].removeprefix("Value error, ")
        got = (
            ""
            if problem["type"] in {"missing", "extra_forbidden", "value_error"}
            else f", got {problem['input']!r:.80}"
        )
        lines.append(f"{where}: {message[0].lower()}{message[1:]}{got}")
    return f"{subject}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0])
