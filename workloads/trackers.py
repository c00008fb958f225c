"""Who else sees the curve: TensorBoard files in the run folder, and an MLflow server where the environment names one.

`metrics.jsonl` is the curve; these are copies for tools that people know. So a copy may lose points (a server that is
away, a full disk), and says how many, but never holds the loop up: a thread imports what it needs, opens and sends.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import struct
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, Protocol

from workloads.record import RunFolder, write_atomic
from workloads.spec import JobSpec

logger = logging.getLogger(__name__)

MAX_WAITING = 1000  # points; some hours of a server's absence
CLOSE_S = 5.0  # the end of a job waits no longer than this for a slow server
PARAM_CHARACTERS = 500  # of a value that every version of an MLflow server takes
PARAMS_A_REQUEST = 100  # its limit
ENGINE = frozenset(
    {"samples_per_s", "step_time_s", "data_wait_share", "memory_gib", "mfu", "rank_skew", "slowest_rank"}
)


class Tracker(Protocol):
    """Observes the curve on rank 0; neither call blocks or raises."""

    def point(self, point: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Sink(Protocol):
    """Where the thread of a tracker sends to; may block and raise."""

    def write(self, step: int, scalars: dict[str, float], at_s: float) -> None: ...

    def close(self) -> None: ...


def trackers_of(spec: JobSpec, run: RunFolder, job_id: str, start_step: int) -> list[Tracker]:
    """The trackers of a run on rank 0; costs about a millisecond, the rest is paid by their threads at the first point.

    Args:
        spec: logged as the parameters of the MLflow run.
        run: TensorBoard files go to its `tensorboard/`, the id of the MLflow run to its `mlflow.json`.
        job_id: a tag of the MLflow run.
        start_step: done steps; copies of later ones are of an attempt that was killed, and are replaced.
    """
    trackers = tensorboard(run.path / "tensorboard", start_step)
    if os.environ.get("MLFLOW_TRACKING_URI") and _installed("mlflow", "MLFLOW_TRACKING_URI has no effect"):
        trackers.append(Background("MLflow", partial(MLflow, spec, run, job_id)))
    return trackers


def tensorboard(folder: Path, start_step: int) -> list[Tracker]:
    """That of `folder`; none where tensorboardX is not installed."""
    if not _installed("tensorboardX", "no TensorBoard files are written"):
        return []
    return [Background("TensorBoard", partial(TensorBoard, folder, start_step))]


def _installed(package: str, otherwise: str) -> bool:
    found = find_spec(package) is not None
    if not found:
        logger.warning("the package %s is not installed: %s; `pip install %s`", package, otherwise, package)
    return found


def scalars_of(point: dict[str, Any]) -> dict[str, float]:
    """The numbers of a point by the names that trackers show.

    `engine/` has what the machine does, `train/` what the model does; a name that has a group of its own keeps it.
    Characters that MLflow refuses become `_`; what is None or no number is left out.
    """
    scalars = {}
    for name, value in point.items():
        if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        group = "" if "/" in name else "engine/" if name in ENGINE else "train/"
        scalars[group + re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)] = float(value)
    return scalars


class Background:
    """A tracker whose thread opens a sink at the first point, and again after an attempt that failed.

    Points are lost when the sink fails or falls `MAX_WAITING` behind: said once when it begins, counted at the end.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self._name, self._open = name, open_sink
        self._waiting: SimpleQueue[tuple[float, dict[str, Any]] | None] = SimpleQueue()
        self._lost, self._lock = 0, Lock()
        self._thread = Thread(target=self._send, name=f"tracker-{name}", daemon=True)

    def point(self, point: dict[str, Any]) -> None:
        if self._thread.ident is None:
            self._thread.start()
        if self._waiting.qsize() < MAX_WAITING:
            self._waiting.put((time.time(), point))
        else:
            self._lose(f"it is {MAX_WAITING} points behind")

    def close(self) -> None:
        """Waits `CLOSE_S` at most; a thread that is not done by then goes on while the process lives."""
        if self._thread.ident is None:
            return
        self._waiting.put(None)
        self._thread.join(CLOSE_S)
        late = max(0, self._waiting.qsize() - 1)
        if self._lost or late:
            logger.warning("%s lacks %d points of the curve; metrics.jsonl has all", self._name, self._lost + late)

    def _send(self) -> None:
        sink: Sink | None = None
        while (item := self._waiting.get()) is not None:
            at_s, point = item
            try:
                sink = sink or self._open()
                sink.write(point["step"], scalars_of(point), at_s)
            except Exception as error:  # whatever a foreign client raises must not end the thread
                self._lose(f"{type(error).__name__}: {error}")
        try:
            if sink is not None:
                sink.close()
        except Exception as error:
            logger.warning("%s could not be closed: %s: %s", self._name, type(error).__name__, error)

    def _lose(self, why: str) -> None:
        with self._lock:
            self._lost += 1
            first = self._lost == 1
        if first:
            logger.warning("%s loses points of the curve: %s; training goes on, metrics.jsonl has all", self._name, why)


class TensorBoard:
    """Scalars in event files (TFRecord frames of `Event` messages), by the messages and checksums of tensorboardX.

    Each attempt has a file of its own, which begins by asking for what earlier ones hold of steps after
    `start_step` to be dropped (SessionLog.START), so TensorBoard draws one curve.

    Its `SummaryWriter` is passed by: it brings a thread and a pipe, and loses what it keeps back when a run is killed.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        event_pb2 = import_module("tensorboardX.proto.event_pb2")  # 20 ms; 170 ms where boto3 is installed
        self._event, self._summary = event_pb2.Event, import_module("tensorboardX.proto.summary_pb2").Summary
        self._crc = import_module("tensorboardX.record_writer").masked_crc32c
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()  # files are read in the order of their names: microseconds, for a restart within a second
        self._file = open(folder / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}", "ab", 0)  # noqa: SIM115
        self._write(wall_time=now, file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(wall_time=now, step=start_step + 1, session_log=start)

    def write(self, step: int, scalars: dict[str, float], at_s: float) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(wall_time=at_s, step=step, summary=self._summary(value=values))

    def _write(self, **event: Any) -> None:
        data = self._event(**event).SerializeToString()
        length = struct.pack("<Q", len(data))
        frame = length + struct.pack("<I", self._crc(length)) + data + struct.pack("<I", self._crc(data))
        self._file.write(frame)

    def close(self) -> None:
        self._file.close()


class MLflow:
    """A run on the server that MLFLOW_TRACKING_URI names; tokens and retries are the client's own variables.

    MLFLOW_EXPERIMENT_ID or MLFLOW_EXPERIMENT_NAME choose the experiment, MLFLOW_RUN_NAME names the run (else the job's
    name), MLFLOW_RUN_ID continues one. Later attempts of the job find the id of its run in `mlflow.json`; they repeat
    the steps after their checkpoint, and MLflow forgets nothing, so what it has is not sent again.
    """

    def __init__(self, spec: JobSpec, run: RunFolder, job_id: str) -> None:
        mlflow = import_module("mlflow")
        self._entities, self._total_steps, self._step = mlflow.entities, run.total_steps, 0
        self._client = mlflow.MlflowClient()  # not `mlflow.start_run`: its run is closed at exit, server away or not
        self._run_id = self._find_or_create(run.path / "mlflow.json", spec.name)
        self._client.update_run(self._run_id, status="RUNNING")
        self._client.set_tag(self._run_id, "manta.job_id", job_id)
        params = [mlflow.entities.Param(k, v[:PARAM_CHARACTERS]) for k, v in flatten(spec.model_dump()).items()]
        for i in range(0, len(params), PARAMS_A_REQUEST):
            self._client.log_batch(self._run_id, params=params[i : i + PARAMS_A_REQUEST])
        history = self._client.get_metric_history(self._run_id, "train/epoch")  # every point has it
        self._sent_step = max((metric.step for metric in history), default=-1)

    def _find_or_create(self, path: Path, name: str) -> str:
        server = re.sub(r"//[^/]*@", "//", os.environ["MLFLOW_TRACKING_URI"])  # without user and password
        if path.exists():
            held: dict[str, str] = json.loads(path.read_text())
            if held["server"] == server:
                return held["run_id"]
        run_id = os.environ.get("MLFLOW_RUN_ID")
        if not run_id:
            name = os.environ.get("MLFLOW_RUN_NAME") or name
            run_id = str(self._client.create_run(self._experiment_id(), run_name=name).info.run_id)
        write_atomic(path, json.dumps({"server": server, "run_id": run_id}))
        return run_id

    def _experiment_id(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if not name:
            return os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"  # MLflow's "Default"
        found = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if found is None else found.experiment_id)

    def write(self, step: int, scalars: dict[str, float], at_s: float) -> None:
        self._step = step
        if step > self._sent_step:
            at_ms = int(1000 * at_s)
            metrics = [self._entities.Metric(name, value, at_ms, step) for name, value in scalars.items()]
            self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        """FINISHED after the last step of the job; KILLED before, until an attempt continues it."""
        done = self._step >= int(self._total_steps.read_text())
        self._client.set_terminated(self._run_id, status="FINISHED" if done else "KILLED")


def flatten(value: Any, name: str = "") -> dict[str, str]:
    """`{"model": {"dim": 96}, "evaluate": [{"name": "knn"}]}` -> `{"model.dim": "96", "evaluate.0.name": "knn"}`."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple) and any(isinstance(one, dict) for one in value):
        items = list(enumerate(value))
    else:
        return {name: str(value)}
    return {k: v for key, one in items for k, v in flatten(one, f"{name}.{key}" if name else str(key)).items()}
