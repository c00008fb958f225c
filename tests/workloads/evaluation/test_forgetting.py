"""The forgetting score: on features whose answer is known, on toy jobs, and whether it tells real domains apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from torch import Tensor

from tests.learning import RealImages, here, pretrained
from tests.toy import make_job
from workloads import assemble
from workloads.data.ranged import read_members
from workloads.evaluation.base import Subject
from workloads.evaluation.forgetting import (
    Forgetting,
    ForgettingConfig,
    above,
    agreement,
    neighbours,
    scores,
)
from workloads.spec import JobSpec, Stream

NOWHERE = {"train": {"shards": "a.tar"}, "test": {"shards": "b.tar"}}


def features(n: int = 60, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def config(**fields: Any) -> ForgettingConfig:
    return ForgettingConfig.model_validate({"reference": "job:x", "data": NOWHERE} | fields)


def test_neighbours_are_mutual_ones() -> None:
    """Four images on a circle: 0, 10, 25 and 100 degrees. With k = 1 only the first two have each other."""
    angle = torch.tensor([0.0, 10.0, 25.0, 100.0]).deg2rad()
    x = torch.stack([angle.cos(), angle.sin()], dim=1) * torch.tensor([[1.0], [5.0], [0.1], [2.0]])
    found = neighbours(x, x, torch.arange(4), k=1)
    assert found.rows[:, 0].tolist() == [1, 0, 1, 2]
    assert found.mutual[:, 0].tolist() == [True, True, False, False]
    two = neighbours(x, x, torch.arange(4), k=2)
    assert [sorted(row[m].tolist()) for row, m in zip(two.rows, two.mutual, strict=True)] == [
        [1, 2],
        [0, 2],
        [0, 1],
        [],
    ]
    between = torch.tensor([[1.0, 0.05], [-1.0, 0.0]])  # 3 and 180 degrees, not of the bank
    found = neighbours(between, x, torch.tensor([-1, -1]), k=1)
    assert found.rows[:, 0].tolist() == [0, 3]
    assert found.mutual[:, 0].tolist() == [True, False]


def test_the_score_is_the_jaccard_index_of_sets() -> None:
    a, b = features(), features() + 0.7 * features(seed=1)
    own = torch.arange(60)
    one, two = neighbours(a, a, own, 7), neighbours(b, b, own, 7)
    expected = []
    for i in range(60):
        sets = [set(x.rows[i][x.mutual[i]].tolist()) for x in (one, two)]
        if not any(sets):
            sets = [set(x.rows[i].tolist()) for x in (one, two)]
        expected.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
    assert agreement(one, two).tolist() == pytest.approx(expected)
    assert 0.1 < np.mean(expected) < 0.9


def test_an_image_without_mutual_neighbours_goes_by_its_plain_ones() -> None:
    x = torch.cat([features(20, seed=2).abs(), -features(1, seed=3).abs()])  # the last is in nobody's list
    own = torch.arange(21)
    found = neighbours(x, x, own, 5)
    assert not found.mutual[20].any()
    y = x.clone()
    y[20] = y[20].flip(0)
    other = neighbours(y, y, own, 5)
    assert not other.mutual[20].any()
    plain = [set(one.rows[20].tolist()) for one in (found, other)]
    assert agreement(found, other)[20].item() == pytest.approx(len(plain[0] & plain[1]) / len(plain[0] | plain[1]))


@pytest.mark.parametrize("bank", [None, 25])
@pytest.mark.parametrize("by", ["neighbours", "features"])
def test_a_network_that_did_not_change_forgets_nothing(by: str, bank: int | None) -> None:
    x = features(), features(9, seed=5)
    for of_images in scores(config(by=by, bank=bank, k=5, seeds=[0, 1]), x, x):
        assert torch.allclose(of_images, torch.ones(()), atol=1e-6)


def test_a_rotation_of_all_features_changes_no_neighbour() -> None:
    turn = torch.linalg.qr(features(8, 8, seed=4)).Q
    x = features(), features(9, seed=5)
    turned = x[0] @ turn, x[1] @ turn
    assert all((of_images == 1).all() for of_images in scores(config(k=5), x, turned))
    assert scores(config(by="features"), x, turned)[0].mean() < 0.5


def test_what_changed_scores_below_what_did_not() -> None:
    x = features(200)
    y = torch.cat([x[:100], features(100, seed=6)])
    for by in ("neighbours", "features"):
        of_source, _ = scores(config(by=by, k=10), (x, x[:1]), (y, y[:1]))
        assert above(of_source[0, :100], of_source[0, 100:]) > 0.95


def test_of_pairs_equal_ones_count_half() -> None:
    assert above(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])) == (0.5 + 1 + 1 + 1) / 4
    assert above(torch.ones(3), torch.ones(2)) == 0.5


def test_features_of_other_widths_have_no_cosine_but_neighbours() -> None:
    x, y = (features(), features(9)), (features(width=6), features(9, 6))
    assert scores(config(k=5), x, y)[0].shape == (1, 60)
    with pytest.raises(ValueError, match=r"got features of 8 and 6 channels.*compare by: neighbours"):
        scores(config(by="features"), x, y)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, toy_shards: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("home")
    pretrained(make_job(toy_shards, epochs=None, steps=2), folder, "source")
    tune = {"method": {"name": "fine_tune"}, "init": str(folder / "runs" / "source" / "artifact")}
    pretrained(make_job(toy_shards, **tune, epochs=None, steps=4), folder, "tuned")
    return folder


@pytest.fixture
def measure(home: Path, toy_shards: dict[str, str], tmp_path: Path) -> Callable[..., dict[str, Any] | None]:
    """Evaluates the artifact of a toy job; results go to `tmp_path`."""

    def run(job: str = "tuned", stop: bool = False, **fields: Any) -> dict[str, Any] | None:
        data = {name: {"shards": toy_shards[name]} for name in ("train", "test")}
        asked = ForgettingConfig.model_validate({"reference": "job:source", "data": data, "k": 5} | fields)
        artifact = home / "runs" / job / "artifact"
        subject = Subject(make_job(toy_shards), artifact, home, tmp_path / "0", "job-1", lambda: stop, here(home))
        return Forgetting().run(asked, subject)

    return run


@pytest.mark.parametrize("by", ["neighbours", "features"])
def test_a_job_is_scored_and_the_file_says_what_to_keep(
    measure: Callable[..., dict[str, Any]], toy_shards: dict[str, str], tmp_path: Path, by: str
) -> None:
    found = measure(by=by)
    assert set(found["results"]) == {"pretrained", "untrained", "target"} and 0 < found["auc"] < 1
    file = tmp_path / "0" / found["scores"]
    table = pq.read_table(file).to_pydict()
    assert len(table["row"]) == 80 and table["score"] == sorted(table["score"], reverse=True)
    assert np.mean(table["score"]) == pytest.approx(found["results"]["pretrained"]["mean"], abs=1e-6)
    half = assemble.open_stream(Stream(shards=toy_shards["train"], scores=str(file), keep=0.5))
    assert sorted(half.keys) == sorted(table["key"][:40])
    assert measure(by=by) == found


def test_the_network_itself_as_reference_scores_1(measure: Callable[..., dict[str, Any]]) -> None:
    found = measure(job="source", untrained=False)["results"]
    assert set(found) == {"pretrained", "target"} and found["pretrained"]["mean"] == found["target"]["mean"] == 1.0
    both = [
        measure(job=a, reference=f"job:{b}")["results"]["pretrained"]
        for a, b in (("source", "tuned"), ("tuned", "source"))
    ]
    assert both[0] == both[1], "the score is the same both ways"


def test_a_stopped_job_leaves_nothing(measure: Callable[..., Any], tmp_path: Path) -> None:
    assert measure(stop=True) is None
    assert not (tmp_path / "0").exists()


VEHICLES = {"airplane", "automobile", "ship", "truck"}
ANIMALS = {"bird", "cat", "deer", "dog", "frog", "horse"}


def write_part(shards: str, folder: Path, classes: set[str], half: int) -> str:
    """Every second image of some classes, from the first or the second on, in a shard of its own."""
    manifest = assemble.open_stream(Stream(shards=shards))
    rows = np.flatnonzero([manifest.classes[label] in classes for label in manifest.label])[half::2]
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "part-000000.tar"), mtime=0) as writer:
        for row, data in zip(rows, read_members(manifest, manifest.primary, rows), strict=True):
            writer.write({"__key__": manifest.keys[row], "jpg": data, "cls": str(manifest.label[row]).encode()})
    (folder / "classes.txt").write_text("\n".join(manifest.classes) + "\n")
    return str(folder / "part-000000.tar")


@pytest.mark.slow
def test_features_of_the_target_domain_are_forgotten_less_whichever_it_is(
    real_images: RealImages, tmp_path: Path
) -> None:
    """SimCLR on 2,000 images of CIFAR-10, then 100 steps more on 200 vehicles, or on 300 animals, with seeds 0 and 1.

    How often a source image of the target's kind scores above one of the other kind (and, held-out ones, above any
    source image), of all pairs: vehicles .689, .755 (.599, .648), animals .680, .631 (.584, .562). That both are above
    chance says that it is the domain, not that vehicles are simple.

    The rest of what was tried does not show it. Neighbours with k = 30: vehicles .562, .492, animals .452, .511;
    with k = 300 of seed 0 .671 and .395, so what a wider look finds is that vehicles are stable whatever comes.
    Features after 30 steps: .307, .729, .576, .593. After fine-tuning by labels, 10 epochs, the kind that was tuned on
    is forgotten more: by features vehicles have .668, .685 where they are the target, and .742, .739 where animals are.
    """
    if real_images.name != "cifar10":
        pytest.skip("needs vehicles and animals")
    source = real_images.contrast({"name": "simclr"}).model_copy(update={"epochs": 3})
    pretrained(source, tmp_path, "source")
    manifest = assemble.open_stream(Stream(shards=real_images.train))
    told = {}
    for domain, classes in (("vehicles", VEHICLES), ("animals", ANIMALS)):
        tuning, held_out = (
            write_part(real_images.test, tmp_path / f"{domain}{half}", classes, half) for half in (0, 1)
        )
        length = {"data": {"train": {"shards": tuning}}, "epochs": None, "steps": 100}
        tuned = JobSpec.model_validate(source.model_dump() | length | {"init": "job:source"})
        artifact = pretrained(tuned, tmp_path, domain)
        subject = Subject(tuned, artifact, tmp_path, tmp_path / "0", domain, lambda: False, here(tmp_path))
        data = {"train": {"shards": real_images.train}, "test": {"shards": held_out}}
        asked = {"reference": "job:source", "data": data, "by": "features", "untrained": False}
        found = Forgetting().run(ForgettingConfig.model_validate(asked), subject)
        assert found is not None
        table = pq.read_table(tmp_path / "0" / found["scores"]).to_pydict()
        score, of = torch.tensor(table["score"]), manifest.label[table["row"]]
        near = torch.tensor([manifest.classes[label] in classes for label in of])
        told[domain] = above(score[near], score[~near]), found["auc"]
    assert all(of_source > 0.6 and of_held_out > 0.5 for of_source, of_held_out in told.values()), told
