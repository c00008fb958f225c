"""LLR-NAS of GENet (Lin et al. 2020, arXiv 2006.14090): the best network near a trained one, within a latency budget.

Each block of the master network is replaced by each candidate, alone: the candidate is distilled for some steps from
what the block gives, and the whole network then has another accuracy (dA) and another latency (dT). To first order

    A(network) = A0 + sum of dA,   T(network) = T0 + sum of dT

over what is replaced, and the network of most A with T within budget is a multiple-choice knapsack (`knapsack`), which
is solved exactly. The best `alternatives` are kept: the paper trains some ten from scratch and takes the best, as each
dA is of a few steps and the sum knows nothing of what two replacements do to each other.

The search has no released code; what the paper leaves open is ours: the loss, steps and rate of the distillation, and
blocks of another width, behind which a linear convolution brings back the old width while accuracy is measured (see
`block_distillation`); latency is that of the network without it, whose next block takes the new width in. The first
order errs where two neighbours both change theirs.

Without a table all latencies are measured first: a budget that no sum meets ends the search before anything is
distilled. Each is measured in turns with the master's, and the quotient counts: what slows a shared device slows both.
Still a device that does other work makes numbers of little worth, and the best of many sums is the one that was lucky:
search where nothing else runs, or by a table.
Networks are measured without a classifier (1 % of the published ones).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from statistics import median
from typing import Any, ClassVar

import torch
from numpy.random import default_rng

from workloads.models.genet import GENet, GENetConfig
from workloads.search import block_distillation as distillation
from workloads.search.base import Result, Search, Winner
from workloads.search.budget import Infeasible
from workloads.search.genet_space import GENetLLRConfig, branches, costs, parse, replaced, text
from workloads.search.knapsack import Choice, Option, best, by_mutation
from workloads.search.latency_budget import NetworkLatency
from workloads.search.latency_ops import of_branches


class GENetLLR(Search):
    """Network 0 is the master, the others have one block replaced.

    Without a table each is a candidate twice: first all are asked for their latency, then for their score.
    """

    Config = GENetLLRConfig
    paper: ClassVar[str] = "GENet (LLR-NAS), Lin et al. 2020, arXiv 2006.14090"
    streams: ClassVar[tuple[str, ...]] = ("train", "val")  # val: 50,000 images that the master was not trained on
    starts_from_weights = True
    ahead = 4096  # a list that no score changes
    config: GENetLLRConfig

    def __init__(self, config: Any, inputs: Any) -> None:
        super().__init__(config, inputs)
        self._told: dict[int, Result] = {}

    @property
    def count(self) -> int:
        """Networks that are measured."""
        return 1 + len(self.config.replacements)

    @property
    def total(self) -> int:
        return self.count if self.config.budget.latency.table is not None else 2 * self.count

    def network(self, number: int) -> GENetConfig:
        return self.config.replacements[number - 1][1] if number else self.config.master

    def ask(self, index: int) -> str:
        return text(self.network(index % self.count))

    def score(self, candidate: str, index: int) -> Result:
        """Latency, score, or by a table both."""
        network, number, found = parse(candidate, self.config.master), index % self.count, dict[str, float]()
        with torch.random.fork_rng(devices=[]):
            if index < self.count:
                master_ms, *others = self._latencies([self.config.master, network] if number else [network])
                found |= {"latency_ms": others[0] if others else master_ms, "master_ms": master_ms}
            if index >= self.total - self.count:
                found["score"] = self._accuracy(network, number)
        return found

    def _latencies(self, networks: Sequence[GENetConfig]) -> list[float]:
        if (table := self._latency.table) is not None:
            return [table.predict(of_branches(branches(network), self.config.size)) for network in networks]
        with torch.device("meta"):
            return self._latency.of_all([network.build() for network in networks])

    @cached_property
    def _latency(self) -> NetworkLatency:
        return NetworkLatency(self.config.budget.latency, self.config.size)

    @cached_property
    def _master(self) -> GENet:
        """Trained, with its classifier.

        Raises:
            ValueError: the weights have no classifier of these classes.
        """
        network = self.config.master.build()
        network.reset_classifier(distillation.labelled(self._val).num_classes)
        torch.nn.init.constant_(network.fc.weight, math.nan)  # type: ignore[arg-type]
        self.inputs.start(network)
        if network.fc.weight.isnan().any():  # type: ignore[operator]
            raise ValueError(
                f"got weights in init: without a classifier of {network.num_classes} classes, expected those of a "
                "network trained on the classes of val; name a job of fine_tune"
            )
        return network.to(self.inputs.device).eval().requires_grad_(False)

    @cached_property
    def _train(self) -> Any:
        return self.inputs.open("train")

    @cached_property
    def _val(self) -> Any:
        return self.inputs.open("val")

    def _accuracy(self, network: GENetConfig, index: int) -> float:
        config, device = self.config, self.inputs.device
        changed = [at for at, (a, b) in enumerate(zip(network.blocks, config.master.blocks, strict=True)) if a != b]
        judged = self._master
        for at in changed:
            torch.manual_seed(self.torch_random(index).initial_seed())
            block = distillation.fresh(network, at, config.master.blocks[at].channels).to(device)
            options: dict[str, Any] = {"batch_size": config.batch_size, "steps": config.steps}
            images = distillation.shuffled(self._train, config.size, device, seed=self.inputs.seed, **options)
            distillation.distil(block, self._master, at, images, steps=config.steps, lr=config.lr)
            judged = distillation.with_block(judged, at, block)
        return distillation.accuracy(judged, distillation.in_order(self._val, config.size, device))

    def tell(self, index: int, candidate: str, result: Result) -> None:
        self._told[index] = result
        if index == self.count - 1 < self.total - 1 and (least := self._least()) > self.config.ms:
            raise self._beyond(least)

    def _beyond(self, least: float) -> Infeasible:
        why = f"got latency_ms: {self.config.ms:.6g}, expected at least {least:.6g}, the fastest sum; allow as much"
        return Infeasible("latency_ms", least, why)

    def _least(self) -> float:
        """Latency in ms of the fastest network, by the sums; 0: nothing could be measured."""
        if not any(self._told.values()):
            return 0.0
        known = {number: self._of(result) for number, result in self._told.items() if number and result}
        return self.config.fastest(self.t0, known)

    def measured(self) -> dict[int, Result]:
        """What was measured of each network of which nothing failed."""
        found = {n: self._told.get(n, {}) | self._told.get(self.count + n, {}) for n in range(self.count)}
        return {n: one for n, one in found.items() if "latency_ms" in one and math.isfinite(one.get("score", math.nan))}

    def state(self) -> Any:
        return [[index, result] for index, result in self._told.items()]

    def restore(self, state: Any) -> None:
        self._told = {index: result for index, result in state}

    def groups(self) -> tuple[list[list[Option]], list[list[int]]]:
        """(dA, dT) of what may be in each block's place, and the network each is of; the first is what is there."""
        options = [[Option(0.0, 0.0)] for _ in self.config.master.blocks]
        indices = [[0] for _ in options]
        measured, t0 = self.measured(), self.t0
        a0 = measured.pop(0)["score"]
        for number, result in measured.items():
            at, _ = self.config.replacements[number - 1]
            options[at].append(Option(result["score"] - a0, self._of(result) - t0))
            indices[at].append(number)
        return options, indices

    @property
    def t0(self) -> float:
        """Latency of the master in ms: the median of all measurements, of which there is one for each network."""
        return median(result["master_ms"] for result in self._told.values() if "master_ms" in result)

    def _of(self, result: Result) -> float:
        """Latency in ms, had the master taken `t0` beside it."""
        return self.t0 * (result["latency_ms"] / result["master_ms"])

    def solutions(self) -> list[dict[str, Any]]:
        """Rows of the best networks within budget, by the sums.

        Raises:
            Infeasible: there is none.
            ValueError: the master could not be measured.
        """
        if (master := self.measured().get(0)) is None:
            raise ValueError("got no measurement of the master, expected one; the log says why it failed")
        a0, t0, keep = master["score"], self.t0, self.config.alternatives
        options, indices = self.groups()
        room = self.config.ms - t0
        try:
            chosen = {choice.picks: choice for choice in best(options, room, keep)}
        except Infeasible as error:
            raise self._beyond(t0 + error.least) from None
        random = default_rng((self.inputs.seed, self.count))
        chosen |= {choice.picks: choice for choice in by_mutation(options, room, random, keep=keep)}
        first = sorted(chosen.values(), key=lambda choice: (-choice.value, choice.cost))[:keep]
        return [
            self._row(self._combined(choice, indices), self.count + i, a0 + choice.value, t0 + choice.cost)
            for i, choice in enumerate(first)
        ]

    def _combined(self, choice: Choice, indices: list[list[int]]) -> GENetConfig:
        numbers = {at: indices[at][pick] for at, pick in enumerate(choice.picks)}
        return replaced(self.config.master, {at: self.network(number).blocks[at] for at, number in numbers.items()})

    def _row(self, network: GENetConfig, index: int, score: float, latency_ms: float) -> dict[str, Any]:
        changed = sum(a != b for a, b in zip(network.blocks, self.config.master.blocks, strict=True))
        row = {"candidate": text(network), "index": index, "score": score, "latency_ms": latency_ms}
        return row | {"replaced": changed, "measured": index < self.count} | costs(network)

    def population(self) -> list[dict[str, Any]]:
        """The best networks by the sums, once all is told and some are within budget; then what was measured."""
        results = self.measured()
        measured = [
            self._row(self.network(number), number, result["score"], self._of(result))
            for number, result in results.items()
            if 0 in results
        ]
        measured.sort(key=lambda row: -row["score"])
        if len(self._told) < self.total:
            return measured
        try:
            solved = self.solutions()
        except ValueError:
            return measured
        known = {row["candidate"] for row in solved}
        return [*solved, *(row for row in measured if row["candidate"] not in known)]

    def build(self, candidate: str) -> GENet:
        return parse(candidate, self.config.master).build()

    def winner(self) -> Winner:
        row = self.solutions()[0]
        network, size = parse(row["candidate"], self.config.master), -(-self.config.size // 2)
        blocks = [{"label": "conv 3x3", "channels": network.stem, "size": size, "layers": 1, "stride": 2}]
        for block in network.blocks:
            size = -(-size // block.stride)
            drawn = {"channels": block.channels, "size": size, "layers": block.layers, "stride": block.stride}
            blocks.append({"label": f"{block.kind} {block.kernel}x{block.kernel}", **drawn})
        blocks.append({"label": "conv 1x1", "channels": network.last, "size": size, "layers": 1, "stride": 1})
        found = {name: row[name] for name in ("parameters", "flops", "layers", "latency_ms", "replaced")}
        model = {
            "name": "genet",
            "image_size": self.config.size,
            **network.model_dump(mode="json", exclude={"image_size"}),
        }
        return Winner(row["candidate"], model, row["score"], found, blocks)
