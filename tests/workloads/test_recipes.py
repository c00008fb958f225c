"""Every recipe is a job that can start; the demo's shows its effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import workloads
from workloads.data.pack import pack_digits
from workloads.preflight import check
from workloads.record import RunFolder
from workloads.run import SUCCEEDED, run_local
from workloads.spec import JobSpec

RECIPES = sorted((Path(workloads.__file__).parent / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "digits"
    pack_digits(folder)
    return folder


def load(path: Path, digits: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text().replace("data/digits/", f"{digits}/"))
    return document


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_start_and_says_what_it_costs(path: Path, digits: Path, tmp_path: Path) -> None:
    assert check(JobSpec.model_validate(load(path, digits)), tmp_path) == []
    header = path.read_text().split("name:")[0]
    assert all(word in header for word in ("command:", "time:", "measured:"))


@pytest.mark.slow
def test_pretraining_on_digits_is_worth_its_while(digits: Path, tmp_path: Path) -> None:
    """Half of the demo's epochs, two seeds: with 10 labels a class the pretrained encoder beats the untrained one."""
    document = load(RECIPES[[path.stem for path in RECIPES].index("digits_mae")], digits) | {"epochs": 20}
    knn, _, tuned = document["evaluate"]
    document["evaluate"] = [knn, tuned | {"seeds": [0, 1], "epochs": 60}]
    assert run_local(JobSpec.model_validate(document), tmp_path / "run") == SUCCEEDED
    gains = {
        result["label"]: result["results"]["pretrained"]["mean"] - result["results"]["untrained"]["mean"]
        for result in RunFolder(tmp_path / "run").read_evaluations()
    }
    assert gains["knn10"] > 0.15 and gains["few_label10"] > 0.05, gains
