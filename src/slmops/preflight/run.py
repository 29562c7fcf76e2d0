"""preflight: looks at everything that a pipeline is about to use, in seconds, and says all that is wrong at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from slmops.artifacts import Sidecar, write_json, writing
from slmops.errors import TransientError, UserError
from slmops.preflight.config import NO_ENDPOINT, PreflightConfig
from slmops.preflight.findings import Findings
from slmops.preflight.model import check_base_model, check_same_tokenizer
from slmops.preflight.place import check_disk, check_gpus, check_memory
from slmops.preflight.sources import check_data, check_endpoint, check_store
from slmops.progress import log
from slmops.resume import work_root

REPORT = "preflight.json"
"""Name of the file with what was found, in the report's directory."""


def run(config: PreflightConfig, *, report: Path) -> Sidecar:
    """Check data, base model, store, place and endpoint by metadata alone, and write what was found to `report`.

    The sidecar's fact `data_version` changes whenever the content behind `data_uri` does.

    Raises:
        UserError: something is wrong; one line for each thing that is.
        TransientError: nothing is wrong but that a store or an endpoint does not answer.
    """
    checks = _checks(config, work_root(report))
    with ThreadPoolExecutor(len(checks)) as pool:  # most of them wait for an answer
        results = list(pool.map(lambda check: check(), checks))
    found = Findings()
    for result in results:
        found.add(result)
    _refuse(found)
    for warning in found.warnings:
        log.warning("%s", warning)
    with writing(report, kind="report", step="preflight", config=config) as draft:
        write_json(draft.path / REPORT, found.facts | {"warnings": found.warnings})
        draft.facts |= found.facts
    return draft.sidecar


def _checks(config: PreflightConfig, work_dir: Path) -> list[Callable[[], Findings]]:
    checks: list[Callable[[], Findings]] = [
        partial(check_data, config.data_uri),
        partial(check_base_model, config.base_model_uri, config.require_license, config.allowed_licenses),
        *(partial(check_same_tokenizer, uri, config.base_model_uri) for uri in config.same_tokenizer_uris),
        partial(check_store, config.store_uri),
        partial(check_disk, work_dir, config.min_free_disk_gib),
        partial(check_memory, config.min_free_memory_gib),
        partial(check_gpus, config.min_gpus, config.min_gpu_memory_gib),
    ]
    if config.teacher_endpoint != NO_ENDPOINT:
        checks.append(partial(check_endpoint, config.teacher_endpoint))
    return checks


def _refuse(found: Findings) -> None:
    """Raise an error if anything is wrong; what is only down now counts if nothing else is wrong."""
    lines = [*found.problems, *found.unavailable]
    if not lines:
        return
    text = lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} things are wrong:", *lines])
    raise (UserError if found.problems else TransientError)(text)
