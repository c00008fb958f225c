"""The run folder: what a job says about itself, whoever started it.

    <runs>/<job id>/
        job.json         the JobSpec as it was accepted
        record.json      state, attempt, progress, reason: replaced by rename, so never half a record
        metrics.jsonl    one JSON object a line, appended in batches
        total_steps      written when training starts: tells the journal that the job is RUNNING
        skipped.txt      a line for each sample that could not be decoded, appended by every rank
        warnings.txt     what the person who submitted the job should know, a line each
        log.txt          the log of the job, all attempts and ranks; bounded, see `workloads.log_file`
        events.jsonl     what happened to the run: workers joined and left, preemptions, hangs; one JSON object a line
        online.jsonl     results of evaluations of checkpoints while training goes on, a line each
        online/          the checkpoint that is evaluated right now
        provenance.json  what the run was made of: code, packages, device, data
        stop             appears when somebody asks the run to stop; the ranks agree on it and checkpoint
        checkpoints/     `workloads.checkpoint`
        artifact/        `workloads.artifact`
        evaluations.json results of `evaluate`

The service, a shell and a notebook read the same files; only the run writes them
(but for `stop`). No torch, no Ray in here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from workloads.log_file import LogFile

logger = logging.getLogger(__name__)

RunState = Literal["STARTING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]
HEARTBEAT_S = 5.0  # a living run renews `updated_at` at least this often
_BLOCK_BYTES = 1 << 13


class Record(BaseModel):
    """What `record.json` holds; times are seconds since the epoch."""

    model_config = ConfigDict(extra="ignore")

    job_id: str
    state: RunState
    attempt: int = 1
    reason: str | None = None
    hint: str | None = None
    started_at: float
    updated_at: float
    finished_at: float | None = None
    step: int = 0
    epoch: int = 0
    total_steps: int = 0
    ran_s: float = 0  # of training, over all attempts
    skipped: list[str] = []  # damaged or not decoded: "file: member at offset: why"; the first thousand
    skipped_samples: int = 0  # how many they are in all
    warnings: list[str] = []
    pid: int = 0
    host: str = ""


def write_atomic(path: Path, text: str) -> None:
    """Replaces `path` by `text` so that a reader, a crash or a full disk never shows half of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _append(path: Path, document: dict[str, Any]) -> None:
    """Appends a line of JSON, in one write; behind half a line of a process that was killed it starts a new one."""
    line = json.dumps(document).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, b"\n" * torn + line)
    finally:
        os.close(descriptor)


def _documents(path: Path, after: int = 0, most: int = -1) -> Iterator[tuple[dict[str, Any], int]]:
    """The JSON lines behind byte `after`, each with the byte behind it; half a line is none, nor is a missing file.

    Of what is there `most` bytes are read, -1: all. Half a line at the end is being written; within, a full disk or a
    killed process left it.
    """
    try:
        with open(path, "rb") as file:
            file.seek(after)
            text = file.read(most)
    except FileNotFoundError:
        return
    for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
        after += len(line)
        with contextlib.suppress(ValueError):
            yield json.loads(line), after


def _backwards(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines from the last to the first; no more of the file is read than what is taken needs."""
    try:
        with open(path, "rb") as file:
            start, rest = file.seek(0, os.SEEK_END), b""  # rest: of a line that begins before `start`
            while start > 0:
                end, start = start, max(0, start - _BLOCK_BYTES)
                file.seek(start)
                rest, *lines = (file.read(end - start) + rest).split(b"\n")
                for line in reversed(lines if start > 0 else [rest, *lines]):
                    with contextlib.suppress(ValueError):  # no half of an object is JSON
                        yield json.loads(line)
    except FileNotFoundError:
        return


def online_names(online: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Entry of `evaluate` -> the label of its `online` results, with its number where other entries have the same."""
    labels = {result["entry"]: result["label"] for result in online}
    often = Counter(labels.values())
    return {entry: label if often[label] == 1 else f"{label}[{entry}]" for entry, label in labels.items()}


class RunFolder:
    """Paths and small files of one run; reads tolerate a run that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec = path / "job.json"
        self.record = path / "record.json"
        self.metrics = path / "metrics.jsonl"
        self.total_steps = path / "total_steps"
        self.skipped = path / "skipped.txt"
        self.warnings = path / "warnings.txt"
        self.log = path / "log.txt"
        self.events = path / "events.jsonl"
        self.online = path / "online.jsonl"
        self.provenance = path / "provenance.json"
        self.stop = path / "stop"
        self.checkpoints = path / "checkpoints"
        self.artifact = path / "artifact"
        self.evaluations = path / "evaluations.json"

    @contextlib.contextmanager
    def logging(self, who: str = "") -> Iterator[None]:
        """Sends what this process logs into the job's log, marked with `who`."""
        handler = LogFile(self.log, who)
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            handler.close()

    def read_record(self) -> Record | None:
        try:
            return Record.model_validate_json(self.record.read_text())
        except FileNotFoundError:
            return None

    def write_record(self, record: Record) -> None:
        write_atomic(self.record, record.model_copy(update={"updated_at": time.time()}).model_dump_json(indent=1))

    def read_metrics(self, *, after_step: int = -1) -> Iterator[dict[str, Any]]:
        """Points with a step above `after_step`, behind the last line of one that is not: only these cost.

        A resumed run repeats the steps after its checkpoint: the later line of a step wins.
        """
        points: dict[int, dict[str, Any]] = {}
        for point in takewhile(lambda point: point["step"] > after_step, _backwards(self.metrics)):
            points.setdefault(point["step"], point)
        yield from (points[step] for step in sorted(points))

    def read_points(self, *, after: int, most: int) -> list[tuple[dict[str, Any], int]]:
        """Points in the order in which they were written, behind byte `after`, each with the byte behind it.

        Among `most` bytes, which are more than a line.
        """
        return list(_documents(self.metrics, after, most))

    def last_point(self) -> dict[str, Any] | None:
        """The last whole line of `metrics.jsonl`."""
        return next(_backwards(self.metrics), None)

    def event(self, kind: str, message: str) -> None:
        """Appends an event, a line that is whole also when several processes of a machine write at once.

        On a disk that is full the event goes to the log only: it is not worth the run.

        Args:
            kind: worker_joined, worker_left, preempted, checkpoint_passed_over, hang, ...
            message: a sentence for a person.
        """
        logger.info("%s: %s", kind, message)
        try:
            _append(self.events, {"time": time.time(), "kind": kind, "message": message})
        except OSError as error:
            logger.warning("an event could not be written: %s", error)

    def read_events(self, *, after: int = 0) -> list[dict[str, Any]]:
        """Events behind byte `after`: `time`, `kind`, `message`, and `offset`, the byte behind each of them."""
        return [{**event, "offset": offset} for event, offset in _documents(self.events, after)]

    def add_online(self, result: dict[str, Any]) -> None:
        """Appends a result of `workloads.online`: step, epoch, entry (of `evaluate`), label, metric, mean, std, seeds.

        Raises:
            OSError: the disk is full.
        """
        _append(self.online, result)

    def read_online(self) -> list[dict[str, Any]]:
        """These results, in the order of their steps."""
        return [result for result, _ in _documents(self.online)]

    def read_evaluations(self) -> list[dict[str, Any]]:
        try:
            results: list[dict[str, Any]] = json.loads(self.evaluations.read_text())
            return results
        except FileNotFoundError:
            return []
