"""Where a training can be followed while it runs, besides its own progress line.

The environment says so, because it says nothing about the model: SLMOPS_TENSORBOARD_DIR names a folder for
TensorBoard's event files, and MLFLOW_TRACKING_URI, MLflow's own variable, its server (extra `mlflow`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from slmops.config import Config
from slmops.errors import ConfigError, TransientError
from slmops.progress import log

TENSORBOARD_DIR = "SLMOPS_TENSORBOARD_DIR"
MLFLOW_URI = "MLFLOW_TRACKING_URI"
RUN_ID_FILE = "mlflow_run_id"
"""In the work directory: a run that was killed goes on in the same run of MLflow."""


class Tracker(Protocol):
    """Takes numbers by name."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note `values` after `step` optimizer steps."""


class Trackers:
    """Several trackers as one. One that fails is told once and left out: a training does not end for a dashboard."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.log(step, values)
            except Exception as error:
                log.warning("%s does not follow any more: %s", type(tracker).__name__, error)
                self._trackers.remove(tracker)


@contextmanager
def following(what: str, config: Config, work_dir: Path, first: int) -> Iterator[Trackers]:
    """The trackers that the environment names.

    Args:
        what: the step's name.
        config: its settings, which MLflow keeps.
        work_dir: the run's; its name tells runs apart.
        first: the step to go on from; what an earlier process noted behind it is dropped.

    Raises:
        ConfigError: MLflow is asked for and not installed.
        TransientError: MLflow's server does not answer.
    """
    with ExitStack() as stack:
        trackers: list[Tracker] = []
        if directory := os.environ.get(TENSORBOARD_DIR):
            trackers.append(stack.enter_context(_tensorboard(Path(directory) / work_dir.name, first)))
        if os.environ.get(MLFLOW_URI):
            trackers.append(stack.enter_context(_mlflow(what, config, work_dir)))
        yield Trackers(trackers)


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


@contextmanager
def _tensorboard(directory: Path, first: int) -> Iterator[Tracker]:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(directory), purge_step=first)
    try:
        yield _TensorBoard(writer)
    finally:
        writer.close()


class _MLflow:
    def __init__(self, mlflow: Any, run_id: str) -> None:
        self._mlflow, self._run_id = mlflow, run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step, run_id=self._run_id)


@contextmanager
def _mlflow(what: str, config: Config, work_dir: Path) -> Iterator[Tracker]:
    try:
        import mlflow
    except ImportError:
        raise ConfigError(f"{MLFLOW_URI} is set, but MLflow is not installed; install slmops[mlflow]") from None
    known = work_dir / RUN_ID_FILE
    try:
        run = mlflow.start_run(
            run_id=known.read_text() if known.exists() else None,
            run_name=None if known.exists() else work_dir.name,
            tags={"step": what},
        )
        if not known.exists():
            mlflow.log_params(config.parameters())
            known.write_text(run.info.run_id)
    except Exception as error:
        raise TransientError(
            f"MLflow does not answer at {os.environ[MLFLOW_URI]} ({type(error).__name__}: {error}); start its server, "
            f"or unset {MLFLOW_URI}"
        ) from error
    try:
        yield _MLflow(mlflow, run.info.run_id)
        mlflow.end_run()
    except BaseException:
        mlflow.end_run(status="FAILED")
        raise
