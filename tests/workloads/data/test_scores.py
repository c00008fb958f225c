"""Scores of samples: written best first, read for the shards that they are of and for no others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from tests.toy import make_job
from workloads import assemble
from workloads.data.columns import Manifest
from workloads.data.scores import FACTS, best, expect_scores, write_scores
from workloads.data.shards import DataError
from workloads.preflight import check
from workloads.record import RunFolder
from workloads.spec import Stream
from workloads.train import train

SCORES = np.tile(np.array([0.25, 1.0, 0.5, 0.75], np.float32), 20)  # of the 80 images


@pytest.fixture
def manifest(toy_shards: dict[str, str]) -> Manifest:
    return assemble.open_stream(Stream(shards=toy_shards["train"]))


@pytest.fixture
def scored(manifest: Manifest, tmp_path: Path) -> str:
    write_scores(tmp_path / "made" / "scores.parquet", manifest, SCORES, {"by": "hand"})
    return str(tmp_path / "made" / "scores.parquet")


def test_a_file_has_the_best_first_and_says_of_what_it_is(manifest: Manifest, scored: str) -> None:
    table = pq.read_table(scored).to_pydict()
    assert table["score"] == sorted(SCORES.tolist(), reverse=True)
    assert table["row"][:20] == [*range(1, 80, 4)], "equal scores keep the order of the set"
    assert all(SCORES[row] == score for row, score in zip(table["row"], table["score"], strict=True))
    assert table["key"] == [manifest.keys[row] for row in table["row"]]
    facts = json.loads(pq.read_schema(scored).metadata[FACTS])
    assert facts == {"content_hash": manifest.content_hash, "samples": 80, "how": {"by": "hand"}}
    assert [path.name for path in Path(scored).parent.iterdir()] == ["scores.parquet"]


@pytest.mark.parametrize(("keep", "kept"), [(0.25, [1]), (0.5, [1, 3]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_a_stream_keeps_the_best_share_in_the_order_of_the_set(
    manifest: Manifest, scored: str, toy_shards: dict[str, str], keep: float, kept: list[int]
) -> None:
    part = assemble.open_stream(Stream(shards=toy_shards["train"], scores=scored, keep=keep))
    assert list(part.keys) == [manifest.keys[row] for row in range(80) if row % 4 in kept]
    assert part.content_hash != manifest.content_hash
    assert part.num_classes == manifest.num_classes


def test_one_sample_at_least_is_kept(manifest: Manifest, scored: str) -> None:
    assert best(scored, manifest, 1e-6).tolist() == [1]


def test_scores_of_other_samples_are_refused(scored: str, toy_shards: dict[str, str]) -> None:
    other = Stream(shards=toy_shards["test"], scores=scored, keep=0.5)
    with pytest.raises(DataError, match=r"of 80 samples with content .*, expected those of these shards: 40 samples"):
        assemble.open_stream(other)


def test_files_that_hold_no_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got no file .*, expected scores there"):
        expect_scores(str(tmp_path / "scores.parquet"))
    (tmp_path / "text").write_text("a,b")
    pq.write_table(pa.table({"row": [1]}), tmp_path / "table.parquet")
    for name in ("text", "table.parquet"):
        with pytest.raises(DataError, match=r"holds no scores .*name its scores.parquet"):
            expect_scores(str(tmp_path / name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": "s.parquet"}, "got scores=s.parquet with keep=None, expected both"),
        ({"keep": 0.5}, "got scores=None with keep=0.5, expected both"),
        ({"scores": "s.parquet", "keep": 0}, "greater than 0"),
        ({"scores": "s.parquet", "keep": 0.5, "per_class": 3}, "expected one way to choose samples"),
        ({"shards": "pipe:cat x", "epoch_samples": 5, "scores": "s.parquet", "keep": 0.5}, "cannot be chosen"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Stream.model_validate({"shards": "a.tar"} | change)


def test_a_job_learns_from_the_best_and_says_so_before_it_starts(
    toy_shards: dict[str, str], scored: str, tmp_path: Path
) -> None:
    stream = {"shards": toy_shards["train"], "scores": scored, "keep": 0.5}
    job = make_job(toy_shards, data={"train": stream}, epochs=1)
    assert check(job, tmp_path) == []
    run = RunFolder(tmp_path / "run")
    assert train(job, run, tmp_path)
    assert run.total_steps.read_text() == "5", "40 of 80 images, 8 at a time"
    lost = make_job(toy_shards, data={"train": stream | {"scores": str(tmp_path / "lost.parquet")}})
    (problem,) = check(lost, tmp_path)
    assert problem.loc == ["data", "train", "scores"] and "got no file" in problem.message


def test_relative_paths_of_scores_are_taken_from_the_base(toy_shards: dict[str, str]) -> None:
    stream = {"shards": toy_shards["train"], "scores": "runs/scores.parquet", "keep": 0.5}
    knn = {"name": "knn", "data": {"train": stream, "test": {"shards": toy_shards["test"]}}}
    job = make_job(toy_shards, data={"train": stream}, evaluate=[knn]).absolute(Path("/base"))
    assert job.data["train"].scores == "/base/runs/scores.parquet"
    assert job.evaluate[0].config["data"]["train"]["scores"] == "/base/runs/scores.parquet"
    assert job.absolute(Path("/")) == job
