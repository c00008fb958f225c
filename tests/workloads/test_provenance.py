"""What a run was made of: complete, cheap in imports, and compared in words."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workloads.data.manifest import open_manifest
from workloads.provenance import _commit, difference, keep, provenance, read
from workloads.record import RunFolder
from workloads.spec import JobSpec

CPU = torch.device("cpu")


def git(folder: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a package at its top; returns the package."""
    package = tmp_path / "repo" / "workloads"
    package.mkdir(parents=True)
    (package / "train.py").write_text("lr = 1\n")
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-qm", "first")
    return package


def test_it_names_all_that_a_result_depends_on(toy_job: Callable[..., JobSpec], toy_shards: dict[str, str]) -> None:
    manifest = open_manifest(toy_shards["train"])
    spec = toy_job(seed=7)
    facts = provenance(spec, CPU, {"train": manifest})
    assert JobSpec.model_validate(facts["spec"]) == spec
    assert facts["seed"] == 7
    assert facts["datasets"] == {"train": {"samples": 80, "content_hash": manifest.content_hash}}
    assert facts["packages"]["torch"] == torch.__version__
    assert all(facts["packages"].values())
    assert {"simplejpeg", "pillow", "av", "nibabel"} <= facts["packages"].keys()  # what decodes decides what is learned
    assert facts["code"]["version"] == metadata.version("manta")
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["device"]["type"] == "cpu" and facts["device"]["name"]
    assert facts["device"]["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(facts)) == facts


def test_packages_are_named_without_importing_them(tmp_path: Path) -> None:
    program = (
        "import sys; from workloads import provenance as p; from workloads.provenance import *\n"
        "assert 'torch' not in sys.modules; import torch\n"
        "spec = p.JobSpec.model_validate_json(sys.argv[1]); provenance(spec, torch.device('cpu'))\n"
        "print([name for name in p.PACKAGES if name in sys.modules and name not in ('torch', 'numpy')])"
    )
    spec = {"name": "t", "method": {"name": "mae"}, "model": {"name": "vit"}, "data": {"train": {"shards": "x"}}}
    command = [sys.executable, "-c", program, json.dumps(spec | {"steps": 1})]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_commit_and_whether_the_package_was_changed(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook
    assert _commit(checkout) == {"commit": head, "dirty": False}
    (checkout.parent / "notes.txt").write_text("not code")
    assert _commit(checkout)["dirty"] is False
    (checkout / "train.py").write_text("lr = 2\n")
    assert _commit(checkout) == {"commit": head, "dirty": True}
    git(checkout, "checkout", "-q", "train.py")
    (checkout / "new.py").write_text("")
    assert _commit(checkout) == {"commit": head, "dirty": True}


def test_a_repository_around_a_virtual_environment_is_not_ours(checkout: Path) -> None:
    installed = checkout.parent / ".venv" / "site-packages" / "workloads"
    installed.mkdir(parents=True)
    assert _commit(installed) == {"commit": None, "dirty": None}


def test_without_git_the_commit_is_unknown(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert _commit(checkout) == {"commit": None, "dirty": None}


def test_a_run_keeps_an_entry_for_each_environment(toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert read(run) == []
    first = provenance(toy_job(), CPU)
    assert keep(run, first) == []
    assert keep(run, copy.deepcopy(first)) == []
    assert read(run) == [first]
    second = copy.deepcopy(first) | {"python": "2.7.18", "code": {"version": "9", "commit": None, "dirty": None}}
    told = keep(run, second)
    assert f'code.version was "{metadata.version("manta")}", is "9"' in told
    assert f'python was "{first["python"]}", is "2.7.18"' in told
    assert read(run) == [first, second]


def test_differences_in_words() -> None:
    a = {"packages": {"torch": "2.12"}, "seed": 0, "spec": {"evaluate": [], "resources": {"workers": [2, 8]}}}
    b = {"packages": {"torch": "2.13", "ray": "2.60"}, "seed": 0, "spec": {"evaluate": [{"name": "knn"}]}}
    assert difference(a, b) == [
        'packages.torch was "2.12", is "2.13"',
        "spec.evaluate was [], is nothing",
        "spec.resources.workers was [2, 8], is nothing",
        'packages.ray was nothing, is "2.60"',
        'spec.evaluate.0.name was nothing, is "knn"',
    ]


def test_two_changed_checkouts_may_differ() -> None:
    code = {"code": {"commit": "abc", "dirty": True}}
    assert difference(code, code) == ["code had changes that are not committed, then and now: they may differ"]


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex("[a-z]{1,3}", fullmatch=True), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from("abc"), TREES), st.dictionaries(st.sampled_from("abc"), TREES))
def test_equal_exactly_where_nothing_is_told(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert (difference(a, b) == []) == (json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True))
