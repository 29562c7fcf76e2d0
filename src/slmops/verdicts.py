"""The verdict of a gate as a file: what was judged, by digest, and what each device class gets. Strictly read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slmops import artifacts
from slmops.artifacts import Sha256, Sidecar
from slmops.config import explain
from slmops.errors import ArtifactError

VERDICT = "verdict.json"
"""Name of the file in the artifact's directory, and among the evidence of a release."""

Word = Literal["pass", "fail", "not_run"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Check(_Part):
    """One threshold; `value` is None where nothing could be compared."""

    name: str
    value: float | None
    threshold: float
    verdict: Word
    detail: str


class Pair(_Part):
    """One variant on one device class."""

    variant: str
    device_class: str
    """Empty for the machine of the gate's measurements, as it is."""
    digest: Sha256 | None
    """Of the variant's files; None if what was measured is not one model."""
    verdict: Word
    reason: str
    checks: tuple[Check, ...] = Field(strict=False)

    @model_validator(mode="after")
    def _follows_from_its_checks(self) -> Self:
        words = {check.verdict for check in self.checks}
        follows = "not_run" if "not_run" in words or not words else "fail" if "fail" in words else "pass"
        if self.verdict != follows:
            raise ValueError(f"{self.variant} on {self.device_class or 'this machine'} is {follows} by its checks")
        return self


class Choice(_Part):
    """What one device class gets: the smallest variant that passes on it, if one does."""

    device_class: str
    verdict: Word
    variant: str | None
    digest: Sha256 | None
    reason: str
    lost: dict[str, str]
    """Why each other variant was not chosen."""


class Verdict(_Part):
    """All of it."""

    schema_version: Literal[1] = 1
    verdict: Word
    reason: str
    variant: str
    """The variant to look at first."""
    candidate_digest: Sha256 | None
    """Its digest."""
    device_class: str
    choices: tuple[Choice, ...] = Field(strict=False)
    pairs: tuple[Pair, ...] = Field(strict=False)

    @model_validator(mode="after")
    def _follows_from_its_pairs(self) -> Self:
        passed = {(p.device_class, p.variant, p.digest) for p in self.pairs if p.verdict == "pass" and p.digest}
        chosen = [choice for choice in self.choices if choice.verdict == "pass"]
        for choice in chosen:
            if (choice.device_class, choice.variant, choice.digest) not in passed:
                raise ValueError(
                    f"{choice.variant} is chosen for {choice.device_class or 'this machine'} and did not pass"
                )
        if (self.verdict == "pass") != bool(chosen):
            raise ValueError(f"verdict is {self.verdict}, and {len(chosen)} device classes have a variant")
        return self


def read_verdict(path: Path) -> tuple[Verdict, Sidecar]:
    """The verdict artifact at `path`: its file, which matches its digest and the sidecar's own copy of the facts.

    Raises:
        ArtifactError: it is missing, half-written, or was edited after the gate wrote it.
    """
    sidecar = artifacts.expect(path, "verdict")
    artifacts.verify(path, VERDICT)
    file = path / VERDICT
    edited = f"{file} is not what the gate wrote; run gate again, and leave its verdict as it is"
    if sidecar.digest != artifacts.digest_of(sidecar.files) or not file.is_file():
        raise ArtifactError(edited)
    try:
        verdict = Verdict.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise ArtifactError(f"{edited} ({explain(error, VERDICT)})") from None
    if json.loads(verdict.model_dump_json()) != sidecar.facts:
        raise ArtifactError(f"{edited} (it and {artifacts.SIDECAR} differ)")
    return verdict, sidecar
