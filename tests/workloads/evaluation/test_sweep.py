"""A sweep over a field of the method, on toy jobs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.learning import here, pretrained
from workloads.evaluation.base import Subject
from workloads.evaluation.sweep import Sweep, SweepConfig, nested_spec
from workloads.place import Here
from workloads.spec import JobSpec

Make = Callable[..., JobSpec]


def config(toy_shards: dict[str, str], **fields: Any) -> SweepConfig:
    data = {name: {"shards": toy_shards[name]} for name in ("train", "test")}
    known = {"field": "mask_ratio", "values": [0.25, 0.75], "epochs": 0.5, "seeds": [0, 1], "probe": {"epochs": 2}}
    return SweepConfig.model_validate(known | {"data": data} | fields)


def test_encoders_of_each_value_are_trained_once_probed_and_drawn(
    toy_shards: dict[str, str], toy_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = toy_job(evaluate=[{"name": "knn"}], register="toy")
    folder = tmp_path / "sweep"
    subject = Subject(spec, pretrained(spec, tmp_path, "toy"), tmp_path, folder, "job-1", lambda: False, here(tmp_path))
    found = Sweep().run(config(toy_shards), subject)
    assert found is not None and found["label"] == "sweep_mask_ratio"
    assert list(found["results"]) == ["pretrained", "untrained", "mask_ratio=0.25", "mask_ratio=0.75"]
    assert all(0 <= value["mean"] <= 1 and len(value["seeds"]) == 2 for value in found["results"].values())
    assert [(at, value) for at, value in found["chart"]["curves"]["trained"]] == [
        (at, found["results"][f"mask_ratio={at}"]) for at in (0.25, 0.75)
    ]
    page = (folder / found["picture"]).read_text()
    assert "mask_ratio" in page and "untrained" in page
    assert not list(folder.glob("*/checkpoints"))
    monkeypatch.delattr(Here, "train")  # what is trained stays: an evaluation that was interrupted goes on
    assert Sweep().run(config(toy_shards), subject) == found


def test_it_stops_when_asked(toy_shards: dict[str, str], toy_job: Make, tmp_path: Path) -> None:
    spec = toy_job()
    subject = Subject(
        spec,
        pretrained(spec, tmp_path, "toy"),
        tmp_path,
        tmp_path / "sweep",
        "job-1",
        lambda: True,
        here(tmp_path, lambda: True),
    )
    assert Sweep().run(config(toy_shards), subject) is None


def test_a_nested_job_is_the_subject_at_another_value(toy_shards: dict[str, str], toy_job: Make) -> None:
    spec = toy_job(checkpoint={"mirror": "/copy"}, register="toy", evaluate=[{"name": "knn"}])
    nested = nested_spec(config(toy_shards), spec, 0.25, seed=3)
    assert nested.method.config == spec.method.config | {"mask_ratio": 0.25}
    assert (nested.epochs, nested.seed, nested.evaluate, nested.register_as) == (0.5, 3, [], None)
    assert nested.checkpoint.mirror is None
    kept = {"model", "data", "batch_size", "optimizer", "schedule", "precision"}
    assert nested.model_dump(include=kept) == spec.model_dump(include=kept)
    assert nested_spec(config(toy_shards, epochs=None), spec, 0.25, seed=0).epochs == spec.epochs


def test_what_cannot_be_swept_is_refused(toy_shards: dict[str, str], toy_job: Make) -> None:
    with pytest.raises(ValueError, match="mask_ration"):
        nested_spec(config(toy_shards, field="mask_ration"), toy_job(), 0.25, seed=0)
    with pytest.raises(ValueError, match="less than 1"):
        nested_spec(config(toy_shards), toy_job(), 2.0, seed=0)
    with pytest.raises(ValidationError, match=r"use \[0.25, 0.75\]"):
        config(toy_shards, values=[0.75, 0.25])
