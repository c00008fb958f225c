"""What a POST refuses: each answer names the place, what was got and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.toy_artifact import write_artifact
from workloads import preflight
from workloads.preflight import check
from workloads.spec import JobSpec


@pytest.mark.parametrize(
    ("change", "loc", "message"),
    [
        ({"method": {"name": "mea"}}, ["method", "name"], "did you mean 'mae'"),
        ({"method": {"name": "mae", "mask_ration": 0.5}}, ["method", "mask_ration"], "did you mean 'mask_ratio'"),
        ({"method": {"name": "mae", "view": {"flipp": 0}}}, ["method", "view", "flipp"], "did you mean 'flip'"),
        ({"method": {"name": "mae", "mask_ratio": 1.5}}, ["method", "mask_ratio"], "less than 1"),
        ({"model": {"name": "vit_bose"}}, ["model", "name"], "'vit_base'"),
        ({"model": {"name": "vit", "dimm": 3}}, ["model", "dimm"], "did you mean 'dim'"),
        ({"model": {"name": "vit", "image_size": 17}}, ["model"], "expected a multiple; use 16"),
        ({"model": {"name": "vit", "image_size": [32, 20]}}, ["model"], "expected a multiple; use [32, 16]"),
        ({"model": {"name": "vit", "image_size": [32, 16]}}, ["method"], "expected a square of patches"),
        ({"model": {"name": "resnet18"}}, ["method"], "got model ResNet, expected a ViT"),
        ({"evaluate": [{"name": "knm", "data": {}}]}, ["evaluate", 0, "name"], "did you mean 'knn'"),
        ({"evaluate": [{"name": "knn"}]}, ["evaluate", 0, "data"], "got nothing for 'data'"),
        ({"data": {"trian": {"shards": "x.tar"}}}, ["data"], "expected train"),
        ({"data": {"train": {"shards": "/nowhere/x-{0..3}.tar"}}}, ["data", "train", "shards"], "/nowhere/x-0.tar"),
        ({"init": "no-such-model@3"}, ["init"], "names no artifact"),
        ({"init": "timm:vit_base_patch16_224.mea"}, ["init"], "vit_base_patch16_224.mae"),
        ({"init": "timm:test_vit.r160_in1k"}, ["init"], "do not fit the model"),
        ({"init": "/nowhere/mae.safetensors"}, ["init"], "which is no file here"),
        ({"init": "mae_pretrain_vit_base.pth"}, ["init"], "a pickle"),
        ({"method": {"name": "mae", "mask_ratio": 0.99}}, ["method"], "one visible patch at least"),
        ({"method": {"name": "mae", "decoder_depth": 2**40}}, ["method"], "got an integer above 16,777,216"),
        ({"model": {"name": "vit", "depth": 2**62}}, ["model"], "got an integer above 16,777,216"),
        ({"evaluate": [{"name": "knn", "data": "x"}]}, ["evaluate", 0, "data"], "valid dictionary"),
    ],
)
def test_refusals(
    toy_job: Callable[..., JobSpec], tmp_path: Path, change: dict[str, object], loc: list[str | int], message: str
) -> None:
    problems = check(toy_job(**change), tmp_path)
    assert [problem.loc for problem in problems] == [loc]
    assert message in problems[0].message


@pytest.mark.parametrize("method", ["look", "coke", "million_way"])
def test_methods_that_know_images_again_refuse_a_pipe(
    toy_job: Callable[..., JobSpec], tmp_path: Path, method: str
) -> None:
    spec = toy_job(
        data={"train": {"shards": "pipe:cat x.tar", "epoch_samples": 24, "num_classes": 4}}, method={"name": method}
    )
    problems = check(spec, tmp_path)
    assert [problem.loc for problem in problems] == [["method"]]
    assert problems[0].message.startswith("got `pipe:`") and problems[0].message.endswith("write shards")


def test_a_good_job_has_no_problem(toy_job: Callable[..., JobSpec], toy_shards: dict[str, str], tmp_path: Path) -> None:
    data = {"train": {"shards": toy_shards["train"]}, "test": {"shards": toy_shards["test"]}}
    assert check(toy_job(evaluate=[{"name": "knn", "data": data}]), tmp_path) == []


def test_all_wrong_names_are_told_at_once(toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    spec = toy_job(method={"name": "mea"}, model={"name": "vot"}, evaluate=[{"name": "kn"}])
    assert [problem.loc[0] for problem in check(spec, tmp_path)] == ["method", "evaluate", "model"]


def test_shards_of_an_evaluation_are_looked_at_too(
    toy_job: Callable[..., JobSpec], toy_shards: dict[str, str], tmp_path: Path
) -> None:
    data = {"train": {"shards": toy_shards["train"]}, "test": {"shards": "/nowhere/t.tar"}}
    problems = check(toy_job(evaluate=[{"name": "knn", "data": data}]), tmp_path)
    assert [problem.loc for problem in problems] == [["evaluate", 0, "data", "test", "shards"]]


def test_what_an_evaluation_compares_with_is_there_when_the_job_begins(
    toy_job: Callable[..., JobSpec], toy_shards: dict[str, str], tmp_path: Path
) -> None:
    """Else it would fail behind the training; or, in a service, read what others register meanwhile."""
    data = {key: {"shards": toy_shards["train"]} for key in ("train", "test")}
    job = toy_job(evaluate=[{"name": "forgetting", "reference": "later", "data": data}])
    (problem,) = check(job, tmp_path)
    assert problem.loc == ["evaluate", 0, "reference"] and "names no artifact" in problem.message
    write_artifact(tmp_path / "registry" / "later" / "1", "encoder")
    assert check(job, tmp_path) == []


def test_a_network_that_would_take_days_to_build_is_refused(
    toy_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "MOST_MODULES", 200)
    deep = toy_job(model={"name": "vit", "image_size": 16, "patch_size": 4, "dim": 8, "depth": 10**6, "heads": 2})
    (problem,) = check(deep, tmp_path)
    assert problem.loc == ["method"] and "more than 200 modules" in problem.message
    assert check(toy_job(), tmp_path) == []  # nothing is counted on


def test_a_network_of_any_size_costs_no_memory(toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    """ViT-H would be 2.5 GB; on the meta device it is a second of Python."""
    assert check(toy_job(model={"name": "vit_huge"}, method={"name": "mae"}), tmp_path) == []
