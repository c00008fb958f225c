"""What every method of the catalog must do. A new catalog line adds its tests here.

The loop is run as it is, in one process and in two threads of a gloo world, on toy shards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from tests.learning import pretrained
from tests.toy import difference, make_job
from workloads import artifact, assemble, catalog, checkpoint
from workloads.data.transforms.image import normalise
from workloads.export import export
from workloads.methods.base import Batch, DataInfo, Method, Progress
from workloads.models.timm_import import timm
from workloads.ranks import Ranks
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.train import train

DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
TOY_CONFIGS: dict[str, dict[str, Any]] = {
    "dmae": DECODER | {"teacher": "job:toy-mae", "student_blocks": [0], "teacher_blocks": [1]},
    "fine_tune": {"drop_path": 0.2},
    "mae": DECODER,
    "maskfeat": {"cell": 4},
    "maskdistill": {"teacher": "job:toy-mae", "min_block": 1},
}
"""A toy size of each method; one is required, so a method without tests cannot be added. `home` has the teachers."""
TOY_JOBS: dict[str, dict[str, Any]] = {}
"""Fields of the job of a method where they differ: methods that compare samples of a batch have no micro-batches."""


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, toy_shards: dict[str, str]) -> Path:
    """An installation with teachers: `job:toy-mae`."""
    folder = tmp_path_factory.mktemp("home")
    pretrained(make_job(toy_shards, epochs=None, steps=2), folder, "toy-mae")
    return folder


@pytest.fixture(params=sorted(catalog.METHODS))
def spec(request: pytest.FixtureRequest, toy_job: Callable[..., JobSpec]) -> JobSpec:
    name = request.param
    assert name in TOY_CONFIGS, f"add a toy config of {name} to TOY_CONFIGS"
    return toy_job(method={"name": name} | TOY_CONFIGS[name], **({"micro_batch_size": 4} | TOY_JOBS.get(name, {})))


def first_batch(spec: JobSpec) -> tuple[DataInfo, Batch]:
    manifest = assemble.open_stream(spec.data["train"])
    views = assemble.views_of(spec)
    from workloads.data.reader import Reader

    batch = Reader(manifest, views, batch_size=8).batch(0)
    return assemble.data_info(spec, manifest), batch | {n: normalise(batch[n], v) for n, v in views.items()}


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    step = checkpoint.latest_step(run.checkpoints)
    state = torch.load(run.checkpoints / f"step-{step:08d}.pt", weights_only=True)
    return state["method"]


def test_every_trained_parameter_gets_a_gradient_and_is_in_one_group(spec: JobSpec, home: Path) -> None:
    info, batch = first_batch(spec)
    method = assemble.build_method(spec, info, home)
    output = method(batch, Progress(step=0, epoch=0, total_steps=10))
    assert output.loss is not None and output.loss.ndim == 0 and output.loss.isfinite()
    output.loss.backward()
    grouped = [id(p) for group in method.parameter_groups() for p in group["params"]]
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert sorted(grouped) == sorted(id(p) for p in trained.values())
    idle = [name for name, p in trained.items() if p.grad is None]
    assert idle == []


def test_state_is_persistent(spec: JobSpec, home: Path) -> None:
    """Every buffer is in the state dict: what is not would be lost at a restart."""
    info, _ = first_batch(spec)
    method = assemble.build_method(spec, info, home)
    assert {name for name, _ in method.named_buffers()} <= set(method.state_dict())


def test_a_typo_in_the_config_is_refused(spec: JobSpec) -> None:
    cls: type[Method] = catalog.load("method", spec.method.name)
    with pytest.raises(ValidationError, match="typo"):
        cls.Config.model_validate(spec.method.config | {"typo": 1})
    with pytest.raises(ValidationError, match="frozen"):
        setattr(cls.Config.model_validate(spec.method.config), next(iter(cls.Config.model_fields)), 0)
    assert cls.paper


@pytest.mark.parametrize("stops", [(3,), (7, 13), (10, 19)])
def test_stop_and_resume_at_any_step_is_bit_exact(
    spec: JobSpec, home: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    assert train(spec, whole, home)
    # every step a checkpoint: so a run can be cut at any of them
    each = spec.model_copy(update={"checkpoint": spec.checkpoint.model_copy(update={"every_steps": 1})})
    steps = itertools.count(1)  # one process is asked after every step
    for stop in stops:
        assert not train(each, parts, home, should_stop=lambda stop=stop: next(steps) == stop)
        assert checkpoint.latest_step(parts.checkpoints) == stop
    assert train(each, parts, home)
    expected, got = weights(whole), weights(parts)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_two_ranks_compute_what_one_does(spec: JobSpec, home: Path, tmp_path: Path) -> None:
    """8 samples as 2 micro-batches of one rank = as one micro-batch on each of two ranks."""
    one, two = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
    assert train(spec, one, home)
    run_in_two_processes(spec, two, home, str(tmp_path / "store"))
    expected, got = weights(one), weights(two)
    assert difference(expected, got) < 5e-5
    curves = [[point["loss"] for point in run.read_metrics()] for run in (one, two)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def run_in_two_processes(spec: JobSpec, run: RunFolder, home: Path, store: str) -> None:
    context = torch.multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_rank, args=(rank, spec.model_dump_json(), run.path, home, store)) for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0


def _rank(rank: int, spec: str, run: Path, home: Path, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    assert train(JobSpec.model_validate_json(spec), RunFolder(run), home, Ranks(rank, 2))
    dist.destroy_process_group()


def test_export_loads_in_timm_and_serves(spec: JobSpec, home: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert train(spec, run, home)
    card = export(spec, run, home, "job-1")
    model = artifact.load_model(run.artifact)
    _, batch = first_batch(spec)
    theirs = timm.create_model(f"local-dir:{run.artifact}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.allclose(model(batch["image"]), theirs(batch["image"]), atol=1e-5)
    assert card.kind == catalog.load("method", spec.method.name).exports
    assert card.parameters == sum(p.numel() for p in model.parameters())
    if card.reconstructs:
        pictures = assemble.restore_method(run.artifact, home).pictures(batch)
        assert all(picture.shape == batch["image"].shape for picture in pictures.values())
