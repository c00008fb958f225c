"""What a Dockerfile of ours must keep, as one function: text in, sentences out."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field

COMPILERS = ("gcc", "g++", "clang", "build-essential", "cmake", "cargo", "rustc", "nvcc", "cuda-toolkit", "-devel")
SECRET = re.compile(r"(token|password|secret|credential|api_?key)", re.IGNORECASE)


@dataclass
class Stage:
    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # instruction, its text

    def of(self, instruction: str) -> list[str]:
        return [text for name, text in self.steps if name == instruction]

    @property
    def variables(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for text in self.of("ENV") for pair in shlex.split(text))


def parse(text: str) -> tuple[dict[str, str], list[Stage]]:
    """Arguments before the first stage, and the stages."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in lines.replace("\\\n", " ").splitlines():
        instruction, _, rest = line.strip().partition(" ")
        rest = " ".join(rest.split())
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(base, name))
        elif instruction == "ARG" and not stages:
            name, _, default = rest.partition("=")
            arguments[name] = default
        elif instruction:
            stages[-1].steps.append((instruction, rest))
    return arguments, stages


def problems(text: str) -> list[str]:
    """Every rule that the file breaks."""
    arguments, stages = parse(text)
    last = stages[-1]
    found = [f"COPY or ADD from the internet: {t}" for s in stages for t in s.of("ADD")]
    names = {stage.name for stage in stages}
    for stage in stages:
        base = re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], stage.base)
        if base not in names and not re.search(r"(:[\w.-]*\d[\w.-]*|@sha256:[0-9a-f]{64})$", base):
            found.append(f"the base image {base} is not pinned")
    for run in [t for s in stages for t in s.of("RUN")]:
        for command in run.split("&&"):
            words = shlex.split(command.replace("$(", "").replace(")", ""))
            if words[:2] == ["pip", "install"] and not {"-c", "--only-binary=:all:"} <= set(words):
                found.append(f"not pinned by constraints.txt, or may compile: {command.strip()}")
            if words[:2] == ["pip", "wheel"] and not {"--no-build-isolation", "--no-deps"} <= set(words):
                found.append(f"builds with, or takes along, what is newest: {command.strip()}")
    for stage in stages:
        if not stage.name.endswith("-cuda") and any(name.startswith("NVIDIA_") for name in stage.variables):
            found.append(f"the stage {stage.name} asks for GPUs in the CPU variant, too")
    run_last = " ".join(last.of("RUN"))
    found += [f"the last stage installs {word}" for word in (*COMPILERS, "apt-get", "pip ") if word in run_last]
    users = last.of("USER")
    if not users or not re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", users[-1]):
        found.append("the last stage has no numeric user other than root, which Kubernetes' runAsNonRoot needs")
    found += [f"{name} is needed exactly once" for name in ("HEALTHCHECK", "CMD") if len(last.of(name)) != 1]
    kept = [*last.variables, *(t.partition("=")[0] for s in stages for t in s.of("ARG")), *arguments]
    found += [f"{name} would be kept in the image's history" for name in kept if SECRET.search(name)]
    return found
