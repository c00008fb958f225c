"""Evaluations that train a classifier by a job of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.learning import here, pretrained
from workloads import artifact, catalog
from workloads.evaluation.base import Subject
from workloads.evaluation.fine_tune import FineTuneEvaluation
from workloads.evaluation.linear_probe_augmented import LinearProbeAugmented
from workloads.evaluation.nested import NestedConfig, resources_of
from workloads.place import Here
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.spec_training import Resources

Make = Callable[..., JobSpec]
Evaluation = FineTuneEvaluation | LinearProbeAugmented


@pytest.fixture
def subject(toy_job: Make, tmp_path: Path) -> Subject:
    """A toy MAE encoder."""
    spec = toy_job(epochs=None, steps=2)
    folder = pretrained(spec, tmp_path, "toy")
    return Subject(spec, folder, tmp_path, tmp_path / "evaluation", "toy", lambda: False, here(tmp_path))


def config_of(evaluation: Evaluation, shards: dict[str, str], **fields: Any) -> Any:
    data = {name: {"shards": shards[name]} for name in ("train", "test")}
    short = {"epochs": 2, "batch_size": 8, "warmup_epochs": 0.5, "seeds": [0], "data": data}
    return evaluation.Config.model_validate(short | fields)


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[JobSpec]:
    """What is trained, in order."""
    seen: list[JobSpec] = []

    def train(self: Here, spec: JobSpec, *args: Any, _train: Any = Here.train) -> bool:
        seen.append(spec)
        trained: bool = _train(self, spec, *args)
        return trained

    monkeypatch.setattr(Here, "train", train)
    return seen


@pytest.mark.parametrize("evaluation", [FineTuneEvaluation(), LinearProbeAugmented()])
def test_each_seed_is_trained_from_the_artifact_and_from_fresh_weights(
    evaluation: Evaluation, subject: Subject, toy_shards: dict[str, str], specs: list[JobSpec]
) -> None:
    config = config_of(evaluation, toy_shards, seeds=[0, 1], labels_per_class=4, register="toy-classifier")
    result = evaluation.run(config, subject)
    assert result is not None
    assert [(spec.seed, spec.init) for spec in specs] == [
        *((seed, str(subject.artifact)) for seed in (0, 1)),
        *((seed, None) for seed in (0, 1)),
    ]
    assert all(spec.data["train"].per_class == 4 for spec in specs)
    assert {who: len(values["seeds"]) for who, values in result["results"].items()} == {"pretrained": 2, "untrained": 2}
    assert result["register"] == "toy-classifier" and result["label"].endswith("4")
    card = artifact.read_card(Path(result["artifact"]))
    assert card.kind == "classifier" and card.evaluations[0]["results"] == result["results"]
    assert not list(subject.folder.glob("*/checkpoints"))
    assert evaluation.run(config, subject) == result  # nothing is trained again
    assert len(specs) == 4


@pytest.mark.parametrize("evaluation", [FineTuneEvaluation(), LinearProbeAugmented()])
def test_a_stop_leaves_what_was_done(
    evaluation: Evaluation, subject: Subject, toy_shards: dict[str, str], specs: list[JobSpec]
) -> None:
    config = config_of(evaluation, toy_shards, untrained=False)
    place = here(subject.home, lambda: bool(specs))
    stopped = Subject(subject.spec, subject.artifact, subject.home, subject.folder, "toy", lambda: bool(specs), place)
    assert evaluation.run(config, stopped) is None
    assert RunFolder(subject.folder / "pretrained-0").checkpoints.is_dir()
    assert evaluation.run(config, subject) is not None


def test_the_probe_is_trained_as_published(
    subject: Subject, toy_shards: dict[str, str], specs: list[JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    published = LinearProbeAugmented.Config.model_validate({"data": config_of(LinearProbeAugmented(), toy_shards).data})
    assert (published.epochs, published.lr, published.warmup_epochs) == (90, 0.1 * 16384 / 256, 10)  # type: ignore[attr-defined]
    assert LinearProbeAugmented().run(config_of(LinearProbeAugmented(), toy_shards, untrained=False), subject)
    (spec,) = specs
    rule = spec.optimizer
    assert (rule.name, rule.lr, rule.momentum, rule.trust_coefficient) == ("lars", 6.4, 0.9, 0.001)
    assert rule.weight_decay == 0 and not rule.scale_lr
    assert spec.method.name == "linear_probe" and spec.method.config["pool"] == "cls"
    before = artifact.load_model(subject.artifact).state_dict()
    after = artifact.load_model(RunFolder(subject.folder / "pretrained-0").artifact).state_dict()
    assert all((after[name] == value).all() for name, value in before.items())  # the encoder stayed as it was


def test_fine_tuning_passes_its_fields_on(subject: Subject, toy_shards: dict[str, str], specs: list[JobSpec]) -> None:
    view = {"interpolation": "bicubic", "randaugment": {"magnitude": 9}, "erasing": {"p": 0.25}}
    fields = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.2, "view": view, "min_lr": 1e-6, "micro_batch_size": 4}
    config = config_of(FineTuneEvaluation(), toy_shards, untrained=False, **fields)
    assert FineTuneEvaluation().run(config, subject)
    (spec,) = specs
    got = catalog.load("method", "fine_tune").Config.model_validate(spec.method.config)
    assert (got.mixup, got.cutmix, got.drop_path, got.layer_decay) == (0.8, 1.0, 0.2, 0.75)
    assert got.view.randaugment.magnitude == 9 and got.view.erasing.p == 0.25 and got.view.interpolation == "bicubic"
    assert (spec.schedule.min_lr, spec.micro_batch_size, spec.optimizer.betas) == (1e-6, 4, (0.9, 0.999))


def test_what_is_left_out_is_as_before_and_a_typo_is_refused(toy_shards: dict[str, str]) -> None:
    data = {name: {"shards": toy_shards[name]} for name in ("train", "test")}
    config = FineTuneEvaluation.Config.model_validate({"data": data})
    assert config.model_dump(exclude={"data", "view"}) == {
        "seeds": (0, 1, 2),
        "untrained": True,
        "every_checkpoints": None,
        "labels_per_class": None,
        "epochs": 100,
        "batch_size": 32,
        "micro_batch_size": None,
        "lr": 1e-3,
        "min_lr": 0.0,
        "warmup_epochs": 5,
        "register_as": None,
        "layer_decay": 0.75,
        "weight_decay": 0.05,
        "drop_path": 0.1,
        "label_smoothing": 0.1,
        "mixup": 0.0,
        "cutmix": 0.0,
    }
    with pytest.raises(ValidationError, match="mixupp"):
        FineTuneEvaluation.Config.model_validate({"data": data, "mixupp": 1})


def test_the_probe_learns_by_the_published_rule(subject: Subject, toy_shards: dict[str, str]) -> None:
    """Classes differ in colour, which an encoder of two steps shows: of four, chance is 0.25."""
    config = config_of(LinearProbeAugmented(), toy_shards, epochs=15, untrained=False)
    result = LinearProbeAugmented().run(config, subject)
    assert result is not None and result["results"]["pretrained"]["mean"] > 0.6


@pytest.mark.parametrize(
    ("job", "fields", "workers"),
    [
        (8, {"batch_size": 1024}, 8),
        (8, {"batch_size": 1020}, 6),
        (8, {"batch_size": 1024, "labels_per_class": 10}, 1),
        (8, {"batch_size": 64, "micro_batch_size": 16}, 4),
        ((2, 8), {"batch_size": 1024}, (2, 8)),
        ((2, 8), {"batch_size": 4}, (2, 4)),
        ((2, 8), {"batch_size": 7}, (2, 7)),
        ((4, 8), {"batch_size": 3}, 3),
    ],
)
def test_it_trains_on_as_many_workers_as_share_the_batch(
    job: int | tuple[int, int], fields: dict[str, int], workers: Any, toy_shards: dict[str, str]
) -> None:
    data = {name: {"shards": toy_shards[name]} for name in ("train", "test")}
    got = resources_of(NestedConfig.model_validate({"data": data} | fields), Resources(workers=job, gpus_per_worker=1))
    assert got == Resources(workers=workers, gpus_per_worker=1)


def test_a_micro_batch_that_does_not_divide_the_batch_is_refused_early(toy_shards: dict[str, str]) -> None:
    data = {name: {"shards": toy_shards[name]} for name in ("train", "test")}
    with pytest.raises(ValidationError, match="micro_batch_size=24 for batch_size=32, expected a divisor; use 8"):
        NestedConfig.model_validate({"data": data, "batch_size": 32, "micro_batch_size": 24})
