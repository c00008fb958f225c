"""Artifacts: references, damage, starting weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy import TOY_MAE, TOY_MODEL
from workloads import artifact
from workloads.models.vit import ViT, ViTConfig
from workloads.spec import JobSpec

SPEC = JobSpec.model_validate(
    {"name": "toy", "method": TOY_MAE, "model": TOY_MODEL, "data": {"train": {"shards": "x.tar"}}, "epochs": 1}
)


def card(**changes: Any) -> dict[str, Any]:
    facts = {
        "kind": "encoder",
        "job_id": "j1",
        "spec": SPEC,
        "paper": "a paper",
        "classes": ["a", "b"],
        "image_size": 16,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "num_instances": 10,
        "datasets": {"train": {"samples": 10, "content_hash": "0" * 64}},
    }
    return facts | changes


def encoder(seed: int = 0, **changes: Any) -> ViT:
    torch.manual_seed(seed)
    return ViTConfig.model_validate({k: v for k, v in TOY_MODEL.items() if k != "name"} | changes).build()


def test_what_is_written_is_loaded(tmp_path: Path) -> None:
    model = encoder()
    written = artifact.write(tmp_path / "a", model, card(), None)
    assert artifact.read_card(tmp_path / "a") == written
    loaded = artifact.load_model(tmp_path / "a")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), model.eval()(images))
    assert not loaded.training
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md",
        "config.json",
        "manta.json",
        "model.safetensors",
    ]
    assert "a paper" in (tmp_path / "a" / "README.md").read_text()


def test_references(tmp_path: Path) -> None:
    for version in (1, 2, 10):
        artifact.write(tmp_path / "registry" / "digits" / str(version), encoder(), card(), None)
    artifact.write(tmp_path / "runs" / "j7" / "artifact", encoder(), card(), None)
    registry = tmp_path / "registry" / "digits"
    assert artifact.resolve("digits@2", tmp_path) == registry / "2"
    assert artifact.resolve("digits", tmp_path) == registry / "10"
    assert artifact.resolve("job:j7", tmp_path) == tmp_path / "runs" / "j7" / "artifact"
    assert artifact.resolve(str(registry / "1"), tmp_path) == registry / "1"
    for wrong in ("digits@3", "digit", "job:j8", str(tmp_path)):
        with pytest.raises(artifact.ArtifactError, match="names no artifact"):
            artifact.resolve(wrong, tmp_path)


def test_a_reference_does_not_climb_out_of_registry_and_runs(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for folder in ("registry/digits/1", "runs/j7/artifact"):
        artifact.write(home / folder, encoder(), card(), None)
    for outside in ("1", "artifact", "home/artifact", "home/runs/artifact", "home/1", "home/registry/1"):
        artifact.write(tmp_path / outside, encoder(), card(), None)
    climbing = ["..@1", ".@1", "job:..", "job:../..", "job:.", "job:", "job:/", f"job:{tmp_path}", "job:j7/../.."]
    for reference in climbing:
        with pytest.raises(artifact.ArtifactError, match=r"names no (artifact|finished job)"):
            artifact.resolve(reference, home)


def test_exchanged_weights_are_refused(tmp_path: Path) -> None:
    artifact.write(tmp_path / "a", encoder(0), card(), None)
    artifact.write(tmp_path / "b", encoder(1), card(), None)
    (tmp_path / "a" / "model.safetensors").write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    with pytest.raises(artifact.ArtifactError, match="is not the file that its card describes"):
        artifact.load_model(tmp_path / "a")
