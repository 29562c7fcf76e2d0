"""Cutting a model's embedding and head to some of their rows, and its config to the new token ids."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from slmops.errors import ModelError
from slmops.shaping.architecture import make_model
from slmops.torch_models import quiet_libraries

LISTS_OF_TOKENS = ("suppress_tokens", "begin_suppress_tokens")
"""Settings of generation that are lists of token ids; those that are gone leave them."""

TOKEN_SEQUENCES = ("bad_words_ids", "force_words_ids", "sequence_bias")
"""Settings of generation that mean sequences of tokens, which lose their sense without one of them."""

TOLERANCE = 1e-4
"""How far logits may be from those of the larger model, as a share of the largest: sums in another order differ so."""


def vocab_size(model: PreTrainedModel) -> int:
    """Rows of the embedding; there may be more of them than the tokenizer has tokens."""
    return len(_embedding_and_head(model)[0].weight)


def num_rows(model: PreTrainedModel) -> int:
    """Rows of the embedding, which are those of the head, so that they can be cut alike.

    Raises:
        ModelError: the model has no head, or one of another size.
    """
    rows = [len(module.weight) if module is not None else 0 for module in _embedding_and_head(model)]
    if rows[0] != rows[1]:
        raise ModelError(
            f"{type(model).__name__} has an embedding of {rows[0]} rows and a head of {rows[1]}; they must be "
            "alike for its vocabulary to be cut, so set vocabulary=kept"
        )
    return rows[0]


def ids_in_config(model: PreTrainedModel) -> set[int]:
    """Token ids that config.json and generation_config.json name: end of turn, padding, and so on.

    Raises:
        ModelError: generation_config.json has sequences of tokens.
    """
    generation: Any = model.generation_config
    if given := [name for name in TOKEN_SEQUENCES if getattr(generation, name, None)]:
        raise ModelError(f"generation_config.json has {', '.join(given)}, which no other vocabulary can say; remove it")
    named = (value for part in (model.config, generation) if part for value in _token_ids(part).values())
    found = {number for value in named for number in (value if isinstance(value, list) else [value])}
    return found & set(range(num_rows(model)))


def keep_rows(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Drop all rows of the embedding and the head of `model` but `ids`, in place, with the biases of the head.

    Args:
        model: On any device, embedding and head tied or not.
        ids: Rows that stay, in rising order; their new ids are their places.

    Raises:
        ModelError: the architecture needs token ids elsewhere.
    """
    rows = torch.tensor(ids, device=model.device)
    embedding, head = _embedding_and_head(model)
    padding = embedding.padding_idx
    tensors = [embedding.weight, head.weight] + ([head.bias] if getattr(head, "bias", None) is not None else [])
    with torch.no_grad():
        # A tied weight is in the list twice, and must be moved once.
        for tensor in {tensor.data_ptr(): tensor for tensor in tensors}.values():
            tensor[: len(ids)] = tensor[rows]
    with quiet_libraries():
        model.resize_token_embeddings(len(ids))
    place = {number: at for at, number in enumerate(ids)}
    embedding.padding_idx = place.get(padding)
    for part in (model.config, model.generation_config):
        for name, value in _token_ids(part).items() if part else ():
            setattr(
                part, name, [place[n] for n in value if n in place] if isinstance(value, list) else place.get(value)
            )
    for name in LISTS_OF_TOKENS:
        if given := getattr(model.generation_config, name, None):
            setattr(model.generation_config, name, [place[number] for number in given if number in place])
    _check_description(model)


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: Sequence[int]) -> torch.Tensor:
    """[T, V] logits of one text of T tokens, in float32 on the CPU."""
    made = model(input_ids=torch.tensor([list(input_ids)], device=model.device), use_cache=False)
    logits: torch.Tensor = made.logits
    return logits[0].float().cpu()


def check_same_logits(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest distance between logits of the same text before and after, where nothing but rows went.

    Raises:
        ModelError: they are not the same, so the architecture uses token ids for more than embedding and head.
    """
    distance = float((before - after).abs().max())
    if not distance <= TOLERANCE * before.abs().max().item():
        raise ModelError(
            f"the model answers differently without the tokens that are unused (logits differ by {distance:.3g}), so "
            "its architecture needs token ids elsewhere; set vocabulary=kept"
        )
    return distance


def _embedding_and_head(model: PreTrainedModel) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _token_ids(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name.endswith("_token_id") and value is not None}


def _check_description(model: PreTrainedModel) -> None:
    """Compare the weights with those that the config asks for when the saved model is loaded again."""
    described = make_model(type(model), copy.deepcopy(model.config), seed=0, device="meta").state_dict()
    for name, weight in model.state_dict().items():
        if name not in described or described[name].shape != weight.shape:
            raise ModelError(
                f"the config of {type(model).__name__} cannot describe a model of another vocabulary: {name} would not "
                "come back as it is; set vocabulary=kept"
            )
