"""A model directory, local or behind s3://, judged by its small files and the headers of its weights."""

from __future__ import annotations

import hashlib
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from slmops import models
from slmops.artifacts import SIDECAR, Sidecar
from slmops.errors import ModelError, explain_os_errors
from slmops.preflight.findings import Findings
from slmops.preflight.licence import find_licence
from slmops.storage import Stat, Store, open_store

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
IDENTITY_FILES = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", CHAT_TEMPLATE)
"""What makes a model that model, apart from its weights."""

MAX_SMALL_FILE_BYTES = 256 * 1024 * 1024
"""The largest tokenizers have some 30 MB; a sidecar or an index of weights less."""
MAX_FILES = 10_000
READERS = 8


class Model(NamedTuple):
    """A model directory as a store, with what lies in it."""

    store: Store
    files: dict[str, Stat]

    def read_json(self, name: str) -> dict[str, Any]:
        """One of its JSON files.

        Raises:
            ModelError: it is absent or no JSON object.
        """
        if name not in self.files:
            raise ModelError(f"{self.store.uri} has no {name}; give a model directory in the Hugging Face layout")
        try:
            content = json.loads(self.store.read(name, MAX_SMALL_FILE_BYTES))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{self.store.uri}/{name} is not JSON ({error}); save the model again") from None
        if not isinstance(content, dict):
            raise ModelError(f"{self.store.uri}/{name} is no JSON object; save the model again")
        return content


def open_directory(uri: str) -> Model:
    """List a model directory.

    Raises:
        ModelError: there is none, or something much larger.
    """
    if "://" not in uri and not Path(uri).is_dir():
        raise ModelError(f"{uri} is no directory; give a model directory in the Hugging Face layout")
    store = open_store(uri)
    with explain_os_errors(uri):
        files = dict(itertools.islice(store.entries(""), MAX_FILES + 1))
    if not files:
        raise ModelError(f"{uri} has no files; check the URI")
    if len(files) > MAX_FILES:
        raise ModelError(f"{uri} has more than {MAX_FILES:,} files; give the directory of one model")
    return Model(store, files)


def check_base_model(uri: str, require_license: bool, allowed_licenses: list[str]) -> Findings:
    """Architecture, tokenizer, chat template, weights, sidecar and licence of the base model."""
    found = Findings()
    with found.about("base model"):
        model = open_directory(uri)
        config: dict[str, Any] = {}
        with found.about("base model"):
            config = model.read_json(CONFIG)
            found.facts |= _check_architecture(uri, config)
        with found.about("base model"):
            found.facts |= _check_tokenizer(model, config)
        with found.about("base model"):
            _check_chat_template(model)
        with found.about("base model"):
            found.facts |= _check_weights(model)
        with found.about("base model"):
            found.facts |= _check_sidecar(model)
        with found.about("base model"):
            found.facts["model_identity"] = _identity(model)
        with found.about("licence"):
            _check_licence(model, config, require_license, allowed_licenses, found)
    return found


def check_same_tokenizer(uri: str, base_uri: str) -> Findings:
    """The tokenizer at `uri` turns text into the same tokens as the base model's."""
    found = Findings()
    with found.about("tokenizer"):
        digests = [models.digest_of_tokenizer(open_directory(u).read_json(TOKENIZER)) for u in (base_uri, uri)]
        if digests[0] != digests[1]:
            raise ModelError(
                f"{uri} has another tokenizer than {base_uri} ({digests[1][:12]}, not {digests[0][:12]}), so logits of "
                "one mean nothing to the other; take two models of one family, or distill from texts"
            )
    return found


def _check_architecture(uri: str, config: dict[str, Any]) -> dict[str, Any]:
    """The installed transformers knows it as a causal language model, without code from the model's directory."""
    if "auto_map" in config:
        raise ModelError(
            f"{uri} brings code of its own (auto_map in {CONFIG}), which slmops does not run; take a model that "
            "transformers knows by itself"
        )
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str) or not isinstance(architectures, list) or not architectures:
        raise ModelError(f"{uri}/{CONFIG} names no model_type and architecture; save the model with save_pretrained")

    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = f"transformers {transformers.__version__}"
    if model_type not in CONFIG_MAPPING:
        raise ModelError(f"{uri} has model_type {model_type!r}, which {known} does not know; use a newer image")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"{uri} is {architectures[0]!r}, which {known} has as no causal language model; take one")
    try:
        CONFIG_MAPPING[model_type].from_dict(config)
    except Exception as error:  # each configuration class checks in its own way
        raise ModelError(
            f"{uri}/{CONFIG} does not fit {known}: {' '.join(str(error).split())[:300]}; save the model again"
        ) from None
    return {"model_type": model_type, "architecture": str(architectures[0])}


def _check_tokenizer(model: Model, config: dict[str, Any]) -> dict[str, Any]:
    content = model.read_json(TOKENIZER)

    import tokenizers

    digest = models.digest_of_tokenizer(content)
    try:
        num_tokens = tokenizers.Tokenizer.from_str(json.dumps(content)).get_vocab_size()
    except Exception as error:  # tokenizers raises Exception itself
        raise ModelError(
            f"{model.store.uri}/{TOKENIZER} cannot be loaded ({error}); save the tokenizer again"
        ) from None
    num_rows = config.get("vocab_size")
    if isinstance(num_rows, int) and num_tokens > num_rows:
        raise ModelError(
            f"{model.store.uri} has a tokenizer of {num_tokens:,} tokens and an embedding of {num_rows:,}; copy the "
            "tokenizer that belongs to the model"
        )
    return {"tokenizer_digest": digest, "num_tokens": num_tokens}


def _check_chat_template(model: Model) -> None:
    if CHAT_TEMPLATE in model.files:
        return
    if TOKENIZER_CONFIG not in model.files or not model.read_json(TOKENIZER_CONFIG).get("chat_template"):
        raise ModelError(f"{model.store.uri} has no chat template; add {CHAT_TEMPLATE} to the model directory")


def _check_weights(model: Model) -> dict[str, Any]:
    """Every safetensors file that the index names is there, and as long as its header says."""
    uri, names = model.store.uri, [models.WEIGHTS]
    if models.WEIGHTS_INDEX in model.files:
        weight_map = model.read_json(models.WEIGHTS_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{uri}/{models.WEIGHTS_INDEX} has no weight_map; save the model again")
        names = sorted(set(map(str, weight_map.values())))
    if missing := [name for name in names if name not in model.files]:
        others = sorted(name for name in model.files if name.endswith((".bin", ".pt", ".pth", ".gguf")))
        found = f"found {others[0]}" if others else f"{len(missing)} of {len(names)} files are missing"
        raise ModelError(f"{uri} has no {missing[0]} ({found}); convert the weights to safetensors, or copy them again")

    def num_weights(name: str) -> int:
        size_bytes = model.files[name].size_bytes
        return models.check_weights(
            f"{uri}/{name}", size_bytes, lambda start, length: model.store.read_range(name, start, length)
        )

    with ThreadPoolExecutor(READERS) as readers:
        num_parameters = sum(readers.map(num_weights, names))
    sizes = {name: model.files[name].size_bytes for name in names}
    return {"num_parameters": num_parameters, "weights_bytes": sum(sizes.values()), "weights": sizes}


def _check_sidecar(model: Model) -> dict[str, Any]:
    """A model that slmops wrote is complete."""
    if SIDECAR not in model.files:
        return {}
    uri = f"{model.store.uri}/{SIDECAR}"
    try:
        sidecar = Sidecar.model_validate_json(model.store.read(SIDECAR, MAX_SMALL_FILE_BYTES))
    except ValidationError as error:
        raise ModelError(f"{uri}: {error.errors()[0]['msg']}; run the step that wrote it again") from None
    if sidecar.kind != "hf_model":
        raise ModelError(f"{model.store.uri} holds {sidecar.kind}, but a base model is hf_model; check the URI")
    for entry in sidecar.files:
        found = model.files.get(entry.path)
        if found is None or found.size_bytes != entry.size_bytes:
            state = f"has {found.size_bytes:,} bytes" if found else "is missing"
            raise ModelError(
                f"{model.store.uri}/{entry.path} {state}, {SIDECAR} says {entry.size_bytes:,} bytes; copy it again"
            )
    return {"model_digest": sidecar.digest}


def _identity(model: Model) -> str:
    """SHA-256 over the names and contents of config, tokenizer and chat template."""
    rows = [
        [name, hashlib.sha256(model.store.read(name, MAX_SMALL_FILE_BYTES)).hexdigest()]
        for name in IDENTITY_FILES
        if name in model.files
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _check_licence(
    model: Model, config: dict[str, Any], require_license: bool, allowed_licenses: list[str], found: Findings
) -> None:
    licence = find_licence(model.store, model.files, config)
    if licence is None:
        found.facts["license"] = "unknown"
        text = (
            f"{model.store.uri} names no licence that is known (model card, LICENSE file, {CONFIG}); add `license:` to "
            "the front matter of its README.md"
        )
        if require_license or allowed_licenses:
            raise ModelError(text)
        found.warnings.append(f"licence: {text}")
        return
    found.facts |= {"license": licence.name, "license_source": licence.source}
    if allowed_licenses and licence.name.casefold() not in {allowed.casefold() for allowed in allowed_licenses}:
        raise ModelError(
            f"{model.store.uri} is under {licence.name} (by its {licence.source}), and allowed_licenses are "
            f"{', '.join(allowed_licenses)}; take another model, or have the licence allowed"
        )
