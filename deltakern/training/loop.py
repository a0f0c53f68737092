"""The loop that both recipes share.

A step is a function of (seed, step, rank) and the weights: which clips it takes and every random number follow from them, so
a resumed run repeats what the killed one would have done, bit for bit, without any generator's state being stored.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from deltakern._extras import require
from deltakern.data.pace import Pace, figure
from deltakern.data.sampling import generator_for
from deltakern.data.tokenize import PRECISIONS, stop_on_signal
from deltakern.models import checkpoint
from deltakern.training.engines import Place, checkpoint_activations, placed
from deltakern.training.optim import Schedule, make_optimizer
from deltakern.training.run import Log, Run, TrainingError, deterministic

log = logging.getLogger("deltakern")

SAY_EVERY = 30.0
"""Seconds between two lines about how training goes."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train. The defaults are the release's for DeltaWorld.

    Attributes:
        steps: before the cool-down.
        batch_size: clips a step, over all processes and accumulated parts.
        rate: AdamW's learning rate after the warm-up.
        weight_decay: of linear weights.
        warmup, cooldown, cooldowns: see :class:`deltakern.training.optim.Schedule`.
        clip: largest norm of the gradient; None does not clip.
        accumulate: parts that a process's share of the batch is computed in.
        precision: "float32" or "bfloat16" (autocast).
        seed: of order, noise and augmentation.
        save_every, validate_every, log_every: steps.
        keep: latest checkpoints that stay.
        compile: torch.compile the training pass.
        recompute: keep no activations inside blocks, compute them again in the backward pass.
        deterministic: deterministic algorithms alone.
        tensorboard: write TensorBoard logs beside the CSV files.
        device: "cpu", "cuda", "cuda:1"...; None takes a GPU where there is one.
    """

    steps: int = 300_000
    batch_size: int = 1024
    rate: float = 1e-4
    weight_decay: float = 0.4
    warmup: int = 5000
    cooldown: int = 5000
    cooldowns: int = 1
    clip: float | None = None
    accumulate: int = 1
    precision: str = "float32"
    seed: int = 0
    save_every: int = 500
    validate_every: int = 5000
    log_every: int = 10
    keep: int = 3
    compile: bool = False
    recompute: bool = False
    deterministic: bool = False
    tensorboard: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "validate_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rate", "weight_decay", "warmup", "cooldown", "cooldowns"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0 or None, got {self.clip}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {tuple(PRECISIONS)}, got {self.precision!r}")

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.rate, self.steps, self.warmup, self.cooldown, self.cooldowns)


class Result(NamedTuple):
    """The steps done so far, whether a signal ended the run before its time, and the loss of the last step."""

    step: int
    stopped: bool
    loss: float


class Task(ABC):
    """What is trained, on what.

    Attributes:
        network: whose weights are saved.
        objective: a module around the network; called with a batch it gives the loss.
        loss: the name of the loss.
    """

    network: nn.Module
    objective: nn.Module
    loss: str

    @abstractmethod
    def size(self) -> str:
        """On how much it trains and validates, for the log."""

    @abstractmethod
    def batches(self, plan: Iterable[tuple[int, int]]) -> Iterator[tuple[torch.Tensor, ...]]:
        """For each (start, stop) of the plan those clips of the task's endless order, on the CPU."""

    @abstractmethod
    def names(self, start: int, stop: int) -> list[str]:
        """What the clips are called, for the report of a step that failed."""

    @abstractmethod
    def validate(self, place: Place) -> dict[str, float]:
        """Losses on held-out clips, the least of "val" is best; empty where there are none. The network is in evaluation mode."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be continued."""

    @abstractmethod
    def order(self) -> str:
        """Changes when the endless order of clips does."""


def fit(task: Task, out: str | os.PathLike, options: TrainOptions) -> Result:
    """Trains until the schedule's end, continuing what ``out`` holds.

    SIGTERM and SIGINT end it after the step in hand, with a checkpoint.

    Raises:
        TrainingError: the run in ``out`` is of another model or of other tokens; a loss or gradient that is not finite, the
            batch of which is saved; every checkpoint is damaged.
        ValueError: a batch that the processes and parts do not divide.
    """
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(placed(options.device))
        stack.enter_context(torch.random.fork_rng(devices=[place.device] if place.device.type == "cuda" else []))
        stack.enter_context(deterministic(options.deterministic))
        stopped = stack.enter_context(stop_on_signal())
        parts = place.size * options.accumulate
        if options.batch_size % parts:
            raise ValueError(
                f"batch_size must be a multiple of processes x accumulate = {place.size} x {options.accumulate}, got {options.batch_size}"
            )
        return _Loop(task, Run(out, options.keep), options, place, options.batch_size // parts).train(stopped)


class _Loop:
    def __init__(self, task: Task, run: Run, options: TrainOptions, place: Place, share: int) -> None:
        self.task, self.run, self.options, self.place, self.share = task, run, options, place, share
        self.schedule = options.schedule
        self.network = task.network.to(place.device)
        saved = run.load()
        self.optimizer = make_optimizer(self.network, options.rate, options.weight_decay)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.step, self.best, self.validated = 0, math.inf, []
        if saved is not None:
            self._resume(*saved)
        if place.first:
            run.create({"options": asdict(options), "processes": place.size, **task.identity()})
        if options.recompute:
            checkpoint_activations(self.network)
        if options.compile:
            task.objective.compile()
        self.module = task.objective
        if place.size > 1:
            self.module = nn.parallel.DistributedDataParallel(task.objective)
        board = None
        if options.tensorboard and place.first:
            require("tensorboard", "train", "TensorBoard logs")
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=self.step)
        self.board = board
        if place.first:
            count = sum(p.numel() for p in self.parameters)
            where = f"{place.device}" if place.size == 1 else f"{place.size} processes on {place.device.type}"
            plan = f"{self.schedule.total} steps of {options.batch_size} clips, {options.precision} on {where}"
            log.info("%s: %s million parameters, %s; %s", run.folder, figure(count / 1e6), task.size(), plan)
        self.logs = [Log(run.folder / f"{name}.csv", self.step, board) for name in ("metrics", "validation")] if place.first else None

    def _resume(self, state: dict[str, Any], weights: checkpoint.Checkpoint) -> None:
        differing = [
            f"{k} was {state['identity'].get(k)!r} and is {v!r}" for k, v in self.task.identity().items() if state["identity"].get(k) != v
        ]
        if differing:
            raise TrainingError(f"{self.run.folder}: holds another run: {'; '.join(differing)}; give another folder")
        if state["order"] != self.task.order():
            warnings.warn(f"{self.run.folder}: the clips are not those of before; training goes on with the new ones", stacklevel=2)
        checkpoint.load_into(self.network, weights)
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, now in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(now)  # of this call, not of the one that saved
        self.step, self.best, self.validated = state["step"], state["best"], state["validated"]
        log.info("%s: continued after step %d", self.run.folder, self.step)

    def _plan(self) -> Iterator[tuple[int, int]]:
        """The clips of every part of every step that is left for this process."""
        for step in range(self.step, self.schedule.total):
            for part in range(self.options.accumulate):
                start = step * self.options.batch_size + (part * self.place.size + self.place.rank) * self.share
                yield start, start + self.share

    def train(self, stopped: Callable[[], bool]) -> Result:
        options, place = self.options, self.place
        saved_at, loss = self.step, math.nan
        since, clips = time.perf_counter(), 0
        pace = Pace(self.schedule.total - self.step, SAY_EVERY)
        self.network.train()
        batches = self.task.batches(self._plan())
        stop = False
        while self.step < self.schedule.total and not stop:
            rate = self.schedule.rate(self.step)
            loss, norm, flag = self._one(batches, rate, stopped)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            clips += options.batch_size
            pace.advance()
            stop = flag > 0
            last = self.step == self.schedule.total
            if self.logs and (self.step % options.log_every == 0 or last):
                now = time.perf_counter()
                self.logs[0].add(self.step, loss=loss, rate=rate, grad_norm=norm, clips_per_second=clips / (now - since))
                since, clips = now, 0
            if self.step % options.validate_every == 0 or last:
                self._validate()
            saving = self.step % options.save_every == 0 or last or stop
            if saving:
                self._save()
                saved_at = self.step
            if place.first and (pace.due() or saving):
                rate, left = pace.rate * options.batch_size, "" if last else f", {pace.left} left"
                text = f"step {self.step} of {self.schedule.total}: loss {loss:.5g}, {figure(rate)} clips a second{left}"
                log.info("%s%s", text, ", saved" if saving else "")
        if saved_at != self.step:
            self._save()
        done = self.step >= self.schedule.total
        if place.first:
            if done:
                self.run.write_weights(self.network)
            ending = "done" if done else "stopped by a signal; the same command goes on"
            log.info("%s: %d of %d steps, %s", self.run.folder, self.step, self.schedule.total, ending)
            for what, path in (("weights", self.run.weights), ("those with the least validation loss", self.run.best_weights)):
                if done and path.exists():
                    log.info("%s: %s", what, path)
        if self.board is not None:
            self.board.close()
        place.wait()
        return Result(self.step, not done, loss)

    def _one(self, batches: Iterator[tuple[torch.Tensor, ...]], rate: float, stopped: Callable[[], bool]) -> tuple[float, float, float]:
        """Gradients of one step, clipped: (loss, gradient's norm before clipping, above 0 where a process was told to stop)."""
        options, place = self.options, self.place
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        dtype = PRECISIONS[options.precision]
        losses, kept = [], []
        for part in range(options.accumulate):
            batch = next(batches)
            kept.append(batch)
            torch.manual_seed(generator_for(options.seed, "step", self.step, place.rank, part).initial_seed())
            last = part == options.accumulate - 1
            together = contextlib.nullcontext() if last or place.size == 1 else self.module.no_sync()
            with together:
                with torch.autocast(place.device.type, dtype, enabled=dtype != torch.float32):
                    loss = self.module(*(t.to(place.device, non_blocking=True) for t in batch))
                (loss / options.accumulate).backward()
            losses.append(loss.detach())
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        loss, norm_value = torch.stack((torch.stack(losses).mean().float(), norm.float())).tolist()
        loss, flag, bad = place.mean([loss, float(stopped()), float(not (math.isfinite(loss) and math.isfinite(norm_value)))])
        if bad:
            self._fail(kept, loss, norm_value)
        if options.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, options.clip, norm)
        return loss, norm_value, flag

    def _fail(self, batches: list[tuple[torch.Tensor, ...]], loss: float, norm: float) -> None:
        """Saves what this process was computing when a loss or gradient was not finite, and raises."""
        options, place = self.options, self.place
        path = self.run.folder / f"failed-step-{self.step:08d}-rank-{place.rank}.pt"
        starts = [self.step * options.batch_size + (p * place.size + place.rank) * self.share for p in range(options.accumulate)]
        names = [name for start in starts for name in self.task.names(start, start + self.share)]
        batch = [torch.cat(tensors) for tensors in zip(*batches, strict=True)]
        torch.save({"step": self.step, "loss": loss, "grad_norm": norm, "seed": options.seed, "names": names, "batch": batch}, path)
        raise TrainingError(
            f"step {self.step}: the loss is {loss} and the gradient's norm {norm}; no step was taken. The batch is in {path}, "
            f"the weights of before in {self.run.checkpoints}"
        )

    def _validate(self) -> None:
        self.network.eval()
        try:
            found = self.task.validate(self.place)
        finally:
            self.network.train()
        if not found:
            return
        if self.validated != list(found):  # on other clips or in another way than before: not to be compared
            self.validated, self.best = list(found), math.inf
        if self.logs:
            self.logs[1].add(self.step, **found)
            log.info("%s", validation_table(self.step, self.task.loss, found, self.best))
        if found["val"] < self.best:
            self.best = found["val"]
            if self.place.first:
                self.run.write_weights(self.network, best=True)

    def _save(self) -> None:
        if self.place.first:
            state = {
                "step": self.step,
                "best": self.best,
                "validated": self.validated,
                "optimizer": self.optimizer.state_dict(),
                "identity": self.task.identity(),
                "order": self.task.order(),
            }
            self.run.save(self.step, self.network, state)
        self.place.wait()


def validation_table(step: int, loss: str, found: Mapping[str, float], best: float) -> str:
    """What :meth:`Task.validate` found, in rows of what is predicted and columns of how."""
    rows: dict[str, dict[str, float]] = {}
    for key, value in found.items():
        if known := re.fullmatch(r"(feature_)?h(\d+)(?:_(\w+))?", key):
            of, ahead, how = known.groups()
            row = f"{'features, ' if of else ''}{ahead} frame{'s' * (ahead != '1')} ahead"
            rows.setdefault(row, {})[(how or "model").replace("_", " ")] = value
    columns = list(dict.fromkeys(how for row in rows.values() for how in row))
    widest = max(map(len, rows), default=0)
    lines = [f"step {step}: validation, {loss} {found['val']:.5g}" + (f", the least so far {best:.5g}" if best < math.inf else "")]
    lines.append(" " * (widest + 2) + "".join(f"{how:>11}" for how in columns))
    for row, values in rows.items():
        lines.append(f"  {row:<{widest}}" + "".join(f"{values.get(how, math.nan):11.5f}" for how in columns))
    return "\n".join(lines)


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
    """Rows of ``metrics.csv`` or ``validation.csv``, each with what it has."""
    import csv

    with open(Path(path), newline="", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
