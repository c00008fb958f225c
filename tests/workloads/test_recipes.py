"""Every recipe is a job that can start; that of the demo shows its effect."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_model

import workloads
from workloads import assemble, catalog
from workloads.artifact import Card
from workloads.data.pack import pack_digits
from workloads.estimate import estimate
from workloads.models.encoders import build_encoder, timm_folder_config
from workloads.preflight import check
from workloads.record import RunFolder
from workloads.run import SUCCEEDED, run_local
from workloads.spec import JobSpec
from workloads.spec_any import parse_spec, read_spec

RECIPES = sorted((Path(workloads.__file__).parent / "recipes").glob("*.yaml"))
FULL = [path for path in RECIPES if path.stem.startswith(("imagenet_", "cifar100_", "acdc_", "luperson_"))]
SMALL = [path for path in RECIPES if path not in FULL]
IMAGENET = 1_281_167
GIB = 2**30


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "digits"
    pack_digits(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation in which every recipe has registered its model; only what another starts from has weights."""
    home = tmp_path_factory.mktemp("home")
    specs = [(path, read_spec(path)) for path in RECIPES]
    starts = {spec.init for _, spec in specs}
    for path, spec in specs:
        if not isinstance(spec, JobSpec) or spec.register_as is None:
            continue
        cls, _ = assemble.method_of(spec)
        with torch.device("cpu" if spec.register_as in starts else "meta"):
            model = build_encoder(spec.model)
        card = Card(
            kind=cls.exports,
            job_id="recipe",
            spec=spec,
            paper=cls.paper,
            classes=[str(number) for number in range(classes_of(path))],
            image_size=assemble.image_size(spec),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            num_features=1,
            parameters=1,
            num_instances=1,
            datasets={},
            sha256="",
            reconstructs=True,
        )
        folder = home / "registry" / spec.register_as / "1"
        folder.mkdir(parents=True)
        (folder / "manta.json").write_text(card.model_dump_json())
        (folder / "config.json").write_text(json.dumps(timm_folder_config(model)))
        if spec.register_as in starts:
            save_model(model, str(folder / "model.safetensors"))
    return home


def classes_of(path: Path) -> int:
    return 1000 if path.stem.startswith("imagenet") else 100 if path.stem.startswith("cifar100") else 10


def load(path: Path, digits: Path) -> dict[str, Any]:
    """The recipe on the digits, which have CIFAR-10's size and number of classes."""
    text = path.read_text()
    for pattern in re.findall(r"data/\w+/(?:train|val|test)-[^\s\"]+tar", text):
        split = "train-{000000..000001}" if "train" in pattern else "test-000000"
        text = text.replace(pattern, f"{digits}/{split}.tar")
    document: dict[str, Any] = yaml.safe_load(text)
    return document


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_costs_and_gives(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert all(word in header for word in ("command:", "time:", "expected:" if path in FULL else "measured:"))
    assert path in FULL or any(character.isdigit() for character in header.partition("measured:")[2])
    assert f"recipes/{path.name}" in header


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_a_small_recipe_can_start(path: Path, digits: Path, home: Path) -> None:
    assert check(parse_spec(load(path, digits)), home) == []


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_a_recipe_of_full_size_makes_a_step_without_values(path: Path, home: Path) -> None:
    spec = read_spec(path)
    assert isinstance(spec, JobSpec)
    found = estimate(spec, home, samples=IMAGENET, num_classes=classes_of(path))
    assert found.flops is not None and found.flops > 1e9, "its arithmetic cannot be counted"
    assert found.steps is not None and found.steps > 1000
    assert 0 < found.trained <= found.parameters
    assert all(0 < group.lr_scale <= 10 and 0 <= group.weight_decay < 1 for group in found.groups)
    assert found.state_bytes + found.activation_bytes < 80 * GIB, "a worker needs more than a GPU of 80 GiB has"
    for evaluation in spec.evaluate:
        catalog.load("evaluation", evaluation.name).Config.model_validate(evaluation.config)


@pytest.mark.slow
def test_pretraining_on_digits_is_worth_its_while(digits: Path, tmp_path: Path) -> None:
    """Half of the demo's epochs, one seed: with 10 labels a class the pretrained encoder beats the untrained one."""
    document = load(RECIPES[[path.stem for path in RECIPES].index("digits_mae")], digits) | {"epochs": 20}
    knn, _, tuned = document["evaluate"]
    document["evaluate"] = [knn, tuned | {"seeds": [0], "epochs": 50}]
    assert run_local(JobSpec.model_validate(document), tmp_path / "run") == SUCCEEDED
    gains = {
        result["label"]: result["results"]["pretrained"]["mean"] - result["results"]["untrained"]["mean"]
        for result in RunFolder(tmp_path / "run").read_evaluations()
    }
    assert gains["knn10"] > 0.15 and gains["few_label10"] > 0.05, gains
