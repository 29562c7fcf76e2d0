"""The published schema of a custom resource, for objects as an API server gets them: the metadata is its own matter."""

from __future__ import annotations

from functools import cache
from typing import Any

import jsonschema

from tests.manifests.validation import CRDS, closed_schema, published_schema

__all__ = ["CRDS", "problems"]


def problems(value: dict[str, Any]) -> list[str]:
    """`path: what is wrong` for each way in which an object does not fit its kind, unknown fields refused."""
    validator = _validator(value["apiVersion"], value["kind"])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


@cache
def _validator(api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    schema = published_schema(api_version, kind)
    assert schema, f"there is no definition of {api_version} {kind} in {CRDS}"
    closed = closed_schema(schema)
    closed["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(closed)
