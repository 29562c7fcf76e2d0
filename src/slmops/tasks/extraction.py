"""extraction: what a text says, as JSON of a given schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from pydantic import Field, field_validator
from referencing import Registry

from slmops.records import ChatRecord
from slmops.tasks.interface import Pairs, Rejected, Task, instructed, mean
from slmops.tasks.json_text import canonical, fields, find_json, strict_json
from slmops.teachers.interface import Prompt


class Extraction(Task):
    """The answer is one JSON value that satisfies a schema."""

    json_schema: dict[str, Any] = Field(default={"type": "object"})
    """JSON Schema (2020-12) of the answer; references only within it."""

    @field_validator("json_schema")
    @classmethod
    def _is_a_schema(cls, schema: dict[str, Any]) -> dict[str, Any]:
        check_schema(schema)
        return schema

    @cached_property
    def _validator(self) -> Draft202012Validator:
        return validator_of(self.json_schema)

    def ask(self, record: ChatRecord) -> Prompt:
        schema = json.dumps(self.json_schema, ensure_ascii=False)
        return instructed(record.prompt, f"Answer with JSON only, that satisfies this JSON Schema:\n{schema}")

    def read(self, text: str, record: ChatRecord) -> str:
        value = find_json(text)
        try:
            strict_json(text)
        except ValueError:
            return json.dumps(value, ensure_ascii=False)
        return text.strip()

    def check(self, completion: str, record: ChatRecord) -> str | None:
        return None if self._validator.is_valid(strict_json(completion)) else "schema"

    def correct(self, completion: str, reference: str) -> bool:
        try:
            return canonical(find_json(completion)) == canonical(find_json(reference))
        except Rejected:
            return False

    def metrics(self, pairs: Pairs) -> dict[str, float]:
        """Exact match of the values; F1 over all fields of all rows; share of answers that satisfy the schema."""
        right = said = wanted = valid = 0
        for answer, reference in pairs:
            answered, expected = _fields(answer), _fields(reference)
            right += (answered & expected).total()
            said += answered.total()
            wanted += expected.total()
            valid += self._satisfies(answer)
        return {
            "json_exact_match": mean([float(self.correct(answer, reference)) for answer, reference in pairs]),
            "field_f1": 2 * right / (said + wanted) if said + wanted else 0.0,
            "valid_fraction": valid / len(pairs),
        }

    def _satisfies(self, text: str) -> bool:
        try:
            return self._validator.is_valid(find_json(text))
        except Rejected:
            return False


def check_schema(schema: dict[str, Any]) -> None:
    """Raise ValueError unless `schema` is a JSON Schema that needs nothing but itself."""
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"no JSON Schema: {error.message} at {error.json_path}") from None
    if far := [reference for reference in _references(schema) if not str(reference).startswith("#")]:
        raise ValueError(
            f"a schema's references must begin with #, found {far[0]!r:.80}; put what it names below $defs"
        )


def validator_of(schema: dict[str, Any]) -> Draft202012Validator:
    """A validator that fetches nothing."""
    return Draft202012Validator(schema, registry=Registry())


def _references(schema: object) -> Iterator[object]:
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key in {"$ref", "$dynamicRef"}:
                yield value
            else:
                yield from _references(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _references(item)


def _fields(text: str) -> Any:
    try:
        return fields(find_json(text))
    except Rejected:
        return fields(None) - fields(None)
