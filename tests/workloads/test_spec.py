"""A JobSpec refuses what cannot be meant and says what would be right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from workloads import catalog
from workloads.spec import JobSpec
from workloads.spec_any import read_spec


def test_round_trip_by_json_keeps_aliases(toy_job: Callable[..., JobSpec]) -> None:
    spec = toy_job(register="toy-model")
    document = spec.model_dump(mode="json")
    assert document["register"] == "toy-model"
    assert document["method"]["decoder_dim"] == 16
    assert JobSpec.model_validate(document) == spec
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 5}, "exactly one of them"),
        ({"epochs": None}, "exactly one of them"),
        ({"batch_size": 9, "resources": {"workers": 2}}, "expected a multiple; use 8"),
        ({"micro_batch_size": 3}, "expected a divisor; use 2"),
        ({"data": {}}, "got no stream"),
        ({"name": "../etc"}, "pattern"),
        ({"epohcs": 3}, "Extra inputs"),
    ],
)
def test_refusals(toy_job: Callable[..., JobSpec], change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        toy_job(**change)


def test_unknown_keys_are_answered_by_the_nearest(toy_job: Callable[..., JobSpec]) -> None:
    with pytest.raises(ValidationError) as caught:
        toy_job(optimizer={"lrr": 1}, epohcs=1)
    found = dict(catalog.problems_of(caught.value, JobSpec))
    assert "did you mean 'lr'" in found["optimizer", "lrr"]
    assert "'epochs'" in found["epohcs",]


def test_accumulation_follows_the_number_of_ranks(toy_job: Callable[..., JobSpec]) -> None:
    spec = toy_job(batch_size=16, micro_batch_size=2, resources={"workers": 2})
    assert [spec.accumulation_on(world_size) for world_size in (1, 2, 4)] == [8, 4, 2]
    assert toy_job(batch_size=16, resources={"workers": 2}).accumulation_on(1) == 2


@pytest.mark.parametrize(("text", "message"), [("- a\n- b\n", "expected a mapping"), ("a: [", "is not YAML")])
def test_a_file_that_is_no_spec(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_spec(path)


@pytest.mark.parametrize(
    ("init", "absolute"),
    [
        ("mae.safetensors", "/base/mae.safetensors"),
        ("runs/a/artifact", "/base/runs/a/artifact"),
        ("/x/artifact", "/x/artifact"),
        ("digits-mae@1", "digits-mae@1"),
        ("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"),
        ("job:abc", "job:abc"),
        (None, None),
    ],
)
def test_a_file_of_weights_is_a_path_too(
    toy_job: Callable[..., JobSpec], init: str | None, absolute: str | None
) -> None:
    assert toy_job(init=init).absolute(Path("/base")).init == absolute


@pytest.mark.parametrize(
    ("mirror", "absolute"),
    [
        ("copies", "/base/copies"),
        ("a/copies", "/base/a/copies"),
        ("/copies", "/copies"),
        ("s3://bucket/copies", "s3://bucket/copies"),
        (None, None),
    ],
)
def test_a_mirror_is_a_path_too(toy_job: Callable[..., JobSpec], mirror: str | None, absolute: str | None) -> None:
    policy = {"mirror": mirror, "keep": 7}
    fixed = toy_job(checkpoint=policy).absolute(Path("/base")).checkpoint
    assert (fixed.mirror, fixed.keep) == (absolute, 7)
