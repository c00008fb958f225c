"""Separability of mixtures: the measure on tokens whose answer is known, and the whole of it on toy jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.learning import here, pretrained
from workloads.evaluation.base import Subject
from workloads.evaluation.separability import LinearMap, Separability, SeparabilityConfig, distance, distances
from workloads.parts.masking import Mask, random_masking
from workloads.parts.patches import patchify
from workloads.spec import JobSpec

DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def test_least_squares_finds_the_map_also_where_channels_depend_on_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator)
    x = torch.cat([x, x.sum(dim=1, keepdim=True)], dim=1)  # of rank 3
    w, c = torch.randn(4, 2, generator=generator), torch.tensor([1.0, -2.0])
    linear = LinearMap(4, 2)
    for part in x.reshape(4, 10, 5, 4):  # batches of [10, 5, D]
        linear.add(part, part @ w + c)
    torch.testing.assert_close(linear.solve()(x), x @ w + c, atol=1e-4, rtol=1e-4)


def test_distance_is_twice_one_minus_the_correlation() -> None:
    t = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(0))
    other = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(1))
    assert distance(t, t) == 0
    assert distance(3 * t + 2, t) == pytest.approx(0, abs=1e-6)
    assert distance(-t, t) == pytest.approx(4, abs=1e-3)
    assert distance(other, t) == pytest.approx(2, abs=0.1)


def test_what_is_a_sum_of_its_parts_is_separable_and_nothing_else() -> None:
    """Images of odd columns mixed with images of even ones: a linear map tells them apart."""

    def pairs(seed: int) -> Iterator[tuple[Tensor, Tensor, Mask]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(4):
            one, two = torch.randn(2, 64, 3, 8, 8, generator=generator)
            one[..., ::2], two[..., 1::2] = 0, 0
            yield torch.lerp(two, one, 0.3), one, random_masking(torch.rand(64, 4, generator=generator), 0.5)

    def patches(images: Tensor, mask: Mask) -> Tensor:
        return patchify(images, 4)

    encoders = {"patches": patches, "constant": lambda images, _: images.new_empty(64, 4, 0)}
    found = distances(pairs(0), pairs(1), encoders, patches, patches)
    assert found["patches"] == pytest.approx(0, abs=0.01)  # the norm of a token is not linear
    assert found["constant"] == pytest.approx(2, abs=0.1)
    assert 0.5 < found["own_layer"] < 2  # the mixture itself, as a layer would that separates nothing


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, toy_shards: dict[str, str]) -> Path:
    from tests.toy import make_job

    folder = tmp_path_factory.mktemp("home")
    pretrained(make_job(toy_shards), folder, "mae")
    i_mae = {"name": "i_mae", "teacher": "job:mae"} | DECODER
    pretrained(make_job(toy_shards, method=i_mae), folder, "i-mae")
    coarse = {"name": "vit", "image_size": 16, "patch_size": 8, "dim": 16, "depth": 1, "heads": 2}
    pretrained(make_job(toy_shards, model=coarse, steps=1, epochs=None), folder, "coarse")
    pretrained(make_job(toy_shards, method={"name": "fine_tune"}, steps=1, epochs=None), folder, "classifier")
    return folder


@pytest.fixture
def measure(
    home: Path, toy_shards: dict[str, str], toy_job: Callable[..., JobSpec], tmp_path: Path
) -> Callable[..., dict[str, Any] | None]:
    """Evaluates the artifact of a job against another; results go to `tmp_path`."""

    def run(job: str = "i-mae", reference: str = "job:mae", stop: bool = False, **fields: Any) -> dict[str, Any] | None:
        data = {name: {"shards": toy_shards[name]} for name in ("train", "test")}
        config = SeparabilityConfig.model_validate({"reference": reference, "data": data, "seeds": [0, 1]} | fields)
        artifact = home / "runs" / job / "artifact"
        subject = Subject(toy_job(), artifact, home, tmp_path, "job-1", lambda: stop, here(home))
        return Separability().run(config, subject)

    return run


def test_everybody_is_measured_and_drawn(measure: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    found = measure()
    results = found["results"]
    assert set(results) == {"pretrained", "untrained", "reference", "constant", "own_layer"}
    assert all(0 < value["mean"] < 2.5 and len(value["seeds"]) == 2 for value in results.values())
    assert all(results[who]["mean"] < results["constant"]["mean"] for who in ("pretrained", "reference", "untrained"))
    assert [a for a, _ in found["chart"]["curves"]["own_layer"]] == [0.1, 0.2, 0.3, 0.4]
    assert found["chart"]["curves"]["reference"][2][1] == results["reference"]
    page = (tmp_path / found["picture"]).read_text()
    assert "own layer" in page and "weight of the subordinate image" in page
    assert measure() == found


def test_dominant_image_is_nearer_than_the_subordinate_one(measure: Callable[..., dict[str, Any]]) -> None:
    hard, easy = (measure(target=target, sweep=[])["results"] for target in ("subordinate", "dominant"))
    assert easy["reference"]["mean"] < hard["reference"]["mean"]
    assert "own_layer" not in easy  # the job asked for the subordinate one only


def test_an_encoder_without_a_layer_of_its_own_is_measured_too(measure: Callable[..., dict[str, Any]]) -> None:
    results = measure("mae", sweep=[], untrained=False)["results"]
    assert set(results) == {"pretrained", "reference", "constant"}
    assert results["pretrained"] == results["reference"]  # it is the reference


def test_a_reference_of_another_kind_is_refused(measure: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="draws no reconstructions"):
        measure(reference="job:classifier")
    with pytest.raises(ValueError, match="patch_size=8 for image_size=16, patch_size=4"):
        measure(reference="job:coarse")


def test_it_stops_when_asked(measure: Callable[..., dict[str, Any] | None]) -> None:
    assert measure(stop=True) is None
