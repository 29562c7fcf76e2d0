"""A component's parameters are documented once: in the fields of its Config."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from slmops.config import Config

F = TypeVar("F", bound=Callable[..., None])


def documented(config: type[Config]) -> Callable[[F], F]:
    """Add the fields' descriptions to the `Args:` that end the function's docstring, where KFP reads them."""
    descriptions = {name: " ".join((field.description or "").split()) for name, field in config.model_fields.items()}
    lines = [f"        {name}: {description}" for name, description in descriptions.items()]

    def with_args(function: F) -> F:
        function.__doc__ = "\n".join([(function.__doc__ or "").rstrip(), *lines, ""])
        return function

    return with_args
