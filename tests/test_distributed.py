"""Engines: two processes with gloo (DDP, FSDP2), recomputed activations, torch.compile; always the gradients of the plain run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("av")
pytest.importorskip("pyarrow")

import stored
from compare import assert_as_accurate, relative_rmse

import deltakern
from deltakern.data.sampling import generator_for
from deltakern.models import checkpoint
from deltakern.training import engines
from deltakern.training.loop import TrainOptions, read_metrics
from deltakern.training.run import Run
from deltakern.training.tok import PairObjective
from deltakern.training.world import make_world, train_world

CRITERION = nn.SmoothL1Loss(reduction="none", beta=0.1)
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(kind: str, recompute: str = "none") -> nn.Module:
    if kind == "tok":
        return stored.tokenizer(use_rope_aug=False, num_hidden_layers=2, recompute=recompute).train()
    return make_world(stored.tokenizer(), stored.PREDICTOR).train()


def inputs(kind: str, batch: int = 4) -> tuple[torch.Tensor, ...]:
    """A batch that both processes cut their half from: frames, or tokens, times and noise."""
    g = generator_for("inputs", kind)
    if kind == "tok":
        return (torch.randint(0, 256, (batch, 2, 3, 32, 48), generator=g, dtype=torch.uint8),)
    noise = torch.randn(batch, 5, 4, stored.PREDICTOR.width, generator=g) * 0.02
    return torch.randn(batch, 6, 64, generator=g), (torch.rand(batch, 6, generator=g) * 0.3 + 0.04).cumsum(1), noise


class Objective(nn.Module):
    """The loss with the noise given, so that a batch and its halves are comparable."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        if isinstance(self.network, deltakern.DeltaTok):
            prediction, target = self.network(*batch)
            return deltakern.ops.recon_loss(prediction, target, kind="log_cosh")
        tokens, times, noise = batch
        prediction, target = self.network.train_on_tokens(tokens, times, CRITERION, queries=noise)
        return deltakern.ops.recon_loss(prediction, target, kind="smooth_l1", beta=0.1)


def gradients(network: nn.Module) -> dict[str, torch.Tensor]:
    """By name; whole tensors of sharded ones."""
    full = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    return {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for n, g in full.items()}


def plain(kind: str, *, double: bool = False, autocast: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one process with the whole batch."""
    network = make(kind)
    batch = inputs(kind)
    if double:
        network, batch = network.double(), tuple(t.double() if t.is_floating_point() else t for t in batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = Objective(network)(*batch)
    loss.backward()
    return loss.item(), gradients(network)


def _in_group(body, rank: int, folder: Path, *args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        found = body(rank, *args)
        if rank == 0:
            torch.save(found, folder / "found.pt")
    finally:
        dist.destroy_process_group()


def in_two_processes(folder: Path, body, *args):
    """What ``body(rank, *args)`` returns on rank 0."""
    context = stored.clean_processes()
    children = [context.Process(target=_in_group, args=(body, rank, folder, *args)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(180)
        assert child.exitcode == 0
    return torch.load(folder / "found.pt", weights_only=True)


def _halves(rank: int, kind: str) -> tuple[torch.Tensor, ...]:
    return tuple(t[2 * rank : 2 * rank + 2] for t in inputs(kind))


def _ddp(rank: int, kind: str, recompute: bool):
    network = make(kind, "cheap")
    if recompute:
        engines.checkpoint_activations(network)
    module = nn.parallel.DistributedDataParallel(Objective(network))
    with module.no_sync():  # the second time counts double: accumulation, as the loop does it
        (module(*_halves(rank, kind)) / 2).backward()
    (module(*_halves(rank, kind)) / 2).backward()
    return gradients(network)


@pytest.mark.parametrize(("kind", "recompute"), [("tok", False), ("tok", True), ("world", False)])
def test_ddp_gives_the_gradients_of_one_process(tmp_path, kind, recompute):
    _, expected = plain(kind)
    found = in_two_processes(tmp_path, _ddp, kind, recompute)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert relative_rmse(found[name], grad) < 1e-5, name


def _fsdp(rank: int, kind: str, dtype: torch.dtype | None, recompute: bool):
    network = make(kind, "cheap")
    if recompute:
        engines.checkpoint_activations(network)
    engines.shard(network, compute_dtype=dtype)
    trained = [p for p in network.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and type(p).__name__ == "DTensor" for p in trained)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    if kind == "tok":
        prediction, target = network(*_halves(rank, kind))
        loss = deltakern.ops.recon_loss(prediction, target, kind="log_cosh")
    else:
        tokens, times, noise = _halves(rank, kind)
        prediction, target = network.train_on_tokens(tokens, times, CRITERION, queries=noise)
        loss = deltakern.ops.recon_loss(prediction, target, kind="smooth_l1", beta=0.1)
    loss.backward()
    found = gradients(network)
    optimizer.step()
    weights = {n: p.full_tensor() for n, p in network.named_parameters() if p.requires_grad}
    return {"grads": found, "weights": weights}


@pytest.mark.parametrize(("kind", "recompute"), [("tok", False), ("tok", True), ("world", False)])
def test_fsdp_gives_the_gradients_of_one_process(tmp_path, kind, recompute):
    _, expected = plain(kind)
    found = in_two_processes(tmp_path, _fsdp, kind, None, recompute)
    assert found["grads"].keys() == expected.keys()
    for name, grad in expected.items():
        assert relative_rmse(found["grads"][name], grad) < 1e-5, name
    network = make(kind)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            parameter.grad = expected[name]
    torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3).step()
    for name, value in network.named_parameters():
        if value.requires_grad:
            assert (found["weights"][name] - value).abs().mean() < 1e-6, name


@pytest.mark.parametrize("kind", ["tok", "world"])
def test_fsdp_computes_in_bfloat16_as_accurately_as_autocast(tmp_path, kind):
    """Against float64; all gradients as one vector, since a bias of few entries errs by chance."""
    _, truth = plain(kind, double=True)
    _, autocast = plain(kind, autocast=True)
    found = in_two_processes(tmp_path, _fsdp, kind, torch.bfloat16, False)["grads"]
    assert all(g.dtype == torch.float32 for g in found.values())
    ours, theirs, exact = (torch.cat([grads[name].flatten() for name in truth]) for grads in (found, autocast, truth))
    assert_as_accurate(ours, theirs, exact, name="gradients")
    assert relative_rmse(ours, exact) > 1e-4  # it did compute in bfloat16


@pytest.mark.parametrize("kind", ["tok", "world"])
def test_recomputing_activations_changes_no_bit(kind):
    loss, expected = plain(kind)
    network = engines.checkpoint_activations(make(kind))
    found = Objective(network)(*inputs(kind))
    found.backward()
    assert found.item() == loss
    for name, grad in gradients(network).items():
        assert torch.equal(grad, expected[name]), name


def test_recomputing_keeps_less():
    """What autograd saves between the passes, in bytes."""
    kept = []
    for recompute in (False, True):
        network = make("tok")
        if recompute:
            engines.checkpoint_activations(network)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t):
            Objective(network)(*inputs("tok"))
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("kind", ["tok", "world"])
def test_the_training_pass_compiles_as_one_graph(kind):
    loss, expected = plain(kind)
    network = make(kind)
    objective = torch.compile(Objective(network), fullgraph=True, backend="eager")
    found = objective(*inputs(kind))
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-5)
    for name, grad in gradients(network).items():
        assert relative_rmse(grad, expected[name]) < 1e-4, name


def test_the_loops_compiled_pass_is_the_plain_one(tmp_path, monkeypatch):
    """The objective is compiled, the trained blocks recompute; what torch.compile makes of models is tested with them."""
    calls = []
    monkeypatch.setattr(PairObjective, "compile", lambda self: calls.append(self))
    from deltakern.data.sampling import Sampling
    from deltakern.training.tok import train_tok

    stored.write_video(tmp_path / "v.mp4")
    options = TrainOptions(steps=1, cooldown=0, batch_size=2, compile=True, recompute=True, device="cpu")
    made = stored.tokenizer()
    train_tok([tmp_path / "v.mp4"], tmp_path / "run", made, options, sampling=Sampling(num_frames=2, size=32))
    assert len(calls) == 1
    assert all("forward" in vars(block) for block in made.encoder_blocks)
    assert not any("forward" in vars(block) for block in engines.blocks(made.backbone))


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_distributed
torch.set_num_threads(1)
test_distributed.train({store!r}, {out!r})
"""


def train(store: Path | str, out: Path | str, steps: int = 8, accumulate: int = 2):
    options = TrainOptions(
        steps=steps,
        cooldown=0,
        warmup=2,
        batch_size=8,
        rate=1e-3,
        accumulate=accumulate,
        save_every=4,
        validate_every=4,
        log_every=1,
        device="cpu",
    )
    return train_world(store, out, options, predictor=stored.PREDICTOR, val_fraction=0.3)


def _train(rank: int, store: Path, out: Path, steps: int):
    return train(store, out, steps)._asdict()


def test_two_processes_under_torchrun_train_resume_and_validate(tmp_path):
    store = stored.write_store(tmp_path / "store")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests"), store=str(store), out=str(tmp_path / "whole")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    assert in_two_processes(tmp_path / "first", _train, store, tmp_path / "pieces", 4)["step"] == 4
    assert in_two_processes(tmp_path / "second", _train, store, tmp_path / "pieces", 8)["step"] == 8
    logs = [read_metrics(tmp_path / out / "metrics.csv") for out in ("whole", "pieces")]
    whole, pieces = ([[row[k] for k in ("step", "loss", "grad_norm")] for row in log] for log in logs)
    assert whole == pieces
    one, other = (checkpoint.read(tmp_path / out / "pytorch_model.bin").state_dict for out in ("whole", "pieces"))
    assert all(torch.equal(v, other[k]) for k, v in one.items())
    shared = read_metrics(tmp_path / "whole/validation.csv")
    assert [row["step"] for row in shared] == [4, 8]
    train(store, tmp_path / "alone", 4, accumulate=1)
    alone = read_metrics(tmp_path / "alone/validation.csv")[0]
    assert shared[0]["h1_copy_last"] == pytest.approx(alone["h1_copy_last"], rel=1e-6)  # the clips are divided, the mean is of all
    assert Run(tmp_path / "whole").load()[0]["step"] == 8
