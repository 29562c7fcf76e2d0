"""Each target rendered once, from a copy whose images are pinned by made-up digests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.manifests.rendering import Resource, pinned_copy, render

Rendered = Callable[[str], list[Resource]]


@pytest.fixture(scope="session")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a copy of the checkout's manifests, pinned."""
    return pinned_copy(tmp_path_factory.mktemp("pinned"))


@pytest.fixture(scope="session")
def rendered(pinned: Path) -> Rendered:
    """The objects of a target of that copy."""
    return cache(lambda target: render(pinned, target))
