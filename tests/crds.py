"""The published schema of a custom resource, with unknown fields refused: what the API server would drop is an error.

The definitions lie beside the checkout, or where SLMOPS_CRDS says. Rules in CEL (x-kubernetes-validations) are not
checked.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

CRDS = Path(os.environ.get("SLMOPS_CRDS", Path(__file__).resolve().parents[2] / "shared" / "crds"))


def problems(value: dict[str, Any], definition: str) -> list[str]:
    """`path: what is wrong` for each way in which an object does not fit `CRDS/definition`."""
    version = value["apiVersion"].rpartition("/")[2]
    return [f"{error.json_path}: {error.message}" for error in _validator(definition, version).iter_errors(value)]


@cache
def _validator(definition: str, version: str) -> jsonschema.Draft202012Validator:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load((CRDS / definition).read_text(), Loader=loader)  # noqa: S506 - a safe loader
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in content["spec"]["versions"] if v["name"] == version)
    closed = _closed(schema)
    closed["properties"]["metadata"] = {"type": "object"}  # the API server's own
    return jsonschema.Draft202012Validator(closed)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    if "properties" in schema:
        closed["properties"] = {name: _closed(child) for name, child in schema["properties"].items()}
    for key in ("items", "additionalProperties"):
        if key in schema:
            closed[key] = _closed(schema[key])
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and not open_ended:
        closed["additionalProperties"] = False
    return closed
