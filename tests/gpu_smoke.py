"""The first thing to run on a GPU: whether everything there computes what it should. In one process, in under 90 seconds.

Every op forward and backward against float64 and again with the same bits, golden vectors of the released code, a captured graph. On a CPU
the same in Triton's interpreter, at small sizes: ``test_benchmarks.py`` runs it so.
"""

from __future__ import annotations

import golden
import graph_tape
import pytest
import small
import torch
from kernel_checks import forward_backward, random_cotangents, same
from test_golden import make_tokenizer, make_world, over_rms

import deltakern
from deltakern import backend, ops
from deltakern.cases import Case, cases
from deltakern.models import Savings
from deltakern.report import accuracy, collect

HAS_CUDA = torch.cuda.is_available()
KERNELS = ("triton", "cuda") if HAS_CUDA else ("triton", "cpp")
AGAIN = 20
LIMIT = 1e-4 if HAS_CUDA else 1e-5  # of the golden tensors' root mean square; a GPU adds up in another order


@pytest.fixture(autouse=True, scope="module")
def exact():
    """No TF32, which convolutions take by default."""
    kept, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = kept


def _chosen() -> list:
    """On a GPU of a model's widths, with rows enough to fill it: what runs at the same time shows there alone."""
    found = []
    for name, op in backend.ops().items():
        tiny, real = cases(name, "tiny")[0], cases(name, "benchmark")[0]
        chosen = [tiny] if not HAS_CUDA else [real] if real.differentiable else [real, tiny]
        found += [pytest.param(c, impl, id=f"{name}-{c.name}-{impl}") for c in chosen for impl in op.kernels if impl in KERNELS]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("case", "impl"), _chosen())
def test_op(case: Case, impl: str, dtype: torch.dtype, device: torch.device) -> None:
    scale = collect.scale_for(case, dtype, 1 << 24)
    verdict = accuracy.check(case, impl, dtype, device, scale=scale)
    assert verdict.ok, verdict.problem
    args, kwargs = case.make(dtype, device, torch.Generator().manual_seed(0), scale)
    cotangents: dict[int, torch.Tensor] = {}

    def cotangent(output: torch.Tensor, index: int) -> torch.Tensor:
        if index not in cotangents:
            cotangents[index] = random_cotangents()(output, index)
        return cotangents[index]

    first = forward_backward(case.function, args, {**kwargs, "impl": impl}, case.differentiable, cotangent)
    for _ in range(AGAIN if HAS_CUDA else 1):
        again = forward_backward(case.function, args, {**kwargs, "impl": impl}, case.differentiable, cotangent)
        for ours, theirs in zip(again, first, strict=True):
            assert same(ours, theirs)


def assert_golden(value: torch.Tensor, truth: torch.Tensor) -> None:
    assert over_rms(value.cpu().double(), truth.double()) <= LIMIT


@pytest.mark.parametrize("variant", golden.VARIANTS if HAS_CUDA else golden.VARIANTS[-1:])  # test_golden.py has both
def test_golden_encode(variant: str, device: torch.device) -> None:
    """And decode, and the loss."""
    tensors = golden.load("deltatok_default", variant)
    tokenizer = make_tokenizer("deltatok_default", variant, Savings()).to(device)
    x, y = (tensors[name].to(device) for name in "xy")
    rows, columns = golden.meta("deltatok_default")["patch_grid"]
    rope = tokenizer._rope(torch.zeros(1, 1, 3, 16 * rows, 16 * columns, device=device))
    with torch.no_grad(), deltakern.use_impl("triton"):
        z = tokenizer.encode(x, y, rope)
        y_hat = tokenizer.decode(z, x, rope)
        assert_golden(z, tensors["z"])
        assert_golden(y_hat, tensors["y_hat"])
        assert_golden(ops.recon_loss(y_hat, y, kind="log_cosh"), tensors["loss"])


def test_golden_rollout(device: torch.device) -> None:
    tensors, known = golden.load("deltaworld", "pre_rope"), golden.meta("deltaworld_rollout")
    world = make_world("pre_rope", Savings()).to(device)
    total = known["ctx_len"] + known["horizon"]
    queries = torch.cat([tensors[f"rollout.query{t}"] for t in range(known["horizon"])], 2).to(device)
    seen = (tensors[name][:, :total].to(device) for name in ("frames", "timestamps"))
    with torch.no_grad():
        predictions, targets, _ = world(*seen, ctx_len=known["ctx_len"], queries=queries)
    assert_golden(predictions, tensors["rollout.preds"])
    assert_golden(targets, tensors["rollout.targets"])


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_a_captured_graph(frozen: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sampled through a graph is what launches one by one give, at every replay."""
    if not HAS_CUDA:
        graph_tape.install(monkeypatch)
    world = small.world().eval().to(device)
    if frozen:
        deltakern.freeze(world)
    z, times = torch.randn(1, 2, 64, device=device), torch.arange(4.0, device=device)[None]
    plain = world.sample(z, times, 2, 5, seed=1, cuda_graph=False)
    for _ in range(3):
        assert torch.equal(world.sample(z, times, 2, 5, seed=1), plain)
    assert not torch.equal(world.sample(z, times, 2, 5, seed=2), plain)
