"""best_of_n: values, order, bits, gradients, streaming, tracing, errors. On a GPU where there is one, else on the CPU."""

from __future__ import annotations

import math
import random

import pytest
import torch
from best_of_n_checks import check_values, identical
from compare import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import deltakern
from deltakern import backend, launch, ops
from deltakern.ops.best_of_n import LOSSES, runs_on

KERNEL = "cuda" if torch.cuda.is_available() else "cpp"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["reference", KERNEL]
HALVES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS = settings(deadline=None, max_examples=150, derandomize=True, database=None)
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.skipif(backend.extension().module is None, reason=f"no compiled extension: {backend.extension().error}")


def draw(shape, reduce_dims=1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    axis = len(shape) - reduce_dims - 1
    target = torch.randn((*shape[:axis], *shape[axis + 1 :]), generator=generator).to(DEVICE, dtype)
    return candidates, target


def rows(*values):
    """Candidates of one element with a target of 0, so that a candidate is its own l1 loss."""
    return torch.tensor(values, device=DEVICE)[:, None], torch.zeros(1, device=DEVICE)


# --- values and order --------------------------------------------------------------------------------------------------------


@SETTINGS
@given(data=st.data())
def test_random_problems_against_float64(data):
    leading = data.draw(st.lists(st.integers(0, 3), max_size=3))
    count = data.draw(st.integers(1, 20))
    reduced = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=2))
    if data.draw(st.integers(0, 9)) == 0:
        reduced[-1] += 4090
    dtype, target_dtype = data.draw(st.sampled_from(HALVES)), data.draw(st.sampled_from(HALVES))
    scale = data.draw(st.sampled_from([0.01, 1.0, 30.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    candidates = (torch.randn((*leading, count, *reduced), generator=generator) * scale).to(dtype)
    target = (torch.randn((*leading, *reduced), generator=generator) * scale).to(target_dtype)
    rest = (slice(None),) * len(reduced)
    if data.draw(st.booleans()) and count > 1:
        candidates[(..., -1, *rest)] = candidates[(..., 0, *rest)]
    for value in data.draw(st.lists(st.sampled_from([NAN, INF, -INF]), max_size=4)):
        if candidates.numel():
            candidates.view(-1)[data.draw(st.integers(0, candidates.numel() - 1))] = value
    if data.draw(st.integers(0, 5)) == 0:
        candidates[..., 0] = NAN
    kwargs = {"loss": data.draw(st.sampled_from(LOSSES)), "beta": data.draw(st.sampled_from([0.02, 0.1, 1.0])), "reduce_dims": len(reduced)}
    candidates, target = candidates.to(DEVICE), target.to(DEVICE)
    kept = candidates.clone(), target.clone()
    out = ops.best_of_n(candidates, target, return_losses=True, impl=KERNEL, **kwargs)
    check_values(out, candidates.cpu(), target.cpu(), **kwargs)
    assert torch.equal(candidates.nan_to_num(), kept[0].nan_to_num())
    assert torch.equal(target, kept[1])
    assert identical(out[:2], ops.best_of_n(candidates, target, impl=KERNEL, **kwargs)), "the losses change the answer"

    layout = data.draw(st.sampled_from(["shifted", "padded", "transposed", "spread", "permuted"]))
    if layout == "shifted":
        other = candidates.new_empty(candidates.numel() + 1)[1:].view(candidates.shape).copy_(candidates)
    elif layout == "padded":
        other = candidates.new_empty((*candidates.shape[:-1], candidates.shape[-1] + 3))[..., :-3].copy_(candidates)
    elif layout == "transposed":
        other = candidates.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "permuted":
        other = candidates.movedim(len(leading), 0).contiguous().movedim(0, len(leading))
    else:
        other = candidates.new_empty((*candidates.shape[:-1], 2 * candidates.shape[-1]))[..., ::2].copy_(candidates)
    assert identical(out, ops.best_of_n(other, target, return_losses=True, impl=KERNEL, **kwargs)), f"{layout} shows in the bits"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("losses", "index", "best"),
    [
        ([3.0, 1.0, 2.0], 1, 1.0),
        ([2.0, 1.0, 1.0], 1, 1.0),
        ([0.0, -0.0], 0, 0.0),
        ([NAN, 5.0], 1, 5.0),
        ([5.0, NAN], 0, 5.0),
        ([NAN, INF], 1, INF),
        ([INF, NAN, INF], 0, INF),
        ([INF, -3.0, NAN], 1, 3.0),
        ([INF, -INF], 0, INF),
        ([NAN, NAN, NAN], 0, NAN),
        ([NAN], 0, NAN),
        ([7.0], 0, 7.0),
    ],
)
def test_order(impl, losses, index, best):
    found = ops.best_of_n(*rows(*losses), loss="l1", impl=impl)
    assert found[0].item() == index
    assert found[1].item() == best or (math.isnan(best) and math.isnan(found[1].item()))
    assert (found[0].dtype, found[1].dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 5, 8)])
def test_empty_leading_dimensions(impl, shape):
    candidates, target = draw(shape)
    index, loss, losses = ops.best_of_n(candidates, target, return_losses=True, impl=impl)
    assert (index.shape, loss.shape, losses.shape) == (shape[:-2], shape[:-2], shape[:-1])


def test_float64_runs_in_the_reference():
    candidates, target = draw((2, 5, 8), dtype=torch.float64)
    assert ops.best_of_n(candidates, target, impl="reference")[1].dtype == torch.float64
    with pytest.raises(deltakern.BackendError, match="takes float32, bfloat16, float16, got float64"):
        ops.best_of_n(candidates, target, impl=KERNEL)


def test_a_negated_view():
    """``.imag`` of a conjugate is a float tensor whose sign is only marked."""
    candidates, target = draw((3, 4, 8))
    marked = torch.complex(candidates, -candidates).conj().imag
    assert marked.is_neg()
    assert identical(ops.best_of_n(marked, target), ops.best_of_n(candidates, target))


@pytest.mark.parametrize(("shape", "reduce_dims"), [((2, 7, 256, 768), 1), ((2, 20, 256, 768), 2)])
def test_the_models_shapes(shape, reduce_dims):
    candidates, target = draw(shape, reduce_dims, torch.bfloat16)
    out = ops.best_of_n(candidates, target, reduce_dims=reduce_dims, return_losses=True, impl=KERNEL)
    check_values(out, candidates.cpu(), target.cpu(), reduce_dims=reduce_dims)


# --- the same bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are the CPU kernel's")
@pytest.mark.parametrize("shape", [(56, 40, 768), (1, 300, 500), (2, 5, 9001)])
def test_any_number_of_threads(shape):
    candidates, target = draw(shape)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(ops.best_of_n(candidates, target, return_losses=True, impl="cpp"))
    finally:
        torch.set_num_threads(before)
    assert all(identical(results[0], r) for r in results[1:])


def test_reruns():
    candidates, target = draw((8, 64, 3000), dtype=torch.bfloat16)
    first = ops.best_of_n(candidates, target, return_losses=True, impl=KERNEL)
    assert all(identical(first, ops.best_of_n(candidates, target, return_losses=True, impl=KERNEL)) for _ in range(5))


def test_more_than_two_to_the_31_elements():
    """Three million candidates of one expanded row, the last one's neighbours included in every partial result."""
    candidates, target = draw((1, 1, 768), dtype=torch.bfloat16)
    count = 2**31 // 768 + 1000
    one = ops.best_of_n(candidates, target, impl=KERNEL)
    index, loss = ops.best_of_n(candidates.expand(1, count, 768), target, impl=KERNEL)
    assert index.item() == 0
    assert identical((loss,), (one[1],))


@pytest.mark.large
def test_offsets_beyond_two_to_the_31():
    """Three rows 2^30 + 64 elements apart; untouched memory is never committed, so this takes none."""
    step = 2**30 + 64
    storage = torch.empty(2 * step + 64, dtype=torch.bfloat16, device=DEVICE)
    spread = storage.as_strided((1, 3, 64), (0, step, 1))
    candidates, target = draw((1, 3, 64), dtype=torch.bfloat16)
    spread.copy_(candidates)
    expected = ops.best_of_n(candidates, target, return_losses=True, impl=KERNEL)
    assert identical(expected, ops.best_of_n(spread, target, return_losses=True, impl=KERNEL))
    across = storage.as_strided((3, 1, 64), (step, 0, 1)), target.expand(3, 64)
    assert identical((expected[2][0],), (ops.best_of_n(*across, impl=KERNEL)[1],))


# --- gradients ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduce_dims", [1, 2])
def test_gradients_against_float64(loss, dtype, reduce_dims):
    candidates, target = draw((3, 2, 9, 4, 25), reduce_dims, dtype)

    def gradients(dtype, impl):
        args = [t.detach().to(dtype).requires_grad_() for t in (candidates, target)]
        best = ops.best_of_n(*args, loss=loss, reduce_dims=reduce_dims, impl=impl)[1]
        weights = torch.linspace(-2, 2, best.numel(), device=DEVICE, dtype=best.dtype).view(best.shape)
        return torch.autograd.grad(best, args, weights)

    index = ops.best_of_n(candidates, target, loss=loss, reduce_dims=reduce_dims)[0]
    for name, ours, plain, truth in zip(
        ("candidates", "target"),
        gradients(dtype, KERNEL),
        gradients(dtype, "reference"),
        gradients(torch.float64, "reference"),
        strict=True,
    ):
        assert ours.dtype == dtype
        assert_as_accurate(ours, plain, truth, name=name)
        if name == "candidates":
            wins = torch.arange(ours.shape[index.ndim], device=DEVICE) == index[..., None]
            assert ours[~wins].count_nonzero() == 0
            assert ours[wins].count_nonzero() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_losers_do_not_reach_the_gradient(impl):
    candidates, target = draw((2, 4, 6))
    candidates[:, 1], candidates[:, 2, 0] = NAN, INF
    candidates.requires_grad_()
    index, loss = ops.best_of_n(candidates, target.requires_grad_(), impl=impl)
    for gradient in torch.autograd.grad(loss.sum(), (candidates, target)):
        assert gradient.isfinite().all()
    assert set(index.tolist()) <= {0, 3}


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
def test_nothing_of_the_candidates_size_is_kept(wanted):
    args = list(draw((4, 50, 32)))
    for i in wanted:
        args[i].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage().nbytes()) or t, lambda t: t):
        loss = ops.best_of_n(*args, impl=KERNEL)[1]
    assert 0 < sum(kept) <= 4 * 32 * 4 + 4 * 8
    assert all(g is not None for g in torch.autograd.grad(loss.sum(), [args[i] for i in wanted]))


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_of_the_reference(loss):
    generator = torch.Generator().manual_seed(5)
    candidates = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randn(2, 4, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda c, t: ops.best_of_n(c, t, loss=loss, impl="reference")[1], (candidates, target))


def test_what_has_no_gradient():
    candidates, target = draw((2, 4, 6))
    candidates.requires_grad_()
    for impl in IMPLS:
        index, loss, losses = ops.best_of_n(candidates, target, return_losses=True, impl=impl)
        assert (index.requires_grad, loss.requires_grad, losses.requires_grad) == (False, True, False)
    (gradient,) = torch.autograd.grad(ops.best_of_n(candidates, target, impl=KERNEL)[1].sum(), candidates, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative is not supported"):
        (gradient.square().sum() + candidates.sum()).backward()
    with pytest.raises(RuntimeError, match="has no gradient of its own"):
        torch.ops.deltakern.best_of_n(candidates, target, "mse", 0.1, 1, False)


# --- streaming ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_any_chunking_equals_one_shot(seed):
    picks = random.Random(seed)
    dtype = HALVES[seed % 3]
    candidates, target = draw((3, 2, 257, 40), dtype=dtype, seed=seed)
    candidates[0, 0, picks.randrange(257)] = NAN
    candidates[0, 1] = NAN
    candidates[1, 0, 200] = candidates[1, 0, 3]
    candidates[1, 1, :, 0] = INF
    expected = ops.best_of_n(candidates, target, impl=KERNEL)
    search, start = ops.BestOfN(impl=KERNEL), 0
    while start < 257:
        size = picks.choice([1, 2, 7, 64, 255])
        before = search.result()[0] if start else None
        improved = search.update(candidates[:, :, start : start + size], target)
        assert torch.equal(improved, search.result()[0] != before if start else torch.ones_like(improved))
        start += size
    assert identical(expected, search.result())

    search, starts = ops.BestOfN(impl=KERNEL), list(range(0, 257, 32))
    picks.shuffle(starts)
    for start in starts:
        search.update(candidates[:, :, start : start + 32], target, offset=start)
    assert identical(expected, search.result())


def test_streaming_is_differentiable():
    candidates, target = draw((3, 10, 8))
    candidates.requires_grad_()
    search = ops.BestOfN(loss="mse")
    for chunk in candidates.split(3, 1):
        search.update(chunk, target)
    (ours,) = torch.autograd.grad(search.result()[1].sum(), candidates)
    (whole,) = torch.autograd.grad(ops.best_of_n(candidates, target, loss="mse")[1].sum(), candidates)
    assert torch.equal(ours, whole)


def test_streaming_errors():
    search = ops.BestOfN()
    with pytest.raises(RuntimeError, match="call update first"):
        search.result()
    search.update(*draw((3, 10, 8)))
    with pytest.raises(ValueError, match=r"chunk must have leading dimensions \(3,\), got \(2,\)"):
        search.update(*draw((2, 10, 8)))


# --- tracing -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "reduce_dims", "return_losses"), [((2, 5, 8), 1, True), ((0, 5, 8), 1, False), ((5, 3, 4), 2, False)])
def test_opcheck(shape, reduce_dims, return_losses):
    args = draw(shape, reduce_dims, torch.bfloat16)
    torch.library.opcheck(torch.ops.deltakern.best_of_n.default, (*args, "smooth_l1", 0.1, reduce_dims, return_losses))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph_forward_and_backward(dynamic):
    def function(candidates, target):
        index, loss, losses = ops.best_of_n(candidates, target, return_losses=True, impl=KERNEL)
        return index, (loss * 2).sum(), losses

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count in (5, 9):
        results = []
        for run in (function, compiled):
            args = [t.requires_grad_() for t in draw((3, count, 8))]
            index, loss, losses = run(*args)
            results.append((index, loss.detach(), losses, *torch.autograd.grad(loss, args)))
        assert identical(*results)


def test_fake_tensors():
    with FakeTensorMode():
        candidates, target = torch.empty(2, 3, 5, 8, device=DEVICE), torch.empty(2, 3, 8, device=DEVICE)
        index, loss, losses = ops.best_of_n(candidates, target, return_losses=True, impl=KERNEL)
    assert (index.shape, loss.shape, losses.shape) == ((2, 3), (2, 3), (2, 3, 5))


# --- choice and errors -------------------------------------------------------------------------------------------------------


def test_the_kernel_is_chosen():
    candidates, target = draw((2, 3, 4))
    assert deltakern.explain(ops.best_of_n, candidates, target).chosen == KERNEL
    other = "cpp" if KERNEL == "cuda" else "cuda"
    with pytest.raises(deltakern.BackendError, match=f"impl='{other}' cannot run: the kernel runs on"):
        ops.best_of_n(candidates, target, impl=other)


def test_without_the_extension_the_reference_runs_and_says_so(monkeypatch):
    monkeypatch.setattr(backend, "extension", lambda: backend.Loaded(None, "ImportError: none was built"))
    monkeypatch.setattr(backend, "_warned", set())
    launch.forget_plans()
    try:
        candidates, target = draw((2, 3, 4))
        with pytest.warns(backend.BackendWarning, match="ImportError: none was built"):
            found = ops.best_of_n(candidates, target)
        assert identical(found, ops.best_of_n.reference(candidates, target))
        with pytest.raises(deltakern.BackendError, match="ImportError: none was built"):
            ops.best_of_n(candidates, target, impl=KERNEL)
    finally:
        launch.forget_plans()


def test_many_dimensions_go_to_the_reference():
    candidates, target = draw((1,) * 7 + (3, 4))
    assert "at most 4 reduced and 6 leading" in deltakern.explain(ops.best_of_n, candidates, target).refused[KERNEL]
    candidates, target = draw((3, 2, 2, 2, 2, 2), 5)
    assert "at most 4 reduced and 6 leading" in deltakern.explain(ops.best_of_n, candidates, target, reduce_dims=5).refused[KERNEL]


@pytest.mark.skipif(not torch.cuda.is_available() and not hasattr(backend.extension().module, "cuda_problem"), reason="built without CUDA")
def test_a_cuda_that_cannot_be_used_is_a_reason():
    """Without a driver the extension's own runtime says what is wrong, and explain passes it on."""
    facts = backend.Facts("cuda", (torch.float32, torch.float32))
    refused = ops.best_of_n.op.kernels["cuda"](facts)
    assert refused is None if KERNEL == "cuda" else "was built with CUDA" in refused


@pytest.mark.parametrize(
    ("capability", "architectures", "fits"),
    [
        ((8, 0), ["80"], True),
        ((8, 9), ["80"], True),
        ((8, 0), ["86"], False),
        ((9, 0), ["80"], False),
        ((9, 0), ["90a"], True),
        ((10, 0), ["90a"], False),
        ((10, 3), ["100f"], True),
        ((12, 1), ["100", "120"], True),
        ((13, 0), ["120"], False),
        ((13, 0), ["120", "120+PTX"], True),
        ((7, 5), ["80", "80+PTX"], False),
    ],
)
def test_which_devices_compiled_code_runs_on(capability, architectures, fits):
    assert runs_on(architectures, capability) is fits


def test_errors_name_the_argument():
    candidates, target = draw((2, 3, 4))

    def raises(error, match, *args, **kwargs):
        with pytest.raises(error, match=match):
            ops.best_of_n(*args, **kwargs)

    raises(ValueError, r"target must be .* = \(2, 4\), got a tensor of shape \(2, 5\)", candidates, torch.zeros(2, 5, device=DEVICE))
    raises(ValueError, r"target must be", candidates, torch.zeros(2, 1, 4, device=DEVICE))
    raises(ValueError, r"at least one candidate in dimension 1", torch.zeros(2, 0, 4, device=DEVICE), target)
    raises(ValueError, r"must not be empty", torch.zeros(2, 3, 0, device=DEVICE), torch.zeros(2, 0, device=DEVICE))
    raises(ValueError, r"reduce_dims must be from 1", candidates, target, reduce_dims=3)
    raises(ValueError, r"reduce_dims must be from 1", candidates, target, reduce_dims=0)
    raises(ValueError, r"beta must be from 1e-6 to 1e6, got 0", candidates, target, beta=0)
    raises(ValueError, r"beta must be from 1e-6 to 1e6, got nan", candidates, target, beta=NAN)
    raises(ValueError, r"loss must be one of .* got 'huber'", candidates, target, loss="huber")
    raises(TypeError, r"candidates must be float32, .* got torch.int64", candidates.long(), target)
    raises(ValueError, r"target is on meta but candidates is on", candidates, target.to("meta"))
