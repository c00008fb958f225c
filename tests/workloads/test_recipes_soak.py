"""`make soak`: what small recipes are worth on data and tasks that they were not trained for, as their headers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import workloads
from workloads.record import RunFolder
from workloads.run import SUCCEEDED, run_local
from workloads.spec import JobSpec

pytestmark = pytest.mark.soak


def run_recipe(name: str, data_folder: Path, run: RunFolder, **fields: Any) -> dict[str, dict[str, float]]:
    """What each evaluation found, of `pretrained` and others; `fields` replace those of the recipe."""
    text = (Path(workloads.__file__).parent / "recipes" / f"{name}.yaml").read_text()
    document = yaml.safe_load(text.replace('"data/', f'"{data_folder}/')) | {"register": None} | fields
    assert run_local(JobSpec.model_validate(document), run.path) == SUCCEEDED
    return {
        found["label"]: {who: result["mean"] for who, result in found["results"].items()}
        for found in run.read_evaluations()
    }


@pytest.mark.parametrize("name", ["cifar10_moco_v2", "cifar10_densecl", "cifar10_cp2"])
def test_photographs_teach_to_segment_streets(name: str, data_folder: Path, tmp_path: Path) -> None:
    """Mean IoU of a linear layer: .184 -> .219, .184 -> .214, .191 -> .219."""
    run = RunFolder(tmp_path / "runs" / name)
    found = run_recipe(name, data_folder, run)
    assert found["segmentation"]["pretrained"] > found["segmentation"]["untrained"] + 0.015, found
    if name == "cifar10_cp2":
        best = [point["foreground_top1"] for point in run.read_metrics()]
        assert min(best[4:]) > 0.43, (
            f"the two places that are most alike are of the foreground no more than drawn: {best}"
        )
    else:
        assert found["knn"]["pretrained"] > found["knn"]["untrained"] + 0.01, found
        assert found["probe"]["pretrained"] > found["probe"]["untrained"] + 0.01, found


def test_two_labelled_volumes_are_enough_for_more(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dice after fine-tuning, three seeds: from scratch .682, after stage 1 .700, after stage 2 .715."""
    monkeypatch.setenv("MANTA_HOME", str(tmp_path))
    first, second = (RunFolder(tmp_path / "runs" / stage) for stage in ("first", "second"))
    whole = run_recipe("hippocampus_medical_cl", data_folder, first)["volume_segmentation"]
    regions = run_recipe("hippocampus_medical_cl_local", data_folder, second, init="job:first")["volume_segmentation"]
    assert whole["pretrained"] > whole["untrained"], whole
    assert regions["pretrained"] > whole["untrained"] + 0.01, (whole, regions)
