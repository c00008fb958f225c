"""LOOK against the golden numbers and checks of its paper's card (arXiv 2110.06014)."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.learning import RealImages, encoder_of, pretrained, untrained
from tests.toy import no_load, random_images
from workloads.data.shards import expand
from workloads.methods.base import DataInfo, Inputs, Progress
from workloads.methods.look import LOOK, LOOKConfig, neighbour_loss
from workloads.models.vit import ViTConfig
from workloads.parts.crop import JITTER
from workloads.parts.heads import mlp
from workloads.spec import JobSpec

START = Progress(step=0, epoch=0, total_steps=10)
LABELS = torch.tensor([0, 1, 0, 1, 1, 0])


def look(num_classes: int = 2, **config: object) -> LOOK:
    torch.manual_seed(0)
    encoder = ViTConfig(image_size=16, patch_size=4, dim=32, depth=2, heads=4).build()
    inputs = Inputs(encoder, DataInfo(8, num_classes, (3, 16, 16)), no_load, no_load)  # type: ignore[arg-type]
    return LOOK(LOOKConfig.model_validate({"dim": 8, "queue": 12, "k": 4} | config), inputs)


def batch(n: int = 4) -> dict[str, Tensor]:
    images = random_images(n)
    return images | {"other": images["image"].flip(0)}


def sines(rows: int, columns: int, k: float = 1.0) -> Tensor:
    """The card's recipe: sin(k), sin(2 k), ... row by row, rows of unit length."""
    return F.normalize((k * torch.arange(1, rows * columns + 1).double()).sin().view(rows, columns).float(), dim=1)


def golden(k: int, order: Tensor | None = None, z: Tensor | None = None) -> Tensor:
    """Losses of two queries against six features at tau = 0.1."""
    order = torch.arange(6) if order is None else order
    same = LABELS[order] == torch.tensor([0, 1])[:, None]
    bank = sines(6, 3, 1.4)[order]
    return neighbour_loss(sines(2, 3) if z is None else z, bank, same, torch.ones_like(same), k, 0.1)


@pytest.mark.parametrize(
    ("k", "losses", "mean"),
    [
        (3, [0.610132965, 12.398519242], 6.504263104),
        (6, [0.614719291, 11.768613179], 6.191666234),
    ],
)
def test_loss_golden(k: int, losses: list[float], mean: float) -> None:
    found = golden(k)
    assert found.tolist() == pytest.approx(losses, rel=1e-5)
    assert found.mean().item() == pytest.approx(mean, rel=1e-5)


def test_neighbours_golden() -> None:
    """What flows back into a query comes from its three nearest, the golden ones."""
    z, bank = sines(2, 3).requires_grad_(), sines(6, 3, 1.4)
    golden(3, z=z).sum().backward()
    for row, nearest in enumerate([[0, 3, 4], [5, 2, 1]]):
        alone = sines(2, 3)[row : row + 1].requires_grad_()
        same = (LABELS[nearest] == row)[None]
        neighbour_loss(alone, bank[nearest], same, torch.ones_like(same), 3, 0.1).sum().backward()
        assert torch.allclose(z.grad[row], alone.grad[0], rtol=1e-4) and alone.grad.any()
        assert (alone.detach() @ bank.T).topk(3).indices.tolist() == [nearest]


def test_order_of_the_bank_means_nothing() -> None:
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    for k in (1, 3, 6):
        assert golden(k, order).tolist() == pytest.approx(golden(k).tolist(), rel=1e-6)


def test_all_as_neighbours_are_the_share_of_all_positives() -> None:
    e = (sines(2, 3) @ sines(6, 3, 1.4).T / 0.1).exp()
    positive = torch.tensor([0, 1])[:, None] == LABELS
    expected = -((e * positive).sum(dim=1) / e.sum(dim=1)).log()
    assert golden(6).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_neighbours_of_the_right_class_leave_nothing_to_learn() -> None:
    """One of them, or several however far away: loss and gradient are 0."""
    z = sines(1, 3).requires_grad_()
    known = torch.ones(1, 6, dtype=torch.bool)
    nearest = (z @ sines(6, 3, 1.4).T).topk(3).indices
    for k in (1, 3):
        same = torch.zeros_like(known).scatter(1, nearest[:, :k], True)
        loss = neighbour_loss(z, sines(6, 3, 1.4), same, known, k, 0.1)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        assert loss.item() == 0 and not gradient.any()


def test_a_far_image_of_the_class_changes_nothing_unlike_in_supcon() -> None:
    z, bank = sines(2, 3), sines(6, 3, 1.4)
    y = torch.tensor([0, 1])

    def losses(bank: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        same = labels == y[:, None]
        log_p = (z @ bank.T / 0.1).log_softmax(dim=1)
        supcon = -(log_p * same).sum(dim=1) / same.sum(dim=1)
        return neighbour_loss(z, bank, same, torch.ones_like(same), 3, 0.1), supcon

    ours, supcon = losses(bank, LABELS)
    for label in (0, 1):
        far = -z[label : label + 1]
        ours_after, supcon_after = losses(torch.cat([bank, far]), torch.cat([LABELS, torch.tensor([label])]))
        assert ours_after[label].item() == pytest.approx(ours[label].item(), rel=1e-5)
        assert (supcon_after[label] - supcon[label]).abs() > 0.1


def test_the_nearest_of_the_class_joins_where_it_is_not_among_the_neighbours() -> None:
    z = torch.eye(1, 4).requires_grad_()
    bank = F.normalize(torch.tensor([[3.0, 1, 0, 0], [2, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]]), dim=1)
    same, known = torch.tensor([[False, False, True, True]]), torch.ones(1, 4, dtype=torch.bool)
    s = (z @ bank.T / 0.1)[0]
    expected = s[:3].logsumexp(dim=0) - s[2]
    loss = neighbour_loss(z, bank, same, known, 2, 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert (gradient @ bank[2]) < (gradient @ bank[0])  # it is drawn nearer


def test_where_nobody_is_of_the_class_nothing_is_said() -> None:
    z = sines(2, 3).requires_grad_()
    same = torch.zeros(2, 6, dtype=torch.bool)
    for known in (torch.ones_like(same), same):  # also of an empty queue
        loss = neighbour_loss(z, sines(6, 3, 1.4), same, known, 3, 0.1)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        assert not loss.any() and not gradient.any()


def test_scores_in_half_precision_have_finite_gradients() -> None:
    z = sines(2, 3).requires_grad_()
    same = torch.tensor([[True] + [False] * 5, [False] * 6])
    with torch.autocast("cpu", torch.bfloat16):
        loss = neighbour_loss(z, sines(6, 3, 1.4), same, torch.ones_like(same), 3, 0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_a_step_is_the_algorithm_of_the_card() -> None:
    method, data = look(k=2), batch()
    z = F.normalize(method.query.projector(method.query.encoder(data["image"])), dim=1)
    kappa = F.normalize(method.key.projector(method.key.encoder(data["other"])), dim=1)
    empty = method(data, START).loss
    empty.backward()
    assert empty.item() == 0 and all(p.grad is not None for p in method.query.projector.parameters())
    method.after_step(START)
    tags = method.queue.tags
    assert torch.allclose(method.queue.rows[:4], kappa, atol=1e-6) and method.queue.place == 4
    assert tags["label"].tolist() == [0, 1, 0, 1] + [-1] * 8 and tags["index"].tolist() == [0, 1, 2, 3] + [-1] * 8
    expected = []
    for i in range(4):  # its own feature is left out, as are those that are not filled
        others = [j for j in range(4) if j != i]
        s = (z[i] @ method.queue.rows[others].T / 0.1).tolist()
        best = sorted(zip(s, others, strict=True), reverse=True)
        chosen = best[:2] if any(j % 2 == i % 2 for _, j in best[:2]) else best
        e = [(torch.tensor(value).exp(), j % 2 == i % 2) for value, j in chosen]
        expected.append(-(sum(v for v, right in e if right) / sum(v for v, _ in e)).log())
    output = method(data, START)
    assert output.loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
    assert output.metrics["with_neighbour"] == 1 and 0 < output.metrics["own_class"] < 1


def test_the_mean_is_over_images_that_have_somebody_of_their_class() -> None:
    method, data = look(num_classes=4), batch()
    method(data | {"label": torch.tensor([0, 0, 1, 1])}, START)
    method.after_step(START)
    both = data | {"index": data["index"] + 4}
    only = method(both | {"label": torch.tensor([0, 0, 3, -1])}, START)  # nobody has class 3, -1 is none
    first = {name: value[:2] for name, value in both.items()} | {"label": torch.tensor([0, 0])}
    assert only.metrics["with_neighbour"] == 0.5
    assert only.loss.item() == pytest.approx(method(first, START).loss.item(), rel=1e-5) and only.loss > 0


def test_images_without_a_label_are_neighbours_of_nobody() -> None:
    method, data = look(), batch()
    method(data | {"label": torch.full((4,), -1)}, START)
    method.after_step(START)
    assert method.queue.tags["index"].tolist()[:4] == [0, 1, 2, 3]
    output = method(data | {"index": data["index"] + 4, "label": torch.full((4,), -1)}, START)
    assert output.loss == 0 and output.metrics["with_neighbour"] == 0


def test_the_slow_copy_and_the_queue_get_no_gradient_and_are_not_trained() -> None:
    method = look()
    for _ in range(2):
        method.zero_grad()
        method(batch(), START).loss.backward()
        method.after_step(START)
    slow = [*method.key.encoder.parameters(), *method.key.projector.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in slow) and method.queue.rows.grad is None
    assert method.query.projector[0].weight.grad.abs().max() > 0
    trained = {id(p) for group in method.parameter_groups() for p in group["params"]}
    assert not trained & {id(p) for p in slow}


def test_the_slow_copy_follows() -> None:
    method = look(momentum=0.75)
    slow, fast = method.key.projector[0].weight, method.query.projector[0].weight
    assert torch.equal(slow, fast)
    nn.init.zeros_(slow)
    nn.init.ones_(fast)
    method.after_step(START)
    assert slow.unique().tolist() == [0.25]


def test_head_has_the_layers_asked_for() -> None:
    for layers in (1, 3):
        linear = [part for part in look(layers=layers).query.projector if isinstance(part, nn.Linear)]
        assert [part.out_features for part in linear] == [32] * (layers - 1) + [8]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got data with 1 classes, expected labels of 2 or more; add a \.cls"):
        look(num_classes=1)
    with pytest.raises(ValueError, match="got k=13 neighbours of a queue of 12, expected k <= queue"):
        look(k=13)


def test_views_are_two_of_a_kind() -> None:
    views = LOOK.views(LOOKConfig(), 224)
    assert list(views) == ["image", "other"] and views["image"] == views["other"]
    view = views["image"]
    assert (view.crop_scale, view.flip, view.photometry.blur_p) == ((0.2, 1.0), 0.5, 0.5)
    assert view.photometry.jitter == (0.4, 0.4, 0.4, 0.1)


def clusters(seed: int) -> tuple[Tensor, Tensor]:
    """Four clusters of 40 points in 16 dimensions [160, 16], and the cluster of each; two and two are a class."""
    mode = torch.arange(4).repeat_interleave(40)
    noise = torch.randn(160, 16, generator=torch.Generator().manual_seed(seed))
    return 2 * torch.eye(4, 16)[mode] + 0.5 * noise, mode


def supcon(z: Tensor, same: Tensor, himself: Tensor) -> Tensor:
    """The mean of logs over all of a class (Khosla et al. 2020, arXiv 2004.11362)."""
    log_p = (z @ z.T / 0.1).masked_fill(himself, -1e9).log_softmax(dim=1)
    return -((log_p * same).sum(dim=1) / same.sum(dim=1)).mean()


def trained(kind: str, seed: int) -> tuple[float, float]:
    """After 150 steps of a small network: purity of k-means in a class, accuracy of neighbours among new points."""
    torch.manual_seed(seed)
    x, mode = clusters(seed)
    y, himself = mode // 2, torch.eye(len(x), dtype=torch.bool)
    same = (y[:, None] == y) & ~himself
    net, classifier = mlp(16, 64, 16), nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*net.parameters(), *classifier.parameters()], lr=3e-3)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "look": lambda z: neighbour_loss(z, z.detach(), same, ~himself, 10, 0.1).mean(),
        "supcon": lambda z: supcon(z, same, himself),
        "ce": lambda z: F.cross_entropy(classifier(z) / 0.1, y),
    }
    for _ in range(150):
        loss = losses[kind](F.normalize(net(x), dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    new, new_mode = clusters(seed + 100)
    with torch.no_grad():
        z, new_z = F.normalize(net(x), dim=1), F.normalize(net(new), dim=1)
    votes = y[(new_z @ z.T).topk(10).indices].float().mean(dim=1) > 0.5
    accuracy = (votes == new_mode // 2).float().mean().item()
    return sum(purity(z[y == c], mode[y == c] % 2) for c in (0, 1)) / 2, accuracy


def purity(z: Tensor, mode: Tensor) -> float:
    """Share of points in the right one of two clusters that k-means finds, from two points far from each other."""
    first = z[(z - z[0]).norm(dim=1).argmax()]
    centres = torch.stack([first, z[(z - first).norm(dim=1).argmax()]])
    for _ in range(20):
        own = torch.cdist(z, centres).argmin(dim=1)
        centres = torch.stack([z[own == i].mean(dim=0) for i in (0, 1)])
    agree = (own == mode).float().mean().item()
    return max(agree, 1 - agree)


def test_a_class_of_two_clusters_stays_two() -> None:
    """Purity of seeds 0 to 3: LOOK .95, .98, .99, .86; cross-entropy .88, .76, .94, .64; SupCon .52, .56, .50, .53.

    Neighbours are right of .95 to .99 of new points for all of them.
    """
    for seed in range(4):
        found = {kind: trained(kind, seed) for kind in ("look", "ce", "supcon")}
        assert all(accuracy > 0.9 for _, accuracy in found.values()), found
        look, ce, supcon = (purity for purity, _ in found.values())
        assert look > ce > supcon, found


def vehicles_and_animals(pattern: str, folder: Path) -> str:
    """The shards of ten classes with labels of two, 0 and 1, under the same names; returns their pattern."""
    folder.mkdir(exist_ok=True)
    for path in expand(pattern):
        with tarfile.open(path) as fine, tarfile.open(folder / Path(path).name, "w") as coarse:
            for member in fine:
                file = fine.extractfile(member)
                assert file is not None
                data = file.read()
                if member.name.endswith(".cls"):
                    data = str(int(2 <= int(data) <= 7)).encode()
                member.size = len(data)
                coarse.addfile(member, io.BytesIO(data))
    (folder / "classes.txt").write_text("vehicle\nanimal\n")
    return str(folder / Path(pattern).name)


@pytest.mark.slow
def test_two_classes_teach_something_of_the_ten_in_them(real_images: RealImages, tmp_path: Path) -> None:
    """2,000 images, vehicles or animals; of the ten classes kNN .246 -> .273, probe .306 -> .319.

    That it transfers better than cross-entropy is not seen at this size. By twice as many test images, one seed, kNN
    and probe: untrained .249 and .289; k = 20 .247, .293 (of 1,024 features; it has hardly begun to learn); k = 200
    .276, .315; all as neighbours .271, .321; cross-entropy on the projection with the same views .287, .308.
    """
    if real_images.name != "cifar10":
        pytest.skip("vehicles and animals are classes of CIFAR-10: set MANTA_TEST_DATA to a folder that holds it")
    method = {"name": "look", "dim": 64, "k": 200, "queue": 1024, "momentum": 0.95, "view": {"photometry": JITTER}}
    shards = vehicles_and_animals(real_images.train, tmp_path / "coarse")
    spec = real_images.contrast(method)
    coarse = JobSpec.model_validate(spec.model_dump() | {"data": {"train": {"shards": shards}}})
    after = encoder_of(pretrained(coarse, tmp_path, "look"))
    scores = [(real_images.knn(encoder), real_images.probe(encoder)) for encoder in (untrained(spec), after)]
    assert scores[1][0] > scores[0][0] and scores[1][1] > scores[0][1], scores
