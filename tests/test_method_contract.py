"""What every method of the catalog must do. A new catalog line adds its tests here.

The loop is run as it is, in one process and in two threads of a gloo world, on toy shards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from tests.toy import difference, random_images, write_shards
from tests.toy_methods import TOY_FORMS, toy_form_job, toy_method_job
from tests.toy_volumes import write_volumes
from tests.two_ranks import TwoRanks
from workloads import artifact, assemble, catalog, checkpoint
from workloads.data.transforms.image import normalise
from workloads.data.views import View
from workloads.export import export
from workloads.methods.base import Batch, DataInfo, Method, Progress
from workloads.models.timm_import import timm
from workloads.parallel import Spread
from workloads.parts import optimizers
from workloads.ranks import Ranks
from workloads.record import RunFolder
from workloads.sheet import GAP, LABEL, PIXELS
from workloads.spec import JobSpec
from workloads.step import Stepper
from workloads.train import train
from workloads.weights import COMPUTED


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Half of the toy shards, so that two epochs are 10 steps."""
    folder = tmp_path_factory.mktemp("few")
    volumes = write_volumes(folder / "volumes", {"train": 40})["train"]
    return {"train": write_shards(folder, "train", 40, 3), "volumes": volumes}


@pytest.fixture(params=sorted(catalog.METHODS))
def spec(request: pytest.FixtureRequest, few: dict[str, str]) -> JobSpec:
    return toy_method_job(few, request.param)


@pytest.fixture(params=sorted([*catalog.METHODS, *TOY_FORMS]))
def form(request: pytest.FixtureRequest, few: dict[str, str]) -> JobSpec:
    return toy_form_job(few, request.param)


Whole = Callable[[JobSpec], RunFolder]


@pytest.fixture(scope="module")
def whole(toy_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A job run to its end by one process, made for the first test that compares with it."""
    folder, made = tmp_path_factory.mktemp("whole"), dict[str, RunFolder]()

    def of(spec: JobSpec) -> RunFolder:
        key = spec.model_dump_json()
        if key not in made:
            made[key] = RunFolder(folder / str(len(made)))
            assert train(spec, made[key], toy_home)
        return made[key]

    return of


def first_batch(spec: JobSpec) -> tuple[DataInfo, Batch]:
    manifest = assemble.open_stream(spec.data["train"])
    views = assemble.views_of(spec)
    from workloads.data.reader import Reader

    batch = Reader(manifest, views, batch_size=8).batch(0)
    images = {n: normalise(batch[n], v) for n, v in views.items() if isinstance(v, View)}
    return assemble.data_info(spec, manifest), batch | images


def weights(run: RunFolder, spec: JobSpec, home: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint, be it one file or the parts of several ranks."""
    info, _ = first_batch(spec)
    method = assemble.build_method(spec, info, home)
    assert checkpoint.restore_weights(run.checkpoints, method) == checkpoint.latest_step(run.checkpoints)
    return method.state_dict()


def test_every_trained_parameter_gets_a_gradient_and_is_in_one_group(spec: JobSpec, toy_home: Path) -> None:
    info, batch = first_batch(spec)
    method = assemble.build_method(spec, info, toy_home)
    output = method(batch, Progress(step=0, epoch=0, total_steps=10))
    if output.loss is None:  # its first epoch fills a memory
        output = method(batch, Progress(step=10, epoch=1, total_steps=20))
    assert output.loss is not None and output.loss.ndim == 0 and output.loss.isfinite()
    output.loss.backward()
    grouped = [id(p) for group in method.parameter_groups() for p in group["params"]]
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert sorted(grouped) == sorted(id(p) for p in trained.values())
    idle = [name for name, p in trained.items() if p.grad is None]
    assert idle == []


def test_state_is_persistent(spec: JobSpec, toy_home: Path) -> None:
    """Every buffer is in the state dict, but tables of shapes: what is not would be lost at a restart."""
    info, _ = first_batch(spec)
    method = assemble.build_method(spec, info, toy_home)
    buffers = {name for name, _ in method.named_buffers() if not name.endswith(COMPUTED)}
    assert buffers <= set(method.state_dict())


def test_a_step_that_is_not_finite_leaves_no_trace_in_what_is_remembered(spec: JobSpec, toy_home: Path) -> None:
    """Queues, centres, prototypes, running statistics; with the next batch it goes on."""
    info, batch = first_batch(spec)
    method = assemble.build_method(spec, info, toy_home)
    optimizer = optimizers.build(method.parameter_groups(), spec.optimizer)
    stepper = Stepper(spec, Spread(method, spec.engine, Ranks()), optimizer, Ranks())
    bad = batch | {name: torch.full_like(batch[name], math.nan) for name in assemble.views_of(spec)}
    first = method.streams[0]
    for step, given in enumerate((bad, batch)):
        progress = Progress(step=10 + step, epoch=1, total_steps=20)
        done = stepper({first: given}, progress)
        method.after_step(progress)
        assert done.skipped == (step == 0)
    assert [name for name, value in method.state_dict().items() if not value.isfinite().all()] == []
    assert done.loss is not None and done.loss.isfinite()


def test_a_typo_in_the_config_is_refused(spec: JobSpec) -> None:
    cls: type[Method] = catalog.load("method", spec.method.name)
    with pytest.raises(ValidationError, match="typo"):
        cls.Config.model_validate(spec.method.config | {"typo": 1})
    with pytest.raises(ValidationError, match="frozen"):
        setattr(cls.Config.model_validate(spec.method.config), next(iter(cls.Config.model_fields)), 0)
    assert cls.paper


def test_stop_and_resume_at_any_step_is_bit_exact(form: JobSpec, whole: Whole, toy_home: Path, tmp_path: Path) -> None:
    parts = RunFolder(tmp_path / "parts")
    # every step a checkpoint: so a run can be cut at any of them
    each = form.model_copy(update={"checkpoint": form.checkpoint.model_copy(update={"every_steps": 1})})
    steps = itertools.count(1)  # one process is asked after every step
    for stop in (2, 5, 9):  # 5 is the end of an epoch
        assert not train(each, parts, toy_home, should_stop=lambda stop=stop: next(steps) == stop)
        assert checkpoint.latest_step(parts.checkpoints) == stop
    assert train(each, parts, toy_home)
    expected, got = (weights(run, form, toy_home) for run in (whole(form), parts))
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_two_ranks_compute_what_one_does(
    form: JobSpec, whole: Whole, toy_home: Path, tmp_path: Path, two_ranks: TwoRanks
) -> None:
    """8 samples of one rank, in 2 micro-batches unless the method compares them = 4 on each of two ranks."""
    one, two = whole(form), RunFolder(tmp_path / "two")
    on_two = JobSpec.model_validate(form.model_dump() | {"resources": {"workers": 2}})
    two_ranks.train(on_two, two, toy_home, tmp_path / "store")
    expected, got = (weights(run, form, toy_home) for run in (one, two))
    assert difference(expected, got) < 5e-5
    curves = [[point["loss"] for point in run.read_metrics()] for run in (one, two)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_export_loads_in_timm_and_serves(spec: JobSpec, whole: Whole, toy_home: Path) -> None:
    run = whole(spec)
    card = export(spec, run, toy_home, "job-1")
    model = artifact.load_model(run.artifact)
    _, batch = first_batch(spec)
    theirs = timm.create_model(f"local-dir:{run.artifact}", pretrained=True).eval()
    images = batch.get("image", random_images()["image"])  # what was trained on volumes is served images too
    with torch.no_grad():
        assert torch.allclose(model(images), theirs(images), atol=1e-5)
    assert card.kind == catalog.load("method", spec.method.name).exports
    assert card.parameters == sum(p.numel() for p in model.parameters())
    if card.reconstructs:
        pictures = assemble.restore_method(run.artifact, toy_home).pictures(batch)
        assert all(picture.shape == batch["image"].shape for picture in pictures.values())
        with Image.open(run.artifact / artifact.PICTURES) as sheet:
            assert sheet.height == len(pictures) * (PIXELS + GAP + LABEL)
    assert not run.read_events()  # `pictures_failed` would be one
