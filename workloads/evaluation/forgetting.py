"""Which images of a source set are like those of a target domain: the catastrophic forgetting score (CFS).

TransReID-SSL (Luo et al. 2021, arXiv 2111.12084): a network is pretrained on the source images, a cheap one will do,
and fine-tuned on the target domain. What that changes least lies nearest to the target, so the best part is what the
large network is pretrained on: the paper keeps 50 or 60 % of its 4.18 million images. The score of an image says how
far its neighbours under one network are those under the other:

    CFS = |R_s & R_t| / |R_s | R_t|    R: its k-reciprocal neighbours by cosine, which have it among their k nearest

An image that has none under both goes by its plain k nearest. Neighbours, unlike features, do not mind that fine-tuning
turns all features together; `by: features` is the cosine of the two features instead, for networks of one origin.

Put it into the job that fine-tunes: its own network is the one, `reference` the one it started from. The score is the
same the other way round. `data.train` are the source images; `data.test`, images of the target domain that were not
trained on, are scored by their neighbours among the source images, and only to see whether the score tells the domains
apart. Labels are not looked at.

    pretrained    mean of the source images
    target        mean of the target's
    untrained     mean of the source images for the network of this job before it was trained

Beside them `auc`: how often an image of the target scores above one of the source, of all pairs; 0.5 is chance. The
scores of the source images, best first, are `scores.parquet` beside the result, and then say what a job learns from:
`data: {train: {shards: ..., scores: .../scores.parquet, keep: 0.5}}`.

The code of the score was never released; k, and neighbours among a part of the source (`bank`), are ours. So look at
`auc` before you trust it, and at that of a network which was tuned on something else: some images are stable whatever
comes. On toy networks (2,000 images, vehicles or animals as the target) neither form told the domains apart after
fine-tuning by labels, and features did after fine-tuning without (`tests/workloads/evaluation/test_forgetting.py`).

Features of all images are held in memory, and neighbours are found by comparing each image with the whole bank.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from workloads import artifact, assemble
from workloads.data.order import permutation
from workloads.data.scores import write_scores
from workloads.data.views import View
from workloads.evaluation.base import EvaluationConfig, Subject, summary, without_head
from workloads.evaluation.features import extract, plain_view

CHUNK = 1024  # images that are compared with the bank at a time
ROUNDING = 1e-6  # of a cosine that is computed twice


class ForgettingConfig(EvaluationConfig):
    reference: str  # the other network: name@version, job:<id> or a folder
    by: Literal["neighbours", "features"] = "neighbours"
    k: int = Field(default=30, ge=1)  # as in the re-ranking of the paper's code
    bank: int | None = Field(default=None, ge=2)  # source images that may be neighbours, drawn by seed; null: all
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)  # the score of an image is its mean over them


class Neighbours(NamedTuple):
    """Of images: the k nearest rows of a bank, int64 [N, k], and which of these have the image among theirs, [N, k]."""

    rows: Tensor
    mutual: Tensor


def neighbours(images: Tensor, bank: Tensor, own: Tensor, k: int) -> Neighbours:
    """The neighbours of each image among those of the bank.

    Args:
        images: features [N, D].
        bank: features [M, D].
        own: int64 [N], the row of the bank that is the image itself, -1 where none is.
        k: of M - 1 at most.
    """
    reach = _nearest(bank, bank, torch.arange(len(bank)), k)[0][:, -1]
    similarity, rows = _nearest(images, bank, own, k)
    return Neighbours(rows, similarity >= reach[rows] - ROUNDING)


def _nearest(images: Tensor, bank: Tensor, own: Tensor, k: int) -> tuple[Tensor, Tensor]:
    bank = F.normalize(bank, dim=1)
    found = []
    for part, places in zip(images.split(CHUNK), own.split(CHUNK), strict=True):
        similarity = F.normalize(part, dim=1) @ bank.T
        inside = places >= 0
        similarity[inside, places[inside]] = -torch.inf
        found.append(similarity.topk(min(k, len(bank) - 1), dim=1))
    return torch.cat([values for values, _ in found]), torch.cat([rows for _, rows in found])


def agreement(one: Neighbours, two: Neighbours) -> Tensor:
    """How far the mutual neighbours of each image are the same, float32 [N] in [0, 1] (Jaccard)."""
    parts = zip(*(x.split(CHUNK) for x in (*one, *two)), strict=True)
    return torch.cat([_jaccard(Neighbours(a, b), Neighbours(c, d)) for a, b, c, d in parts])


def _jaccard(one: Neighbours, two: Neighbours) -> Tensor:
    same = one.rows[:, :, None] == two.rows[:, None, :]  # [n, k, k]
    both = (same & one.mutual[:, :, None] & two.mutual[:, None, :]).sum(dim=(1, 2))
    either = one.mutual.sum(dim=1) + two.mutual.sum(dim=1) - both
    plain = same.sum(dim=(1, 2))
    return torch.where(either > 0, both / either.clamp(min=1), plain / (2 * same.shape[1] - plain))


def above(high: Tensor, low: Tensor) -> float:
    """How often one of `high` [N] is more than one of `low` [M], of all pairs; equal ones count half."""
    low = low.sort().values
    places = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)
    return float(places.double().mean() / (2 * len(low)))


def scores(config: ForgettingConfig, one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of the source and of the target images under two networks, float32 [seeds, N] and [seeds, T].

    Args:
        config: how.
        one: features of source [N, D] and target [T, D] under one network.
        two: likewise.

    Raises:
        ValueError: features of other widths, which have no cosine.
    """
    if config.by == "features":
        if one[0].shape[1] != two[0].shape[1]:
            raise ValueError(
                f"got features of {one[0].shape[1]} and {two[0].shape[1]} channels, expected a network and the one it "
                "was fine-tuned from; name that one, or compare by: neighbours"
            )
        source, target = (F.cosine_similarity(a, b)[None] for a, b in zip(one, two, strict=True))
        return source, target
    n = len(one[0])
    found: list[list[Tensor]] = []
    for seed in config.seeds:
        bank = torch.arange(n) if config.bank is None else torch.from_numpy(permutation(seed, 0, 0, n)[: config.bank])
        own = torch.full((n,), -1)
        own[bank] = torch.arange(len(bank))
        nobody = torch.full((len(one[1]),), -1)
        sides = [
            [neighbours(x, source[bank], places, config.k) for x, places in ((source, own), (target, nobody))]
            for source, target in (one, two)
        ]
        found.append([agreement(a, b) for a, b in zip(*sides, strict=True)])
    source, target = (torch.stack(each) for each in zip(*found, strict=True))
    return source, target


class Forgetting:
    Config: ClassVar[type[EvaluationConfig]] = ForgettingConfig

    def run(self, config: ForgettingConfig, subject: Subject) -> dict[str, Any] | None:
        folder = artifact.resolve(config.reference, subject.home)
        card = artifact.read_card(folder)
        source, target = (assemble.open_stream(stream) for stream in (config.data.train, config.data.test))
        networks = subject.encoders(untrained=config.untrained)
        views = dict.fromkeys(networks, plain_view(subject))
        networks["reference"] = without_head(artifact.load_model(folder))
        views["reference"] = View(size=card.image_size, mean=card.mean, std=card.std)
        features = {}
        for who, network in networks.items():
            if subject.should_stop():
                return None
            scan = partial(subject.place.scan, extract, network)
            features[who] = scan(source, views[who]).x, scan(target, views[who]).x
        reference = features.pop("reference")
        found = {who: scores(config, x, reference) for who, x in features.items()}
        results = {who: _means(of_source) for who, (of_source, _) in found.items()}
        of_source, of_target = found["pretrained"]
        results["target"] = _means(of_target)
        how = config.model_dump(mode="json", include={"reference", "by", "k", "bank", "seeds"}) | {
            "job": subject.job_id
        }
        file = subject.folder / "scores.parquet"
        write_scores(file, source, np.asarray(of_source.mean(dim=0)), how)
        auc = statistics.fmean(above(high, low) for high, low in zip(of_target, of_source, strict=True))
        told = {"label": "forgetting", "metric": "cfs", "results": results}
        return told | {"auc": auc, "scores": file.name}


def _means(of_seeds: Tensor) -> dict[str, Any]:
    return summary([float(values.double().mean()) for values in of_seeds])
