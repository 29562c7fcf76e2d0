"""What a run on a Kubeflow Pipelines server says of its steps, told as it changes.

A server on Argo Workflows lists every node of the workflow as a task: for a step `finetune` the nodes `finetune`,
`finetune-driver` (which resolves inputs and asks the cache) and `executor` (the pod itself), beside nodes of the
pipeline. A step is known by its key in the compiled pipeline; its driver counts only if it fails; a step whose executor
was skipped was taken from the cache, as far as the server says which executor belongs to which step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

DRIVER = "-driver"
EXECUTOR = "executor"


@dataclass
class Follower:
    """Tells the changes from one look at a run to the next."""

    display_names: Mapping[str, str]
    """What to call a step, by its key in the compiled pipeline."""
    say: Callable[[str], None]
    _states: dict[str, str] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)

    def look(self, run: Any) -> None:
        """Tell what changed. `run` is a `kfp_server_api.V2beta1Run`."""
        tasks = _tasks(run)
        for task in tasks:
            name, state = self._name(task), _state(task, tasks)
            key = task.task_id or task.display_name
            if name and state and self._states.get(key) != state:
                self._states[key] = state
                reason = _reason(task) if state == "failed" else ""
                self.tell(f"{name}: {state}{f', {reason}' if reason else ''}")

    def tell(self, text: str) -> None:
        """Say `text` with the time since the following began."""
        self.say(f"{clock(time.monotonic() - self._started)}  {text}")

    def why(self, run: Any) -> str:
        """Which steps failed and why, as far as the server says; empty if it says nothing."""
        failed = [(self._name(task), task) for task in _tasks(run) if task.state == "FAILED"]
        reasons = [f"{name}: {_reason(task) or 'failed'}" for name, task in failed if name]
        return "; ".join(reasons) or _reason(run)

    def _name(self, task: Any) -> str:
        """What to call a task; empty for one that is not worth a line."""
        shown = task.display_name or ""
        if shown in self.display_names:
            return self.display_names[shown]
        if shown.endswith(DRIVER) and task.state == "FAILED":
            return f"driver of {self.display_names.get(shown.removesuffix(DRIVER), shown.removesuffix(DRIVER))}"
        return shown if shown in self.display_names.values() else ""


def clock(seconds: float) -> str:
    """`1:02:03`."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _tasks(run: Any) -> list[Any]:
    return list((run.run_details.task_details if run.run_details else None) or ())


def _state(task: Any, tasks: Iterable[Any]) -> str:
    state = (task.state or "RUNTIME_STATE_UNSPECIFIED").lower()
    if state == "runtime_state_unspecified":
        return ""
    return "cached" if state == "succeeded" and _executor_skipped(task, tasks) else state


def _executor_skipped(task: Any, tasks: Iterable[Any]) -> bool:
    children = {child.task_id or child.pod_name for child in task.child_tasks or ()}
    executors = [t for t in tasks if t.display_name == EXECUTOR and children & {t.task_id, t.pod_name}]
    return bool(executors) and all(executor.state == "SKIPPED" for executor in executors)


def _reason(subject: Any) -> str:
    """The message of a run or a task: its own, or the latest of its history."""
    errors = [subject.error, *(status.error for status in reversed(subject.state_history or ()))]
    return next((error.message for error in errors if error and error.message), "")
