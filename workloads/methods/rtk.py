"""RTK: representative teacher keys (Yang et al. 2022, arXiv 2206.12788), on top of AFD.

A student network of convolutions learns from labels, from the teacher's logits and from its feature maps: an attention
learns which map of the teacher is for which map of the student. In AFD (show, attend and distill, Ji et al., AAAI
2021; `mode: afd`) teacher maps ask and student maps answer, so each teacher map is taught to somebody. In RTK student
maps ask and teacher maps answer, of which only the representative ones of each stage are kept.

AFD is as its released code has it. Of RTK only the abstract could be read and no code is public: the swapped roles,
the selection of the share `rho` of each stage by mean score, and `merge` are a reconstruction, whose numbers cannot be
held against the paper's.

Differences from the released code of AFD:

- The crop: a part of the image is enlarged, of the sizes and shapes that a 32 px window on the image padded by 4
  shows; theirs is shifted onto black instead. Pixels are normalised as everywhere here, not by data set.
- No bias before a BatchNorm, which takes it away, and none behind the bilinear map, where the softmax does: the same
  function. BatchNorm has the statistics of all ranks, unless `engine.sync_batchnorm` says otherwise.
- ResNet-20, -56 and their kin have shortcuts without parameters (He et al. 2016), theirs convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.models.encoders import classifier_of
from workloads.parts.crop import RandomResizedCrop
from workloads.parts.feature_maps import map_shapes, tapped
from workloads.parts.frozen import Teacher
from workloads.parts.gather import gather


class Augmentation(RandomResizedCrop):
    crop_scale: tuple[float, float] = (49 / 64, 1.0)  # from 28 x 28 of 32 x 32 pixels
    crop_ratio: tuple[float, float] = (7 / 8, 8 / 7)


class RTKConfig(MethodConfig):
    teacher: str  # a classifier of the same classes
    mode: Literal["rtk", "afd"] = "rtk"
    rho: float = Field(default=0.5, gt=0, le=1)  # of rtk: the share of each stage that is kept; the value is ours
    merge: bool = False  # of rtk: what is kept of a stage becomes one key and one map
    d: int = Field(default=128, ge=1)  # of queries and keys; this and what follows: AFD's released code
    alpha: float = Field(default=0.9, ge=0)  # weight of KD
    temperature: float = Field(default=4.0, gt=0)
    beta: float = Field(default=200.0, ge=0)  # weight of the attended distances, which are about 1e-3
    view: Augmentation = Augmentation()


class RTK(Method):
    Config = RTKConfig
    paper: ClassVar[str] = "RTK: Representative Teacher Keys, Yang et al. 2022, arXiv 2206.12788"
    exports: ClassVar[str] = "classifier"
    config: RTKConfig

    def __init__(self, config: RTKConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        classes, size = inputs.data.num_classes, inputs.data.side
        self.teacher = Teacher(inputs.load(config.teacher), View(size=size))
        expect_classes(self.teacher.module, classes, config.teacher)
        self.classifier = classifier_of(inputs.encoder, classes, drop_path=0.0).requires_grad_(True)
        student, teacher = map_shapes(self.classifier, size), map_shapes(self.teacher.module, size)
        self.stages = [len(list(alike)) for _, alike in groupby(shape[1:] for shape in teacher)]  # teacher maps of each
        asking, answering = (teacher, student) if config.mode == "afd" else (student, teacher)
        self.attention = Attention([shape[0] for shape in asking], [shape[0] for shape in answering], config.d)

    @classmethod
    def views(cls, config: RTKConfig, image_size: Size) -> dict[str, View]:
        return {"image": View(size=image_size, **config.view.model_dump())}

    def forward(self, batch: Batch, progress: Progress) -> Output:
        images, label = batch["image"], batch["label"]
        with torch.no_grad(), tapped(self.teacher.module) as teacher:
            teacher_logits = self.teacher.module(self.teacher.see(images)).float()
        with tapped(self.classifier) as student:
            logits = self.classifier(images).float()  # [B, classes]
        terms = {
            "ce": F.cross_entropy(logits, label),
            "kd": kd(logits, teacher_logits, self.config.temperature),
            "attention": self.attended(student, teacher),
        }
        loss = terms["ce"] + self.config.alpha * terms["kd"] + self.config.beta * terms["attention"]
        accuracy = (logits.detach().argmax(dim=1) == label).float().mean()
        return Output(loss, {name: term.detach() for name, term in terms.items()} | {"accuracy": accuracy})

    def attended(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """L_att of S and T feature maps [B, C, H, W]; the weights of what answers sum to 1 for each asking map."""
        pairs = spatial_maps(student, teacher, self.stages)
        if self.config.mode == "afd":
            weights = self.attention(teacher, student).softmax(dim=-1)  # [B, T, S]
            return attended_distance(weights, distances(pairs).mT)
        scores = self.attention(student, teacher)  # [B, S, T]
        # Over all ranks, and without gradient: else the loss would fall by choosing maps that are easy.
        relevance = gather(scores.mean(dim=(0, 1))[None]).mean(dim=0)  # [T]
        kept = representatives(relevance, self.stages, self.config.rho)
        if self.config.merge:
            scores, pairs = merged(scores, pairs, kept, self.stages)
        else:
            scores = scores.masked_fill(kept.isneginf(), -torch.inf)
        return attended_distance(scores.softmax(dim=-1), distances(pairs))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All decays, also norms and the attention, as in the released code."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def export(self) -> nn.Module:
        return self.classifier


class Descriptors(nn.Module):
    """Feature maps -> BN(Linear(mean over places)), a linear layer each: n of [B, C_i, H_i, W_i] -> [B, n, d]."""

    def __init__(self, channels: Sequence[int], d: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(c, d, bias=False) for c in channels)
        self.norm = nn.BatchNorm1d(len(channels) * d)  # n of d features at once

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        projected = [linear(x.mean(dim=(2, 3))) for linear, x in zip(self.linears, maps, strict=True)]
        return self.norm(torch.cat(projected, dim=1)).unflatten(1, (len(projected), -1))


class Attention(nn.Module):
    """How well each answering map fits each asking one: trained with the student and thrown away."""

    def __init__(self, asking: Sequence[int], answering: Sequence[int], d: int) -> None:
        """Attention between maps of so many channels; d: of queries and keys."""
        super().__init__()
        self.queries, self.keys = Descriptors(asking, d), Descriptors(answering, d)
        self.bilinear = nn.Linear(d, d * len(asking), bias=False)
        self.norm = nn.BatchNorm1d(d * len(asking))
        self.norm.bias.requires_grad_(False)  # the same for all answers: the softmax does not see it
        self.asking_position = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(asking), d)))
        self.answering_position = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(answering), d)))

    def forward(self, asking: Sequence[Tensor], answering: Sequence[Tensor]) -> Tensor:
        """N and m feature maps -> (q_n . k_mn + p_n . p_m) / sqrt(d) in float32, [B, n, m]."""
        q = self.queries(asking).float()  # [B, n, d]
        keys = self.bilinear(self.keys(answering).relu())  # [B, m, n * d]: a key for each query
        k = self.norm(keys.flatten(0, 1)).float().view(len(q), len(answering), *q.shape[1:])
        position = self.asking_position @ self.answering_position.T
        return (torch.einsum("bnd,bmnd->bnm", q, k) + position) / math.sqrt(q.shape[-1])


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits [B, classes], mean over B (Hinton et al. 2015)."""
    log_p, log_q = ((logits / temperature).log_softmax(dim=1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def spatial_map(maps: Tensor, size: Sequence[int]) -> Tensor:
    """phi: [B, C, H, W] -> the mean of squares over channels, pooled to `size` (h, w), at unit length: [B, h * w]."""
    energy = maps.float().square().mean(dim=1, keepdim=True)
    return F.normalize(F.adaptive_avg_pool2d(energy, (size[0], size[1])).flatten(1), dim=1)


def spatial_maps(
    student: Sequence[Tensor], teacher: Sequence[Tensor], stages: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """For each stage of n teacher maps of one size: all student maps [B, S, h * w] and its own [B, n, h * w]."""
    pairs, left = [], list(teacher)
    for n in stages:
        stage, left = left[:n], left[n:]
        size = stage[0].shape[2:]
        g, h = (torch.stack([spatial_map(x, size) for x in maps], dim=1) for maps in (student, stage))
        pairs.append((g, h))
    return pairs


def distances(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean squared difference of each student map [B, S, h * w] and each teacher map [B, n, h * w]: [B, S, all n]."""
    return torch.cat([(g[:, :, None] - h[:, None]).square().mean(dim=-1) for g, h in pairs], dim=2)


def attended_distance(weights: Tensor, distance: Tensor) -> Tensor:
    """The weighted sum, mean over samples; both [B, asking, answering]."""
    return (weights * distance).sum(dim=(1, 2)).mean()


def representatives(relevance: Tensor, stages: Sequence[int], rho: float) -> Tensor:
    """Relevance [T] of the best ceil(rho n) of each stage's n maps; -inf of the others."""
    kept = []
    for stage in relevance.split(list(stages)):
        best = stage.topk(math.ceil(rho * len(stage)))
        kept.append(torch.full_like(stage, -torch.inf).scatter(0, best.indices, best.values))
    return torch.cat(kept)


def merged(
    scores: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], kept: Tensor, stages: Sequence[int]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """One key and one map a stage: averages of what `representatives` kept, by the softmax of its relevance.

    A score is linear in its key, so averaging keys is averaging scores: [B, S, T] -> [B, S, stages].
    """
    shares = [stage.softmax(dim=0) for stage in kept.split(list(stages))]
    means = [part @ share for part, share in zip(scores.split(list(stages), dim=2), shares, strict=True)]
    maps = [
        (g, F.normalize((h * share[:, None]).sum(dim=1, keepdim=True), dim=-1))
        for (g, h), share in zip(pairs, shares, strict=True)
    ]
    return torch.stack(means, dim=2), maps


def expect_classes(teacher: nn.Module, num_classes: int, reference: str) -> None:
    """Raises ValueError unless the teacher classifies into so many classes."""
    theirs = int(getattr(teacher, "num_classes", 0))
    preflight = next(teacher.parameters()).is_meta  # has not read the data, so does not know its classes
    if theirs < 2 or (theirs != num_classes and not preflight):
        raise ValueError(
            f"got teacher {reference!r} of {theirs} classes for data of {num_classes}, expected a classifier of the "
            "same classes; train one on this data with method fine_tune"
        )
