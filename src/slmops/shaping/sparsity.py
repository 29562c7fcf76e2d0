"""Zeros among the weights of a model's layers, chosen and made up for by SparseGPT.

Frantar and Alistarh 2023, arXiv:2301.00774: weights go where the squared error of a matrix's output on calibration rows
grows least, and those that stay take over what was lost. D inputs and E outputs of a matrix, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from slmops.errors import DataError, ModelError
from slmops.progress import track
from slmops.shaping.layers import layers_of
from slmops.training.batches import Batch

Pattern = Literal["2:4", "unstructured"]

GROUP, ZEROS_OF_GROUP = 4, 2
"""Of `2:4`: what NVIDIA's sparse tensor cores take."""
BLOCK = 128
"""Columns whose zeros are chosen together, as in the paper."""
DAMPING = 0.01
"""Share of the mean diagonal that is added to the Hessian's, as in the paper."""


def sparsify(model: PreTrainedModel, batches: Iterable[Batch], pattern: Pattern, fraction: float) -> None:
    """Set a share of the weights of each linear map in the layers of `model` to zero, in place, layer after layer.

    Each layer sees what the layers before it, already sparse, make of the calibration rows.

    Args:
        model: In float32; its embedding and head stay dense.
        batches: The calibration rows.
        pattern: `2:4` has two zeros in each four neighbouring inputs; `unstructured` has them anywhere.
        fraction: The share of zeros for `unstructured`, 0 to 1.

    Raises:
        ModelError: the layers hold no linear maps, or such as 2:4 does not fit, or their inputs are not finite.
        DataError: there is no calibration row.
    """
    layers = layers_of(model)
    linears = [_linears(layer) for layer in layers]
    _check_linears(linears, pattern)
    calls = _record_calls(model, layers, batches)
    for number, layer in track(enumerate(layers), f"choosing zeros ({pattern})", len(layers), "layers"):
        for name, hessian in _measure(layer, linears[number], calls, number).items():
            linear = linears[number][name]
            sparse = prune_matrix(linear.weight.detach().float(), hessian, pattern, fraction)
            linear.weight.data = sparse.to(linear.weight.dtype)
        for call in calls:
            call.hidden = _output_of(layer, call, number)


def zero_fraction(model: PreTrainedModel) -> float:
    """Share of zeros among the weights of all matrices in the layers, 0 to 1."""
    matrices = [weight for weight in layers_of(model).parameters() if weight.dim() > 1]
    zeros = sum(int((weight == 0).sum()) for weight in matrices)
    return zeros / sum(weight.numel() for weight in matrices)


def prune_matrix(weight: torch.Tensor, hessian: torch.Tensor, pattern: Pattern, fraction: float) -> torch.Tensor:
    """Algorithm 1 of the paper.

    Args:
        weight: [E, D] in float32.
        hessian: [D, D] sum or mean of x xᵀ over the matrix's inputs x.
        pattern: Which weights may go together.
        fraction: Share of zeros for `unstructured`.

    Returns:
        [E, D] with zeros, the other weights changed so that the output changes least.

    Raises:
        ModelError: the inputs are not finite.
    """
    weight, inverse = weight.clone(), _inverse_factor(hessian)
    weight[:, hessian.diagonal() == 0] = 0
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        block, own = weight[:, start:end].clone(), inverse[start:end, start:end]
        scale = own.diagonal().square()
        drop = torch.zeros_like(block, dtype=torch.bool)
        if pattern == "unstructured":
            cheapest = (block.square() / scale).flatten().topk(round(block.numel() * fraction), largest=False).indices
            drop.view(-1)[cheapest] = True
        errors = torch.zeros_like(block)
        for column in range(end - start):
            if pattern == "2:4" and column % GROUP == 0:
                group = slice(column, column + GROUP)
                cost = block[:, group].square() / scale[group]
                drop[:, group].scatter_(1, cost.topk(ZEROS_OF_GROUP, dim=1, largest=False).indices, True)
            lost = torch.where(drop[:, column], block[:, column], 0.0)
            errors[:, column] = lost / own[column, column]
            block[:, column:] -= errors[:, column, None] * own[column, column:]
        # What a column was set to is only off zero by rounding.
        weight[:, start:end] = block.masked_fill(drop, 0.0)
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return weight


@dataclass
class _Call:
    """How the model calls its layers with one batch."""

    mask: torch.Tensor
    """[B, L] where there are tokens."""
    hidden: torch.Tensor
    """[B, L, H] what goes into the next layer."""
    others: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """For each layer, what it is given besides hidden states: positions, an attention mask."""


def _record_calls(model: PreTrainedModel, layers: torch.nn.ModuleList, batches: Iterable[Batch]) -> list[_Call]:
    """
    Raises:
        DataError: there is no batch.
    """
    seen: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append((hidden, args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    calls = []
    hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    model.eval()
    try:
        for batch in batches:
            seen.clear()
            with torch.no_grad():
                model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            padding = batch.attention_mask
            mask = torch.ones_like(batch.input_ids).bool() if padding is None else padding.bool()
            calls.append(_Call(mask, seen[0][0], [(args, kwargs) for _, args, kwargs in seen]))
    finally:
        for each in hooks:
            each.remove()
    if not calls:
        raise DataError("there are no calibration rows to choose zeros on; give at least one")
    return calls


def _measure(
    layer: torch.nn.Module, linears: dict[str, torch.nn.Linear], calls: list[_Call], number: int
) -> dict[str, torch.Tensor]:
    """[D, D] the sum of x xᵀ over the inputs x of each linear map that the rows reach."""
    hessians: dict[str, torch.Tensor] = {}
    mask = torch.empty(0)

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs = args[0][mask] if args[0].shape[:2] == mask.shape else args[0].flatten(0, -2)
            product = inputs.float().T @ inputs.float()
            hessians[name] = hessians[name] + product if name in hessians else product

        return hook

    hooks = [linear.register_forward_hook(hook_of(name)) for name, linear in linears.items()]
    try:
        for call in calls:
            mask = call.mask
            _output_of(layer, call, number)
    finally:
        for each in hooks:
            each.remove()
    return hessians


@torch.no_grad()
def _output_of(layer: torch.nn.Module, call: _Call, number: int) -> torch.Tensor:
    args, kwargs = call.others[number]
    made = layer(call.hidden, *args, **kwargs)
    hidden: torch.Tensor = made[0] if isinstance(made, tuple) else made
    return hidden


def _linears(layer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}


def _check_linears(linears: list[dict[str, torch.nn.Linear]], pattern: Pattern) -> None:
    if not all(linears):
        raise ModelError("the model's layers hold no linear maps to put zeros into; set sparsity=none")
    unfit = [name for layer in linears for name, linear in layer.items() if linear.in_features % GROUP]
    if pattern == "2:4" and unfit:
        raise ModelError(
            f"2:4 needs inputs in groups of {GROUP}, and {unfit[0]} has another number; set sparsity=unstructured"
        )


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """[D, D] the upper Cholesky factor of the damped Hessian's inverse.

    Raises:
        ModelError: it has none.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    except RuntimeError as error:  # torch.linalg.LinAlgError, which torch does not export to type checkers
        raise ModelError(
            "the inputs of a layer are not finite or too much alike for zeros to be chosen; give more calibration rows"
        ) from error
    return factor
