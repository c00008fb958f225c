"""`python -m workloads.run job.yaml`: a job -> what it trained, evaluated or found, and a true record.

The same for a job of the service, for `ray job submit -- python -m workloads.run`, and
for `manta run --local`, which uses no Ray. One CPU worker trains in this very process
(5 s to the first step instead of 20); more workers, or GPUs, go through Ray Train.

Exit codes: 0 succeeded, 1 failed, 3 stopped with a checkpoint (run it again to continue).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from workloads import log_lines, tracing
from workloads.artifact import ArtifactError
from workloads.checkpoint_mirror import Mirror
from workloads.data.sources import RETRY_DELAYS_S
from workloads.journal import Journal
from workloads.metrics import OnPoint
from workloads.preflight import look
from workloads.record import RunFolder, write_atomic
from workloads.spec import JobSpec
from workloads.spec_any import AnySpec, read_spec, spec_of
from workloads.winner import settled
from workloads.work import Work

logger = logging.getLogger(__name__)

SUCCEEDED, FAILED, STOPPED = 0, 1, 3
HINT = (  # of a job that reached max_duration
    "go on from it by `manta resume JOB --max-duration TIME`, or by `manta run --local` in the same folder with a "
    "longer max_duration in the job"
)


class StopRequest:
    """SIGTERM, SIGINT or the file `stop` in the run folder; ranks poll it and checkpoint."""

    def __init__(self, run: RunFolder) -> None:
        self._run, self._signalled = run, False

    def __call__(self) -> bool:
        return self._signalled or self._run.stop.exists()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: now
        self._signalled = True
        self._run.stop.touch()  # workers of Ray Train see this one

    def install(self) -> None:
        """Takes the signals over; call it again after `ray.init`, which replaces the handler."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def execute(
    spec: AnySpec,
    run: RunFolder,
    home: Path,
    *,
    job_id: str,
    attempt: int = 1,
    ray: bool = False,
    on_point: OnPoint = lambda _: None,
) -> int:
    """Runs a job in its folder to the end, or on from where an earlier call was stopped or killed.

    Args:
        spec: the job; must be the one that the folder already holds, if it holds one. A model that is another job's is
            kept there as what it stands for.
        run: the folder; locked, so two processes never run one job.
        home: where references to weights are looked up.
        job_id: written into record and card.
        attempt: counted by whoever starts the job again.
        ray: whether a cluster is at hand.
        on_point: gets each point of the curve when the loop runs in this process.

    Returns:
        The exit code; the record has the state and the reason.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(_locked(run.path / "lock")):
            logger.error("another process runs the job in %s; wait for it, or cancel it", run.path)
            return FAILED
        stack.enter_context(_story_in_mirror(spec, run))
        stack.enter_context(run.logging())
        if ray and (before := run.read_record()) is not None and before.state == "SUCCEEDED":
            logger.info("an earlier attempt, of which nobody had heard, has succeeded meanwhile")
            return SUCCEEDED
        try:
            spec = settled(spec, home)
        except ArtifactError as error:
            with Journal(run, job_id, attempt) as journal:
                journal.finish("FAILED", f"model: {error}")
            return FAILED
        if problem := _claim(spec, run, home):
            logger.error("%s", problem)
            return FAILED
        journal = stack.enter_context(Journal(run, job_id, attempt, max_duration=spec.max_duration))
        stop = stack.enter_context(StopRequest(run))
        try:
            if problems := look(spec, home):
                hints = dict.fromkeys(problem.hint for problem in problems if problem.hint)
                journal.finish("FAILED", "; ".join(problem.sentence for problem in problems), "; ".join(hints) or None)
                return FAILED
            work = Work(spec, run, home, job_id, ray, should_stop=stop, connected=stop.install)
            with tracing.span("work"):
                done = work.go(journal, on_point)
            if journal.out_of_time:
                run.stop.unlink(missing_ok=True)  # what is trained is still exported and evaluated
                if not done:
                    now = journal.update()
                    reached = f"step {now.step} of {now.total_steps}; the last checkpoint is kept"
                    journal.finish("FAILED", f"got max_duration of {spec.max_duration:.9g} s, reached {reached}", HINT)
                    return FAILED
            if not done or stop():
                journal.finish("STOPPED", "stopped on request; what is done is kept")
                return STOPPED
            with tracing.span("conclude"):
                concluded = work.conclude()
            if not concluded:
                journal.finish("STOPPED", "stopped on request between evaluations")
                return STOPPED
        except Exception as error:
            logger.exception("the job failed")
            journal.finish("FAILED", f"{type(error).__name__}: {error}", getattr(error, "hint", None))
            return FAILED
        except KeyboardInterrupt:
            journal.finish("STOPPED", "interrupted; continues from the last checkpoint")
            return STOPPED
        journal.finish("SUCCEEDED")
        logger.info("succeeded; the artifact is %s", run.artifact)
        return SUCCEEDED


def _mirror_of(spec: AnySpec, run: RunFolder) -> Mirror | None:
    """Where the run has a copy of its checkpoints, if it has one."""
    if not isinstance(spec, JobSpec) or spec.checkpoint.mirror is None:
        return None
    policy, wait = spec.checkpoint, threading.Event().wait
    return Mirror(spec.checkpoint.mirror, run.path.name, policy, wait=wait, delays_s=RETRY_DELAYS_S)


@contextlib.contextmanager
def _story_in_mirror(spec: AnySpec, run: RunFolder) -> Iterator[None]:
    """Where there is a mirror, job and log come from there to an empty disk, and the log goes there at the end."""
    mirror = _mirror_of(spec, run)
    if mirror is None:
        yield
        return
    mirror.fetch_story(run)
    try:
        yield
    finally:
        mirror.send_log(run.log)


def _claim(spec: AnySpec, run: RunFolder, home: Path) -> str | None:
    """Writes the spec into a new folder; refuses a folder that holds another job. Only `max_duration` may change.

    A job that was refused, and mended since, is no other job: nothing was begun.
    """
    text = spec.model_dump_json(indent=1)
    if not run.spec.exists():
        write_atomic(run.spec, text)
        return None
    held = settled(spec_of(run), home)  # the service writes the job as it was sent
    alone = all(_mirror_of(one, run) is None for one in (held, spec))  # nothing of it lies elsewhere
    if held.model_copy(update={"max_duration": spec.max_duration}) == spec or (alone and _never_began(run)):
        if run.spec.read_text() != text:
            write_atomic(run.spec, text)
        return None
    ours, theirs = spec.model_dump(), held.model_dump()
    keys = ", ".join(key for key in ours if ours[key] != theirs.get(key))
    return f"{run.path} holds another job (it differs in {keys}); use another folder, or --fresh to start anew"


def _never_began(run: RunFolder) -> bool:
    record = run.read_record()
    return record is not None and record.total_steps == 0 and not run.total_steps.exists()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """True while this process holds the lock; the system lets go of it when the process dies."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def run_local(spec: AnySpec, out: Path, *, fresh: bool = False, on_point: OnPoint = lambda _: None) -> int:
    """Runs a job in this process, without Ray, in the folder `out`; a second call continues.

    Args:
        spec: the job; `resources.workers` above 1 become micro-batches of one process.
        out: the run folder.
        fresh: forget what the folder, and its copy in a mirror, hold of an earlier run.
        on_point: gets each point of the curve.

    Raises:
        ValueError: the mirror is the run folder; `fresh` finds something else there, or a mirror that does not answer.
    """
    out = out.resolve()  # also `..`: its name is that of the run in a mirror
    run = RunFolder(out)
    mirror = _mirror_of(spec, run)
    if mirror is not None and Path(str(mirror)).resolve() == out:
        raise ValueError(f"got a mirror whose folder for this run is {out} itself, expected one on another disk")
    if fresh:
        if out.exists() and any(out.iterdir()) and not run.spec.exists():
            raise ValueError(f"got --fresh for {out}, which holds files but no run; choose an empty folder")
        _forget(run, mirror)
    run.stop.unlink(missing_ok=True)
    before = run.read_record()
    if before is None:
        job_id, attempt = f"local-{uuid.uuid4().hex[:12]}", 1
    else:
        job_id, attempt = before.job_id, before.attempt + 1
        if before.state == "SUCCEEDED":
            logger.info("%s is complete; --fresh runs it again", out)
    home = Path(os.environ.get("MANTA_HOME", out))
    return execute(spec, run, home, job_id=job_id, attempt=attempt, on_point=on_point)


def _forget(run: RunFolder, mirror: Mirror | None) -> None:
    """Removes a run, first its copy in the mirror, from which it would be continued."""
    if mirror is not None:
        try:
            mirror.clear()
        except (OSError, ValueError) as error:
            raise ValueError(f"got --fresh, but {mirror} cannot be emptied ({error}); see that it answers") from error
    if run.path.exists():
        shutil.rmtree(run.path)


def _job_id() -> str:
    """The id under which the service or Ray knows this process."""
    if job_id := os.environ.get("MANTA_JOB_ID"):
        return job_id
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    submission_id: str | None = config.get("metadata", {}).get("job_submission_id")
    if submission_id is None:
        raise SystemExit(
            "workloads.run is started by the service or by `ray job submit`; without Ray use `manta run --local`"
        )
    return submission_id


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m workloads.run", description=__doc__.split("\n")[0])
    parser.add_argument("spec", type=Path, help="job.yaml or job.json")
    arguments = parser.parse_args(argv)
    job_id, attempt = _job_id(), int(os.environ.get("MANTA_ATTEMPT", "1"))
    log_lines.from_environment(job_id=job_id, attempt=str(attempt))
    home = os.environ.get("MANTA_HOME")
    if home is None:
        raise SystemExit("MANTA_HOME is not set in this cluster; start it by `manta up`, or set it on every node")
    try:
        spec = read_spec(arguments.spec).absolute(arguments.spec.absolute().parent)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{arguments.spec} is no job: {error}") from error
    run = RunFolder(Path(home) / "runs" / job_id)
    tracing.start("manta-run")
    about = {"manta.job.id": job_id, "manta.job.attempt": attempt}
    try:
        with tracing.span("run", about, parent=os.environ.get("TRACEPARENT")) as span:
            code = execute(spec, run, Path(home), job_id=job_id, attempt=attempt, ray=True)
            if span is not None:
                span.set_attribute("process.exit.code", code)
        return code
    finally:
        tracing.stop()


if __name__ == "__main__":
    sys.exit(main())
