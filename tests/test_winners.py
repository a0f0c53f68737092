"""The candidates that training supervises are those of the current weights: at every step, sharded, and in a run that was resumed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("pyarrow")

import stored
from test_distributed import CRITERION, in_two_processes, one_thread  # noqa: F401 - a fixture for every test

from deltakern.models import DeltaWorld
from deltakern.nn import product as products
from deltakern.nn.weights import Derived, calling
from deltakern.training import engines
from deltakern.training.loop import TrainOptions, read_metrics
from deltakern.training.run import Log, Run
from deltakern.training.world import Predictor, make_world, train_world

PREDICTOR = Predictor(width=128, layers=2, heads=2, mlp_ratio=4, candidates=256, samples=3, layer_scale_init=0.1)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored.write_store(tmp_path_factory.mktemp("tokens") / "store", videos=24, width=64)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product that may go to oneDNN does, as on AMD's processors with AVX-512: its reordered weights once outlived their own."""
    monkeypatch.setattr(products, "takes", lambda *_: True)


def options(batch_size: int, **changes) -> TrainOptions:
    few = {"cooldown": 0, "warmup": 2, "rate": 1e-3, "save_every": 10**6, "validate_every": 10**6, "log_every": 1, "device": "cpu"}
    return TrainOptions(batch_size=batch_size, **{**few, **changes})


class Winners:
    """Records the winners of every training pass beside those of a copy that was made for this pass from the state dict."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fresh: Callable[[DeltaWorld], DeltaWorld]) -> None:
        self.steps = self.differing = 0
        train, search, found = DeltaWorld.train_on_tokens, DeltaWorld._best_queries, []

        def recording(*args, **kwargs):
            found.append(search(*args, **kwargs))
            return found[-1]

        def both(world, *args, **kwargs):
            before = torch.get_rng_state()
            made = train(world, *args, **kwargs)
            after = torch.get_rng_state()
            torch.set_rng_state(before)
            with calling():  # of its own, whatever the trained model's is
                train(fresh(world), *args, **kwargs)
            torch.set_rng_state(after)
            theirs, ours = found.pop(), found.pop()
            self.steps += 1
            self.differing += int((ours != theirs).any())
            return made

        monkeypatch.setattr(DeltaWorld, "_best_queries", recording)
        monkeypatch.setattr(DeltaWorld, "train_on_tokens", both)


def _copy(world: DeltaWorld) -> DeltaWorld:
    made = make_world(stored.manifest(width=64), PREDICTOR, seed=1).train()
    made.load_state_dict(world.state_dict())
    return made


@pytest.mark.slow
@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_train_world_picks_the_winners_of_a_fresh_copy(tokens, tmp_path, monkeypatch, precision):
    winners = Winners(monkeypatch, _copy)
    train_world(tokens, tmp_path, options(1, steps=60, precision=precision), predictor=PREDICTOR, val_fraction=0.0)
    assert (winners.steps, winners.differing) == (60, 0)


@pytest.mark.usefixtures("onednn")
def test_weights_that_outlive_the_step_are_seen(tokens, tmp_path, monkeypatch):
    """The check above can fail: derived weights that outlive their call choose other winners."""
    winners = Winners(monkeypatch, _copy)
    with calling(Derived(lasting=True)):
        train_world(tokens, tmp_path, options(1, steps=6), predictor=PREDICTOR, val_fraction=0.0)
    assert winners.steps == 6
    assert winners.differing >= 3


def _sharded(rank: int, steps: int, dtype: torch.dtype | None) -> dict[str, int]:
    """FSDP2 with plain AdamW: its gathered weights come back to the same address, version counter and all."""
    network = make_world(stored.manifest(width=64), PREDICTOR_SMALL).train()
    engines.shard(network, compute_dtype=dtype)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3, foreach=False, fused=False)
    copy, found = make_world(stored.manifest(width=64), PREDICTOR_SMALL).train(), []
    differing, moved, unlike = 0, 0, 0.0
    search = DeltaWorld._best_queries
    DeltaWorld._best_queries = lambda *args: (found.append(search(*args)), found[-1])[1]
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        tokens, noise = torch.randn(2, 4, 64, generator=generator), torch.randn(2, 3, 16, 32, generator=generator)
        times = (torch.rand(2, 4, generator=generator) * 0.3 + 0.04).cumsum(1)
        prediction, target = network.train_on_tokens(tokens, times, CRITERION, queries=noise)
        before = copy.predictor.head.weight.clone()
        copy.load_state_dict({n: p.full_tensor() for n, p in network.state_dict().items()})
        moved += not torch.equal(before, copy.predictor.head.weight)
        copy.to(dtype or torch.float32).train_on_tokens(tokens, times, CRITERION, queries=noise)
        copy.float()
        theirs, ours = found.pop(), found.pop()
        differing += int((ours != theirs).any())
        (prediction - target).square().mean().backward()
        if moved % 25 == 0:  # validation between the passes, as a loop has it
            with torch.no_grad():
                sampled = [m.sample(tokens[:, :3], times, 1, 3, queries=noise[:, :1, :3].transpose(1, 2)) for m in (network, copy)]
            unlike = max(unlike, (sampled[0].float() - sampled[1].float()).abs().max().item())
        optimizer.step()
        optimizer.zero_grad()
    return {"differing": differing, "moved": moved, "alike": unlike < (1e-6 if dtype is None else 1e-2)}


PREDICTOR_SMALL = Predictor(width=32, layers=2, heads=2, mlp_ratio=2, candidates=16, samples=3, layer_scale_init=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sharded_training_picks_the_winners_of_a_fresh_copy(tmp_path, dtype):
    assert in_two_processes(tmp_path, _sharded, 100, dtype) == {
        "differing": 0,
        "moved": 99,
        "alike": True,
    }  # the first has the weights of before


def _train(tokens: Path, out: Path, precision: str, end: int | None = None) -> None:
    """Seven steps of 32 clips and 256 candidates; ``end`` is a signal to itself during the fifth."""
    torch.set_num_threads(1)
    products.takes = lambda *_: True
    add = Log.add

    def telling(self, step, **values):
        add(self, step, **values)
        if step == 4 and end is not None:
            os.kill(os.getpid(), end)

    Log.add = telling
    small = Predictor(width=64, layers=1, heads=1, mlp_ratio=4, candidates=256, samples=3, layer_scale_init=0.1)
    train_world(tokens, out, options(32, steps=7, save_every=3, precision=precision), predictor=small, val_fraction=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_uninterrupted_one(tokens, tmp_path, precision):
    """At batch 32, bit for bit, however it ended."""
    context = stored.clean_processes()

    def run(name: str, end: int | None = None) -> int:
        child = context.Process(target=_train, args=(tokens, tmp_path / name, precision, end))
        child.start()
        child.join(120)
        return child.exitcode

    assert run("whole") == 0
    whole = Run(tmp_path / "whole")
    for end, code, step in ((signal.SIGINT, 0, 5), (signal.SIGTERM, 0, 5), (signal.SIGKILL, -signal.SIGKILL, 3)):
        name = signal.Signals(end).name
        assert run(name, end) == code
        assert Run(tmp_path / name).load()[0]["step"] == step
        assert run(name) == 0
        logs = [[(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / n / "metrics.csv")] for n in ("whole", name)]
        assert logs[0] == logs[1], name
        (state, weights), (ours, resumed) = whole.load(), Run(tmp_path / name).load()
        assert state["step"] == ours["step"] == 7
        assert all(torch.equal(value, resumed.state_dict[key]) for key, value in weights.state_dict.items()), name
