"""Which checkpoint a run continues from: the newest that is as it was written."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from workloads import checkpoint_folder as files
from workloads.checkpoint_folder import CheckpointError, Seal, stem
from workloads.checkpoint_mirror import Mirror

PASSED_OVER = "checkpoint_passed_over"


class Note(NamedTuple):
    """What went wrong on the way to a checkpoint: a kind of event of the run, and a sentence."""

    kind: str
    text: str


@dataclass(frozen=True)
class Found:
    """A checkpoint, or none.

    Attributes:
        seal: None where there is none.
        state: None where it is in parts, which each rank reads for itself.
        notes: what was passed over, and why.
    """

    seal: Seal | None = None
    state: dict[str, Any] | None = None
    notes: list[Note] = field(default_factory=list)


def newest(folder: Path, mirror: Mirror | None = None) -> Found:
    """The newest whole checkpoint, on the disk or else in the mirror.

    Raises:
        CheckpointError: there are some and none is whole, or there were some, or there may be some in a mirror that
            does not answer.
    """
    here, there, problems = files.steps(folder), [], list[Note]()
    if mirror is not None:
        try:
            there = mirror.steps()
        except (OSError, ValueError) as error:
            problems.append(Note("mirror_away", f"{mirror} cannot be read ({first_line(error)})"))
    latest, mirrored = files.latest_step(folder), files.mirrored_step(folder)
    if latest is not None and mirrored is not None and latest < mirrored:  # went back, and could not tell the mirror
        there = [step for step in there if step <= latest]
    for step in files.given_up(folder):
        problems.append(Note(PASSED_OVER, f"checkpoint of step {step} is suspect: a guard had begun to count"))
    for step in sorted({*here, *there}, reverse=True):
        for at_mirror in (False, True):
            if step not in (there if at_mirror else here):
                continue
            where = f" in {mirror}" if at_mirror else ""
            try:
                if at_mirror and mirror is not None:
                    mirror.fetch(step, folder)
                seal, state = _open(folder, step)
            except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
                why = f"checkpoint of step {step}{where} is damaged ({first_line(error)})"
                problems.append(Note(PASSED_OVER, why))
            else:
                notes = [Note(kind, f"{why}; continued from step {step}{where}") for kind, why in problems]
                return Found(seal, state, notes)
    if latest is not None and not (here or there):
        problems.append(Note(PASSED_OVER, f"`latest` names step {latest}, of which nothing is left"))
    if problems:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read: {'; '.join(problem.text for problem in problems)}",
            f"bring one of them back, or remove {folder} to start anew"
            if here or there or latest is not None
            else f"see that {mirror} answers, then submit again",
        )
    return Found()


def _open(folder: Path, step: int) -> tuple[Seal, dict[str, Any] | None]:
    """A checkpoint as it was written; its state, unless it is in parts."""
    seal = files.read_seal(folder, step)
    if seal is None:
        raise OSError(f"{stem(step)}.json is missing or damaged")
    if (problem := files.damage(folder, seal)) is not None:
        raise OSError(problem)
    if in_parts(seal):
        return seal, None
    return seal, torch.load(folder / seal.name, map_location="cpu", weights_only=True)


def in_parts(seal: Seal) -> bool:
    """Whether it is of a sharded method."""
    return not seal.name.endswith(".pt")


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
