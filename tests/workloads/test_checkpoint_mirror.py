"""The mirror brings a run to a node with an empty disk, and its absence costs nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs
from torch import nn
from torch.optim import Optimizer

from tests.s3 import S3
from workloads import checkpoint, log_file
from workloads import checkpoint_folder as files
from workloads.checkpoint import CheckpointError, Checkpoints
from workloads.checkpoint_mirror import Mirror
from workloads.ranks import Ranks
from workloads.record import RunFolder
from workloads.spec_training import CheckpointPolicy


@pytest.fixture
def bucket(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    yield f"s3://{s3_server.bucket()}"
    s3_server.come_back()


@pytest.fixture
def frail(bucket: str, s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same bucket by a client that gives up at once: pyarrow's own asks for six seconds each time."""
    once = fs.AwsStandardS3RetryStrategy(max_attempts=1)
    store = s3_server.store(retry_strategy=once)
    monkeypatch.setattr(Mirror, "_store", fs.SubTreeFileSystem(f"{bucket.removeprefix('s3://')}/{RUN}", store))
    return bucket


@pytest.fixture(params=["folder", "s3"])
def mirror(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    url: str = (
        request.getfixturevalue("bucket") + "/runs/a" if request.param == "s3" else str(tmp_path / "mirror" / "a")
    )
    return url


RUN = "job-1"


def made(seed: int = 0) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def folder(disk: Path) -> Path:
    return RunFolder(disk / RUN).checkpoints


def checkpoints(disk: Path, mirror: str, delays_s: tuple[float, ...] = (), **policy: Any) -> Checkpoints:
    """Of the run, which lies on one disk or another."""
    return Checkpoints(folder(disk), CheckpointPolicy(mirror=mirror, **policy), Ranks(), mirror_delays_s=delays_s)


def save(writer: Checkpoints, step: int, metric: float | None = None) -> None:
    writer.save(step, *made(step), extra={"n": step}, metric=metric)


def listed(url: str, run: str = RUN) -> list[str]:
    store, path = fs.FileSystem.from_uri(url) if "://" in url else (fs.LocalFileSystem(), url)
    return sorted(info.base_name for info in store.get_file_info(fs.FileSelector(f"{path}/{run}")))


def both(*steps: int) -> list[str]:
    return ["latest", *(f"step-{step:08d}.{kind}" for step in steps for kind in ("json", "pt"))]


def test_a_node_with_an_empty_disk_continues(mirror: str, tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "a", mirror).restore(*made()).step == 0
    with checkpoints(tmp_path / "a", mirror, keep=1, keep_best=1) as writer:
        for step, metric in ((1, 0.5), (2, 0.1), (3, 0.2), (4, 0.3)):
            save(writer, step, metric)
    assert listed(mirror) == both(2, 4)
    model, optimizer = made(9)
    with checkpoints(tmp_path / "b", mirror, keep=1, keep_best=1) as other:
        assert other.restore(model, optimizer) == checkpoint.Restored(4, {"n": 4}, [])
        assert torch.equal(model.weight, made(4)[0].weight)
        assert checkpoint.latest_step(folder(tmp_path / "b")) == 4
        save(other, 5, 0.9)
    assert listed(mirror) == both(2, 5), "the best one is elsewhere, and stays"
    assert checkpoints(tmp_path / "a", mirror).restore(*made()).step == 5, "newer than what is on the disk"


@pytest.mark.parametrize("away", [False, True])
def test_the_mirror_goes_back_with_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: bool) -> None:
    there = str(tmp_path / "mirror")
    with pytest.raises(KeyError), checkpoints(tmp_path / "a", there, keep=1) as writer, writer.back_after(KeyError):
        save(writer, 1)
        writer.save(2, *made(2), extra={"n": 2}, metric=None, suspect=True)
        writer.wait()
        assert listed(there) == both(1, 2)
        if away:
            monkeypatch.setattr(Mirror, "_update", _refused)
        raise KeyError
    monkeypatch.undo()
    assert listed(there) == (both(1, 2) if away else both(1))
    restored = checkpoints(tmp_path / "a", there).restore(*made())
    assert restored.step == 1 and "step 2 is suspect" in restored.notes[0].text


def _refused(*_: object) -> None:
    raise OSError("connection refused")


def test_the_mirror_heals_the_disk(mirror: str, tmp_path: Path) -> None:
    with checkpoints(tmp_path / "a", mirror) as writer:
        save(writer, 1)
        save(writer, 2)
    (folder(tmp_path / "a") / "step-00000002.pt").write_bytes(b"")
    restored = checkpoints(tmp_path / "a", mirror).restore(*made())
    assert restored.step == 2 and restored.notes[0].text.endswith(f"continued from step 2 in {mirror}/{RUN}")
    assert checkpoint.restore_weights(folder(tmp_path / "a"), made()[0]) == 2


def test_folders_of_parts_go_there_and_back(mirror: str, tmp_path: Path) -> None:
    here, there, policy = folder(tmp_path / "a"), folder(tmp_path / "b"), CheckpointPolicy(keep=1)
    copy = Mirror(mirror, RUN, policy, wait=lambda _: True, delays_s=())
    for step in (1, 2):
        parts = [here / files.stem(step) / name for name in (".metadata", "__0_0.distcp")]
        parts[0].parent.mkdir(parents=True)
        for part in parts:
            part.write_bytes(part.name.encode() * step)
        sums = {f"{files.stem(step)}/{part.name}": files.sum_of(part) for part in parts}
        files.complete(here, files.Seal(step=step, files=sums, metric=None, time=0))
        assert copy.update(here)
    assert copy.steps() == [2]
    assert files.damage(there, copy.fetch(2, there)) is None
    assert files.latest_step(there) == 2


def test_runs_that_name_the_same_mirror_do_not_meet(mirror: str, tmp_path: Path) -> None:
    ours, theirs = (
        Checkpoints(
            tmp_path / name / "checkpoints", CheckpointPolicy(mirror=mirror, keep=1), Ranks(), mirror_delays_s=()
        )
        for name in ("my run", "my run%20#2")  # what a person may call a folder
    )
    with ours, theirs:
        save(ours, 7)
        assert theirs.restore(*made()).step == 0
        save(theirs, 2)
        save(ours, 8)
    assert listed(mirror, "my run") == both(8) and listed(mirror, "my run%20#2") == both(2)
    copy = Mirror(mirror, "my run", CheckpointPolicy(), wait=lambda _: True, delays_s=())
    copy.clear()
    assert copy.steps() == [] and listed(mirror, "my run%20#2") == both(2)


def test_a_store_that_is_away_is_asked_again(frail: str, s3_server: S3, tmp_path: Path) -> None:
    pauses: list[float] = []
    refused = s3_server.refused

    def wait(delay_s: float) -> bool:
        pauses.append(delay_s)
        if len(pauses) == 2:
            s3_server.come_back()
        return False

    with Checkpoints(tmp_path, CheckpointPolicy(), Ranks()) as writer:
        save(writer, 3)
    s3_server.leave()
    assert Mirror(frail, RUN, CheckpointPolicy(), wait=wait, delays_s=(1, 2, 4)).update(tmp_path)
    assert pauses == [1, 2] and s3_server.refused >= refused + 2
    assert listed(frail) == both(3)


def test_a_store_that_stays_away_costs_no_checkpoint_and_is_brought_up_to_date(
    frail: str, s3_server: S3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with checkpoints(tmp_path / "a", frail, delays_s=(0.01,)) as writer:
        save(writer, 1)
        writer.wait()
        s3_server.leave()
        save(writer, 2)
        writer.wait()
        assert checkpoint.latest_step(folder(tmp_path / "a")) == 2
        assert (
            files.mirrored_step(folder(tmp_path / "a")) == 1
        )  # what `manta_run_mirror_backlog_checkpoints` counts from
        (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert "step 2 is on the disk of the run but not yet in" in warning.getMessage()
        s3_server.come_back()
        assert listed(frail) == both(1)
        save(writer, 3)
    assert listed(frail) == both(2, 3) and files.mirrored_step(folder(tmp_path / "a")) == 3
    assert all(seal.seconds is not None for seal in files.seals(folder(tmp_path / "a")))


def test_training_does_not_wait_for_a_store_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def away(*_: object) -> None:
        asked.set()
        raise OSError("connection refused")

    monkeypatch.setattr(Mirror, "_update", away)
    writer = checkpoints(tmp_path / "a", str(tmp_path / "mirror"), delays_s=(3600,))
    save(writer, 1)
    assert asked.wait(10)
    save(writer, 2)  # ends the hour of waiting
    writer._wait_for_write()
    assert checkpoint.latest_step(folder(tmp_path / "a")) == 2
    writer._next_waits.set()
    writer.close()


def test_a_mirror_that_cannot_be_read_is_no_fresh_start(frail: str, s3_server: S3, tmp_path: Path) -> None:
    s3_server.leave()
    with pytest.raises(CheckpointError, match=f"{frail}/{RUN} cannot be read") as caught:
        checkpoints(tmp_path / "a", frail).restore(*made())
    assert "see that s3://" in caught.value.hint
    with Checkpoints(folder(tmp_path / "a"), CheckpointPolicy(), Ranks()) as writer:
        save(writer, 1)
    restored = checkpoints(tmp_path / "a", frail).restore(*made())
    assert restored.step == 1 and "cannot be read" in restored.notes[0].text and restored.notes[0].kind == "mirror_away"


def test_a_mirror_of_an_unknown_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"nowhere://x/{RUN} cannot be read"):
        checkpoints(tmp_path, "nowhere://x").restore(*made())


def test_a_large_one_goes_there_and_back(bucket: str, tmp_path: Path) -> None:
    with checkpoints(tmp_path / "a", bucket) as writer:
        writer.save(1, *made(), extra={"much": torch.arange(2 << 20)}, metric=None)  # 16 MiB: sent in pieces
    assert checkpoints(tmp_path / "b", bucket).restore(*made()).extra["much"][-1] == (2 << 20) - 1


def test_a_write_that_failed_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with (
        pytest.raises(CheckpointError, match="No space left"),
        checkpoints(tmp_path / "a", str(tmp_path / "m")) as writer,
    ):
        save(writer, 1)
    assert writer._mirrored is not None and writer._mirrored.result()
    assert not (tmp_path / "m").exists()


def test_the_log_goes_there_with_each_checkpoint_bounded_as_it_is(
    tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_file, "SEGMENT_BYTES", 300)
    run, (model, optimizer) = RunFolder(tmp_path / RUN), made()
    run.path.mkdir()
    there = Mirror(mirror, RUN, CheckpointPolicy(), wait=lambda _: True, delays_s=())
    for round_ in range(3):
        for i in range(20):
            log_file.append(run.log, "n", f"{round_} {i}")
        with checkpoints(tmp_path, mirror) as some:
            some.save(round_ + 1, model, optimizer, extra={}, metric=None)
        names = [log_file.segment(run.log, number).name for number in log_file.segments(run.log)]
        assert {name: there._read(name) for name in names} == {
            name: run.log.with_name(name).read_bytes() for name in names
        }
        listed = there._store.get_file_info(fs.FileSelector(""))
        assert sorted(info.base_name for info in listed if info.base_name.startswith("log.")) == sorted(names)
    assert len(names) == 1 + log_file.KEEP
    there.fetch_story(RunFolder(tmp_path / "elsewhere"))  # a node with an empty disk goes on with it
    assert {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()} == {
        name: run.log.with_name(name).read_bytes() for name in names
    }


def test_a_store_that_is_away_does_not_hold_up_the_end_of_a_log(tmp_path: Path, caplog: Any) -> None:
    log_file.append(tmp_path / "log.txt", "n", "x")
    (tmp_path / "file").write_text("no folder")
    away = Mirror(str(tmp_path / "file"), RUN, CheckpointPolicy(), wait=lambda _: True, delays_s=())
    assert not away.send_log(tmp_path / "log.txt") and "is not yet in" in caplog.text
