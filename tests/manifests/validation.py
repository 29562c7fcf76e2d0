"""Holds rendered objects against the schemas of their kinds, unknown fields refused at every depth.

Built-in kinds: the Kubernetes schemas that the package kubernetes-validate brings. Custom resources: the published
CRDs, which lie beside the checkout, or where SLMOPS_CRDS says. Kinds without a CRD there: `schemas/`, which are ours
and name only the fields that the manifests use. Rules in CEL (x-kubernetes-validations) are not evaluated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.manifests.rendering import CHECKOUT, Finding, Resource, load_yaml

KUBERNETES_VERSION = "1.36"
CRDS = Path(os.environ.get("SLMOPS_CRDS", CHECKOUT.parent / "shared" / "crds"))
OUR_SCHEMAS = Path(__file__).with_name("schemas")
BUILT_IN_GROUPS = {"", "apps", "batch", "networking.k8s.io", "rbac.authorization.k8s.io", "policy", "scheduling.k8s.io"}

_METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"},
        "namespace": {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"},
        "labels": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "required": ["name"],
}


def is_built_in(api_version: str) -> bool:
    return api_version.rpartition("/")[0] in BUILT_IN_GROUPS


def check(resource: Resource) -> list[Finding]:
    """Every way in which an object does not fit the schema of its kind."""
    problems = _problems(json.dumps(resource.content))
    return [Finding(resource, field, message) for field, message in problems]


@cache
def _problems(content: str) -> list[tuple[str, str]]:
    """(field, what is wrong), once per content: most objects are in several targets."""
    value = json.loads(content)
    return list(_built_in_problems(value) if is_built_in(value["apiVersion"]) else _custom_problems(value))


def _built_in_problems(value: dict[str, Any]) -> Iterator[tuple[str, str]]:
    try:
        kubernetes_validate.validate(value, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield from _explained(error)
    except kubernetes_validate.SchemaNotFoundError as error:
        yield "kind", error.message


def _custom_problems(value: dict[str, Any]) -> Iterator[tuple[str, str]]:
    api_version, kind = value["apiVersion"], value["kind"]
    validator = _validator(api_version, kind)
    if validator is None:
        yield "kind", f"there is no schema of {api_version} {kind}; correct it, or add one to tests/manifests/schemas"
        return
    for error in validator.iter_errors(value):
        yield from _explained(error)


@cache
def _validator(api_version: str, kind: str) -> jsonschema.Draft202012Validator | None:
    schema = published_schema(api_version, kind) or _our_schema(api_version, kind)
    return None if schema is None else jsonschema.Draft202012Validator(_closed_object(schema))


def published_schema(api_version: str, kind: str) -> dict[str, Any] | None:
    group, _, version = api_version.partition("/")
    for path in CRDS.glob(f"{group}_*.yaml"):
        text = path.read_text()
        if f"kind: {kind}\n" in text:  # some are long: parse only the one that is asked for
            definition = load_yaml(text)
            for entry in definition["spec"]["versions"]:
                if entry["name"] == version and definition["spec"]["names"]["kind"] == kind and entry["served"]:
                    found: dict[str, Any] = entry["schema"]["openAPIV3Schema"]
                    return found
    return None


def _our_schema(api_version: str, kind: str) -> dict[str, Any] | None:
    for path in OUR_SCHEMAS.glob("*.yaml"):
        for entry in yaml.safe_load_all(path.read_text()):
            if (entry["apiVersion"], entry["kind"]) == (api_version, kind):
                found: dict[str, Any] = entry["schema"]
                return found
    return None


def _closed_object(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a whole object: what Kubernetes itself defines of it, and the rest closed."""
    closed: dict[str, Any] = closed_schema(schema)
    closed["properties"] |= {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": closed_schema(_METADATA),
    }
    closed["required"] = sorted({*closed.get("required", ()), "apiVersion", "kind", "metadata"})
    return closed


def closed_schema(schema: Any) -> Any:
    """A structural schema of OpenAPI as JSON Schema that refuses every field which the API server would drop."""
    if isinstance(schema, list):
        return [closed_schema(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: value for key, value in schema.items() if key not in {"description", "default", "example"}}
    for key in ("properties", "items", "additionalProperties", "allOf", "anyOf", "oneOf", "not"):
        if key == "properties" and key in schema:
            closed[key] = {name: closed_schema(child) for name, child in schema[key].items()}
        elif key in schema:
            # Below the logical words there are conditions on fields that the schema itself declares.
            closed[key] = schema[key] if key in {"allOf", "anyOf", "oneOf", "not"} else closed_schema(schema[key])
    if schema.get("x-kubernetes-embedded-resource"):
        closed.setdefault("properties", {}).update(apiVersion={"type": "string"}, kind={"type": "string"}, metadata={})
    preserves = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if schema.get("type") == "object" and "additionalProperties" not in schema and not preserves:
        closed["additionalProperties"] = False
    if schema.get("nullable"):
        return {"anyOf": [closed, {"type": "null"}]}
    return closed


def _explained(error: jsonschema.ValidationError) -> Iterator[tuple[str, str]]:
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
    if error.validator == "additionalProperties":
        known: dict[str, Any] = error.schema.get("properties", {})  # type: ignore[union-attr]  # it has the keyword
        for name in sorted(set(error.instance) - known.keys()):  # type: ignore[arg-type]  # so the instance is an object
            yield f"{field}.{name}".lstrip("."), "unknown field"
    else:
        yield field.lstrip(".") or "(the object)", error.message[:300]
