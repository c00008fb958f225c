"""What searches cost: a Zen-Score beside the plainest one, two scorers beside one, Ray Tune beside the scoring."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.benchmarks import apart
from tests.benchmarks.table import Row
from workloads.models.structure import Structure, parse
from workloads.models.zennet import EPS, published
from workloads.search.zen_score import zen_score
from workloads.search.zen_space import START

NETWORKS = {"S0": START["cifar"]} | {
    f"{size}M": published()[f"cifar-{size}M"]["structure"] for size in ("0.5", "1", "2")
}
SIZE, BATCH_SIZE, ROUNDS = 32, 64, 5
SEARCH: dict[str, Any] = {
    "name": "zen_nas", "initial": "cifar", "image_size": 16, "classes": 10, "batch_size": 16,
    "population": 64, "budget": {"parameters": 300_000, "layers": 12},
}  # fmt: skip


def plainest(structure: Structure) -> float:
    """A Zen-Score as one writes it down: modules with the library's initialisers, then N(0, 1)."""
    modules: list[nn.Module] = []
    for conv in (conv for part in structure for branch in part.branches() for conv in branch.convs):
        groups, padding = conv.groups, conv.kernel // 2
        modules.append(
            nn.Conv2d(conv.width_in, conv.width, conv.kernel, conv.stride, padding, groups=groups, bias=False)
        )
        modules += [nn.BatchNorm2d(conv.width, eps=EPS), nn.ReLU()]
    network = nn.Sequential(*modules)
    for module in modules:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight)
    with torch.no_grad():
        x = torch.randn(BATCH_SIZE, 3, SIZE, SIZE)
        near = x + 0.01 * torch.randn_like(x)
        delta = (network(x) - network(near)).abs().sum(dim=(1, 2, 3)).mean()
        norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
        return math.log(delta) + sum(float(norm.running_var.mean().log()) / 2 for norm in norms)  # type: ignore[union-attr]


def ours(structure: Structure) -> float:
    return zen_score(structure, size=SIZE, batch_size=BATCH_SIZE).score


def scores_per_s(of: str, rounds: int = ROUNDS) -> dict[str, float]:
    """Candidates a second of one core, by network; in a process of its own, as ours keeps freed memory for the next.

    Args:
        of: `ours` or `plainest`.
        rounds: whose median counts.
    """
    from workloads.data.allocator import keep_freed_memory

    torch.set_num_threads(1)
    score: Callable[[Structure], float] = {"ours": ours, "plainest": plainest}[of]
    if of == "ours":
        keep_freed_memory()
    found = {}
    for name, text in NETWORKS.items():
        structure, taken = parse(text), []
        score(structure)
        for _ in range(rounds):
            since = time.perf_counter()
            score(structure)
            taken.append(time.perf_counter() - since)
        found[name] = 1 / statistics.median(taken)
    return found


def under_tune(folder: str, candidates: int, workers: list[int]) -> list[dict[str, float]]:
    """`searched`, on a cluster of its own."""
    with apart.own_cluster(Path(folder)):
        return searched(Path(folder), candidates, workers)


def searched(folder: Path, candidates: int, workers: list[int]) -> list[dict[str, float]]:
    """Searches the same candidates by so many workers each.

    Returns:
        For each: `fit_s` from the start of Tune to its end, `loop_s` of the island's loop, `scoring_s` of its
        processes, all together; `rate`, candidates a second once the scorers are there.
    """
    from workloads.ray_explore import explore_on_ray
    from workloads.record import RunFolder
    from workloads.spec_search import SearchSpec

    found = []
    for n in workers:
        run = RunFolder(folder / f"runs-{n}")
        run.path.mkdir()
        document = {"name": "bench", "search": SEARCH | {"iterations": candidates}, "resources": {"workers": n}}
        since = time.perf_counter()
        assert explore_on_ray(SearchSpec.model_validate(document), run, folder, connected=lambda: None)
        fit_s, told, loop_s, scoring_s, after_first = time.perf_counter() - since, 0, 0.0, 0.0, []
        for point in run.read_metrics():
            if not point["candidates_per_s"]:
                continue  # nothing was told yet
            seconds = (point["step"] - told) / point["candidates_per_s"]
            after_first.append((point["step"] - told, seconds))
            told, loop_s, scoring_s = point["step"], loop_s + seconds, scoring_s + n * seconds * point["scoring_share"]
        new, seconds = map(sum, zip(*(after_first[1:] or after_first), strict=True))
        found.append({"fit_s": fit_s, "loop_s": loop_s, "scoring_s": scoring_s, "rate": new / seconds})
    return found


def rows(folder: Path) -> list[Row]:
    """(what, measured, wanted, reached)."""
    ours_, plain = (apart.run(scores_per_s, of=of) for of in ("ours", "plainest"))
    ratios = {name: ours_[name] / plain[name] for name in NETWORKS}
    each = ", ".join(f"{name} {ours_[name]:.3g}/s ({ratios[name]:.2f})" for name in NETWORKS)
    (one,) = apart.run(under_tune, folder=str(folder / "tune-1"), candidates=10_000, workers=[1])
    alone, both = apart.run(under_tune, folder=str(folder / "tune-2"), candidates=6_000, workers=[1, 2])
    gain, overhead = both["rate"] / alone["rate"], one["fit_s"] / one["scoring_s"] - 1
    worst = min(ratios.values())
    return [
        (
            f"search: Zen-Scores a second and core, {SIZE} px, batch {BATCH_SIZE} (times the plainest implementation)",
            each,
            ">= 2 times",
            worst >= 2,
        ),
        (
            "search: candidates/s of two scorers / of one, under Ray Tune",
            f"{gain:.2f} ({both['rate']:.1f} / {alone['rate']:.1f})",
            ">= 1.8",
            gain >= 1.8,
        ),
        (
            f"search: 10,000 candidates under Ray Tune: all else / scoring of {one['scoring_s'] / 10:.1f} ms each",
            f"{overhead:.1%} ({one['fit_s']:.0f} / {one['scoring_s']:.0f} s)",
            "< 5 %",
            overhead < 0.05,
        ),
    ]
