"""A whole installation on this machine: three ways in, a driver killed, everything restarted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import embedded
from cluster.doctor import listening
from cluster.embedded import Head
from service.client import ApiError, Client
from tests.faults.faults import SEED
from tests.faults.ray_faults import replica_killed
from tests.faults.table import Row
from tests.faults.trial import final_weights
from tests.toy import TOY_MAE
from tests.toy_artifact import image
from tests.toy_search import toy_search
from tests.waiting import until
from workloads.record import RunFolder
from workloads.run import SUCCEEDED, run_local
from workloads.spec import JobSpec

pytestmark = pytest.mark.ray


def manta(home: Path, *arguments: str, code: int = 0) -> str:
    """Runs the command as a user would, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MANTA_"))}
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "--home", str(home), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("installation")
    manta(home, "up", "--cpus", "3")
    yield home
    manta(home, "down")


def head_of(home: Path) -> Head:
    head = embedded.read(home)
    assert head is not None
    return head


def classifier(toy_job: Callable[..., JobSpec], **changes: Any) -> dict[str, Any]:
    return toy_job(method={"name": "fine_tune"}, **changes).model_dump(mode="json")


def test_three_ways_in_make_one_list(home: Path, toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(classifier(toy_job, name="three", register="three")))
    head = head_of(home)
    with Client(head.url) as client:
        ids = [client.submit(yaml.safe_load(path.read_text()))["id"]]
        ids.append(manta(home, "submit", str(path)).split()[0])
        script = f'{embedded.shell_exports(head)}\nray job submit --no-wait -- python -m workloads.run "{path}"'
        printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True).stdout
        ids.append(next(word.strip("'") for word in printed.split() if word.startswith("'raysubmit_")))
        until(lambda: ids[2] in {job["id"] for job in client.jobs()}, "the job by Ray is in the list")
        jobs = [client.wait(job_id) for job_id in ids]
        assert [(job["state"], job["reason"]) for job in jobs] == [("SUCCEEDED", None)] * 3
        assert [job["origin"] for job in jobs] == ["rest", "rest", "ray"]
        assert sorted(job["models"][0] for job in jobs) == ["three@1", "three@2", "three@3"]
        assert all(client.metrics(job_id)[-1]["step"] == 20 for job_id in ids)
        assert "succeeded" in client.logs(ids[0])


def test_a_killed_driver_and_a_cancel(home: Path, toy_job: Callable[..., JobSpec]) -> None:
    """The driver dies without a word: the job goes on from its checkpoint. Then it is cancelled, twice."""
    with Client(head_of(home).url) as client:
        job_id = client.submit(classifier(toy_job, epochs=5000, checkpoint={"every_steps": 20}))["id"]
        run = RunFolder(home / "runs" / job_id)
        until(lambda: client.job(job_id)["progress"]["step"] > 40, "it trains")
        record = run.read_record()
        assert record is not None
        os.kill(record.pid, signal.SIGKILL)
        until(lambda: client.job(job_id)["attempt"] == 2 and client.job(job_id)["state"] == "RUNNING", "it runs again")
        assert run.log.read_text().count("step 0 of") == 1  # the second attempt started at a checkpoint
        states = [client.cancel(job_id)["state"] for _ in range(2)]
        assert states[0] == "CANCELLING"
        job = client.wait(job_id)
        assert (job["state"], client.cancel(job_id)["state"]) == ("CANCELLED", "CANCELLED")
        stopped = run.read_record()
        assert stopped is not None and stopped.state == "STOPPED"


def test_a_student_learns_from_a_job_and_from_a_registered_model(home: Path, toy_job: Callable[..., JobSpec]) -> None:
    """Two steps: a teacher, then students that name it, and one whose teacher is not there."""
    short = {"epochs": None, "steps": 4}
    with Client(head_of(home).url) as client:

        def student(teacher: str) -> str:
            method = {**TOY_MAE, "name": "dmae", "teacher": teacher, "student_blocks": [0], "teacher_blocks": [1]}
            job_id: str = client.submit(toy_job(method=method, **short).model_dump(mode="json"))["id"]
            return job_id

        teacher = client.submit(toy_job(**short, register="toy-teacher").model_dump(mode="json"))["id"]
        assert client.wait(teacher)["models"] == ["toy-teacher@1"]
        ids = [student(name) for name in (f"job:{teacher}", "toy-teacher@1")]  # at once: a start is most of either
        students = [client.wait(job_id) for job_id in ids]
        assert [(job["state"], job["reason"]) for job in students] == [("SUCCEEDED", None)] * 2
        curves = [[point["loss"] for point in client.metrics(job["id"])] for job in students]
        assert curves[0] == curves[1] != []
        with pytest.raises(ApiError, match="no-such-teacher"):
            student("no-such-teacher@1")


def test_what_a_search_finds_is_trained_registered_and_served(home: Path, toy_job: Callable[..., JobSpec]) -> None:
    search = toy_search({"iterations": 200}, resources={"workers": 2}, islands=2, migrate_every=50)
    with Client(head_of(home).url) as client:
        with pytest.raises(ApiError, match="expected at least 6, which the smallest network has"):
            client.submit(toy_search({"budget": {"layers": 5}}).model_dump(mode="json"))
        with pytest.raises(ApiError, match="names no finished job"):
            client.submit(classifier(toy_job, model={"name": "job:none"}))
        assert "zen_nas" in [one["name"] for one in client.searches()]
        found = client.wait(client.submit(search.model_dump(mode="json"))["id"])
        assert (found["state"], found["reason"], found["search"]) == ("SUCCEEDED", None, "zen_nas")
        assert found["found"]["costs"]["parameters"] <= 200_000
        page = client.report(found["id"])
        assert len(page) > 4 * 2**20 and found["found"]["structure"] in page  # plotly's script is larger than that
        trained = client.wait(
            client.submit(classifier(toy_job, model={"name": f"job:{found['id']}"}, epochs=2, register="winner"))["id"]
        )
        assert (trained["state"], trained["models"]) == ("SUCCEEDED", ["winner@1"])
        assert client.deploy("winner", wait_s=120)["state"] == "RUNNING"
        (answer,) = client.predict("winner", [image(0)])
        assert answer["label"] in answer["probabilities"]
        client.undeploy("winner")


def test_a_killed_replica_costs_a_job_nothing(
    home: Path, toy_job: Callable[..., JobSpec], tmp_path: Path, record_row: Callable[[Row], None]
) -> None:
    spec = toy_job(epochs=None, steps=400, log_steps=1, checkpoint={"every_steps": 50})
    assert run_local(spec, tmp_path / "alone") == SUCCEEDED
    row = replica_killed(head_of(home), spec, random.Random(SEED), final_weights(RunFolder(tmp_path / "alone")))
    record_row(row)


def test_everything_comes_back_after_a_restart(
    home: Path, toy_job: Callable[..., JobSpec], toy_shards: dict[str, str]
) -> None:
    """A running job and a deployed model outlive `manta down`; the sockets stay on loopback all the while."""
    with tarfile.open(toy_shards["test"].replace("{000000..000000}", "000000")) as tar:
        member = next(m for m in tar if m.name.endswith(".png"))
        file = tar.extractfile(member)
        assert file is not None
        image = file.read()
    with Client(head_of(home).url) as client:
        client.deploy("three", wait_s=60)
        before = client.predict("three", [image])
        assert before[0]["label"] in "abcd"
        with pytest.raises(ApiError) as caught:
            client.predict("three", [b"no image"])
        assert caught.value.status == 422
        job_id = client.submit(classifier(toy_job, epochs=200, checkpoint={"every_steps": 20}))["id"]
        until(lambda: client.job(job_id)["progress"]["step"] > 40, "it trains")
    open_to_all = [name for name, _, _ in listening(head_of(home).pid)]
    assert all("ServeReplica" in name for name in open_to_all), open_to_all  # Ray's own, which checks the token
    manta(home, "doctor")  # exit code 0: it finds nothing wrong
    manta(home, "down")
    manta(home, "jobs", code=4)
    manta(home, "up", "--cpus", "3")
    with Client(head_of(home).url) as client:
        job = client.wait(job_id)
        assert (job["state"], job["reason"]) == ("SUCCEEDED", None) and job["attempt"] == 2
        assert RunFolder(home / "runs" / job_id).log.read_text().count("step 0 of") == 1
        client.deploy("three", wait_s=60)
        assert client.predict("three", [image]) == before


def test_the_command_line_on_a_running_service(home: Path, tmp_path: Path, toy_shards: dict[str, str]) -> None:
    assert "three" in manta(home, "models")
    assert manta(home, "methods").startswith("name\tpaper")
    with tarfile.open(toy_shards["test"].replace("{000000..000000}", "000000")) as tar:
        member = next(m for m in tar if m.name.endswith(".png"))
        file = tar.extractfile(member)
        assert file is not None
        (tmp_path / "a.png").write_bytes(file.read())
    printed = manta(home, "predict", "three", str(tmp_path / "a.png"))
    assert printed.splitlines()[1].split("\t")[1] in "abcd"
    manta(home, "predict", "nobody", str(tmp_path / "a.png"), code=1)
    manta(home, "job", "job-none", code=1)
