"""Multiple-choice knapsack: one option of each group, most value in sum, within a budget of cost.

Values and costs are real, and costs may be negative (a block that is faster than the one that it replaces). `best` is
dynamic programming over the groups. What it keeps after each are the sums that may still win: those that fewer than
`keep` others beat in value at no more cost. That is exact, without rounding costs to bins. Should more than `MOST`
be left, they go into bins of cost of which each keeps its best; true costs are carried along, so the budget is kept
even then. `by_mutation` knows nothing of this and checks it.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from numpy.random import Generator

from workloads.search.budget import Infeasible

MOST = 50_000
BIN = 0.005  # of the budget's room, above the cheapest


class Option(NamedTuple):
    value: float
    cost: float


class Choice(NamedTuple):
    """One option of each group, by number, and their sums."""

    value: float
    cost: float
    picks: tuple[int, ...]


Groups = Sequence[Sequence[Option]]


def best(groups: Groups, budget: float, keep: int = 1) -> list[Choice]:
    """The `keep` best combinations, best first; fewer where there are fewer.

    Args:
        groups: of options.
        budget: that the costs' sum must not exceed.
        keep: how many.

    Raises:
        Infeasible: there is none.
    """
    least = [min(option.cost for option in group) for group in groups]
    found = [Choice(0.0, 0.0, ())]
    for i, group in enumerate(groups):
        room = budget - sum(least[i + 1 :])
        grown = [
            Choice(value + option.value, cost + option.cost, (*picks, number))
            for value, cost, picks in found
            for number, option in enumerate(group)
            if cost + option.cost <= room
        ]
        found = _undominated(grown, keep)
        if len(found) > MOST:
            found = _binned(found, (budget - sum(least)) * BIN, keep)
    if not found:
        raise _infeasible(budget, sum(least))
    return heapq.nlargest(keep, found, _rank)


def _infeasible(budget: float, least: float) -> Infeasible:
    why = f"got a budget of {budget:.6g}, expected at least {least:.6g}, the cheapest combination's"
    return Infeasible("cost", least, why)


def _rank(choice: Choice) -> tuple[float, float]:
    return choice.value, -choice.cost


def _undominated(choices: Iterable[Choice], keep: int) -> list[Choice]:
    """Those that fewer than `keep` beat at no more cost."""
    found, top = [], [-math.inf] * keep  # the best values at no more cost, a heap
    for choice in sorted(choices, key=lambda choice: (choice.cost, -choice.value)):
        if choice.value > top[0]:
            found.append(choice)
            heapq.heapreplace(top, choice.value)
    return found


def _binned(choices: Iterable[Choice], width: float, keep: int) -> list[Choice]:
    """The best of each bin of cost."""
    bins = itertools.groupby(choices, lambda choice: math.floor(choice.cost / width))  # they are in order of cost
    return [choice for _, group in bins for choice in heapq.nlargest(keep, group, _rank)]


def by_mutation(groups: Groups, budget: float, random: Generator, *, keep: int = 1, turns: int = 5000) -> list[Choice]:
    """What chance finds: up to three options of one of the best so far are replaced, again and again.

    Args:
        groups: of options.
        budget: that the costs' sum must not exceed.
        random: what is drawn.
        keep: how many to return.
        turns: mutations.

    Raises:
        Infeasible: no combination is within the budget.
    """
    cheapest = [min(range(len(group)), key=lambda number, g=group: g[number].cost) for group in groups]  # type: ignore[misc]

    def chosen(picks: Sequence[int]) -> Choice:
        options = [group[number] for group, number in zip(groups, picks, strict=True)]
        return Choice(sum(o.value for o in options), sum(o.cost for o in options), tuple(picks))

    start = chosen(cheapest)
    if start.cost > budget:
        raise _infeasible(budget, start.cost)
    members, known = [start], {start.picks}
    for _ in range(turns):
        picks = list(members[random.integers(len(members))].picks)
        for at in random.integers(len(groups), size=random.integers(1, 4)):
            picks[at] = int(random.integers(len(groups[at])))
        child = chosen(picks)
        if child.cost <= budget and child.picks not in known:
            known.add(child.picks)
            members = heapq.nlargest(max(keep, 32), [*members, child], _rank)
    return members[:keep]
