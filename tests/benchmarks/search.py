"""What searches cost: a Zen-Score beside the plainest one, two scorers beside one, Ray Tune beside the scoring."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

from tests.benchmarks import apart
from tests.benchmarks.table import Row
from workloads.models.structure import EPS, Structure, parse
from workloads.models.zennet import published
from workloads.search.zen_score import zen_score
from workloads.search.zen_space import START
from workloads.spec_search import SearchSpec

NETWORKS = {"S0": START["cifar"]} | {
    f"{size}M": published()[f"cifar-{size}M"]["structure"] for size in ("0.5", "1", "2")
}
SIZE, BATCH_SIZE, ROUNDS = 32, 64, 3
SCORE_S = 1.0  # a network is scored for so long at least
RECIPE = Path(__file__).parents[2] / "workloads/recipes/search_zen_nas_cifar10.yaml"
STEADY = (0.3, 0.9)
"""Shares of the candidates: by then all scorers are there, those of the start, which are small, are over, and the last
ones, for which there is nothing to score beside, have not come."""
SMALL_MS = 12  # of a candidate of at most 20 M FLOPs, 32 px, batch 64: about the smallest that one would search among


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
        return math.log(delta) + math.fsum(norm.running_var.mean().log().item() / 2 for norm in norms)  # type: ignore[union-attr]


def ours(structure: Structure) -> float:
    return zen_score(structure, size=SIZE, batch_size=BATCH_SIZE).score


def scores_per_s(of: str) -> dict[str, float]:
    """Candidates a second of one core, by network: median. In a process of its own: ours keeps freed memory.

    Args:
        of: `ours` or `plainest`.
    """
    from workloads.data.allocator import keep_freed_memory

    torch.set_num_threads(1)
    score: Callable[[Structure], float] = {"ours": ours, "plainest": plainest}[of]
    if of == "ours":
        keep_freed_memory()
    found = {}
    for name, text in NETWORKS.items():
        structure, taken = parse(text), list[float]()
        score(structure)
        while len(taken) < 2 or sum(taken) < SCORE_S:
            since = time.perf_counter()
            score(structure)
            taken.append(time.perf_counter() - since)
        found[name] = 1 / statistics.median(taken)
    return found


def bare(candidates: int) -> float:
    """Candidates a second of a search in this very process: nothing but asking, scoring and telling."""
    from workloads.data.allocator import keep_freed_memory
    from workloads.explore import Explorer, Own, search_of
    from workloads.search.island import Island

    torch.set_num_threads(1)
    keep_freed_memory()
    island = Island(search_of(spec_of(candidates), Path(), torch.device("cpu")))
    since = time.perf_counter()
    Explorer(island, Own(island.search)).go(lambda: False)
    return candidates / (time.perf_counter() - since)


def spec_of(candidates: int, workers: int = 1) -> SearchSpec:
    """The recipe's search, of so many candidates, by so many processes."""
    recipe = yaml.safe_load(RECIPE.read_text())
    search = recipe["search"] | {"iterations": candidates}
    return SearchSpec.model_validate(recipe | {"search": search, "resources": {"workers": workers}})


def cores(candidates: int) -> float:
    """What two searches do beside each other / one: the most that the machine's second core can add."""
    alone: float = apart.run(bare, candidates=candidates)
    with (
        apart.started(bare, candidates=candidates) as first,
        apart.started(bare, candidates=candidates) as second,
    ):
        return (first() + second()) / alone


def under_tune(folder: str, candidates: int, workers: list[int]) -> list[dict[str, float]]:
    """`searched`, on a cluster of its own."""
    with apart.own_cluster(Path(folder)):
        return searched(Path(folder), candidates, workers)


def searched(folder: Path, candidates: int, workers: list[int]) -> list[dict[str, float]]:
    """Searches the same candidates by so many workers each.

    Returns:
        For each: `fit_s` from the start of Tune to its end, `loop_s` of the island's loop, `scoring_s` of its
        processes, all together; `rate`, candidates a second while `STEADY`.
    """
    from workloads.ray_explore import explore_on_ray
    from workloads.record import RunFolder

    found = []
    for i, n in enumerate(workers):
        run = RunFolder(folder / f"runs-{i}")
        run.path.mkdir()
        since = time.perf_counter()
        assert explore_on_ray(spec_of(candidates, n), run, folder, connected=lambda: None)
        fit_s, told, at_s, scoring_s = time.perf_counter() - since, [0], [0.0], 0.0
        for point in run.read_metrics():
            if not point["candidates_per_s"]:
                continue  # nothing was told yet
            seconds = (point["step"] - told[-1]) / point["candidates_per_s"]
            scoring_s += n * seconds * point["scoring_share"]
            told.append(point["step"])
            at_s.append(at_s[-1] + seconds)
        began, ended = np.interp([share * candidates for share in STEADY], told, at_s)
        rate = (STEADY[1] - STEADY[0]) * candidates / (ended - began)
        found.append({"fit_s": fit_s, "loop_s": at_s[-1], "scoring_s": scoring_s, "rate": rate})
    return found


def best_score(folder: str) -> float:
    """That of the recipe's search, in this process."""
    import pyarrow.parquet as pq

    from workloads.record import RunFolder
    from workloads.run import SUCCEEDED, run_local
    from workloads.spec_any import read_spec
    from workloads.winner import POPULATION, read_found

    run = RunFolder(Path(folder))
    spec = read_spec(RECIPE)
    assert isinstance(spec, SearchSpec) and run_local(spec, run.path) == SUCCEEDED
    found, points = read_found(run.artifact), list(run.read_metrics())
    budget = spec.search.config["budget"]
    kept = pq.read_table(run.artifact / POPULATION).to_pylist()
    assert found is not None and all(row[name] <= budget[name] for row in kept for name in budget)
    assert [point["best_score"] for point in points] == sorted(point["best_score"] for point in points)
    score: float = found.score
    return score


def rows(folder: Path) -> list[Row]:
    """(what, measured, wanted, reached)."""
    pairs = [[apart.run(scores_per_s, of=of) for of in ("ours", "plainest")] for _ in range(ROUNDS)]
    ratios = {name: apart.ratio(*([one[i][name] for one in pairs] for i in range(2))) for name in NETWORKS}
    rates = {name: statistics.median(ours_[name] for ours_, _ in pairs) for name in NETWORKS}
    each = ", ".join(f"{name} {rates[name]:.3g}/s ({ratios[name]:.2f})" for name in NETWORKS)
    (one,) = apart.run(under_tune, folder=str(folder / "tune-1"), candidates=10_000, workers=[1])
    turns = apart.run(under_tune, folder=str(folder / "tune-2"), candidates=1000, workers=[1, 2] * ROUNDS)
    alone, both = ([turn["rate"] for turn in turns[i::2]] for i in range(2))
    gain, most = apart.ratio(both, alone), statistics.median(cores(300) for _ in range(ROUNDS))
    overhead, best = one["fit_s"] / one["scoring_s"] - 1, apart.run(best_score, folder=str(folder / "recipe"))
    else_s = one["fit_s"] - one["scoring_s"]
    of_small = else_s / (10 * SMALL_MS)
    return [
        (
            f"search: Zen-Scores a second and core, {SIZE} px, batch {BATCH_SIZE} (times the plainest implementation)",
            each,
            ">= 2 times",
            min(ratios.values()) >= 2,
        ),
        (
            "search: candidates/s of two scorers / of one, under Ray Tune; two searches beside each other / one, bare",
            f"{gain:.2f} ({statistics.median(both):.1f} / {statistics.median(alone):.1f}); {most:.2f}",
            ">= 1.8",
            gain >= 1.8,
        ),
        (
            "search: 10,000 candidates of the recipe under Ray Tune: all else / scoring of "
            f"{one['scoring_s'] / 10:.1f} ms each; were they of {SMALL_MS} ms",
            f"{overhead:.1%} ({else_s:.1f} / {one['scoring_s']:.0f} s, {one['fit_s'] - one['loop_s']:.1f} s of it to "
            f"start and end); {of_small:.1%}",
            "< 5 %",
            overhead < 0.05,
        ),
        (
            "search: best Zen-Score of 1,000 candidates, CIFAR, a million parameters, 18 layers, noise of 16",
            f"{best:.1f}",
            "> 80",
            best > 80,
        ),
    ]
