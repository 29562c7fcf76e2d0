"""A student out of a larger model, by a plan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from transformers import PreTrainedModel

from slmops.errors import ConfigError
from slmops.progress import log
from slmops.shaping.fresh import fresh_student
from slmops.shaping.layers import block_influence, choose_layers, important_layers, keep_layers
from slmops.shaping.plan import StudentPlan, check_plan, sizes_of, sizes_of_student
from slmops.shaping.width import choose_width, kept_fractions, measure_width, narrow, weigh_width
from slmops.training.batches import Batch

Calibration = Callable[[], Iterable[Batch]]
"""Yields the batches to measure importance on, each time that it is called."""


def shape_student(
    model: PreTrainedModel, plan: StudentPlan, calibration: Calibration | None, seed: int
) -> tuple[PreTrainedModel, dict[str, object]]:
    """The student that `plan` describes, and facts about it for its sidecar.

    `model` is used up: its layers may be those of the student. The same model, plan, rows and seed give the same
    student. `calibration` is called only where something is measured; without it, width is chosen by norms of weights.

    Raises:
        ConfigError: the plan contradicts itself or the model, or there is nothing to measure layers on.
        ModelError: the model cannot be shaped so.
        DataError: the calibration has no rows.
    """
    known = model.config.to_dict() | {"architectures": [type(model).__name__]}
    check_plan(plan, known)
    facts: dict[str, object] = {}
    if plan.weights == "fresh":
        student = fresh_student(type(model), model.config, plan, seed)
    elif not plan.shape and not plan.keep_layers:
        student = model
    else:
        student, facts = _keep_weights(model, plan, calibration, sizes_of_student(plan, known))
    student.generation_config = copy.deepcopy(model.generation_config)
    torch.nn.Module.to(student, device=model.device, dtype=model.dtype)
    student.train(model.training)
    return student, {"student_weights": plan.weights, "sizes": sizes_of(student.config.to_dict()), **facts}


def _keep_weights(
    model: PreTrainedModel, plan: StudentPlan, calibration: Calibration | None, sizes: Mapping[str, int]
) -> tuple[PreTrainedModel, dict[str, object]]:
    source = sizes_of(model.config.to_dict())
    layers, facts = _choose_layers(model, plan, calibration, sizes["num_hidden_layers"])
    if all(sizes[name] == source[name] for name in sizes if name != "num_hidden_layers"):
        keep_layers(model, layers)
        return model, facts
    importance = measure_width(model, layers, calibration()) if calibration else weigh_width(model, layers)
    width = choose_width(importance, sizes)
    keep_layers(model, layers)
    fractions = kept_fractions(importance, width)
    log.info("of the importance of hidden dimensions, MLP channels and heads, %s stay", fractions)
    return narrow(model, width), facts | {
        "width_importance": "activations" if calibration else "weights",
        "kept_importance_fraction": fractions,
        "kept_key_value_heads": width.groups,
    }


def _choose_layers(
    model: PreTrainedModel, plan: StudentPlan, calibration: Calibration | None, count: int
) -> tuple[list[int], dict[str, object]]:
    num_layers = model.config.num_hidden_layers
    if plan.keep_layers or count == num_layers:
        layers = plan.keep_layers or list(range(num_layers))
        return layers, {"kept_layers": layers}
    facts: dict[str, object] = {"layer_rule": plan.layer_rule}
    if plan.layer_rule != "importance":
        layers = choose_layers(plan.layer_rule, count, num_layers)
    elif calibration is None:
        raise ConfigError("layer_rule=importance needs calibration rows to measure on; give some, or use spread")
    else:
        influence = block_influence(model, calibration())
        layers = important_layers(count, influence)
        facts["layer_importance"] = influence
    log.info("layers %s of %d are kept, by the rule %s", layers, num_layers, plan.layer_rule)
    return layers, {"kept_layers": layers} | facts
