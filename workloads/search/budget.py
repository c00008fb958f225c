"""What a network may cost; a candidate over budget is never scored."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, model_validator

COUNTED = ("parameters", "flops", "layers")


class Budget(BaseModel):
    """The most that a network may cost; None: as much as it likes.

    Attributes:
        parameters: with the classifier.
        flops: multiply-adds of one image, in the units of the paper whose search it is.
        layers: as that paper counts them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int | None = Field(default=None, ge=1)
    flops: int | None = Field(default=None, ge=1)
    layers: int | None = Field(default=None, ge=1)

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
        """Bounds below what the smallest network of a space costs: (where, got and expected)."""
        return [
            (
                ("budget", name),
                f"got {bound:,}, expected at least {int(least[name]):,}, which the smallest network has; allow as much",
            )
            for name in COUNTED
            if (bound := getattr(self, name)) is not None and bound < least[name]
        ]
