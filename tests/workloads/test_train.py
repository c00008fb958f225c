"""The loop: accumulation, clipping, precision, models of timm, and that it learns."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.learning import here
from tests.toy import difference
from workloads import artifact, checkpoint
from workloads.data.views import height_width
from workloads.evaluate import evaluate
from workloads.export import export
from workloads.models.timm_import import timm
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.train import total_steps, train

Make = Callable[..., JobSpec]


def weights(spec: JobSpec, folder: Path) -> dict[str, torch.Tensor]:
    run = RunFolder(folder)
    assert train(spec, run, folder)
    step = checkpoint.latest_step(run.checkpoints)
    return torch.load(run.checkpoints / f"step-{step:08d}.pt", weights_only=True)["method"]


def losses(folder: Path) -> list[float]:
    return [point["loss"] for point in RunFolder(folder).read_metrics()]


def test_micro_batches_add_up_to_the_batch(toy_job: Make, tmp_path: Path) -> None:
    whole = weights(toy_job(), tmp_path / "whole")
    parts = weights(toy_job(micro_batch_size=2), tmp_path / "parts")
    assert difference(whole, parts) < 5e-5


def test_workers_become_micro_batches_of_one_process(toy_job: Make, tmp_path: Path) -> None:
    two = weights(toy_job(resources={"workers": 2}), tmp_path / "two")
    one = weights(toy_job(micro_batch_size=4), tmp_path / "one")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("clip", ["clip_grad_norm", "clip_parameter_norm"])
def test_clipping_bounds_the_gradient_and_is_in_the_curve(toy_job: Make, tmp_path: Path, clip: str) -> None:
    free = weights(toy_job(), tmp_path / "free")
    clipped = weights(toy_job(optimizer={"lr": 1e-3, clip: 1e-3}), tmp_path / "clipped")
    assert any(not torch.equal(free[name], clipped[name]) for name in free)
    points = list(RunFolder(tmp_path / "clipped").read_metrics())
    assert all(point["grad_norm"] > 1e-3 for point in points)  # before it was cut


def test_bf16_follows_fp32_and_keeps_fp32_weights(toy_job: Make, tmp_path: Path) -> None:
    weights(toy_job(), tmp_path / "fp32")
    half = weights(toy_job(precision="bf16"), tmp_path / "bf16")
    assert all(value.dtype == torch.float32 for value in half.values())
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")


def test_the_seed_decides_everything(toy_job: Make, tmp_path: Path) -> None:
    first, again = (weights(toy_job(seed=3), tmp_path / name) for name in ("a", "b"))
    other = weights(toy_job(seed=4), tmp_path / "c")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["decoder.mask_token"], other["decoder.mask_token"])


def test_length(toy_job: Make) -> None:
    assert total_steps(toy_job(epochs=4), 10) == 40
    assert total_steps(toy_job(epochs=None, steps=7), 10) == 7
    assert total_steps(toy_job(epochs=0.01), 10) == 1


@pytest.mark.parametrize(
    ("method", "model"),
    [
        ("mae", {"name": "vit_tiny_patch16_224", "image_size": 32}),
        ("fine_tune", {"name": "resnet18", "image_size": 32}),
        ("simclr", {"name": "vit_tiny_patch16_224", "image_size": [32, 16]}),
    ],
)
def test_models_of_timm_by_name(toy_job: Make, tmp_path: Path, method: str, model: dict[str, Any]) -> None:
    spec = toy_job(method={"name": method}, model=model, epochs=None, steps=1, batch_size=4)
    run = RunFolder(tmp_path / "run")
    assert train(spec, run, tmp_path)
    export(spec, run, tmp_path, "j")
    theirs = timm.create_model(f"local-dir:{run.artifact}", pretrained=True).eval()
    images = torch.randn(2, 3, *height_width(artifact.read_card(run.artifact).image_size))
    with torch.no_grad():
        assert torch.allclose(artifact.load_model(run.artifact)(images), theirs(images), atol=1e-5)


def test_starting_weights_come_from_an_artifact(toy_job: Make, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "first")
    assert train(toy_job(), run, tmp_path)
    export(toy_job(), run, tmp_path, "first")
    encoder = artifact.load_model(run.artifact)
    tuned = toy_job(method={"name": "fine_tune"}, init=str(run.artifact), optimizer={"lr": 1e-12})
    after = weights(tuned, tmp_path / "second")
    assert torch.allclose(
        after["classifier.blocks.0.attn.qkv.weight"], encoder.state_dict()["blocks.0.attn.qkv.weight"]
    )


def test_every_evaluation_also_with_all_labels(toy_job: Make, toy_shards: dict[str, str], tmp_path: Path) -> None:
    data = {"train": {"shards": toy_shards["train"]}, "test": {"shards": toy_shards["test"]}}
    full = {"name": "fine_tune", "epochs": 2, "seeds": [0], "data": data}
    spec = toy_job(evaluate=[full, {"name": "linear_probe", "epochs": 5, "data": data}, {"name": "knn", "data": data}])
    run = RunFolder(tmp_path / "run")
    assert train(spec, run, tmp_path)
    export(spec, run, tmp_path, "j")
    assert evaluate(spec, run, tmp_path, "j", lambda: False, here(tmp_path))
    first = run.read_evaluations()
    assert [result["label"] for result in first] == ["fine_tune", "probe", "knn"]
    assert all({"pretrained", "untrained"} <= result["results"].keys() for result in first)
    shutil.rmtree(run.path / "evaluations")
    run.evaluations.unlink()
    assert evaluate(spec, run, tmp_path, "j", lambda: False, here(tmp_path))
    assert [r["results"] for r in run.read_evaluations()] == [r["results"] for r in first]  # the seeds decide
