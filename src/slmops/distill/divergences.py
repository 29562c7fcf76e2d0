"""Finds divergences by name.

A divergence is an entry point of the group `slmops.divergences`: a function of the form of
`slmops.training.losses.Divergence`, which may take settings by name. A package that is installed beside slmops adds its
own in its pyproject.toml.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from slmops.errors import ConfigError
from slmops.training.losses import Divergence

GROUP = "slmops.divergences"


def find(name: str, settings: Mapping[str, Any]) -> Divergence:
    """The divergence called `name`, with its settings, tried on two small distributions.

    Raises:
        ConfigError: there is none, it does not take these settings, or it gives no finite number with a gradient.
    """
    points = {(point.name, point.value): point for point in metadata.entry_points(group=GROUP) if point.name == name}
    if len(points) != 1:
        known = ", ".join(sorted({point.name for point in metadata.entry_points(group=GROUP)}))
        problem = "no divergence is" if not points else f"several divergences ({', '.join(v for _, v in points)}) are"
        raise ConfigError(
            f"{problem} called {name!r:.80}; there are: {known}. One of your own is an entry point of the group "
            f"{GROUP}; install the package that brings it"
        )
    (point,) = points.values()
    try:
        function = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"divergence {name} cannot be loaded from {point.value}: {error}; install it again") from None
    try:
        inspect.signature(function).bind(None, None, **settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"divergence {name} does not take divergence_settings {dict(settings)}: {error}") from None
    divergence: Divergence = functools.partial(function, **settings) if settings else function
    _try(name, divergence)
    return divergence


def _try(name: str, divergence: Divergence) -> None:
    """
    Raises:
        ConfigError: the divergence is none.
    """
    student = torch.log_softmax(torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]]), -1).requires_grad_()
    teacher = torch.log_softmax(torch.tensor([[1.0, 0.0, -1.0], [0.0, 3.0, 0.0]]), -1)
    try:
        value = divergence(student, teacher)
        (gradient,) = torch.autograd.grad(value.sum(), student)
    except Exception as error:  # what a function of someone else's may raise
        raise ConfigError(f"divergence {name} fails on two small distributions: {error}") from error
    if value.ndim or not torch.isfinite(value) or not torch.isfinite(gradient).all():
        raise ConfigError(f"divergence {name} must give one finite number with a finite gradient, got {value!r:.80}")
