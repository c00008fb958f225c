"""A reference -> a frozen network: artifacts of ours, networks of timm, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.toy_artifact import CLASSES, SIZE, write_artifact
from workloads import artifact
from workloads.artifact import ArtifactError
from workloads.models.timm_import import timm
from workloads.teachers import load_teacher

IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`job:encoder`, `toy@1` (the same) and `toy@2`, a classifier."""
    home = tmp_path_factory.mktemp("home")
    for folder, kind in [
        ("runs/encoder/artifact", "encoder"),
        ("registry/toy/1", "encoder"),
        ("registry/toy/2", "classifier"),
    ]:
        (home / folder).parent.mkdir(parents=True, exist_ok=True)
        write_artifact(home / folder, kind)
    return home


@pytest.mark.parametrize("reference", ["job:encoder", "toy@1", "{home}/registry/toy/1"])
def test_an_encoder_by_each_of_its_names(reference: str, home: Path) -> None:
    frozen = load_teacher(reference.format(home=home), home)
    expected = artifact.load_model(home / "registry/toy/1")
    assert torch.equal(frozen(IMAGES), expected(IMAGES))
    assert not frozen.module.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_the_newest_version_is_a_classifier(home: Path) -> None:
    frozen = load_teacher("toy", home)
    assert frozen(IMAGES).shape == (2, len(CLASSES))


def test_a_teacher_says_how_its_images_are_normalised(home: Path) -> None:
    view = load_teacher("job:encoder", home).view
    assert view is not None
    assert (view.size, view.mean, view.std) == (SIZE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


@pytest.mark.parametrize(("reference", "shape"), [("toy@1", (2, 16)), ("toy@2", (2, len(CLASSES)))])
def test_on_the_meta_device_no_weight_is_read(
    reference: str, shape: tuple[int, int], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workloads.artifact.load_model", None)
    with torch.device("meta"):
        frozen = load_teacher(reference, home)
        assert frozen(torch.zeros(2, 3, SIZE, SIZE)).shape == shape
    assert {parameter.device.type for parameter in frozen.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("job:nobody", "names no artifact"),
        ("toy@9", "names no artifact"),
        ("timm:vit_base_patch16_clip_225", "the nearest are"),
        ("{home}/model.pth", "a pickle"),
        ("{home}/bare/model.safetensors", "does not say its network"),
        ("{home}/registry/toy/2/other.safetensors", "does not say its network"),
    ],
)
def test_what_names_no_network(reference: str, words: str, home: Path) -> None:
    weights = (home / "registry/toy/2/model.safetensors").read_bytes()
    for path in (home / "bare/model.safetensors", home / "registry/toy/2/other.safetensors"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(weights)
    with pytest.raises(ArtifactError, match=words):
        load_teacher(reference.format(home=home), home)


def test_a_vit_of_timm_takes_images_of_any_size_and_others_are_as_they_are(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The networks of timm's own tests, without their weights: no network connection."""
    create, asked = timm.create_model, []

    def create_model(name: str, **options: Any) -> nn.Module:
        asked.append(options.pop("pretrained"))
        model: nn.Module = create(name, pretrained=False, **options)
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    vit = load_teacher("timm:test_vit.r160_in1k", home)
    assert vit.view is not None
    assert (vit.view.size, vit.view.mean, vit.view.std) == (160, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for size in (160, 64):
        assert vit(torch.zeros(1, 3, size, size)).shape == (1, vit.module.num_features)
    resnet = load_teacher("timm:test_resnet.r160_in1k", home)
    assert resnet(torch.zeros(1, 3, 64, 64)).shape == (1, resnet.module.num_features)
    assert all(asked)


def test_on_the_meta_device_nothing_is_downloaded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.models._builder.load_pretrained", None)
    with torch.device("meta"):
        clip = load_teacher("timm:vit_base_patch16_clip_quickgelu_224.openai", home)
    assert clip.view is not None
    assert clip.view.size == 224
    assert clip.view.mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)
    assert clip.module.num_features == 768


def test_without_network(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    for error in (ConnectionError("no route"), httpx.ReadTimeout("no route")):

        def create_model(name: str, error: Exception = error, **_: Any) -> nn.Module:
            raise error

        monkeypatch.setattr(timm, "create_model", create_model)
        with pytest.raises(ArtifactError, match=r"whose weights could not be fetched \(no route\); fetch them once"):
            load_teacher("timm:test_vit.r160_in1k", home)
