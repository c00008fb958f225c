"""Ray's Jobs API, made safe to repeat: the one place that submits to, asks and stops Ray.

Ray answers a duplicate id with HTTP 500, forgets jobs with its head, and can call a
living job FAILED. So nothing here is believed to be the truth about a job; see
`service.reconciler`.
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from service.errors import Unavailable
from service.packing import Hardware, Node, may_come, of_driver
from service.settings import Settings
from workloads import tracing
from workloads.spec_any import read_spec

logger = logging.getLogger(__name__)

RayStatus = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
HARDWARE_TTL_S = 0.5  # a round asks once; a burst of submissions seldom more often
GIB = 1 << 30
DRIVER_GIB = 0.46  # resident, of a job that trains on workers, after its imports: measured (cluster/README.md)
HEAD_GIB = 3.0  # of Ray's control plane and the front end, as 8 GiB hold about ten drivers
HEAD_SHARE = 0.4  # at most, of a small head
HEAD = "node:__internal_head__"  # the resource by which Ray marks it
TAIL_LINES = 30
TIMEOUT_S = (5.0, 30.0)  # to connect, and of silence: a head may hang, and would keep the reconciler for ever


def submission_id(job_id: str, attempt: int) -> str:
    """The id in Ray: the job's own for the first attempt.

    Ray keeps the name of a dead driver's supervisor taken for a while, so each later attempt has a name of its own.
    """
    return job_id if attempt <= 1 else f"{job_id}-{attempt}"


class RayJobs:
    """Blocking; called from threads. Raises Unavailable when Ray cannot be reached."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client: Any = None
        self._hardware: tuple[float, Hardware] | None = None

    def _connected(self) -> Any:
        if self._client is None:
            try:
                self._client = _client(self._settings.ray_dashboard_url)
            except Exception as error:  # ray raises bare RuntimeError and ConnectionError here
                raise Unavailable(f"Ray at {self._settings.ray_dashboard_url} does not answer: {error}") from error
        return self._client

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        client = self._connected()
        try:
            return getattr(client, name)(*args, **kwargs)
        except (RuntimeError, OSError) as error:  # what the client makes of any HTTP error, and of no answer
            raise Unavailable(f"Ray could not {name.replace('_', ' ')}: {error}") from error

    def statuses(self) -> dict[str, RayStatus]:
        """Every job that Ray knows by a submission id."""
        jobs = self._call("list_jobs")
        return {job.submission_id: job.status.value for job in jobs if job.submission_id is not None}

    def submit(self, job_id: str, attempt: int) -> None:
        """Starts the run of an attempt; a second call for one that Ray knows changes nothing."""
        name = submission_id(job_id, attempt)
        if name in self.statuses():
            return
        spec = self._settings.runs / job_id / "job.json"
        # A job inherits the environment of its node, where the service may have its own secrets: "" hides them.
        environment = dict.fromkeys(self._settings.kept_from_jobs(), "") | {
            "MANTA_HOME": str(self._settings.home),
            "MANTA_JOB_ID": job_id,
            "MANTA_ATTEMPT": str(attempt),
            "RAY_JOB_STOP_WAIT_TIME_S": str(self._settings.stop_grace_s),
            "MANTA_LOG_FORMAT": self._settings.log_format,
            "PYTHONUNBUFFERED": "1",
        }
        if (here := tracing.traceparent()) is not None:
            environment["TRACEPARENT"] = here
        try:
            self._call(
                "submit_job",
                submission_id=name,
                entrypoint=shlex.join([sys.executable, "-m", "workloads.run", str(spec)]),
                runtime_env={"env_vars": environment},
                **self._reserved(spec),
            )
        except Unavailable:
            if name not in self.statuses():
                raise  # else the answer was lost, not the job

    def _reserved(self, spec: Path) -> dict[str, Any]:
        """What the driver needs when it is the one that trains."""
        resources = read_spec(spec).resources
        needs = {"CPU": resources.cpus, "GPU": resources.gpus, **resources.custom}
        asked = of_driver(needs, resources.max_workers, grows=self._grows)
        return {"entrypoint_num_cpus": asked.pop("CPU", None), "entrypoint_resources": asked or None}

    def stop(self, job_id: str, attempt: int) -> None:
        """SIGTERM, and SIGKILL after the grace; an attempt that Ray does not know is stopped already."""
        name = submission_id(job_id, attempt)
        if self.statuses().get(name) in ("PENDING", "RUNNING"):
            self._call("stop_job", name)

    def log_tail(self, job_id: str, attempt: int) -> str:
        """The last lines that the driver printed; empty where Ray knows nothing."""
        name = submission_id(job_id, attempt)
        if name not in self.statuses():
            return ""
        return "\n".join(str(self._call("get_job_logs", name)).splitlines()[-TAIL_LINES:])

    def hardware(self) -> Hardware:
        """What there is and what of it is used, and the nodes that may come."""
        if self._hardware is None or time.monotonic() - self._hardware[0] > HARDWARE_TTL_S:
            import ray
            from ray._private.state import available_resources_per_node

            try:
                found = [node for node in ray.nodes() if node["Alive"]]
                free = available_resources_per_node()
            except Exception as error:  # ray raises SystemError, ConnectionError and RaySystemError here
                raise Unavailable(f"Ray's resources are not known: {error}") from error
            found.sort(key=lambda node: HEAD not in node["Resources"])  # it first, where drivers run
            nodes = [Node(node["Resources"], _used(node["Resources"], free.get(node["NodeID"]))) for node in found]
            ours = self._settings
            drivers = ours.max_running_jobs or (drivers_on(nodes[0].total) if nodes else None)
            nodes += may_come(ours.cluster_nodes, [node for node in nodes if HEAD not in node.total])
            self._hardware = time.monotonic(), Hardware(nodes, drivers, self._grows)
        return self._hardware[1]

    @property
    def _grows(self) -> bool:
        return bool(self._settings.cluster_nodes)


def _client(address: str) -> Any:
    """Ray's own, which would wait for ever."""
    from ray.job_submission import JobSubmissionClient

    class Bounded(JobSubmissionClient):
        def _do_request(self, *words: Any, **more: Any) -> Any:
            return super()._do_request(*words, timeout=TIMEOUT_S, **more)

    return Bounded(address)


def drivers_on(node: Mapping[str, float]) -> int | None:
    """How many drivers the memory holds that Ray has on this node; None where it is not the head."""
    if HEAD not in node or "memory" not in node:
        return None
    memory = node["memory"] / GIB
    return max(1, int((memory - min(HEAD_GIB, HEAD_SHARE * memory)) / DRIVER_GIB))


def _used(total: Mapping[str, float], free: Mapping[str, float] | None) -> dict[str, float]:
    """Nothing of a node that joined this moment; Ray does not name what a node has nothing left of."""
    return {} if free is None else {name: amount - free.get(name, 0.0) for name, amount in total.items()}
