"""The loop and its data: several streams, samplers, worker processes, damage, and what the run says about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.toy import write_shards
from workloads import assemble, catalog
from workloads.data.manifest import DataError
from workloads.data.samplers import PK, SamplerConfig
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.metrics import Warnings
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.train import train

Make = Callable[..., JobSpec]


class Watching(Method):
    """Two streams; notes the rows of each batch in a file of its own."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    paper = "none"
    exports = "classifier"
    streams = ("labeled", "unlabeled")
    seen: ClassVar[list[dict[str, list[int]]]] = []

    def __init__(self, config: Any, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        self.weight = nn.Parameter(torch.zeros(()))

    @classmethod
    def sampler(cls, config: Any) -> SamplerConfig | None:
        return PK(k=2)

    def forward(self, batch: dict[str, Batch], progress: Progress) -> Output:
        self.seen.append(
            {name: stream["index"].tolist() for name, stream in batch.items()}
            | {"labels": batch["labeled"]["label"].tolist()}
        )
        mean: Tensor = torch.stack([stream["image"].mean() for stream in batch.values()]).sum()
        return Output((self.weight - mean) ** 2)


@pytest.fixture
def two_streams(toy_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    load = catalog.load
    monkeypatch.setattr(catalog, "load", lambda kind, name: Watching if name == "watching" else load(kind, name))
    monkeypatch.setattr(Watching, "seen", [])
    few, many = (write_shards(tmp_path, name, n, 2) for name, n in (("few", 16), ("many", 40)))

    def make(**changes: Any) -> JobSpec:
        data = {"labeled": {"shards": few}, "unlabeled": {"shards": many, "batch_size": 16}}
        return toy_job(method={"name": "watching"}, data=data, **changes)

    return make


def test_the_first_stream_sets_the_epoch_and_others_go_round_in_their_own_order(
    two_streams: Make, tmp_path: Path
) -> None:
    spec = two_streams(epochs=10)
    assert train(spec, RunFolder(tmp_path / "run"), tmp_path)
    assert len(Watching.seen) == 20, "16 samples, 8 a batch: 2 steps an epoch"
    for step in Watching.seen:
        labels = torch.tensor(step["labels"]).reshape(4, 2)
        assert (labels[:, 0] == labels[:, 1]).all() and len(set(labels[:, 0].tolist())) == 4
    first = [row for step in Watching.seen[:2] for row in step["labeled"]]
    assert sorted(first) == list(range(16)), "P x K over 4 x 4 images: each once an epoch"
    rounds = [[row for step in Watching.seen[i : i + 2] for row in step["unlabeled"]] for i in range(0, 20, 2)]
    assert all(len(set(rows)) == 32 for rows in rounds) and rounds[0] != rounds[1]


def test_streams_resume_at_the_very_next_sample(
    two_streams: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = two_streams(epochs=4, checkpoint={"every_steps": 3})
    assert train(spec, RunFolder(tmp_path / "whole"), tmp_path)
    whole = list(Watching.seen)
    Watching.seen.clear()
    run = RunFolder(tmp_path / "halves")

    class Killed(Exception):
        pass

    def after_step(_: Method, progress: Progress) -> None:
        if progress.step == 4:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Watching, "after_step", after_step)
        train(spec, run, tmp_path)
    halves = Watching.seen[:3]
    Watching.seen.clear()
    assert train(spec, run, tmp_path)
    assert halves + Watching.seen == whole


def test_worker_processes_bring_what_the_thread_brings(toy_job: Make, tmp_path: Path) -> None:
    readers = {}
    for workers in (0, 2):
        spec = toy_job(resources={"loader_workers": workers})
        manifests = {"train": assemble.open_stream(spec.data["train"])}
        readers[workers] = assemble.readers_of(spec, manifests)["train"]
    made = {workers: list(reader.batches(3, 17)) for workers, reader in readers.items()}
    assert len(made[0]) == len(made[2]) == 14
    for a, b in zip(made[0], made[2], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert readers[2].busy_s > 0


def test_worker_processes_report_bad_samples_and_stop_with_the_reason(toy_job: Make, tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, "bad", 40, 1)
    spec = toy_job(data={"train": {"shards": pattern}}, resources={"loader_workers": 1})
    manifest = assemble.open_stream(spec.data["train"])
    with open(tmp_path / "bad-000000.tar", "r+b") as file:
        for row in (4, 9):
            file.seek(int(manifest.members["image"].offset[row]) + 30)
            file.write(b"damage" * 10)
    (reader,) = assemble.readers_of(spec, {"train": manifest}).values()
    with pytest.raises(DataError, match=r"got [12] of 40 samples that cannot be decoded.*0000[04]"):
        list(reader.batches(0, 5))
    reader.max_bad_share = 1.0
    index = torch.cat([batch["index"] for batch in reader.batches(0, 5)])
    assert not {4, 9} & set(index.tolist()) and set(reader.skipped) == {4, 9}


def test_quarantined_members_are_in_the_record_and_too_many_end_the_job(toy_job: Make, tmp_path: Path) -> None:
    import tarfile

    pattern = write_shards(tmp_path, "q", 40, 1)
    with tarfile.open(tmp_path / "q-000000.tar", "a") as tar:
        for name in ("../climbs.png", "zz.cls"):
            info = tarfile.TarInfo(name)
            tar.addfile(info)
    spec = toy_job(data={"train": {"shards": pattern, "max_bad_share": 0.1}}, epochs=1)
    run = RunFolder(tmp_path / "run")
    assert train(spec, run, tmp_path)
    lines = run.skipped.read_text().splitlines()
    assert (
        len(lines) == 2
        and any("climbs out" in line for line in lines)
        and any("no class number" in line for line in lines)
    )
    with pytest.raises(DataError, match=r"got 2 damaged members beside 40 samples.*climbs out"):
        train(toy_job(data={"train": {"shards": pattern}}), RunFolder(tmp_path / "strict"), tmp_path)


def test_a_pipe_trains_and_the_record_says_what_is_not_promised(
    toy_job: Make, toy_shards: dict, tmp_path: Path
) -> None:
    source = toy_shards["train"].replace("{000000..000002}", "000000")
    spec = toy_job(data={"train": {"shards": f"pipe:cat {source}", "epoch_samples": 24, "num_classes": 4}})
    run = RunFolder(tmp_path / "run")
    assert train(spec, run, tmp_path)
    (line,) = run.warnings.read_text().splitlines()
    assert line.startswith("train: read as a stream") and "starts its sources again" in line


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"shards": "pipe:cat x"}, "without epoch_samples"),
        ({"shards": "pipe:cat x", "epoch_samples": 5, "per_class": 1}, "cannot be chosen"),
        ({"shards": "/x.tar", "epoch_samples": 5}, "for files, which are counted"),
        ({"shards": "/x.tar", "batch_size": 3}, "for 2 micro-batches of a step, expected a multiple; use 2"),
    ],
)
def test_streams_that_make_no_sense_are_refused(toy_job: Make, stream: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_job(data={"train": stream}, micro_batch_size=4)


class Fed:
    """A reader that says how long its batches took."""

    def __init__(self) -> None:
        self.busy_s = 0.0


@pytest.mark.parametrize(("wait_s", "said"), [(0.0, False), (0.9, False), (5.0, True)])
def test_a_model_that_waits_for_data_says_how_many_cores_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_s: float, said: bool
) -> None:
    now = 0.0
    monkeypatch.setattr("workloads.metrics.time.perf_counter", lambda: now)
    reader = Fed()
    warnings = Warnings(tmp_path / "warnings.txt", {"train": reader}, [])  # type: ignore[dict-item]
    warnings.waited(100.0)  # to fill the loader at the start
    warnings.point()
    now, reader.busy_s = 10.0, 12.0
    warnings.waited(wait_s)
    warnings.point()
    assert (tmp_path / "warnings.txt").exists() == said
    if said:  # 12 s of loading for 5 s of computing
        assert (
            "loader-bound: 3 cores needed for this model, which waits for data 50%"
            in (tmp_path / "warnings.txt").read_text()
        )


def test_warnings_reach_the_record(tmp_path: Path) -> None:
    from workloads.journal import Journal

    run = RunFolder(tmp_path)
    run.warnings.write_text("one\ntwo\n")
    with Journal(run, "job", 1):
        pass
    assert json.loads(run.record.read_text())["warnings"] == ["one", "two"]
