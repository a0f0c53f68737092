"""What a run leaves on disk: configuration, logs, checkpoints that survive any kill, the weights in the released format."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltakern.models import checkpoint

WEIGHTS = "pytorch_model.bin"  # the released files' name
STATE = "training_state.pt"
SUMS = "sha256.json"


class TrainingError(ValueError):
    """A run that cannot go on. The message says what to do."""


class Run:
    """The folder of a run::

    config.json                            how it was called, last time
    metrics.csv, validation.csv            one row a logged step
    checkpoints/step-00000500/             the released file, the training state, and the checksums of both
    best/pytorch_model.bin                 the weights with the least validation loss
    pytorch_model.bin                      the weights at the end

    Args:
        folder: created if need be.
        keep: how many of the latest checkpoints stay.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 3) -> None:
        if keep < 2:
            raise ValueError(f"keep must be at least 2, so that a damaged checkpoint has one before it, got {keep}")
        self.folder, self.keep = Path(folder), keep
        self.checkpoints = self.folder / "checkpoints"

    def create(self, config: Mapping[str, Any]) -> None:
        """Makes the folder, notes how the run was called, and removes weights that a killed process had half written."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for path in (self.weights, self.best_weights):
            for left in path.parent.glob(f".{path.name}.*.partial"):
                left.unlink(missing_ok=True)
        partial = self.folder / ".config.partial"
        partial.write_text(json.dumps(config, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(partial, self.folder / "config.json")

    def saved(self) -> list[Path]:
        """The checkpoints, latest first; whether they are sound is seen when they are loaded."""
        return sorted(self.checkpoints.glob("step-*"), reverse=True)

    def save(self, step: int, network: nn.Module, state: Mapping[str, Any]) -> Path:
        """Writes a checkpoint: complete under its name, or not there at all."""
        target = self.checkpoints / f"step-{step:08d}"
        partial = self.checkpoints / f".step-{step:08d}.{os.getpid()}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        checkpoint.save(network, partial / WEIGHTS)
        with open(partial / STATE, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        with open(partial / SUMS, "w", encoding="utf-8") as file:
            json.dump({name: _sum(partial / name) for name in (WEIGHTS, STATE)}, file)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():  # a damaged one that the run fell back from, or the same step saved twice
            shutil.rmtree(target)
        os.rename(partial, target)
        for old in self.saved()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        for left in self.checkpoints.glob(".step-*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        return target

    def load(self) -> tuple[dict[str, Any], checkpoint.Checkpoint] | None:
        """Training state and weights of the latest sound checkpoint; None where there is none.

        Raises:
            TrainingError: there are checkpoints, and all are damaged.
        """
        found = self.saved()
        for folder in found:
            try:
                sums = json.loads((folder / SUMS).read_text(encoding="utf-8"))
                for name in (WEIGHTS, STATE):
                    if sums.get(name) != _sum(folder / name):
                        raise ValueError(f"{name} is not what was written")
                state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
                weights = checkpoint.read(folder / WEIGHTS)
            except (OSError, ValueError, AttributeError, RuntimeError) as problem:
                warnings.warn(f"{folder}: a damaged checkpoint ({problem}); falling back to the one before", stacklevel=2)
                continue
            return state, weights
        if found:
            raise TrainingError(f"{self.checkpoints}: all {len(found)} checkpoints are damaged; move them away to begin anew")
        return None

    @property
    def weights(self) -> Path:
        """The weights at the end, once there."""
        return self.folder / WEIGHTS

    @property
    def best_weights(self) -> Path:
        """The weights with the least validation loss, once there."""
        return self.folder / "best" / WEIGHTS

    def write_weights(self, network: nn.Module, *, best: bool = False) -> None:
        """Writes the weights in the released format, as the best or as the last."""
        path = self.best_weights if best else self.weights
        path.parent.mkdir(exist_ok=True)
        checkpoint.save(network, path)


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


class Log:
    """A CSV file of one row a step, and the same in TensorBoard. Rows of steps that a resumed run repeats are dropped first.

    Args:
        path: the CSV file.
        start: the step that the run begins at.
        board: a ``SummaryWriter``, or None.
    """

    def __init__(self, path: Path, start: int, board: Any = None) -> None:
        self.path, self.board = path, board
        self.names: list[str] = []
        kept: list[dict[str, str]] = []
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self.names = list(reader.fieldnames or ())
                kept = [
                    row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) <= start and None not in row.values()
                ]
        self._write(kept)

    def _write(self, rows: list[dict[str, str]]) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial")
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.names, lineterminator="\n")
            if self.names:
                writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.path)

    def add(self, step: int, **values: float) -> None:
        """One row; names that are new become columns, empty in the rows before."""
        row = {"step": step, **values}
        if new := [name for name in row if name not in self.names]:
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            self.names += new
            self._write(rows)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.names, lineterminator="\n").writerow(row)
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)


@contextlib.contextmanager
def deterministic(on: bool):
    """Within the context only deterministic algorithms run, where ``on``; as before otherwise."""
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if on:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
