"""Tasks by their names: found, loaded with their data, and checked before a model is."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from slmops.errors import ConfigError, DataError, SlmopsError
from slmops.lm_evaluate.config import LmEvaluateConfig
from slmops.lm_evaluate.task_files import check_task_files
from slmops.progress import heartbeat, log

STEP = "lm_evaluate"

BRING = (
    "for a public task, run `python -c \"from lm_eval.tasks import TaskManager; TaskManager().load(['{name}'])\"` on a "
    "machine with network and bring its $HF_HOME here; for a task of your own, put the data into the folder with the "
    "task files: data_files count from that folder"
)


def load_tasks(config: LmEvaluateConfig, task_files: Path | None) -> dict[str, Any]:
    """The tasks of `config`, as `lm_eval.evaluator.evaluate` takes them: `tasks` by name, `groups`, `group_map`.

    Raises:
        ArtifactError: there is no folder `task_files`.
        ConfigError: a task is unknown or broken, or would run code that is not allowed.
        DataError: a task's data is not there.
    """
    if task_files is not None:
        task_files = task_files.resolve()
        check_task_files(task_files, allow_code=config.allow_code)
    manager = _manager(config.tasks, task_files)
    names = sorted({name for asked in config.tasks for name in _matching(asked, manager)})
    # Data files of one's own are named from the folder on, which lies elsewhere in every run.
    with contextlib.chdir(task_files or Path()), heartbeat(f"{STEP} data", lambda: f"{len(names)} tasks"):
        loaded = _load(manager, names)
    for name, task in loaded["tasks"].items():
        _check(name, task, config.allow_code)
        _set_fewshot(name, task, config)
    return loaded


def request_types(tasks: Mapping[str, Any]) -> dict[str, str]:
    """What each task wants of a model: `generate_until`, `loglikelihood` or `loglikelihood_rolling`."""
    types = {name: str(task.OUTPUT_TYPE) for name, task in tasks.items()}
    return {name: "loglikelihood" if kind == "multiple_choice" else kind for name, kind in types.items()}


def refuse_sampling(tasks: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: a task wants answers that are drawn by chance, where decoding is greedy.
    """
    for name, task in tasks.items():
        if (task.get_config("generation_kwargs") or {}).get("do_sample"):
            raise ConfigError(
                f"task {name} samples its answers (do_sample: true), and a quantized variant is decoded greedily; set "
                "do_sample: false in a task file of your own that includes this one"
            )


def _manager(asked: Sequence[str], task_files: Path | None) -> TaskManager:
    """An index of one's own task files and, unless single tasks of these are all that is asked for, of lm_eval's."""
    if task_files is not None:
        own = TaskManager(include_path=str(task_files), include_defaults=False)
        if set(asked) <= set(own.all_subtasks):
            return own
    with heartbeat(f"{STEP}: reading the list of lm_eval's tasks", lambda: "about 15,000"):
        return TaskManager(include_path=str(task_files) if task_files else None)


def _matching(asked: str, manager: TaskManager) -> list[str]:
    """The names that `asked` means."""
    if asked in manager.task_index:
        return [asked]
    if "*" in asked and (found := manager.match_tasks([asked])):
        return list(found)
    near = difflib.get_close_matches(asked, manager.all_tasks, 3, 0.5)
    hint = f"is it {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
    raise ConfigError(f"no task is called {asked!r}; {hint} Task files of your own go into the input task_files")


def _load(manager: TaskManager, names: Sequence[str]) -> dict[str, Any]:
    try:
        return dict(manager.load(list(names)))
    except Exception as error:
        failed, reason = _first_failure(manager, names) or (", ".join(names), error)
        raise _explained(failed, reason) from reason


def _first_failure(manager: TaskManager, names: Sequence[str]) -> tuple[str, Exception] | None:
    """The first name that cannot be loaded on its own, and why."""
    for name in names:
        try:
            manager.load([name])
        except Exception as error:
            return name, error
    return None


def _explained(name: str, error: Exception) -> SlmopsError:
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, ModuleNotFoundError):
        return ConfigError(f"task {name} needs the package {error.name}, which is not installed; add it to the image")
    if isinstance(error, OSError):  # all of what `datasets` and the hub's client raise for data that is not there
        return DataError(f"the data of task {name} is not there ({said}); {BRING.format(name=name)}")
    return ConfigError(f"task {name} cannot be set up ({said}); correct its task file")


def _check(name: str, task: Any, allow_code: bool) -> None:
    """
    Raises:
        ConfigError: the task runs what a model writes, shows pictures, or has a metric that is not there.
    """
    if getattr(task, "UNSAFE_CODE", False) and not allow_code:
        raise ConfigError(
            f"task {name} runs code that the model writes; set allow_code=true if this machine may do that, or leave "
            "it out"
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"task {name} shows pictures or sounds, and these models read text; leave it out")
    metrics = getattr(task, "_metric_fn_list", {})
    missing = [metric for metric, function in metrics.items() if function is None]
    if missing and not callable(task.config.process_results):
        raise ConfigError(
            f"task {name} has the metric {missing[0]}, which neither lm_eval nor the cache in $HF_HOME has; bring the "
            "cache of a machine with network, or take one of lm_eval's own metrics"
        )


def _set_fewshot(name: str, task: Any, config: LmEvaluateConfig) -> None:
    """How many examples a task shows, by the rules of `lm_eval.evaluator.simple_evaluate`."""
    own = task.get_config("num_fewshot")
    if config.fewshot == "fixed" and own == 0 and config.num_fewshot:
        log.warning("%s: without examples, as its task file says num_fewshot: 0", name)
    elif config.fewshot == "fixed":
        task.set_config(key="num_fewshot", value=config.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=config.seed)
