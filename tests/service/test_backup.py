"""A backup of a service at work, restored elsewhere: what it holds, what it refuses, and that the service goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service import backup as backups
from service import cli
from service.backup import backup, restore, verified
from service.backup_database import BackupError
from service.principal import ALL, LOCAL
from service.registry import Registry
from service.settings import Settings
from service.store import Job, Store
from service.tokens import Tokens
from tests.postgres import Postgres
from tests.service.fakes import write_record
from tests.service.world import BODY, World
from tests.toy_artifact import image, write_artifact
from workloads.inference import Model

runner = CliRunner()
cli._more_commands()


@pytest.fixture
def world(database: str, tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "home", database_url=database)
    yield world
    world.store.close()


@pytest.fixture
def elsewhere(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Settings]]:
    """Makes an empty home, with an empty database of the same kind as the URL is of."""
    made = []

    def settings(like: str) -> Settings:
        url = f"sqlite:///{tmp_path / 'elsewhere' / 'manta.db'}"
        if not like.startswith("sqlite"):
            server: Postgres = request.getfixturevalue("postgres")
            made.append(server.create())
            url = server.url(made[-1])
        return Settings(home=tmp_path / "elsewhere", database_url=url)

    yield settings
    for name in made:
        request.getfixturevalue("postgres").drop(name)


def ends(world: World, job: Job) -> None:
    """Its run has succeeded; the service has not looked yet."""
    write_artifact(world.folder(job) / "artifact", "classifier")
    write_record(world.folder(job), "SUCCEEDED", world.jobs.get(job.id).attempt, step=9)
    world.status(job, "SUCCEEDED")


def test_of_a_service_at_work_restored_elsewhere(
    world: World, elsewhere: Callable[[str], Settings], tmp_path: Path
) -> None:
    done, ended, running, waiting = (world.submissions.submit(BODY | {"register": f"m{i}"})[0] for i in range(4))
    world.ray.cpus = 3
    world.reconciler.round()
    ends(world, done)
    world.reconciler.round()
    for job in (ended, running):
        write_record(world.folder(job), "RUNNING", step=3, age_s=60)
    world.reconciler.round()
    ends(world, ended)
    world.store.put_deployment("m0", 1, "RUNNING", None)
    token = Tokens(world.store).create(LOCAL, "ann", "admin", ALL, None)[1]
    states = [world.state(job) for job in (done, ended, running, waiting)]
    assert states == ["SUCCEEDED", "RUNNING", "RUNNING", "STARTING"]  # of the last Ray has just been asked
    before = {job.id for job in world.jobs.list(limit=500)}
    accepted, done_submitting = [], threading.Event()

    def submit() -> None:
        while not done_submitting.is_set():
            accepted.append(world.submissions.submit(BODY)[0].id)
            write_record(world.settings.runs / accepted[-1], "RUNNING")

    thread = threading.Thread(target=submit)
    thread.start()
    try:
        made = backup(world.settings, tmp_path / "saved")
    finally:
        done_submitting.set()
        thread.join()
    settings = elsewhere(world.settings.database)
    assert restore(settings, tmp_path / "saved") == made
    again = World(settings.home, database_url=settings.database)
    held = {job.id for job in again.jobs.list(limit=500)}
    assert before <= held <= before | set(accepted) and made.counts["jobs"] == len(held)
    assert {path.name for path in settings.runs.iterdir()} <= held  # else they would be adopted as strangers
    again.ray.cpus = 2
    again.reconciler.round()
    assert [again.state(job) for job in (done, ended, running)] == ["SUCCEEDED", "SUCCEEDED", "STARTING"]
    assert (running.id, 2) in again.ray.submitted and done.id not in {name for name, _ in again.ray.submitted}
    registry = Registry(settings, again.store)
    assert registry.of_jobs([done.id, ended.id]) == {done.id: ["m0@1"], ended.id: ["m1@1"]}
    images = [image(seed) for seed in range(3)]
    old = Model(world.settings.registry / "m0" / "1").predict(images)
    assert Model(registry.folder("m0", registry.get("m0").version)).predict(images) == old
    assert [(d.name, d.version) for d in again.store.list_deployments()] == [("m0", 1)]
    assert Tokens(again.store).authenticate(token).name == "ann"
    last = max(job.number for job in again.jobs.list(limit=500))
    assert again.submissions.submit(BODY)[0].number == last + 1  # numbers go on
    assert again.jobs.events(done.id) == world.jobs.events(done.id)
    again.store.close()


def test_an_installation_moves_from_sqlite_to_postgresql(
    tmp_path: Path, elsewhere: Callable[[str], Settings], postgres: Postgres
) -> None:
    world = World(tmp_path / "home")
    ids = [world.submissions.submit(BODY)[0].id for _ in range(3)]
    backup(world.settings, tmp_path / "saved")
    settings = elsewhere("postgresql")
    restore(settings, tmp_path / "saved")
    with closing(Store(settings.database)) as store, store.session() as session:
        rows = session.query(Job).order_by(Job.number).all()
        assert [row.id for row in rows] == ids
        assert [row.spec for row in rows] == [world.jobs.get(job_id).spec for job_id in ids]
    world.store.close()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A backup of one job, which has run, and a model."""
    world = World(tmp_path / "home")
    job = world.submissions.submit(BODY | {"register": "m"})[0]
    world.reconciler.round()
    ends(world, job)
    world.reconciler.round()
    (world.folder(job) / "checkpoints").mkdir()
    (world.folder(job) / "checkpoints" / "latest").write_text("step-00000009")
    (world.folder(job) / ".record.json.1.tmp").write_text("half")
    backup(world.settings, tmp_path / "saved")
    world.store.close()
    return tmp_path / "saved"


def test_what_it_holds_and_what_not(saved: Path, tmp_path: Path) -> None:
    made = verified(saved)
    (run,) = (saved / "runs").iterdir()
    assert {path.name for path in run.iterdir()} == {"job.json", "record.json", "artifact"}
    assert (saved / "registry" / "m" / "1" / "model.safetensors").exists()
    assert (made.counts["jobs"], made.counts["model_versions"], made.checkpoints) == (1, 1, False)
    assert saved.stat().st_mode & 0o777 == 0o700  # hashes of tokens, and jobs of all projects
    whole = backup(Settings(home=tmp_path / "home"), tmp_path / "whole", checkpoints=True)
    assert f"runs/{run.name}/checkpoints/latest" in whole.files and whole.checkpoints
    assert (tmp_path / "whole" / "runs" / run.name / "checkpoints" / "latest").read_text() == "step-00000009"


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "backup.json").unlink(), "no backup"),
        (lambda folder: (folder / "backup.json").write_text("{}"), "no backup"),
        (lambda folder: shutil.rmtree(folder / "registry"), "without registry/m/1/"),
        (lambda folder: next(folder.glob("runs/*/record.json")).write_text("{}"), "damaged runs/job-"),
        (lambda folder: (folder / "manta.db").write_bytes(b"\0" * 4096), "damaged manta.db"),
    ],
)
def test_a_damaged_one_is_refused_and_nothing_is_restored(
    saved: Path, tmp_path: Path, harm: Callable[[Path], object], said: str
) -> None:
    harm(saved)
    with pytest.raises(BackupError, match=said):
        restore(Settings(home=tmp_path / "new"), saved)
    assert not (tmp_path / "new").exists()


def test_a_damaged_database_is_refused_whatever_its_manifest_says(saved: Path, tmp_path: Path) -> None:
    for harm, said in ((b"\0" * 4096, "no database"), (None, "rows without their parents|damaged")):
        if harm is None:
            data = bytearray((tmp_path / "home" / "manta.db").read_bytes())
            data[-2000:] = b"\xff" * 2000
            harm = bytes(data)
        (saved / "manta.db").write_bytes(harm)
        manifest = json.loads((saved / "backup.json").read_text())
        manifest["files"]["manta.db"] = backups._digest(saved / "manta.db")
        (saved / "backup.json").write_text(json.dumps(manifest))
        with pytest.raises(BackupError, match=f"{said}|expected"):
            verified(saved)


def test_nothing_is_overwritten(saved: Path, tmp_path: Path, world: World) -> None:
    with pytest.raises(BackupError, match="which exists, expected a new folder"):
        backup(Settings(home=tmp_path / "home"), saved)
    with pytest.raises(BackupError, match="not empty; move it away"):
        restore(Settings(home=tmp_path / "home"), saved)
    with pytest.raises(BackupError, match=r"which exists, expected none|expected an empty one"):
        restore(Settings(home=tmp_path / "new", database_url=world.settings.database), saved)
    assert not (tmp_path / "new").exists()


def test_one_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackupError, match=r"manta\.db, which does not exist"):
        backup(Settings(home=tmp_path / "nowhere"), tmp_path / "saved")
    world = World(tmp_path / "home")
    world.submissions.submit(BODY)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backups, "_copy_run", full)
    with pytest.raises(OSError, match="No space left"):
        backup(world.settings, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    world.store.close()


def test_a_run_that_writes_meanwhile_is_copied_so_that_it_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path / "home")
    job = world.submissions.submit(BODY)[0]
    write_record(world.folder(job), "RUNNING")
    folder = world.folder(job) / "checkpoints"
    folder.mkdir()
    for name in ("latest", "step-00000001.pt", "step-00000002.pt"):
        (folder / name).write_text(name)
    order, copy = [], shutil.copy2

    def copy_while_it_is_pruned(source: Path, target: Path) -> None:
        order.append(source.name)
        (folder / "step-00000001.pt").unlink(missing_ok=True)
        copy(source, target)

    monkeypatch.setattr("service.backup.shutil.copy2", copy_while_it_is_pruned)
    backup(world.settings, tmp_path / "saved", checkpoints=True)
    assert order == ["record.json", "step-00000002.pt", "step-00000001.pt", "latest"]
    names = {path.name for path in (tmp_path / "saved" / "runs" / job.id / "checkpoints").iterdir()}
    assert names == {"latest", "step-00000002.pt"}
    world.store.close()


def test_by_the_command_line(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANTA_DATABASE_URL", raising=False)
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "home"))
    made = runner.invoke(cli.app, ["backup", str(tmp_path / "one")])
    assert made.exit_code == 0 and "jobs\t1" in made.stdout
    assert "not held: checkpoints (--checkpoints), shards" in made.stdout
    refused = runner.invoke(cli.app, ["backup", str(tmp_path / "one")])
    assert refused.exit_code == 1 and "expected a new folder" in refused.stderr
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "new"))
    restored = runner.invoke(cli.app, ["restore", str(tmp_path / "one"), "--json"])
    assert restored.exit_code == 0 and json.loads(restored.stdout)["counts"]["jobs"] == 1
    refused = runner.invoke(cli.app, ["restore", str(tmp_path / "one")])
    assert refused.exit_code == 1 and "not empty" in refused.stderr
    again = World(tmp_path / "new")
    again.reconciler.round()
    assert [job.state for job in again.jobs.list(limit=5)] == ["SUCCEEDED"] and again.ray.submitted == []
    again.store.close()


def test_a_dump_of_postgresql_restores_into_an_empty_database(
    postgres: Postgres, migrated: str, tmp_path: Path
) -> None:
    """The commands of the chart's README."""
    missing = [name for name in ("pg_dump", "psql") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed")
    names = postgres.create(migrated), postgres.create()
    world = World(tmp_path / "home", database_url=postgres.url(names[0]))
    ids = [world.submissions.submit(BODY)[0].id for _ in range(3)]
    where = ["--host", "127.0.0.1", "--port", str(postgres.port), "--username", "manta"]
    text = subprocess.run(["pg_dump", *where, names[0]], check=True, capture_output=True, timeout=60).stdout
    psql = ["psql", *where, "--set", "ON_ERROR_STOP=1", "--quiet", names[1]]
    subprocess.run(psql, input=text, check=True, stdout=subprocess.DEVNULL, timeout=60)
    again = World(tmp_path / "home", database_url=postgres.url(names[1]))
    assert [job.id for job in again.jobs.list(limit=5)] == ids[::-1]
    assert again.submissions.submit(BODY)[0].number == world.jobs.get(ids[-1]).number + 1
    for one in (world, again):
        one.store.close()
    for name in names:
        postgres.drop(name)
