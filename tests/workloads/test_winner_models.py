"""What a search found, as the network of other jobs: pretrained, distilled and fine-tuned, of each family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy_artifact import write_artifact
from tests.toy_search import toy_search
from workloads import catalog
from workloads.artifact import load_model
from workloads.models import binas, maedet, zennet
from workloads.models.encoders import build_encoder
from workloads.preflight import check
from workloads.record import RunFolder
from workloads.run import SUCCEEDED, execute
from workloads.spec import JobSpec, Named
from workloads.winner import Found, write

WINNERS: dict[str, dict[str, Any]] = {
    "zennet": {
        "structure": "SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(8,16,2,8,2)SuperResIDWE2K5(16,16,2,8,1)"
        "SuperConvK1BNRELU(16,32,1,1)"
    },
    "maedet": {
        "structure": [
            {"class": "ConvKXBNRELU", "in": 3, "out": 8, "s": 2, "k": 3},
            {"class": "ResK1KXK1", "in": 8, "out": 16, "s": 2, "k": 3, "L": 2, "btn": 8},
        ]
    },
    "genet": {"stem": 8, "blocks": [["XX", 16, 1, 2], ["DW", 16, 2, 1]], "last": 24},
    "binas": {
        "structure": "[['ds_r1_k3_s1_e1_c8_nre'], ['ir_r1_k3_s2_e3_c16_se0.25', 'ir_r1_k3_s1_e3_c16'], "
        "['cn_r1_k1_s1_c32']]",
        "stem": 8,
        "features": 24,
    },
}


PUBLISHED: list[dict[str, Any]] = [
    *({"name": "zennet", "structure": name} for name in zennet.published()),
    *({"name": "maedet", "structure": name} for name in maedet.published()),
    *({"name": "binas", "structure": name} for name in binas.published()),
    *({"name": name} for name in catalog.MODELS if name.startswith("genet_")),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`job:<family>`: what a search found of each family; `job:teacher`: a classifier of two classes."""
    home = tmp_path_factory.mktemp("home")
    for name, config in WINNERS.items():
        model = {"name": name, "image_size": 16, **config}
        facts: dict[str, Any] = {"paper": "", "structure": "", "score": 0, "costs": {}, "blocks": []}
        found = Found(job_id=name, spec=toy_search(), model=model, told=1, scored=1, spent=0, **facts)
        (home / "runs" / name).mkdir(parents=True)
        write(home / "runs" / name / "artifact", found, [{"candidate": ""}])
    (home / "runs" / "teacher").mkdir()
    write_artifact(
        home / "runs" / "teacher" / "artifact", "classifier", model={"name": "resnet_cifar", "depth": 8}, classes="ab"
    )
    return home


@pytest.mark.parametrize("family", WINNERS)
def test_a_winner_is_pretrained_fine_tuned_and_distilled(
    family: str, home: Path, toy_job: Callable[..., JobSpec]
) -> None:
    """The one that is fine-tuned is the teacher of the third."""
    for method in ({"name": "simclr"}, {"name": "fine_tune"}, {"name": "rtk", "teacher": f"job:{family}-fine_tune"}):
        spec = toy_job(method=method, model={"name": f"job:{family}"}, epochs=None, steps=2)
        assert check(spec, home) == []
        run = RunFolder(home / "runs" / f"{family}-{method['name']}")
        assert execute(spec, run, home, job_id="j") == SUCCEEDED
        student = load_model(run.artifact)
        assert type(student) is type(build_encoder(Named(name=family, **WINNERS[family])))
        assert student(torch.zeros(1, 3, 16, 16)).shape[1] == (
            student.num_features if method["name"] == "simclr" else 4
        )
    assert list(run.read_metrics())[-1]["attention"] > 0


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model.get("structure", model["name"]))
def test_each_published_network_fits_a_method_by_its_name(
    model: dict[str, Any], home: Path, toy_job: Callable[..., JobSpec]
) -> None:
    """Of the one that asks most of it: maps of its blocks, and a classifier."""
    assert check(toy_job(method={"name": "rtk", "teacher": "job:teacher"}, model=model), home) == []
