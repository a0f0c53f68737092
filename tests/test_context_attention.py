"""``context_attention``'s kernels beyond the registry's cases: gradients of each query's own keys, times, limits, refusals."""

from __future__ import annotations

import pytest
import torch
from compare import assert_as_accurate, to_double
from kernel_checks import far_apart, forward_backward, poisoned, random_cotangents, sliced, transposed

from deltakern import backend, ops
from deltakern.ops import _triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(params=["triton", "cpp"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp" and backend.extension().module is None:
        pytest.skip(f"no compiled extension: {backend.extension().error}")
    return request.param


@pytest.fixture
def place(impl: str, device: torch.device) -> torch.device:
    return CPU if impl == "cpp" else device


def positional(function, **options):
    """``function`` of nine positional arguments, so that the own keys and values can take a gradient like any other."""

    def call(q, k, v, q_time, k_time, visible, own_k, own_v, own_time):
        return function(q, k, v, q_time, k_time, visible, own_k=own_k, own_v=own_v, own_time=own_time, **options)

    return call


def arguments(dtype, device, *, batch=2, groups=2, each=3, tokens=4, own=2, heads=2, head=10, causal=True, turned=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    times = torch.rand((batch, groups + tokens + own), generator=generator).mul(3).to(device)
    return [
        normal(batch, groups * each, heads, head),
        normal(batch, tokens, heads, head),
        normal(batch, tokens, heads, head),
        times[:, :groups],
        None if turned else times[:, groups : groups + tokens],
        torch.arange(1, groups + 1, device=device, dtype=torch.int32) if causal else None,
        normal(batch, groups * each, own, heads, head),
        normal(batch, groups * each, own, heads, head),
        None if turned else times[:, groups + tokens :],
    ]


def assert_accurate(args, impl, *, rope_size=6, wanted=(0, 1, 2, 6, 7), lay=lambda t: t, **options):
    options["rope_size"] = rope_size
    reference = positional(ops.context_attention.reference, **options)
    truth = forward_backward(reference, to_double(args), {}, wanted, random_cotangents())
    plain = forward_backward(reference, args, {}, wanted, random_cotangents())
    laid = [lay(a) if isinstance(a, torch.Tensor) else a for a in args]
    with poisoned():
        kernel = forward_backward(positional(ops.context_attention, impl=impl, **options), laid, {}, wanted, random_cotangents())
    for ours, theirs, exactly in zip(kernel, plain, truth, strict=True):
        for i, (k, p, t) in enumerate(zip(ours, theirs, exactly, strict=True)):
            assert_as_accurate(k, p, t, name=str(i))


@every_dtype
@pytest.mark.parametrize("turned", [False, True])
def test_own_keys_have_gradients(dtype: torch.dtype, turned: bool, impl: str, place: torch.device) -> None:
    assert_accurate(arguments(dtype, place, turned=turned), impl)


@pytest.mark.parametrize("lay", [sliced, transposed, pytest.param(far_apart, marks=pytest.mark.large)], ids=lambda f: f.__name__)
def test_own_keys_strided(lay, impl: str, place: torch.device) -> None:
    assert_accurate(arguments(torch.bfloat16, place), impl, lay=lay)


@pytest.mark.parametrize("wanted", [(6,), (7,), (0, 6)])
def test_own_gradients_alone(wanted, impl: str, place: torch.device) -> None:
    assert_accurate(arguments(torch.float32, place), impl, wanted=wanted)


@pytest.mark.parametrize("rope_size", [2, 8, 10])
def test_rope_sizes(rope_size: int, impl: str, place: torch.device) -> None:
    assert_accurate(arguments(torch.float32, place), impl, rope_size=rope_size)


def test_scale(impl: str, place: torch.device) -> None:
    assert_accurate(arguments(torch.float32, place), impl, scale=1.0)


def test_one_dominant_key(impl: str, place: torch.device) -> None:
    """Nearly all of the softmax on one key: its gradient is what cancellation leaves."""
    args = arguments(torch.float32, place, causal=False)
    args[0] = args[0] * 30
    assert_accurate(args, impl)


def test_as_many_tokens_as_fit(impl: str, place: torch.device) -> None:
    assert_accurate(arguments(torch.bfloat16, place, tokens=32, heads=1, causal=False), impl)


def test_own_keys_equal_shared_ones(impl: str, place: torch.device) -> None:
    """Keys that every query brings itself give what the same keys in the context give."""
    args = arguments(torch.float32, place, own=2, causal=False)
    q, k, v, q_time, k_time, _, own_k, own_v, own_time = args
    own_k, own_v = own_k[:, :1].expand_as(own_k), own_v[:, :1].expand_as(own_v)
    own = ops.context_attention(q, k, v, q_time, k_time, own_k=own_k, own_v=own_v, own_time=own_time, rope_size=6, impl=impl)
    all_k, all_v = torch.cat((k, own_k[:, 0]), 1), torch.cat((v, own_v[:, 0]), 1)
    shared = ops.context_attention(q, all_k, all_v, q_time, torch.cat((k_time, own_time), 1), rope_size=6, impl=impl)
    torch.testing.assert_close(own, shared, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [0.0, 86_400.0, 1.7e9])
def test_times_far_from_zero(start: float, impl: str, place: torch.device) -> None:
    """Only differences of times matter, and float64 times keep them: at 1.7e9 seconds the angles are past 10^12 radians."""
    args = arguments(torch.float32, place, head=64)
    near = list(args)
    for i in (3, 4, 8):
        args[i] = args[i].double() + start
        near[i] = args[i] - start  # exact: what was lost was lost in the addition
    truth = positional(ops.context_attention.reference)(*to_double(near))
    plain = positional(ops.context_attention.reference)(*near)
    assert_as_accurate(positional(ops.context_attention, impl=impl)(*args), plain, truth)


def test_a_later_token_is_not_seen(impl: str, place: torch.device) -> None:
    args = arguments(torch.float32, place, groups=3)
    first = positional(ops.context_attention, rope_size=6, impl=impl)(*args)
    args[1], args[2] = args[1].clone(), args[2].clone()
    args[1][:, 2:], args[2][:, 2:] = 1e4, 1e4
    second = positional(ops.context_attention, rope_size=6, impl=impl)(*args)
    assert torch.equal(first[:, :6], second[:, :6])
    assert not torch.equal(first[:, 6:], second[:, 6:])


def test_refusals_name_the_reason(device: torch.device) -> None:
    many = arguments(torch.float32, device, tokens=33, causal=False)
    with pytest.raises(backend.BackendError, match="at most 32 context tokens"):
        positional(ops.context_attention, rope_size=6, impl="triton")(*many)
    mixed = arguments(torch.float32, device)
    mixed[1] = mixed[1].bfloat16()
    with pytest.raises(backend.BackendError, match="q, k and v of one dtype"):
        positional(ops.context_attention, rope_size=6, impl="triton")(*mixed)


def test_one_launch_forward_two_backward(device: torch.device) -> None:
    args = arguments(torch.float32, device)
    function = positional(ops.context_attention, rope_size=6, impl="triton")
    with torch.no_grad(), _triton.count_launches() as forward:
        function(*args)
    assert dict(forward) == {"context_attention_forward_kernel": 1}
    with _triton.count_launches() as queries_only:
        forward_backward(function, args, {}, (0,), random_cotangents())
    assert dict(queries_only) == {"context_attention_forward_kernel": 1, "context_attention_backward_kernel": 1}
    with _triton.count_launches() as everything:
        forward_backward(function, args, {}, (0, 1, 2), random_cotangents())
    assert dict(everything) == {
        "context_attention_forward_kernel": 1,
        "context_attention_backward_kernel": 1,
        "context_attention_reduce_kernel": 1,
    }
