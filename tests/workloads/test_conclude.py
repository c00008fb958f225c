"""What a search measures of its winner at the end."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from workloads import conclude


@pytest.mark.parametrize(("flops", "batch_size"), [(1.6e8, 64), (2e9, 10), (1.9e10, 1), (1e12, 1)])
def test_a_cpu_sees_fewer_images_at_once_the_larger_the_network(
    flops: float, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(conclude, "measure", lambda _, **how: seen.append(how) or 7.0)
    found = conclude.measured(nn.Conv2d(3, 1, 1), 480, flops)
    assert (found["ms"], found["precision"], found["batch_size"]) == (7.0, "fp32", batch_size)
    assert seen[0]["batch_size"] == batch_size and seen[0]["size"] == 480
