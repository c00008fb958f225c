"""Keeps a search's order: candidates are asked ahead, scored in any order, told in order.

As many as `ahead` wait for their scores; the next is asked for when the first of them was told, neither earlier nor
later, so that what a search proposes is a function of its seed alone: not of how many processes score, of which is
faster, or of when it was interrupted. The price is that a child does not know the last `ahead` scores, against
thousands of candidates nothing. Turns that are spent wait for nothing and do not count: of a tight budget they are
two in three, and scorers would run dry.
"""

from __future__ import annotations

from typing import Any

from workloads.search.base import Result, Search


class Island:
    """A search under way."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.told = self.scored = self.spent = 0
        self._waiting: dict[int, str | None] = {}  # asked for and not told
        self._results: dict[int, Result] = {}
        self._handed: set[int] = set()
        self._asked = self._to_score = 0  # of what waits, those that are no spent turn
        self._advance()

    @property
    def done(self) -> bool:
        return self.told == self.search.total

    @property
    def best(self) -> dict[str, Any] | None:
        """The best row of the population; None while there is none."""
        return next(iter(self.search.population()), None)

    def take(self, most: int) -> list[tuple[int, str]]:
        """Up to so many candidates that are to be scored, and that nobody was given before."""
        free = [(i, c) for i, c in self._waiting.items() if c is not None and i not in self._handed][:most]
        self._handed |= {index for index, _ in free}
        return free

    def give(self, results: dict[int, Result]) -> None:
        """What was measured of candidates that were taken, by their index."""
        self._results |= results
        self._advance()

    def _advance(self) -> None:
        while True:
            while self._asked < self.search.total and self._to_score < self.search.ahead:
                candidate = self._waiting[self._asked] = self.search.ask(self._asked)
                self._to_score += candidate is not None
                self._asked += 1
            if self.told not in self._waiting:
                return
            candidate = self._waiting[self.told]
            if candidate is None:
                self.spent += 1
            elif self.told in self._results:
                self.search.tell(self.told, candidate, self._results.pop(self.told))
                self._handed.discard(self.told)
                self.scored += 1
                self._to_score -= 1
            else:
                return
            del self._waiting[self.told]
            self.told += 1

    def state(self) -> dict[str, Any]:
        """JSON values; what was taken and not given is scored again after `restore`."""
        waiting = [[index, candidate] for index, candidate in self._waiting.items()]
        counts = {"told": self.told, "scored": self.scored, "spent": self.spent}
        return {**counts, "waiting": waiting, "best": self.best, "search": self.search.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.told, self.scored, self.spent = state["told"], state["scored"], state["spent"]
        self._waiting = {index: candidate for index, candidate in state["waiting"]}
        self._asked = self.told + len(self._waiting)
        self._to_score = sum(candidate is not None for candidate in self._waiting.values())
        self._results, self._handed = {}, set()
        self.search.restore(state["search"])
