"""lm_evaluate: how a model does tasks of lm-evaluation-harness (https://doi.org/10.5281/zenodo.10256836)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.errors import ConfigError, DataError
from slmops.lm_evaluate.config import LmEvaluateConfig
from slmops.lm_evaluate.quiet import Count, quiet
from slmops.lm_evaluate.results import facts_of, numbers, write_results
from slmops.lm_evaluate.task_files import sandboxed_templates
from slmops.progress import heartbeat, log
from slmops.variants import ModelFiles, find_model

if TYPE_CHECKING:
    from lm_eval.api.model import LM

STEP = "lm_evaluate"

BOOTSTRAP_ITERS = 1000
"""Resamples for the standard error of a metric that has no formula: lm_eval's 100,000 take hours for some of them."""


def run(
    config: LmEvaluateConfig, *, model: Path | None = None, task_files: Path | None = None, lm_evaluation: Path
) -> Sidecar:
    """Do the tasks with `model`, or with the endpoint of `config`; keep lm_eval's results and every sample.

    Args:
        model: A Hugging Face directory, or an artifact with quantized variants; None with an endpoint.
        task_files: A folder with task files of one's own and their data, if there is one.

    Raises:
        ArtifactError: an input is missing or half-written.
        ConfigError: neither or both of model and endpoint; a task is unknown, broken, or not for this target.
        DataError: a task's data is not there, or does not fit its template.
        ModelError: the model cannot be loaded.
        UserError: the endpoint refuses the key, the model or a request.
        TransientError: the endpoint does not answer.
    """
    files = _model_files(config, model)
    parents = [files.sidecar] if files else []
    with artifacts.writing(lm_evaluation, kind="lm_evaluation", step=STEP, config=config, parents=parents) as draft:
        with quiet(), sandboxed_templates(config.allow_code):
            results, runtime = _evaluate(config, files, task_files)
        write_results(draft.path, results)
        draft.facts |= facts_of(results) | _target_facts(config, files) | {"runtime": runtime}
        if task_files is not None:
            draft.facts["task_files_digest"] = artifacts.digest_of(list(artifacts.list_files(task_files)))
    for name, figures in results["results"].items():
        log.info("%s: %s", name, ", ".join(f"{k.removesuffix(',none')} {v:.4g}" for k, v in numbers(figures).items()))
    return draft.sidecar


def _model_files(config: LmEvaluateConfig, model: Path | None) -> ModelFiles | None:
    """What is evaluated; None for an endpoint."""
    if config.target == "endpoint" and model is not None:
        raise ConfigError("target=endpoint, and a model is given too; leave the model out, or set target=model")
    if config.target == "endpoint":
        return None
    if model is None:
        raise ConfigError("target=model, but no model is given; give the step a model, or set target=endpoint")
    return find_model(model, config.variant)


def _evaluate(
    config: LmEvaluateConfig, files: ModelFiles | None, task_files: Path | None
) -> tuple[dict[str, Any], str]:
    """lm_eval's results, and what ran the model."""
    from jinja2 import TemplateError
    from lm_eval.evaluator import evaluate

    from slmops.lm_evaluate.tasks import load_tasks

    tasks, count = load_tasks(config, task_files), Count()
    lm: Any = _open(config, files, tasks["tasks"], count)
    log.info("%d tasks with %s", len(tasks["tasks"]), lm.name)
    _seed(config.seed)
    chat = config.apply_chat_template or (files is None and config.endpoint_api == "chat")
    try:
        with heartbeat(STEP, count.note):
            results = evaluate(
                lm=lm,
                task_dict=tasks,
                limit=config.max_rows,
                bootstrap_iters=BOOTSTRAP_ITERS,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                confirm_run_unsafe_code=config.allow_code,
            )
    except TemplateError as error:
        raise DataError(
            f"a template does not fit a row of its task ({error}); correct the task file, or the row"
        ) from None
    return dict(results), str(lm.name)


def _open(config: LmEvaluateConfig, files: ModelFiles | None, tasks: Mapping[str, Any], count: Count) -> LM:
    """The target as a language model of lm_eval. What it cannot do is said before it is loaded or asked.

    Imported here: each kind brings libraries of its own, which the others need not hold.
    """
    from slmops.lm_evaluate.tasks import refuse_sampling, request_types

    kinds = request_types(tasks)
    if files is None:
        from slmops.lm_evaluate.endpoint import open_endpoint

        return open_endpoint(config, kinds, count)
    if files.quantized:
        from slmops.lm_evaluate.genai_lm import GenAILM

        refuse_sampling(tasks)
        return GenAILM(files.directory, config, count)
    from slmops.lm_evaluate.hf_lm import CountingHFLM

    return CountingHFLM(files.directory, config, count)


def _seed(seed: int) -> None:
    """As `lm_eval.evaluator.simple_evaluate`."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _target_facts(config: LmEvaluateConfig, files: ModelFiles | None) -> dict[str, Any]:
    if files is None:
        return {"target": "endpoint", "endpoint_url": config.endpoint_url.partition("?")[0]}
    return {
        "target": "model",
        "variant": files.variant,
        "model_digest": files.digest,
        "size_bytes": files.size_bytes,
    }
