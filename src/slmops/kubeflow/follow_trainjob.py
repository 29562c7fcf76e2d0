"""Follows a TrainJob to its end: shows what is new of it and its pods, and says why it failed."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slmops.errors import SlmopsError, TransientError, UserError
from slmops.kubeflow.trainjob import INDEX_LABEL, NODE, ROUND_S, Cluster, Wanted, condition
from slmops.progress import log

LAST_LINES = 20

EVICTIONS = {"Evicted", "NodeLost", "Preempting", "Shutdown", "Terminated", "NodeShutdown", "UnexpectedAdmissionError"}
KILLED = {137, 143}
"""Exit codes of a container that the kubelet or the node ended."""
TORCHRUN_TERMINATED = "got signal: 15"
"""In torchrun's last lines: it was told to end, and ends with exit code 1."""
SLMOPS_EXIT = re.compile(r"^(?P<message>.*)\nexit code (?P<code>\d+)\s*$", re.DOTALL)
"""What `slmops.step` leaves as a container's termination message."""


@dataclass(frozen=True)
class Failure:
    """Why a pod of the training ended."""

    pod: str
    why: str
    """Exit code and reason, and the error that the training itself gave, if it came to that."""
    error: type[SlmopsError]
    last_lines: str
    order: int
    """Which failure of several is the cause: the lowest. Those of a lost node end the other nodes' pods in turn."""

    def __str__(self) -> str:
        lines = f"; its last lines:\n{self.last_lines}" if self.last_lines else ""
        return f"pod {self.pod} {self.why}{lines}"


class NotStarted(TransientError):
    """A TrainJob that found no place in time."""


def follow(cluster: Cluster, wanted: Wanted, pending_timeout_s: float) -> None:
    """Wait for the end of the TrainJob, and show states, warnings and the log of its first process meanwhile.

    Raises:
        SlmopsError: it failed; of the class that the training's own error had, where that is known.
        TransientError: it was deleted by somebody else, did not start in time, or the API server fell silent.
    """
    view = _View(cluster, wanted, time.monotonic() + pending_timeout_s)
    while True:
        found = cluster.read(wanted.name)
        if found is None:
            raise TransientError(
                f"TrainJob {cluster.namespace}/{wanted.name} was deleted by somebody else; its checkpoint is kept"
            )
        view.look_around()
        if view.ended(found):
            return
        for changed in cluster.changes(wanted.name, found["metadata"]["resourceVersion"]):
            if view.ended(changed):
                return


class _View:
    """What has been shown of a TrainJob, so that only news is."""

    def __init__(self, cluster: Cluster, wanted: Wanted, start_before: float) -> None:
        self.cluster, self.wanted, self._start_before = cluster, wanted, start_before
        self._started = False
        self._state = ""
        self._pods: dict[str, str] = {}
        self._warned: set[tuple[str, ...]] = set()
        self._failures: dict[str, Failure] = {}
        self._logged_until = ""

    def ended(self, job: Mapping[str, Any]) -> bool:
        """Show the TrainJob's state if it is new; whether it is complete.

        Raises:
            SlmopsError: it failed.
            TransientError: it did not start in time.
        """
        if condition(job, "Complete"):
            self.look_around()
            return True
        if failed := condition(job, "Failed"):
            self.look_around()
            raise self._explain(failed)
        suspended = condition(job, "Suspended")
        state = "running" if self._started else "starting its pods"
        if suspended:
            state = f"waiting in queue {self.wanted.queue_name} ({suspended.get('message') or suspended['reason']})"
        if state != self._state:
            log.info("TrainJob %s: %s", self.wanted.name, state)
            self._state = state
        if not self._started and time.monotonic() > self._start_before:
            raise NotStarted(f"TrainJob {self.wanted.name} did not start in time: it was {state}; try again later")
        return False

    def look_around(self) -> None:
        """Show what is new of pods, warnings and the first process's log."""
        pods = sorted(self.cluster.pods(self.wanted.name), key=lambda pod: str(pod["metadata"]["name"]))
        for pod in pods:
            name, state = pod["metadata"]["name"], _pod_state(pod)
            if self._pods.get(name) != state:
                log.info("pod %s: %s", name, state)
                self._pods[name] = state
            if name not in self._failures and (failure := self._failure(pod)):
                self._failures[name] = failure
                log.warning("%s", failure)
        self._started = self._started or (
            sum(pod["status"].get("phase") in {"Running", "Succeeded"} for pod in pods) >= self.wanted.num_nodes
        )
        for event in self.cluster.warnings(self.wanted.name):
            about = event["involvedObject"]
            news = (about["kind"], about["name"], event.get("reason") or "", event.get("message") or "")
            if news not in self._warned:
                self._warned.add(news)
                log.warning("%s %s: %s: %s", *news)
        for pod in pods:
            if pod["metadata"].get("labels", {}).get(INDEX_LABEL) == "0":
                self._show_log(pod["metadata"]["name"])

    def _show_log(self, pod: str) -> None:
        for line in self.cluster.log_lines(pod, timestamps=True, since_seconds=ROUND_S * 3):
            stamp, _, text = line.partition(" ")
            stamp = _sortable(stamp)
            if stamp > self._logged_until:
                self._logged_until = stamp
                log.info("node 0: %s", text)

    def _failure(self, pod: Mapping[str, Any]) -> Failure | None:
        """Why a pod failed; None if it did not."""
        status, name = pod["status"], pod["metadata"]["name"]
        ended = _terminated(status)
        evicted = status.get("reason") in EVICTIONS
        if status.get("phase") != "Failed" and not (ended and ended.get("exitCode")):
            return None
        code, reason = ended.get("exitCode"), ended.get("reason") or status.get("reason") or "Error"
        said = SLMOPS_EXIT.match(ended.get("message") or "")
        why = f"ended with exit code {code} ({reason})" if ended else f"failed ({reason}: {status.get('message', '')})"
        lines = "\n".join(f"  {line}" for line in self.cluster.log_lines(name, tail_lines=LAST_LINES))
        if reason == "OOMKilled":
            why += ": it needs more memory; lower micro_batch_size or max_length, or ask for more"
            return Failure(name, why, UserError, lines, order=0)
        if said:
            error = {2: UserError, 75: TransientError, 143: TransientError}.get(int(said["code"]), SlmopsError)
            order = 3 if error is TransientError else 0  # it may only have missed a pod that ended before
            return Failure(name, f"{why}: {said['message']}", error, lines, order)
        if evicted or code in KILLED or not ended:
            return Failure(name, why, TransientError, lines, order=1)
        if TORCHRUN_TERMINATED in lines:
            return Failure(name, why, TransientError, lines, order=4)
        return Failure(name, why, SlmopsError, lines, order=2)

    def _explain(self, failed: Mapping[str, Any]) -> SlmopsError:
        """The error of a failed TrainJob: of the pod that is the cause; others ended because it was gone."""
        summary = f"TrainJob {self.wanted.name} failed ({failed['reason']}: {failed.get('message', '')})"
        if not self._failures:
            return SlmopsError(
                f"{summary}, and none of its pods is left to tell why; look at its events: kubectl -n "
                f"{self.cluster.namespace} describe trainjob {self.wanted.name}"
            )
        cause = min(self._failures.values(), key=lambda failure: failure.order)
        return cause.error(f"{summary}: {cause}")


def _pod_state(pod: Mapping[str, Any]) -> str:
    """One word for where a pod is, and what holds it up."""
    status = pod["status"]
    for container in status.get("containerStatuses") or []:
        waiting = container.get("state", {}).get("waiting")
        if waiting and waiting.get("reason"):
            return f"{waiting['reason']} {waiting.get('message') or ''}".strip()
    return str(status.get("phase", "Unknown")).lower()


def _terminated(status: Mapping[str, Any]) -> dict[str, Any]:
    """How a pod's training container ended, now or before its last restart; empty if it did not."""
    for container in status.get("containerStatuses") or []:
        if container["name"] == NODE:
            ended: dict[str, Any] | None = container.get("state", {}).get("terminated")
            before: dict[str, Any] | None = container.get("lastState", {}).get("terminated")
            return ended or before or {}
    return {}


def _sortable(stamp: str) -> str:
    """An RFC 3339 time whose fraction has nine digits, so that text order is time order."""
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    return f"{whole}.{fraction:0<9}" if whole else ""
