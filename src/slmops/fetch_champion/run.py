"""fetch_champion: the model that a channel's nodes run now, so that what is to follow it can be held against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slmops import artifacts
from slmops.artifacts import Draft, Sidecar
from slmops.champion import STEP, Status
from slmops.fetch_champion.config import CHAMPION, FetchChampionConfig
from slmops.progress import log
from slmops.release.build import variant_digest
from slmops.release.fetch import fetch_files
from slmops.release.format import Manifest, Release, read_verified, release_key
from slmops.release.machine import choose, this_machine
from slmops.release.metadata import read_channel
from slmops.storage import Store, open_store

ABOUT = "champion.json"


def run(config: FetchChampionConfig, *, champion: Path) -> Sidecar:
    """Fetch what a node like this machine takes of the channel's current release, verified as a node verifies it.

    A channel that nothing was published to, and a release of which this machine can run nothing, are results: the
    artifact then holds no model, and its facts say why.

    Raises:
        StoreError, StoreUnavailable: the store refuses, or does not answer.
        CorruptDownload, DataError: the release is not what the metadata names, or not what a release may be.
        DiskFullError: not enough space.
    """
    store = open_store(config.store_uri)
    current = read_channel(store, config.channel)
    with artifacts.writing(champion, kind="variants", step=STEP, config=config) as draft:
        if current is None:
            _say(draft, config, "no_release", reason="no release in this channel yet")
        else:
            release = read_verified(store, Release, release_key(current.release_digest), current.release_digest)
            _fetch(draft, config, store, release)
            # Nested, and in no file: the same model in a later release is the same to caches, and to the verdict.
            draft.facts["release"] = {"digest": current.release_digest, "sequence": current.sequence}
    return draft.sidecar


def _fetch(draft: Draft, config: FetchChampionConfig, store: Store, release: Release) -> None:
    chosen = choose(store, release, this_machine())
    if not isinstance(chosen, Manifest):
        reason = f"no variant of the release runs on the machine that evaluates: {'; '.join(chosen)}"
        _say(draft, config, "cannot_run", reason=reason)
        return
    fetch_files(store, chosen, draft.path / CHAMPION, {})
    _say(draft, config, "found", released_as=chosen.variant)
    draft.facts["variants"] = {
        CHAMPION: {
            "digest": variant_digest(chosen),
            "size_bytes": chosen.size_bytes,
            "execution_provider": chosen.requirements.execution_provider,
        }
    }


def _say(draft: Draft, config: FetchChampionConfig, status: Status, **more: str) -> None:
    """Facts and a file of what there is: what says otherwise has another digest."""
    about: dict[str, Any] = {"status": status, "channel": config.channel, **more}
    draft.facts |= about | {"variants": {}}
    artifacts.write_json(draft.path / ABOUT, about)
    log.info("champion of channel %s: %s", config.channel, more.get("reason") or more["released_as"])
