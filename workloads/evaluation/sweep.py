"""What a field of the method is worth: encoders trained at several values of it, under a linear probe.

For each value and seed the subject's job is run again, shorter where `epochs` says so, and
a linear probe asks its encoder. So i-MAE measures the degree of semantics (Zhang and Shen
2022, arXiv 2210.11470): accuracy over `field: s`, the probability that the two images of a
mixture are of one class. `sweep.html`, beside the result, draws it.

`pretrained` is the subject itself, comparable only where it was trained as long. The runs
go one after the other, each on the job's resources.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, field_validator

from workloads import artifact, assemble
from workloads.chart import Chart, write_chart
from workloads.evaluation.base import EvaluationConfig, Subject, summary, without_head
from workloads.evaluation.features import Features, extract, feature_sets, labelled, plain_view
from workloads.evaluation.linear_probe import probe_accuracy
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.spec_training import Strict


class Probe(Strict):
    """As in `linear_probe`."""

    epochs: int = Field(default=90, ge=1)
    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=0.1, gt=0)


class SweepConfig(EvaluationConfig):
    field: str  # of the subject's method
    values: tuple[float, ...] = Field(min_length=2)
    epochs: float | None = Field(default=None, gt=0)  # of each run; null: as long as the subject
    probe: Probe = Probe()

    @field_validator("values")
    @classmethod
    def _growing(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if list(values) != sorted(set(values)):
            raise ValueError(f"got values {list(values)}, expected growing ones; use {sorted(set(values))}")
        return values


class Sweep:
    Config: ClassVar[type[EvaluationConfig]] = SweepConfig

    def run(self, config: SweepConfig, subject: Subject) -> dict[str, Any] | None:
        manifests, view = labelled(config), plain_view(subject)
        specs = {v: [nested_spec(config, subject.spec, v, seed) for seed in config.seeds] for v in config.values}
        sets = feature_sets(*manifests, subject, untrained=config.untrained, raw_pixels=False)
        results = {who: summary([_accuracy(config, of, seed) for seed in config.seeds]) for who, of in sets.items()}
        curve: list[tuple[float, dict[str, Any]]] = []
        for value, nested in specs.items():
            accuracies = []
            for spec in nested:
                run = RunFolder(subject.folder / f"{config.field}={value:g}-{spec.seed}")
                if not subject.trained(spec, run):
                    return None
                encoder = without_head(artifact.load_model(run.artifact))
                train_set, test_set = (subject.place.scan(extract, encoder, m, view) for m in manifests)
                accuracies.append(_accuracy(config, (train_set, test_set), spec.seed))
            curve.append((value, summary(accuracies)))
        curves = {"trained": curve}
        if config.untrained:
            curves["untrained"] = [(value, results["untrained"]) for value in config.values]
        picture = subject.folder / "sweep.html"
        title = f"Linear probe of encoders trained at several {config.field}"
        chart: Chart = {"title": title, "x": config.field, "y": "accuracy", "curves": curves}
        write_chart(picture, chart)
        results |= {f"{config.field}={value:g}": found for value, found in curve}
        told = {"label": f"sweep_{config.field}", "metric": "accuracy", "results": results}
        return told | {"chart": chart, "picture": picture.name}


def _accuracy(config: SweepConfig, features: tuple[Features, Features], seed: int) -> float:
    return probe_accuracy(*features, **config.probe.model_dump(), seed=seed)


def nested_spec(config: SweepConfig, spec: JobSpec, value: float, seed: int) -> JobSpec:
    """The JobSpec of one run: that of the subject at another value.

    Raises:
        ValueError: the method has no such field, or does not take the value.
    """
    document = spec.model_dump()
    length = {} if config.epochs is None else {"epochs": config.epochs, "steps": None}
    changes = {
        "name": f"{spec.name[:50]}-sweep",
        "method": document["method"] | {config.field: value},
        "seed": seed,
        "checkpoint": document["checkpoint"] | {"mirror": None},  # the mirror is of the job itself
        "evaluate": [],
        "register": None,
    }
    nested = JobSpec.model_validate(document | length | changes)
    assemble.method_of(nested)
    return nested
