"""``best_of_n_head`` beyond the registry's cases: order, NaN, bits, losses, refusals. The rest is in ``test_triton_kernels.py``."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from best_of_n_checks import identical, ordered_argmin
from compare import assert_as_accurate, to_double
from kernel_checks import far_apart, poisoned, sliced, transposed

import deltakern
from deltakern import backend, launch, ops
from deltakern.ops import _triton
from deltakern.ops.best_of_n import LOSSES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE = "cuda" if torch.cuda.is_available() else "cpp"
NAN, INF = float("nan"), float("inf")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_impl = pytest.mark.parametrize(
    "impl",
    [
        "reference",
        "triton",
        pytest.param(NATIVE, marks=pytest.mark.skipif(backend.extension().module is None, reason="no compiled extension")),
    ],
)


def arguments(
    device, *, leading=(2,), count=9, patches=(), width=24, outputs=20, dtype=torch.float32, stream=None, target=None, spread=1.0, seed=0
):
    """(stream, branch, scale, weight, bias, head, head_bias, target); ``spread`` is the candidates' around one another."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(device, dtype)

    middle = normal(*leading, 1, *patches, width)
    x = (middle + spread * normal(*leading, count, *patches, width)).to(stream or dtype)
    y = spread * normal(*leading, count, *patches, width)
    return [
        x,
        y.to(dtype),
        0.5 * normal(width),
        1 + 0.1 * normal(width),
        0.1 * normal(width),
        (normal(outputs, width) / math.sqrt(width)).to(dtype),
        0.1 * normal(outputs),
        normal(*leading, *patches, outputs, dtype=target or dtype),
    ]


def coarse(args):
    """``args`` in bfloat16 with a head of halves and ones, so that a prediction is exact in whatever order it is added up: the library
    behind the interpreter's products, and torch's own, round a row by its place among the others."""
    args[0], args[1], args[6] = args[0].bfloat16(), args[1].bfloat16(), None
    args[5] = (args[5].sign() * torch.where(args[5].abs() < 0.1, 0.5, 1.0)).bfloat16()
    return args


def assert_accurate(args, **options) -> None:
    """The losses against float64, index and loss against the losses."""
    options["return_losses"] = True
    truth = ops.best_of_n_head.reference(*to_double(args), **options)
    plain = ops.best_of_n_head.reference(*args, **options)
    with poisoned():
        index, loss, losses = ops.best_of_n_head(*args, **options, impl="triton")
    assert_as_accurate(losses, plain[2], truth[2], name="losses")
    assert torch.equal(index, ordered_argmin(losses).to(index.device))
    assert identical((loss,), (losses.gather(-1, index[..., None])[..., 0],))


# --- values ------------------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_accurate(arguments(device, dtype=dtype, target=torch.float32), loss=loss)


@pytest.mark.parametrize("beta", [0.02, 1.0, 30.0])
def test_beta(beta: float, device: torch.device) -> None:
    assert_accurate(arguments(device, leading=(), patches=(3,)), beta=beta, reduce_dims=2)


@pytest.mark.parametrize(("width", "outputs"), [(1, 1), (31, 255), (64, 256), (65, 257), (129, 300)])
def test_sizes_about_a_tile(width: int, outputs: int, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_accurate(arguments(device, width=width, outputs=outputs, dtype=dtype), eps=1e-3)


@pytest.mark.parametrize("count", [127, 128, 129])
def test_counts_about_a_tile(count: int, device: torch.device) -> None:
    assert_accurate(arguments(device, count=count, dtype=torch.bfloat16))


def test_the_predictors_width(device: torch.device) -> None:
    args = arguments(device, leading=(1,), count=40, width=768, outputs=768, dtype=torch.bfloat16, stream=torch.float32)
    assert_accurate(args)


def test_a_large_mean_costs_no_digits(device: torch.device) -> None:
    args = arguments(device)
    args[0] = args[0] + 1000.0
    assert_accurate(args)


@every_impl
def test_tensors_that_may_be_none(impl: str, device: torch.device) -> None:
    """Without them the op does what zeros or ones would."""
    full = arguments(device)
    for names in ((1, 2), (2,), (4,), (6,), (1, 2, 4, 6)):
        without, neutral = list(full), list(full)
        for i in names:
            without[i] = None
            neutral[i] = torch.ones_like(full[i]) if i == 2 else torch.zeros_like(full[i])
        ours = ops.best_of_n_head(*without, return_losses=True, impl=impl)
        theirs = ops.best_of_n_head(*neutral, return_losses=True, impl=impl)
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[2], theirs[2], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(backend.extension().module is None, reason="no compiled extension")
@every_dtype
def test_the_unfused_path_is_the_ops_it_is_made_of(dtype: torch.dtype, device: torch.device) -> None:
    """Bit for bit: a norm, the library's product, the compiled reduction."""
    stream, branch, scale, weight, bias, head, head_bias, target = args = arguments(device, dtype=dtype, stream=torch.float32)
    normed = ops.residual_norm(stream, branch, scale, weight, bias, out_dtype=dtype)[1]
    expected = ops.best_of_n(F.linear(normed, head, head_bias.to(dtype)), target, return_losses=True, impl=NATIVE)
    assert identical(expected, ops.best_of_n_head(*args, return_losses=True, impl=NATIVE))


@every_impl
def test_more_leading_dimensions_than_the_reduction_takes(impl: str, device: torch.device) -> None:
    many = arguments(device, leading=(2, 1, 1, 3, 1, 1, 2), count=3, patches=(2, 1, 2, 1, 2))
    few = [many[0].reshape(12, 3, 8, 24), many[1].reshape(12, 3, 8, 24), *many[2:7], many[7].reshape(12, 8, 20)]
    index, loss, losses = ops.best_of_n_head(*many, reduce_dims=6, return_losses=True, impl=impl)
    assert (index.shape, loss.shape, losses.shape) == ((2, 1, 1, 3, 1, 1, 2), (2, 1, 1, 3, 1, 1, 2), (2, 1, 1, 3, 1, 1, 2, 3))
    flat = ops.best_of_n_head(*few, reduce_dims=2, return_losses=True, impl=impl)
    assert torch.equal(index.flatten(), flat[0])
    torch.testing.assert_close(losses.flatten(0, -2), flat[2], rtol=1e-5, atol=1e-7)


@every_impl
def test_autocast_changes_nothing(impl: str, device: torch.device) -> None:
    args = arguments(device)
    plain = ops.best_of_n_head(*args, return_losses=True, impl=impl)
    with torch.autocast(device.type, torch.bfloat16):
        assert identical(plain, ops.best_of_n_head(*args, return_losses=True, impl=impl))


# --- order -------------------------------------------------------------------------------------------------------------------


@every_impl
def test_ties_go_to_the_lowest_index(impl: str, device: torch.device) -> None:
    """Equal candidates in other tiles, and in another portion of what the second kernel takes at a time."""
    args = coarse(arguments(device, leading=(3,), count=1300, width=8, outputs=4))
    best = ops.best_of_n_head(*args, impl=impl)[0]
    for group, places in enumerate(((1, 2), (5, 700), (900, 1299))):
        for tensor in args[:2]:
            winner = tensor[group, best[group]].clone()
            tensor[group, best[group]] = tensor[group, (best[group] + 1) % 1300]
            for place in places:
                tensor[group, place] = winner
    index, loss, losses = ops.best_of_n_head(*args, return_losses=True, impl=impl)
    assert index.tolist() == [1, 5, 900]
    assert identical((loss, losses[0, 1], losses[1, 5]), (losses.amin(-1), losses[0, 2], losses[1, 700]))


@every_impl
def test_nan_and_infinity(impl: str, device: torch.device) -> None:
    """A NaN never wins, but over nothing; infinity is a loss like any other."""
    args = arguments(device, leading=(6,), count=4)
    stream, target = args[0], args[7]
    expected = ops.best_of_n_head(*args, return_losses=True, impl=impl)
    stream[1, expected[0][1], 3] = NAN
    stream[2] = NAN
    stream[3, 0, 0] = INF  # of which a norm makes NaN
    target[3, 5] = INF
    target[4, 0] = -INF
    target[5, 2] = NAN
    index, loss, losses = ops.best_of_n_head(*args, return_losses=True, impl=impl)
    assert index[0] == expected[0][0]
    assert losses[1].isnan().sum() == 1
    assert index[1] != expected[0][1]
    assert loss[1] == expected[2][1].sort().values[1]
    assert (index[2].item(), index[3].item(), index[4].item(), index[5].item()) == (0, 1, 0, 0)
    assert loss[[2, 5]].isnan().all()
    assert torch.equal(loss[3:5], torch.full_like(loss[3:5], INF))


@every_impl
def test_empty_leading_dimensions(impl: str, device: torch.device) -> None:
    for leading in ((0,), (2, 0)):
        index, loss, losses = ops.best_of_n_head(*arguments(device, leading=leading), return_losses=True, impl=impl)
        assert (index.shape, loss.shape, losses.shape) == (leading, leading, (*leading, 9))


# --- bits --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lay", [sliced, transposed, pytest.param(far_apart, marks=pytest.mark.large)], ids=lambda f: f.__name__)
@pytest.mark.parametrize("patches", [(), (3,)], ids=["rows", "patches"])
def test_the_layout_does_not_show(lay, patches, device: torch.device) -> None:
    args = arguments(device, leading=(2, 2), patches=patches, dtype=torch.bfloat16)
    options = {"reduce_dims": 1 + len(patches), "return_losses": True, "impl": "triton"}
    expected = ops.best_of_n_head(*args, **options)
    assert identical(expected, ops.best_of_n_head(*map(lay, args), **options))


def test_expanded_strides(device: torch.device) -> None:
    args = arguments(device, leading=(3,), dtype=torch.bfloat16)
    args[0], args[1], args[7] = args[0][:, :1].expand(-1, 9, -1), args[1][:1].expand(3, -1, -1), args[7][:1].expand(3, -1)
    dense = [a.contiguous() for a in args]
    options = {"return_losses": True, "impl": "triton"}
    assert identical(ops.best_of_n_head(*args, **options), ops.best_of_n_head(*dense, **options))


def assert_chunking_does_not_show(args) -> None:
    args[0][0, 0, 7] = NAN
    args[0][0, 1] = NAN
    for tensor in args[:2]:
        tensor[1, 0, 200] = tensor[1, 0, 3]
    index, loss, losses = ops.best_of_n_head(*args, return_losses=True, impl="triton")
    for sizes in ([300], [1, 2, 128, 169], [150, 150], [255, 45]):
        search, start, parts = ops.BestOfN(), 0, []
        for size in sizes:
            chunk = [t[:, :, start : start + size] for t in args[:2]]
            found = ops.best_of_n_head(*chunk, *args[2:], return_losses=True, impl="triton")
            before = search.result()[0] if start else None
            improved = search.merge(*found[:2], size)
            assert torch.equal(improved, search.result()[0] != before if start else torch.ones_like(improved))
            parts.append(found[2])
            start += size
        assert torch.equal(index, search.result()[0])
        for ours, whole in ((search.result()[1], loss), (torch.cat(parts, -1), losses)):
            assert torch.equal(ours.nan_to_num(-1.0), whole.nan_to_num(-1.0))


def test_any_chunking_equals_one_shot(device: torch.device) -> None:
    assert_chunking_does_not_show(coarse(arguments(device, leading=(2, 2), count=300)))


@pytest.mark.gpu
@every_dtype
def test_any_chunking_equals_one_shot_where_order_matters(dtype: torch.dtype, device: torch.device) -> None:
    """Tensor cores add a row up in one order, wherever it lies in a tile."""
    assert_chunking_does_not_show(arguments(device, leading=(2, 2), count=300, width=768, outputs=768, dtype=dtype))


def test_chunks_in_any_order(device: torch.device) -> None:
    args = coarse(arguments(device, count=30))
    search = ops.BestOfN()
    for start in (20, 0, 10):
        chunk = [t[:, start : start + 10] for t in args[:2]]
        search.merge(*ops.best_of_n_head(*chunk, *args[2:], impl="triton"), 10, offset=start)
    assert identical(search.result(), ops.best_of_n_head(*args, impl="triton"))


# --- what it starts and what it stores -----------------------------------------------------------------------------------------


def test_two_launches(device: torch.device) -> None:
    for reduce_dims, patches in ((1, ()), (2, (3,))):
        with _triton.count_launches() as counted:
            ops.best_of_n_head(*arguments(device, patches=patches), reduce_dims=reduce_dims, impl="triton")
        assert counted == {"best_of_n_head_kernel": 1, "best_of_n_head_pick_kernel": 1}


def test_stores_no_predictions(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the launcher allocates is a float32 a row and a scratch that is the same for twice the candidates."""
    made = []
    empty = torch.empty

    def noted(*shape, **kwargs):
        made.append(empty(*shape, **kwargs))
        return made[-1]

    taken = []
    for count in (512, 1024):
        args = arguments(device, count=count, width=64, outputs=64)
        made.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", noted)
            ops.best_of_n_head(*args, impl="triton")
        assert made
        taken.append(sum(t.nbytes for t in made) - 4 * args[0].shape[:2].numel())
    if device.type == "cpu":
        assert taken[0] == taken[1]
    assert taken[1] < 0.5 * 4 * 2 * 1024 * 64 or device.type == "cuda"


# --- gradient, choice, errors ------------------------------------------------------------------------------------------------


@every_impl
def test_a_recorded_call_raises(impl: str, device: torch.device) -> None:
    for i in range(8):
        args = arguments(device)
        args[i].requires_grad_()
        with pytest.raises(RuntimeError, match=r"best_of_n_head: has no gradient; call it under torch.no_grad\(\)"):
            ops.best_of_n_head(*args, impl=impl)
        with torch.no_grad():
            assert not ops.best_of_n_head(*args, impl=impl)[1].requires_grad


@pytest.mark.skipif(backend.extension().module is None, reason="no compiled extension")
@every_dtype
def test_the_choice(dtype: torch.dtype, device: torch.device) -> None:
    """The kernel on a GPU, whatever the mixture of dtypes; on a CPU the compiled reduction."""
    args = arguments(device, dtype=dtype, stream=torch.float32, target=torch.float32)
    facts = ops.best_of_n_head.op.facts(*args)
    assert backend._decide(ops.best_of_n_head.op, "auto", facts._replace(device="cuda")).chosen == "triton"
    assert backend._decide(ops.best_of_n_head.op, "auto", facts._replace(device="cpu")).chosen == "cpp"
    assert deltakern.explain(ops.best_of_n_head, *args).chosen == ("triton" if device.type == "cuda" else "cpp")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has a kernel without the extension")
def test_without_the_extension_the_reference_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(torch.device("cpu"))
    monkeypatch.setattr(backend, "extension", lambda: backend.Loaded(None, "ImportError: none was built"))
    monkeypatch.setattr(backend, "_warned", set())
    launch.forget_plans()
    try:
        with pytest.warns(backend.BackendWarning, match="best_of_n_head: the PyTorch reference runs.*none was built"):
            found = ops.best_of_n_head(*args)
        assert identical(found, ops.best_of_n_head.reference(*args))
        monkeypatch.setenv("DELTAKERN_STRICT", "1")
        with pytest.raises(deltakern.BackendError, match=r"best_of_n_head: DELTAKERN_STRICT=1.*none was built"):
            ops.best_of_n_head(*args)
    finally:
        launch.forget_plans()


@pytest.mark.skipif(backend.extension().module is None, reason="no compiled extension")
def test_the_unfused_path_compiles_in_one_graph(device: torch.device) -> None:
    args = arguments(device)

    def call(*given):
        return ops.best_of_n_head(*given, return_losses=True, impl=NATIVE)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert identical(compiled(*args), call(*args))


def test_errors_name_the_argument(device: torch.device) -> None:
    names = ("stream", "branch", "scale", "weight", "bias", "head", "head_bias", "target")
    plain = dict(zip(names, arguments(device), strict=True))

    def raises(error, match, **changed):
        options = {k: v for k, v in changed.items() if k not in names}
        with pytest.raises(error, match=match):
            ops.best_of_n_head(*{**plain, **{k: v for k, v in changed.items() if k in names}}.values(), **options)

    def zeros(*shape):
        return torch.zeros(shape, device=device)

    raises(ValueError, r"branch must be stream's shape .* got a tensor of shape \(2, 9, 23\)", branch=zeros(2, 9, 23))
    raises(ValueError, r"scale without branch; branch must be .* \(2, 9, 24\), got None", branch=None)
    raises(ValueError, r"scale must be \(D,\) = \(24,\)", scale=zeros(23))
    raises(ValueError, r"weight must be \(D,\) = \(24,\)", weight=zeros(1))
    raises(ValueError, r"bias must be \(D,\) = \(24,\)", bias=zeros(24, 1))
    raises(ValueError, r"head must be \(E,D\), got", head=zeros(24))
    raises(ValueError, r"head must be \(E,D\) = \(20, 24\)", head=zeros(20, 25))
    raises(ValueError, r"head_bias must be \(E,\) = \(20,\)", head_bias=zeros(24))
    raises(ValueError, r"target must be \(...,R...,E\) = \(2, 20\), got a tensor of shape \(2, 24\)", target=zeros(2, 24))
    raises(ValueError, r"target must be \(...,R...,E\) = \(9, 20\)", reduce_dims=2)
    raises(ValueError, r"reduce_dims must be from 1", reduce_dims=0)
    raises(ValueError, r"reduce_dims must be from 1", reduce_dims=3)
    raises(ValueError, r"at least one candidate in dimension 1", stream=zeros(2, 0, 24), branch=zeros(2, 0, 24))
    raises(ValueError, r"must not be empty", head=zeros(0, 24), head_bias=None, target=zeros(2, 0))
    raises(ValueError, r"loss must be one of .* got 'huber'", loss="huber")
    raises(ValueError, r"beta must be from 1e-6 to 1e6, got 0", beta=0)
    raises(TypeError, r"target must be float32, .* got torch.int64", target=zeros(2, 20).long())
    raises(ValueError, r"target is on meta but stream is on", target=zeros(2, 20).to("meta"))
