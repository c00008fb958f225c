"""Where workers go: how many of one size a node holds, and what of a cluster is free. Pure.

Ray places the workers of a job in its own order, so what is found here is that they fit, not where they will be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.settings import NodeGroup

EPS = 1e-6  # of a GPU: sums of fractions

Places = dict[int, int]  # workers by the number of the node


@dataclass(frozen=True)
class Node:
    """By the names of Ray.

    Attributes:
        total: what it has.
        used: what of it is reserved now, by jobs or by anything else.
    """

    total: Mapping[str, float]
    used: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Hardware:
    """A cluster.

    Attributes:
        nodes: those that are there, the head first, and those that may come.
        drivers: that its head holds at a time; None: nobody knows.
        grows: an autoscaler adds nodes, and the head gives out no CPU.
    """

    nodes: Sequence[Node]
    drivers: int | None = None
    grows: bool = False


def may_come(groups: Sequence[NodeGroup], there: Iterable[Node]) -> list[Node]:
    """The nodes of the groups that are not there yet.

    Args:
        groups: that an autoscaler makes nodes of.
        there: its nodes. Each is taken for one of the group that it is nearest to, of those that have the same kinds of
            resources: a GPU of it may be broken, say.
    """
    names = {name for group in groups for name in group.resources}
    near = []
    for n, node in enumerate(there):
        for g, group in enumerate(groups):
            pairs = [(node.total.get(name, 0.0), group.resources.get(name, 0.0)) for name in names]
            if all((has > 0) == (size > 0) for has, size in pairs):
                near.append((sum(abs(has / size - 1) for has, size in pairs if size), n, g))
    left, placed = [group.count for group in groups], set[int]()
    for _, n, g in sorted(near):
        if n not in placed and left[g]:
            placed.add(n)
            left[g] -= 1
    return [Node(group.resources) for group, more in zip(groups, left, strict=True) for _ in range(more)]


class Rooms:
    """What is free of each node; below zero where more is promised than there is."""

    def __init__(self, nodes: Iterable[Mapping[str, float]]) -> None:
        self.nodes = [dict(node) for node in nodes]
        self._first: dict[tuple[tuple[str, float], ...], int] = {}  # node that may have room, by what is asked of it

    def free(self, names: Iterable[str]) -> dict[str, float]:
        """Of all nodes together."""
        return {name: sum(max(0.0, node.get(name, 0.0)) for node in self.nodes) for name in names}

    def take(self, each: Mapping[str, float], workers: int) -> Places:
        """Takes room for as many of the workers as there is any for, in the order of the nodes."""
        places: Places = {}
        shape = tuple(each.items())
        for i in range(self._first.get(shape, 0), len(self.nodes)):
            if not workers:
                break
            self._first[shape] = i
            if count := min(workers, workers_on(self.nodes[i], each)):
                places[i] = count
                workers -= count
        self.change(each, places, -1)
        return places

    def owe(self, each: Mapping[str, float], workers: int, sizes: Sequence[Mapping[str, float]]) -> Places:
        """Takes what workers without room wait for: from the nodes that lack least of it, up to their sizes.

        So what gets free there stays free until there is room, whatever smaller ones ask.
        """

        def lack(i: int) -> float:
            return sum(max(0.0, need - self.nodes[i].get(name, 0.0)) / need for name, need in each.items())

        places: Places = {}
        for i in sorted(range(len(sizes)), key=lack) if workers else ():
            if count := min(workers, workers_on(sizes[i], each)):
                places[i] = count
                workers -= count
        self.change(each, places, -1)
        return places

    def change(self, each: Mapping[str, float], places: Places, sign: int) -> None:
        """Gives what workers hold back to their nodes (1), or takes it from them (-1)."""
        for i, count in places.items():
            for name, need in each.items():
                self.nodes[i][name] = self.nodes[i].get(name, 0.0) + sign * count * need
        if sign > 0:
            self._first.clear()


def together(nodes: Sequence[Node]) -> Node:
    """All of them as one, for which where a worker is does not matter."""
    return Node(_sum([node.total for node in nodes]), _sum([node.used for node in nodes]))


def _sum(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def workers_on(has: Mapping[str, float], each: Mapping[str, float]) -> int:
    """How many workers of `each`, which is not empty, there is room for."""
    return max(0, min(math.floor((has.get(name, 0.0) + EPS) / need) for name, need in each.items()))


def of_driver(needs: Mapping[str, float], most_workers: int, *, grows: bool) -> dict[str, float]:
    """What Ray is asked for with the driver of a job, which goes to where that is; nothing: it runs on the head.

    A driver that trains needs what the job does. Its cores are asked for only where the cluster grows: elsewhere the
    head gives out its own, and evaluations beside the training want them of Ray.
    """
    if most_workers > 1 or needs.get("GPU"):
        return {}
    return {name: need for name, need in needs.items() if need and (grows or name != "CPU")}
