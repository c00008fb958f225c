"""Top-1 accuracy of a classifier artifact on labelled shards."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from workloads import artifact
from workloads.data.manifest import Manifest
from workloads.data.views import View
from workloads.evaluation.base import EvaluationConfig, Subject, summary
from workloads.evaluation.features import batches, device_of, labelled, plain_view


class AccuracyConfig(EvaluationConfig):
    seeds: tuple[int, ...] = (0,)  # nothing is drawn
    untrained: bool = False  # an untrained head guesses


@torch.inference_mode()
def accuracy(classifier: nn.Module, test: Manifest, view: View) -> float:
    """Where the classifier is."""
    device = device_of(classifier)
    answers = ((classifier(images.to(device)).argmax(dim=1).cpu(), y) for images, y in batches(test, view))
    return sum(int((answer == y).sum()) for answer, y in answers) / len(test)


class Accuracy:
    Config: ClassVar[type[EvaluationConfig]] = AccuracyConfig

    def run(self, config: AccuracyConfig, subject: Subject) -> dict[str, Any]:
        card = artifact.read_card(subject.artifact)
        if card.kind != "classifier":
            raise ValueError(
                f"got an artifact of kind {card.kind!r} from method {card.spec.method.name!r}, expected a classifier; "
                "evaluate encoders by knn, linear_probe or fine_tune"
            )
        _, test = labelled(config)
        value = subject.place.scan(accuracy, artifact.load_model(subject.artifact), test, plain_view(subject))
        return {"label": "accuracy", "metric": "accuracy", "results": {"pretrained": summary([value])}}
