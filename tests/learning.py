"""Does a method learn on real images? CIFAR-10 where it is at hand, else the handwritten digits.

Runs are seeded and small, by the loop itself: what a test compares is what a user would get.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from workloads import artifact, assemble
from workloads.data.pack import pack_digits
from workloads.data.views import View
from workloads.evaluation.base import without_head
from workloads.evaluation.features import extract
from workloads.evaluation.knn import knn_accuracy
from workloads.evaluation.linear_probe import probe_accuracy
from workloads.export import export
from workloads.models.encoders import build_encoder
from workloads.place import Here
from workloads.record import RunFolder
from workloads.spec import JobSpec, Stream
from workloads.spec_training import Resources
from workloads.train import train

SMALL_VIT = {"name": "vit", "image_size": 32, "patch_size": 4, "dim": 64, "depth": 4, "heads": 4}


def here(home: Path, should_stop: Callable[[], bool] = lambda: False) -> Here:
    """Evaluations of a test train in its own process, on one core."""
    return Here(Resources(), home, should_stop)


@dataclass(frozen=True)
class RealImages:
    """Labelled shards of 32 x 32 pixels, 10 classes.

    Attributes:
        name: cifar10 or digits.
        train, test: brace patterns; about 1,500 and 400 images.
    """

    name: str
    train: str
    test: str

    def job(self, method: dict[str, Any], **fields: Any) -> JobSpec:
        """A job over the training images; `fields` replace those of the spec."""
        document: dict[str, Any] = {
            "name": "learning",
            "method": method,
            "model": SMALL_VIT,
            "data": {"train": {"shards": self.train}},
            "epochs": 4,
            "batch_size": 64,
            "optimizer": {"lr": 1e-3, "weight_decay": 0.05, "betas": [0.9, 0.95]},
            "schedule": {"warmup_epochs": 0.5},
            "checkpoint": {"every_steps": 10000},
        }
        return JobSpec.model_validate(document | fields)

    def contrast(self, method: dict[str, Any]) -> JobSpec:
        """A job of a contrastive method: six epochs of a ViT of two blocks, large patches."""
        optimizer = {"lr": 2e-3, "weight_decay": 0.05, "betas": [0.9, 0.95]}
        return self.job(method, model=SMALL_VIT | {"patch_size": 8, "depth": 2}, epochs=6, optimizer=optimizer)

    def features(self, encoder: torch.nn.Module) -> Any:
        """Features of training and test images, in the plain view."""
        view = View(size=32)
        manifests = (assemble.open_stream(Stream(shards=shards)) for shards in (self.train, self.test))
        return tuple(extract(encoder.eval(), manifest, view) for manifest in manifests)

    def knn(self, encoder: torch.nn.Module) -> float:
        """Accuracy of 20 nearest neighbours."""
        return knn_accuracy(*self.features(encoder), k=20, temperature=0.07)

    def probe(self, encoder: torch.nn.Module) -> float:
        """Accuracy of a linear probe."""
        return probe_accuracy(*self.features(encoder), epochs=30, batch_size=128, lr=0.1, seed=0)


@pytest.fixture(scope="session")
def real_images(tmp_path_factory: pytest.TempPathFactory) -> RealImages:
    named = os.environ.get("MANTA_TEST_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if (folder / "cifar10").is_dir():
        cifar = folder / "cifar10"
        return RealImages("cifar10", str(cifar / "train-{000000..000001}.tar"), str(cifar / "test-000000.tar"))
    digits = tmp_path_factory.mktemp("digits") / "digits"
    pack_digits(digits)
    return RealImages("digits", str(digits / "train-{000000..000001}.tar"), str(digits / "test-000000.tar"))


@pytest.fixture
def photographs(real_images: RealImages) -> RealImages:
    """CIFAR-10: digits do not show every effect."""
    if real_images.name != "cifar10":
        pytest.skip("its effect is one of photographs: set MANTA_TEST_DATA to a folder with cifar10")
    return real_images


def pretrained(spec: JobSpec, home: Path, name: str) -> Path:
    """Trains `spec` as job `name` of `home`: the folder of its artifact, which `job:NAME` names too."""
    run = RunFolder(home / "runs" / name)
    assert train(spec, run, home)
    export(spec, run, home, name)
    return run.artifact


def encoder_of(folder: Path) -> torch.nn.Module:
    """The network of an artifact as a feature extractor."""
    return without_head(artifact.load_model(folder))


def untrained(spec: JobSpec) -> torch.nn.Module:
    """The encoder of `spec` before it was trained."""
    torch.manual_seed(spec.seed)
    return build_encoder(spec.model)


def losses(home: Path, name: str) -> list[float]:
    """The curve of job `name`."""
    return [point["loss"] for point in RunFolder(home / "runs" / name).read_metrics()]
