"""What a network may cost; a candidate over budget is never scored."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, model_validator

from workloads.search.latency_budget import LatencyBudget

COUNTED = ("parameters", "flops", "layers")


class Infeasible(ValueError):
    """Nothing is within a budget.

    Attributes:
        name: of the budget.
        least: what the cheapest has of it.
    """

    def __init__(self, name: str, least: float, why: str) -> None:
        self.name, self.least = name, least
        super().__init__(name, least, why)

    def __str__(self) -> str:
        return str(self.args[2])


class Budget(BaseModel):
    """The most that a network may cost; None: as much as it likes.

    Attributes:
        parameters: with the classifier.
        flops: multiply-adds of one image, in the units of the paper whose search it is.
        layers: as that paper counts them.
        latency: milliseconds of an image, measured or by a table; looked at after the others, on the workers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int | None = Field(default=None, ge=1)
    flops: int | None = Field(default=None, ge=1)
    layers: int | None = Field(default=None, ge=1)
    latency: LatencyBudget | None = None

    @model_validator(mode="after")
    def _bounds_something(self) -> Budget:
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError(
                f"got a budget without bounds, expected one of {', '.join(type(self).model_fields)}: scores only grow "
                "with the network; set how large it may be"
            )
        return self

    def met(self, costs: Mapping[str, float]) -> bool:
        """Whether what was counted so far is within bounds."""
        bounds = {name: getattr(self, name) for name in COUNTED}
        return all(bound is None or costs[name] <= bound for name, bound in bounds.items())

    def problems(self, least: Mapping[str, float]) -> list[tuple[tuple[str | int, ...], str]]:
        """Bounds below what the smallest network of a space costs: (where, got and expected).

        Args:
            least: by the names of the bounds; `latency_ms` where it is known without measuring.
        """
        found: list[tuple[tuple[str | int, ...], str]] = [
            (
                ("budget", name),
                f"got {bound:,}, expected at least {int(least[name]):,}, which the smallest network has; allow as much",
            )
            for name in COUNTED
            if (bound := getattr(self, name)) is not None and bound < least[name]
        ]
        if self.latency is not None and self.latency.ms < (fastest := least.get("latency_ms", 0.0)):
            sentence = f"got {self.latency.ms:g} ms, expected at least {fastest:.4g}, by the table; allow as much"
            found.append((("budget", "latency", "ms"), sentence))
        return found
