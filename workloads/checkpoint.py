"""Checkpoints of a training run: method, optimizer and step, whole or not there.

    checkpoints/step-00000050.pt   torch.save of tensors and numbers only; read with weights_only=True
    checkpoints/latest             the name of the newest whole one, replaced by rename

Learning rate, data position and randomness are functions of the step, so nothing else
needs saving. A full disk or a kill while writing leaves the previous checkpoint whole.
"""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workloads.record import write_atomic

_NAME = re.compile(r"step-(\d{8,})\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the one before it is whole."""

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = message, hint
        super().__init__(message, hint)

    def __str__(self) -> str:
        return self.message


def latest_step(folder: Path) -> int | None:
    """Steps done at the newest checkpoint, None where there is none."""
    try:
        match = _NAME.fullmatch((folder / "latest").read_text().strip())
    except FileNotFoundError:
        return None
    return int(match[1]) if match else None


def save(folder: Path, step: int, method: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int) -> Path:
    """Writes the state after `step` optimizer steps and removes all but the newest `keep` checkpoints.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; `latest` still names the previous one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    scratch = path.with_suffix(".tmp")
    try:
        with open(scratch, "wb") as file:
            torch.save({"step": step, "method": method.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        write_atomic(folder / "latest", path.name)
    except (OSError, RuntimeError) as error:  # torch's zip writer answers a full disk with a RuntimeError
        scratch.unlink(missing_ok=True)
        raise CheckpointError(
            f"checkpoint of step {step} could not be written to {folder}: {error}",
            "free disk space, then submit again: the run continues from the checkpoint before",
        ) from error
    whole = sorted(folder.glob("step-*.pt"))
    for old in whole[: max(0, len(whole) - keep)]:
        old.unlink(missing_ok=True)
    return path


def restore(folder: Path, method: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Loads the newest checkpoint in place and returns the steps done; 0 where there is none.

    Raises:
        CheckpointError: `latest` names a file that is missing or damaged, or of another model.
    """
    step = latest_step(folder)
    if step is None:
        return 0
    path = folder / f"step-{step:08d}.pt"
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        method.load_state_dict(state["method"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
    except (OSError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be restored: {error}",
            f"remove it and write the name of an older one into {folder / 'latest'}, or start anew",
        ) from error
    return int(state["step"])
