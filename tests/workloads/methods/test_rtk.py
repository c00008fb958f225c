"""AFD and RTK: golden numbers of AFD's released code, and what the selection of representative keys must do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.learning import RealImages, pretrained
from workloads import artifact, assemble
from workloads.data.views import View
from workloads.evaluation.accuracy import accuracy
from workloads.methods.base import DataInfo, Inputs, Progress
from workloads.methods.rtk import (
    RTK,
    RTKConfig,
    attended_distance,
    distances,
    kd,
    merged,
    representatives,
    spatial_map,
    spatial_maps,
)
from workloads.models.resnet_cifar import ResNetCifar
from workloads.models.timm_import import timm
from workloads.models.vit import ViTConfig
from workloads.models.wide_resnet import WideResNet
from workloads.parts.feature_maps import tapped
from workloads.parts.frozen import Frozen
from workloads.spec import Stream

START = Progress(step=0, epoch=0, total_steps=10)
MODES: list[dict[str, Any]] = [{"mode": "afd"}, {"mode": "rtk"}, {"mode": "rtk", "merge": True}]


def inputs(teacher: nn.Module, student: nn.Module | None = None, num_classes: int = 3) -> Inputs:
    info = DataInfo(num_instances=8, num_classes=num_classes, shape=(3, 16, 16))
    return Inputs(student or ResNetCifar(8), info, lambda _: Frozen(teacher, View(size=16)), None)  # type: ignore[arg-type]


def rtk(**config: Any) -> RTK:
    """A student of 3 maps, 16, 8 and 4 pixels a side, and a teacher of 2 maps of each of these sizes."""
    torch.manual_seed(0)
    return RTK(RTKConfig(teacher="wide", d=8, **config), inputs(WideResNet(16, 1, num_classes=3)))


def batch(n: int = 6) -> dict[str, torch.Tensor]:
    return {
        "image": torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
        "label": torch.arange(n) % 3,
    }


def maps_of(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    with tapped(network) as maps:
        network(images)
    return maps


def both(method: RTK) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Maps of the student and of the teacher."""
    with torch.no_grad():
        return maps_of(method.classifier, batch()["image"]), maps_of(method.teacher.module, batch()["image"])


def scoring(method: RTK, scores: torch.Tensor) -> None:
    """The attention says `scores`, whatever it sees."""
    method.attention.register_forward_hook(lambda *_: scores)


def test_spatial_map_golden() -> None:
    maps = torch.arange(8.0).reshape(1, 2, 2, 2)
    energy = torch.tensor([8.0, 13, 20, 29])
    assert spatial_map(maps, (2, 2))[0].tolist() == pytest.approx([0.208373, 0.338606, 0.520932, 0.755352], abs=1e-6)
    assert torch.allclose(spatial_map(maps, (2, 2))[0], energy / energy.norm())


@pytest.mark.parametrize("factor", [3.0, -0.5])
def test_spatial_map_knows_no_scale(factor: float) -> None:
    maps = torch.randn(2, 3, 4, 4)
    assert torch.allclose(spatial_map(maps, (2, 2)), spatial_map(factor * maps, (2, 2)), atol=1e-6)


def test_squares_come_before_pooling() -> None:
    maps = torch.tensor([[[[1.0, -1], [2, 2]]]])
    assert torch.allclose(spatial_map(maps, (2, 1)), F.normalize(torch.tensor([[1.0, 4]])))


def test_term_golden() -> None:
    student, teacher = torch.tensor([[[0.6, 0.8], [1, 0]]]), torch.tensor([[[0.0, 1]]])
    distance = distances([(student, teacher)])  # [1, S, T]
    assert attended_distance(torch.tensor([[[0.25, 0.75]]]), distance.mT).item() == pytest.approx(0.8)


def test_kd_golden() -> None:
    student, teacher = torch.tensor([[2.0, 0, -2]]), torch.tensor([[4.0, 0, 0]])
    assert kd(student, teacher, temperature=4).item() == pytest.approx(0.365668, abs=1e-6)
    assert kd(student.repeat(5, 1), teacher.repeat(5, 1), 4).item() == pytest.approx(0.365668, abs=1e-6)  # a mean


@pytest.mark.parametrize(("mode", "asking"), [("afd", 6), ("rtk", 3)])
def test_the_softmax_runs_over_what_answers(mode: str, asking: int) -> None:
    """Scores that are all alike weigh the student's maps alike in AFD, the teacher's in RTK."""
    method = rtk(mode=mode, rho=1)
    student, teacher = both(method)
    scoring(method, torch.zeros(6, asking, 9 - asking))
    distance = distances(spatial_maps(student, teacher, method.stages))  # [B, S, T]
    expected = distance.mean(dim=1 if mode == "afd" else 2).sum(dim=1).mean()
    assert method.attended(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)


def test_scores_are_products_of_queries_keys_and_positions() -> None:
    method = rtk()
    attention, (student, teacher) = method.attention.eval(), both(method)
    nn.init.uniform_(attention.norm.weight)
    scores = attention(student, teacher)
    assert scores.shape == (6, 3, 6)
    q = attention.queries(student)[:, 1]
    keys = attention.bilinear(F.relu(attention.keys(teacher))[:, 4])
    k = attention.norm(keys)[:, 8:16]  # of the second that asks
    position = attention.asking_position[1] @ attention.answering_position[4]
    assert torch.allclose(scores[:, 1, 4], ((q * k).sum(1) + position) / 8**0.5, atol=1e-6)


def test_keeping_all_is_the_unfiltered_loss() -> None:
    method = rtk(rho=1)
    student, teacher = both(method)
    method.attention.eval()
    weights = method.attention(student, teacher).softmax(dim=-1)
    assert torch.allclose(weights.sum(dim=-1), torch.ones(6, 3))
    expected = attended_distance(weights, distances(spatial_maps(student, teacher, method.stages)))
    assert method.attended(student, teacher).item() == pytest.approx(expected.item(), rel=1e-6)


def test_representatives_are_the_best_of_each_stage() -> None:
    relevance = torch.tensor([0.1, 0.3, 0.2, 9.0, 8.0])
    inf = -torch.inf
    assert representatives(relevance, [3, 2], 0.5).tolist() == pytest.approx([inf, 0.3, 0.2, 9.0, inf])
    assert representatives(relevance, [3, 2], 0.01).tolist() == pytest.approx([inf, 0.3, inf, 9.0, inf])
    assert torch.equal(representatives(relevance, [3, 2], 1), relevance)


def test_dropped_keys_have_no_weight_and_no_gradient() -> None:
    method = rtk(rho=0.5)
    student, teacher = both(method)
    scores = torch.randn(6, 3, 6, generator=torch.Generator().manual_seed(2))
    scores[:, :, ::2] -= 10  # so the second of each stage is kept
    scoring(method, scores.requires_grad_(True))
    loss = method.attended(student, teacher)
    loss.backward()
    assert scores.grad is not None
    assert scores.grad[:, :, ::2].abs().max() == 0
    assert scores.grad[:, :, 1::2].abs().min() > 0
    other = [torch.rand_like(x) if i % 2 == 0 else x for i, x in enumerate(teacher)]
    assert torch.equal(method.attended(student, other), loss)


def test_what_is_kept_is_no_matter_of_gradients() -> None:
    """The loss moves with the scores of what is kept as with fixed choices, merged or not."""
    scores = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(3), requires_grad=True)
    method = rtk(rho=1, merge=True)
    student, teacher = both(method)
    pairs = spatial_maps([x[:4] for x in student], [x[:4] for x in teacher], method.stages)
    kept = representatives(scores.mean(dim=(0, 1)).detach(), method.stages, 1)
    means, maps = merged(scores, pairs, kept, method.stages)
    (expected,) = torch.autograd.grad(attended_distance(means.softmax(-1), distances(maps)), scores)
    scoring(method, scores)
    (got,) = torch.autograd.grad(method.attended([x[:4] for x in student], [x[:4] for x in teacher]), scores)
    assert torch.allclose(got, expected)


def test_one_kept_a_stage_is_merged_with_itself() -> None:
    merging, plain = rtk(rho=0.1, merge=True), rtk(rho=0.1)
    student, teacher = both(plain)
    assert merging.attended(student, teacher).item() == pytest.approx(plain.attended(student, teacher).item(), rel=1e-5)


def test_merging_averages_keys_and_maps() -> None:
    kept = torch.tensor([0.0, 0.0, -torch.inf])
    h = torch.tensor([[[1.0, 0], [0, 1], [0.6, 0.8]]])
    g = torch.rand(1, 2, 2)
    scores, ((g_after, map_after),) = merged(torch.tensor([[[1.0, 3, 7], [2, 0, 7]]]), [(g, h)], kept, [3])
    assert scores[0].tolist() == [[2], [1]]
    assert map_after[0, 0].tolist() == pytest.approx([0.5**0.5] * 2)
    assert g_after is g


@pytest.mark.parametrize("mode", ["afd", "rtk"])
def test_a_student_that_is_its_teacher_has_no_distance(mode: str) -> None:
    torch.manual_seed(0)
    teacher = ResNetCifar(8, num_classes=3)
    method = RTK(RTKConfig(teacher="twin", mode=mode, rho=1), inputs(teacher))  # type: ignore[arg-type]
    method.classifier.load_state_dict(teacher.state_dict())
    method.classifier.eval()
    scoring(method, 1e4 * torch.eye(3).expand(6, 3, 3))
    student, maps = both(method)
    assert method.attended(student, maps).item() == 0


@pytest.mark.parametrize("config", MODES, ids=str)
def test_the_teacher_stays_as_it_is(config: dict[str, Any]) -> None:
    method = rtk(**config).train()
    before = {name: value.clone() for name, value in method.teacher.module.state_dict().items()}
    loss = method(batch(), START).loss
    assert loss is not None
    loss.backward()
    assert not method.teacher.module.training
    assert all(p.grad is None for p in method.teacher.module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.module.state_dict().items())
    assert not any("teacher" in name for name in method.state_dict())


def test_without_attention_it_is_plain_kd() -> None:
    method, data = rtk(beta=0), batch()
    loss = method(data, START).loss
    assert loss is not None
    loss.backward()
    got = {name: p.grad for name, p in method.classifier.named_parameters()}
    with torch.no_grad():
        teacher = method.teacher.module(data["image"])
    logits = method.classifier(data["image"])
    plain = F.cross_entropy(logits, data["label"]) + 0.9 * 16 * F.kl_div(
        (logits / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="sum"
    ) / len(logits)
    expected = torch.autograd.grad(plain, list(method.classifier.parameters()))
    for name, gradient in zip(got, expected, strict=True):
        assert got[name] is not None and torch.allclose(got[name], gradient, atol=1e-5), name  # type: ignore[arg-type]


@pytest.mark.parametrize("config", MODES, ids=str)
def test_a_step_runs_each_network_once(config: dict[str, Any]) -> None:
    method = rtk(**config)
    calls: list[str] = []
    method.classifier.register_forward_hook(lambda *_: calls.append("student"))
    method.teacher.module.register_forward_hook(lambda *_: calls.append("teacher"))
    method(batch(), START)
    assert sorted(calls) == ["student", "teacher"]


def test_the_attention_is_trained_like_the_student() -> None:
    """One group: the job's rate and weight decay for all."""
    method = rtk()
    (group,) = method.parameter_groups()
    assert group.keys() == {"params"}
    trained = {id(p) for p in group["params"]}
    left_out = [name for name, p in method.named_parameters() if id(p) not in trained]
    assert left_out == ["attention.norm.bias"]


@pytest.mark.parametrize("config", MODES, ids=str)
def test_the_softmax_does_not_see_the_bias_that_is_left_out(config: dict[str, Any]) -> None:
    method = rtk(**config)
    method.attention.norm.bias.requires_grad_(True)
    loss = method(batch(), START).loss
    assert loss is not None
    loss.backward()
    bias, weight = method.attention.norm.bias.grad, method.attention.norm.weight.grad
    assert bias is not None and weight is not None
    assert bias.abs().max() < 1e-5 * weight.abs().max()


@pytest.mark.parametrize("config", MODES, ids=str)
def test_resnets_of_timm_learn_and_teach(config: dict[str, Any]) -> None:
    teacher, student = (timm.create_model(name, num_classes=n) for name, n in (("resnet26", 3), ("resnet18", 0)))
    method = RTK(RTKConfig(teacher="timm", d=8, **config), inputs(teacher, student))
    output = method(batch(), START)
    assert output.loss is not None and output.loss.isfinite()
    output.loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_teachers_that_do_not_fit_are_refused() -> None:
    config = RTKConfig(teacher="wide")
    with pytest.raises(ValueError, match=re.escape("got teacher 'wide' of 0 classes for data of 3")):
        RTK(config, inputs(WideResNet(10, 1)))
    with pytest.raises(ValueError, match="of 5 classes for data of 3, expected a classifier of the same"):
        RTK(config, inputs(WideResNet(10, 1, num_classes=5)))
    vit = ViTConfig(image_size=16, patch_size=4, dim=16, depth=1, heads=2).build()
    with pytest.raises(ValueError, match="got model ViT, expected one of residual blocks"):
        RTK(config, inputs(WideResNet(10, 1, num_classes=3), vit))


def test_preflight_does_not_know_the_classes_yet() -> None:
    with torch.device("meta"):
        RTK(RTKConfig(teacher="wide"), inputs(WideResNet(10, 1, num_classes=5), ResNetCifar(8), num_classes=2))


@pytest.mark.slow
def test_a_teacher_of_many_labels_helps_a_student_of_few(real_images: RealImages, tmp_path: Path) -> None:
    """Same network and epochs; 20 labels a class against all that the teacher saw.

    On CIFAR-10 labels alone give .295, AFD .337, RTK .335; with two threads, whose sums are rounded otherwise, labels
    .301 and RTK .318. Over three seeds and a third longer training: .297, KD alone .352, AFD .367, RTK .348: attention
    is worth something in AFD; that RTK is better, as the abstract says, does not show.
    """
    scratch = {"name": "fine_tune", "layer_decay": 1.0, "drop_path": 0, "label_smoothing": 0}
    scratch["view"] = RTKConfig(teacher="").view.model_dump()
    test = assemble.open_stream(Stream(shards=real_images.test))

    def score(name: str, method: dict[str, Any], epochs: int, **stream: int) -> float:
        spec = real_images.job(
            method,
            model={"name": "resnet_cifar", "image_size": 16, "depth": 8},
            data={"train": {"shards": real_images.train, **stream}},
            epochs=epochs,
            batch_size=32,
            optimizer={"name": "sgd", "lr": 0.05, "weight_decay": 5e-4},
            schedule={"name": "cosine"},
        )
        return accuracy(artifact.load_model(pretrained(spec, tmp_path, name)), test, View(size=16))

    score("teacher", scratch, epochs=3)
    few = {"epochs": 12, "per_class": 20}
    labels = score("labels", scratch, **few)
    for mode in ("afd", "rtk"):
        distilled = score(mode, {"name": "rtk", "mode": mode, "teacher": "job:teacher"}, **few)
        margin = 0.005 if real_images.name == "cifar10" else 0.0  # digits are easy with 20 labels too
        assert distilled > labels + margin, (mode, distilled, labels)
