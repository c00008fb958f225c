"""One artifact, one version; nothing registered ever changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import NotFound
from service.registry import Registry
from service.settings import Settings
from service.store import Store
from tests.workloads.test_artifact import card, encoder
from workloads import artifact


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    settings = Settings(home=tmp_path)
    artifact.write(tmp_path / "runs" / "j1" / "artifact", encoder(), card(), None)
    return Registry(settings, Store(settings.database))


def test_versions_count_up_and_one_artifact_gets_one(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "j1" / "artifact"
    first = registry.register("digits", folder, "j1", "artifact")
    assert first.version == registry.register("digits", folder, "j1", "artifact").version == 1
    assert registry.register("digits", folder, "j1", "evaluations/0/artifact").version == 2
    assert registry.register("other", folder, "j1", "artifact").version == 1
    assert [row.version for row in registry.versions("digits")] == [2, 1]
    assert registry.of_jobs(["j1", "none"]) == {"j1": ["digits@1", "digits@2", "other@1"], "none": []}
    assert [(row.name, row.version) for row in registry.newest()] == [("digits", 2), ("other", 1)]
    assert artifact.resolve("digits@1", tmp_path) == registry.folder("digits", 1)


def test_a_registered_copy_outlives_its_run(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "j1" / "artifact"
    registry.register("digits", folder, "j1", "artifact")
    (folder / "model.safetensors").write_bytes(b"overwritten")
    artifact.load_model(registry.folder("digits", 1))  # checks the hash


def test_a_crash_before_the_row_is_taken_over(registry: Registry, tmp_path: Path) -> None:
    half = registry.folder("digits", 1)
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    row = registry.register("digits", tmp_path / "runs" / "j1" / "artifact", "j1", "artifact")
    assert row.version == 1
    artifact.load_model(registry.folder("digits", 1))


def test_unknown_names_and_versions_say_what_there_is(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="none is registered"):
        registry.get("digits")
    registry.register("digits", tmp_path / "runs" / "j1" / "artifact", "j1", "artifact")
    with pytest.raises(NotFound, match="registered are digits"):
        registry.get("digit")
    with pytest.raises(NotFound, match=r"expected one of \[1\]"):
        registry.get("digits", 2)
