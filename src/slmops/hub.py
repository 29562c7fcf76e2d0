"""Data sets of a Hugging Face hub: what a URI names, and which commit it is now."""

from __future__ import annotations

import re
from dataclasses import dataclass

from slmops.errors import StoreError, TransientError

SCHEME = "hf://"
_FORM = re.compile(r"hf://datasets/([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?(?:#([\w.-]+))?")


@dataclass(frozen=True, slots=True)
class HubDataset:
    """What a URI names."""

    name: str
    revision: str | None
    config: str | None
    """Which of the data sets in the repository, if it holds several."""


def parse(uri: str) -> HubDataset:
    """The parts of hf://datasets/owner/name, with @revision and #config behind it if wanted.

    Raises:
        StoreError: it is no such URI.
    """
    if not (found := _FORM.fullmatch(uri)):
        raise StoreError(
            f"a data set of a hub is hf://datasets/owner/name, with @revision and #config behind it if wanted, found "
            f"{uri!r:.100}; use that form"
        )
    return HubDataset(*found.groups())


def commit_of(uri: str) -> str:
    """The commit that the repository's revision is now, which pins its content.

    Raises:
        StoreError: there is no such repository or revision, or it may not be read.
        TransientError: the hub does not answer.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    dataset = parse(uri)
    try:
        commit = HfApi().dataset_info(dataset.name, revision=dataset.revision).sha
    except HFValidationError as error:
        raise StoreError(f"{uri}: {error}; correct the name") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status != 429 and status < 500:
            raise StoreError(
                f"{uri} does not exist or may not be read (the hub answered {status}); check the name, and put a token "
                "into $HF_TOKEN if it is private"
            ) from None
        raise TransientError(f"{uri}: the hub answered {status}; try again later") from None
    except (OSError, httpx2.HTTPError) as error:
        raise TransientError(f"{uri}: the hub does not answer ({type(error).__name__}); check the network") from None
    return str(commit)
