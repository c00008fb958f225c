"""What a checkpoint becomes; that networks load and serve is in tests/test_method_contract.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workloads import artifact
from workloads.export import export
from workloads.methods.base import DRAWN
from workloads.methods.mae import MAE
from workloads.record import RunFolder
from workloads.sheet import GAP, PIXELS
from workloads.spec import JobSpec
from workloads.train import train


def test_the_card_shows_what_the_method_draws(toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    from PIL import Image

    spec, run = toy_job(epochs=None, steps=1), RunFolder(tmp_path)
    assert train(spec, run, tmp_path)
    export(spec, run, tmp_path, "j")
    with Image.open(run.artifact / artifact.PICTURES) as sheet:
        assert sheet.width == DRAWN * (PIXELS + GAP) + GAP
        assert len(sheet.getcolors(1 << 24) or []) > 100
    assert f"({artifact.PICTURES})" in (run.artifact / "README.md").read_text()


def test_a_method_that_cannot_draw_costs_the_pictures_only(
    toy_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise MemoryError("no room for pictures")

    spec, run = toy_job(epochs=None, steps=1), RunFolder(tmp_path)
    assert train(spec, run, tmp_path)
    monkeypatch.setattr(MAE, "pictures", broken)
    assert export(spec, run, tmp_path, "j").reconstructs
    assert not (run.artifact / artifact.PICTURES).exists()
    assert artifact.PICTURES not in (run.artifact / "README.md").read_text()
    (event,) = run.read_events()
    assert (event["kind"], event["message"]) == ("pictures_failed", "MemoryError: no room for pictures")
