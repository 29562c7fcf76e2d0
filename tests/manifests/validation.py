"""Holds rendered objects against the schemas of their kinds, unknown fields refused at every depth.

Built-in kinds: the Kubernetes schemas that the package kubernetes-validate brings. Custom resources: the published CRDs,
which lie beside the checkout, or where SLMOPS_CRDS says. Kinds without a CRD there: `schemas/`, which are ours and name
only the fields that the manifests use. Rules in CEL (x-kubernetes-validations) are not evaluated.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.manifests.rendering import CHECKOUT, Finding, Resource

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


def is_built_in(resource: Resource) -> bool:
    return resource.content["apiVersion"].rpartition("/")[0] in BUILT_IN_GROUPS


def check_built_in(resource: Resource) -> Iterator[Finding]:
    """The first way in which an object of Kubernetes' own does not fit its schema."""
    try:
        kubernetes_validate.validate(resource.content, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield from _findings(resource, [error])
    except kubernetes_validate.SchemaNotFoundError as error:
        yield Finding(resource, "kind", error.message)


def check_custom(resource: Resource) -> Iterator[Finding]:
    """All ways in which a custom resource does not fit its schema."""
    api_version = resource.content["apiVersion"]
    validator = _validator(api_version, resource.kind)
    if validator is None:
        known = f"{CRDS} and {OUR_SCHEMAS.relative_to(CHECKOUT)}"
        yield Finding(resource, "kind", f"there is no schema of {api_version} {resource.kind} in {known}; add one")
        return
    yield from _findings(resource, validator.iter_errors(resource.content))


@cache
def _validator(api_version: str, kind: str) -> jsonschema.Draft202012Validator | None:
    schema = _published_schema(api_version, kind) or _our_schema(api_version, kind)
    return None if schema is None else jsonschema.Draft202012Validator(_closed_object(schema))


def _published_schema(api_version: str, kind: str) -> dict[str, Any] | None:
    group, _, version = api_version.partition("/")
    for path in CRDS.glob(f"{group}_*.yaml"):
        text = path.read_text()
        if f"kind: {kind}\n" in text:  # some are long: parse only the one that is asked for
            definition = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
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
    closed = _closed(schema)
    closed["properties"] |= {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": _closed(_METADATA),
    }
    closed["required"] = sorted({*closed.get("required", ()), "apiVersion", "kind", "metadata"})
    return closed


def _closed(schema: Any) -> Any:
    """A structural schema of OpenAPI as JSON Schema that refuses every field which the API server would drop."""
    if isinstance(schema, list):
        return [_closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: value for key, value in schema.items() if key not in {"description", "default", "example"}}
    for key in ("properties", "items", "additionalProperties", "allOf", "anyOf", "oneOf", "not"):
        if key == "properties" and key in schema:
            closed[key] = {name: _closed(child) for name, child in schema[key].items()}
        elif key in schema:
            # Below the logical words there are conditions on fields that the schema itself declares.
            closed[key] = schema[key] if key in {"allOf", "anyOf", "oneOf", "not"} else _closed(schema[key])
    if schema.get("x-kubernetes-embedded-resource"):
        closed.setdefault("properties", {}).update(apiVersion={"type": "string"}, kind={"type": "string"}, metadata={})
    preserves = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if schema.get("type") == "object" and "additionalProperties" not in schema and not preserves:
        closed["additionalProperties"] = False
    if schema.get("nullable"):
        return {"anyOf": [closed, {"type": "null"}]}
    return closed


def _findings(resource: Resource, errors: Iterable[jsonschema.ValidationError]) -> Iterator[Finding]:
    for error in errors:
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        if error.validator == "additionalProperties":
            for name in sorted(set(error.instance) - set(error.schema.get("properties", ()))):
                yield Finding(resource, f"{field}.{name}".lstrip("."), "unknown field")
        else:
            yield Finding(resource, field.lstrip(".") or "(the object)", error.message[:300])
