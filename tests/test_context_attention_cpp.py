"""context_attention in C++ beyond what test_cpp_kernels.py and test_context_attention.py ask: random problems, bits, what C++ refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from compare import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    assert_case_accurate,
    forward_backward,
    inputs,
    random_cotangents,
    run_kernel,
    same,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import deltakern
from deltakern import backend, ops
from deltakern.cases import Case, cases

_C = backend.extension().module
pytestmark = pytest.mark.skipif(_C is None, reason=f"no compiled extension: {backend.extension().error}")
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TINY = cases("context_attention", "tiny")
BY_NAME = {case.name: case for case in cases("context_attention")}
each_case = pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# --- values ------------------------------------------------------------------------------------------------------------------


@each_case
def test_any_subset_of_gradients(case: Case):
    for wanted in itertools.chain.from_iterable(itertools.combinations(case.differentiable, n) for n in (1, 2)):
        assert_case_accurate(case, torch.float32, CPU, wanted=wanted, impl="cpp")


def problem(draw, dtypes) -> tuple[list, dict]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    batch, groups, each = draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(0, 9))
    tokens, own, heads = draw(st.integers(1, 40)), draw(st.sampled_from([None, 0, 1, 3, 17])), draw(st.integers(1, 3))
    width = draw(st.integers(2, 256))
    turned, seen = draw(st.booleans()), draw(st.booleans())

    def normal(*shape, of=0):
        return torch.randn(shape, generator=generator).to(dtypes[of])

    def seconds(count):
        return 3 * torch.rand((batch, count), generator=generator, dtype=draw(st.sampled_from([torch.float32, torch.float64])))

    args = [
        normal(batch, groups * each, heads, width),
        normal(batch, tokens, heads, width, of=1),
        normal(batch, tokens, heads, width, of=1),
        seconds(groups),
        None if turned else seconds(tokens),
        torch.randint(1, tokens + 1, (groups,), generator=generator) if seen else None,
    ]
    kwargs = {"rope_size": 2 * draw(st.integers(1, width // 2))}
    if own is not None:
        kwargs |= {"own_k": normal(batch, groups * each, own, heads, width, of=1), "own_v": normal(batch, groups * each, own, heads, width)}
        kwargs["own_time"] = None if turned else seconds(own)
    return args, kwargs


def doubled(values):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in values]


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(data=st.data())
def test_random_problems_of_every_width(data):
    dtypes = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    args, kwargs = problem(data.draw, dtypes)

    def run(function, given_, options, **extra):
        names = [n for n in ("own_k", "own_v") if n in options]
        rest = {k: v for k, v in options.items() if k not in names}

        def call(*positional):
            return function(*positional[:6], **dict(zip(names, positional[6:], strict=True)), **rest, **extra)

        wanted = (0, 1, 2, *range(6, 6 + len(names)))
        return forward_backward(call, [*given_, *(options[n] for n in names)], {}, wanted, random_cotangents())

    reference = ops.context_attention.reference
    truth = run(reference, doubled(args), dict(zip(kwargs, doubled(kwargs.values()), strict=True)))
    plain, found = run(reference, args, kwargs), run(ops.context_attention, args, kwargs, impl="cpp")
    for ours, theirs, right in zip(*(itertools.chain(*made) for made in (found, plain, truth)), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert_as_accurate(ours, theirs, right)


def _run_on(isa: str, monkeypatch: pytest.MonkeyPatch, run):
    """``run()`` with every call of the extension on that instruction set."""

    class Module:
        @staticmethod
        def context_attention_forward_cpu(*arguments):
            _C.context_attention_forward_cpu(*arguments, isa)

        @staticmethod
        def context_attention_backward_cpu(*arguments):
            _C.context_attention_backward_cpu(*arguments, isa)

    with monkeypatch.context() as patched:
        patched.setattr("deltakern.ops._extension.module", lambda op: Module)
        return run()


@each_dtype
@pytest.mark.parametrize("name", ["several-tiles", "turned", "own", "rollout"])
def test_every_instruction_set(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """All are right, and those with a fused multiply-add agree to the last bit."""
    fused = []
    for isa in _C.build_info()["cpu_isas"]:
        _run_on(isa, monkeypatch, lambda: assert_case_accurate(BY_NAME[name], dtype, CPU, impl="cpp"))
        args, kwargs = inputs(BY_NAME[name], dtype, CPU)
        outputs, grads = _run_on(isa, monkeypatch, lambda args=args, kwargs=kwargs: run_kernel(BY_NAME[name], args, kwargs, impl="cpp"))
        if isa != "baseline":
            fused.append([*outputs, *grads])
    assert all(same(fused[0], other) for other in fused[1:])


def test_the_exponential():
    """One query whose scores are the exponents: probabilities against float64, from 1 down to the least normal numbers and below."""
    exponents = torch.cat((-torch.logspace(-6, math.log10(120), 2000), torch.tensor([0.0, -87.0, -87.5, -104.0, -1e30, -math.inf])))
    tokens = len(exponents)
    k = torch.zeros(1, tokens, 1, 4)
    k[0, :, 0, 3] = exponents
    q = torch.tensor([0.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    v = torch.zeros(1, tokens, 1, 4)
    times, rates, weights = torch.zeros(1, 1), torch.ones(1), []
    for isa in _C.build_info()["cpu_isas"]:
        out = torch.empty(1, 1, 1, 4)
        for which in (0, 700, 1400, 1999, tokens - 6, tokens - 5, tokens - 4, tokens - 3, tokens - 2, tokens - 1):
            v.zero_()
            v[0, which] = 1.0
            rows = [(t.data_ptr(), 0, t.stride()) for t in (q, k, v, out)]
            none = (0, 0, ())
            at = ((times.data_ptr(), False), (0, False), (0, False), rates.data_ptr())
            _C.context_attention_forward_cpu((1, 1, 1, tokens, 0, 1, 4, 1), *rows[:3], (none, none), at, 0, 1.0, rows[3], 1, isa)
            weights.append((out[0, 0, 0, 0].item(), torch.softmax(exponents.double(), 0)[which].item()))
    for ours, truth in weights:
        assert abs(ours - truth) <= 4e-7 * truth + 1e-37
    assert weights[-1] == (0.0, 0.0)


def test_what_is_not_seen_may_be_anything():
    """NaN and infinities in tokens that a query does not see reach neither its output nor its gradient."""
    (q, k, v, q_time, k_time, visible), kwargs = inputs(BY_NAME["training"], torch.float32, CPU)
    seen = forward_backward(ops.context_attention, [q, k, v, q_time, k_time, visible], {**kwargs, "impl": "cpp"}, (0,), random_cotangents())
    k, v = k.clone(), v.clone()
    k[:, visible.max() :], v[:, visible.max() :] = math.nan, math.inf
    other = forward_backward(
        ops.context_attention, [q, k, v, q_time, k_time, visible], {**kwargs, "impl": "cpp"}, (0,), random_cotangents()
    )
    assert visible.max() < k.shape[1]
    assert same([*seen[0], *seen[1]], [*other[0], *other[1]])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_seen_is_not_hidden(bad: float):
    args, kwargs = inputs(BY_NAME["sampling"], torch.float32, CPU)
    args[1] = args[1].clone()
    args[1][0, 1, 0, 0] = bad
    found, plain = (f(*args, **kwargs) for f in (ops.context_attention, ops.context_attention.reference))
    assert torch.equal(found.isnan(), plain.isnan())
    assert found.isnan().any()


# --- bits, inputs ------------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("own", [0, 2])
def test_the_same_bits_on_every_run_and_for_any_number_of_threads(own: int, dtype: torch.dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 150, 3, 64), torch.randn(2, 5, 3, 64), torch.randn(2, 5, 3, 64)
    args = [t.to(dtype) for t in (q, k, v)] + [torch.rand(2, 1), torch.rand(2, 5)]
    kwargs = {"own_k": torch.randn(2, 150, own, 3, 64, dtype=dtype), "own_v": torch.randn(2, 150, own, 3, 64, dtype=dtype)}
    kwargs["own_time"] = torch.rand(2, own)
    case = Case("context_attention", "threads", lambda *_: (args, kwargs), (0, 1, 2))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            outputs, grads = run_kernel(case, args, kwargs, impl="cpp")
            found.append([*outputs, *grads])
    finally:
        torch.set_num_threads(threads)
    assert all(same(found[0], other) for other in found[1:])


def test_a_query_does_not_depend_on_its_company():
    """Whichever queries are asked together, in portions of any size, each has the bits that it has alone."""
    torch.manual_seed(0)
    q, k, v, times = torch.randn(1, 131, 2, 20), torch.randn(1, 3, 2, 20), torch.randn(1, 3, 2, 20), torch.rand(1, 1)
    together = ops.context_attention(q, k, v, times, None, rope_size=20, impl="cpp")
    for some in (slice(0, 1), slice(5, 8), slice(63, 67), slice(64, 131)):
        assert same([together[:, some]], [ops.context_attention(q[:, some], k, v, times, None, rope_size=20, impl="cpp")])


def test_no_queries_leave_the_keys_a_gradient_of_zero():
    q, k, v = torch.randn(2, 0, 1, 6), torch.randn(2, 3, 1, 6), torch.randn(2, 3, 1, 6)
    (out,), grads = forward_backward(
        ops.context_attention, [q, k, v, torch.rand(2, 1), None], {"rope_size": 4, "impl": "cpp"}, (0, 1, 2), random_cotangents()
    )
    assert out.shape == q.shape
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert not any(g.any() for g in grads)


def test_fake_tensors():
    args, kwargs = inputs(BY_NAME["sampling"], torch.bfloat16, CPU)
    with FakeTensorMode() as mode:
        out = ops.context_attention(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args], impl="cpp", **kwargs)
    assert (out.shape, out.dtype, out.is_contiguous()) == (args[0].shape, torch.bfloat16, True)


def test_a_second_derivative_is_refused():
    args, kwargs = inputs(BY_NAME["sampling"], torch.float32, CPU)
    args[0] = args[0].requires_grad_()
    (grad,) = torch.autograd.grad(ops.context_attention(*args, impl="cpp", **kwargs).square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="context_attention"):
        grad.sum().backward()


def test_it_takes_what_triton_does_not():
    """Long contexts, wide heads and keys of another dtype are limits of the GPU's registers, not of this kernel."""
    q, k = torch.randn(1, 5, 1, 200), torch.randn(1, 70, 1, 200).bfloat16()
    arguments = (q, k, k, torch.rand(1, 1), torch.rand(1, 70))
    found = deltakern.explain(ops.context_attention, *arguments, rope_size=100)
    assert found.chosen == "cpp"
    assert found.refused["triton"] == "the kernel takes at most 32 context tokens"
    truth = ops.context_attention.reference(*doubled(arguments), rope_size=100)
    plain = ops.context_attention.reference(*arguments, rope_size=100)
    assert_as_accurate(ops.context_attention(*arguments, rope_size=100), plain, truth)


def test_a_head_too_wide_is_refused_with_the_reason():
    q, k = torch.randn(1, 2, 1, 258), torch.randn(1, 2, 1, 258)
    with pytest.raises(deltakern.BackendError, match="the kernel takes at most 256 channels"):
        ops.context_attention(q, k, k, torch.rand(1, 1), None, rope_size=4, impl="cpp")


# --- what C++ refuses --------------------------------------------------------------------------------------------------------


def _call(changes):
    q, grad, out = (torch.randn(2, 6, 3, 8) for _ in range(3))
    k, v, dk, dv = (torch.randn(2, 4, 3, 8) for _ in range(4))
    own = [torch.randn(2, 6, 2, 3, 8) for _ in range(4)]
    times, visible = torch.rand(2, 4), torch.tensor([1, 4, changes.get("seen", 4)])
    values = {"sizes": (2, 6, 3, 4, 2, 3, 8, 3), "visible": visible.data_ptr(), "threads": 1, "isa": "auto", "q_time": times.data_ptr()}
    values |= {"rates": times.data_ptr(), "k_time": times.data_ptr(), "own_time": times.data_ptr(), "seen": 4}
    rows = {"q": q, "k": k, "v": v, "own_k": own[0], "own_v": own[1], "out": out, "grad": grad}
    rows |= {"dk": dk, "dv": dv, "d_own_k": own[2], "d_own_v": own[3]}
    values |= {name: t.data_ptr() for name, t in rows.items()}
    values |= {f"{name} strides": t.stride() for name, t in rows.items()} | {f"{name} dtype": 0 for name in rows}
    assert set(changes) <= set(values)
    g = {**values, **changes}

    def of(name):
        return g[name], g[f"{name} dtype"], g[f"{name} strides"]

    shared = (
        g["sizes"], of("q"), of("k"), of("v"), (of("own_k"), of("own_v")),
        ((g["q_time"], False), (g["k_time"], False), (g["own_time"], False), g["rates"]), g["visible"], 0.5,
    )  # fmt: skip
    if any(name.split()[0] in ("grad", "dk", "dv", "d_own_k", "d_own_v") for name in changes):
        made = [of(name) for name in ("dk", "dv", "d_own_k", "d_own_v")]
        _C.context_attention_backward_cpu(*shared, of("grad"), of("out"), made, g["threads"], g["isa"])
    else:
        _C.context_attention_forward_cpu(*shared, of("out"), g["threads"], g["isa"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (2, -6, 3, 4, 2, 3, 8, 3)}, "sizes must not be negative"),
        ({"sizes": (2, 6, 3, 4, -1, 3, 8, 3)}, "sizes must not be negative"),
        ({"sizes": (2**40, 6, 3, 4, 2, 2**20, 8, 3)}, "sizes overflow 64 bits"),
        ({"sizes": (2, 6, 3, 0, 2, 3, 8, 3)}, "there must be a context token"),
        ({"sizes": (2, 6, 4, 4, 2, 3, 8, 3)}, "queries must be a multiple of groups, got 6 and 4"),
        ({"sizes": (2, 6, 0, 4, 2, 3, 8, 3)}, "queries must be a multiple of groups"),
        ({"sizes": (2, 6, 3, 4, 2, 3, 257, 3)}, "from 2 to 256 channels, got 257"),
        ({"sizes": (2, 6, 3, 4, 2, 3, 8, 5)}, "half of the channels rotate with another one, got 5"),
        ({"sizes": (2, 6, 3, 4, 2, 3, 8, 0)}, "half of the channels rotate with another one, got 0"),
        ({"q": 0}, "q: null pointer"),
        ({"k": 2}, "k: misaligned address"),
        ({"v dtype": 3}, "v: dtype must be"),
        ({"out": 0}, "out: null pointer"),
        ({"own_k": 0}, "own_k: null pointer"),
        ({"own_v strides": (1, 1, 1, 1)}, "own_v: wrong number of strides"),
        ({"q strides": (1, 1, 1, 2)}, "q: channels must lie side by side"),
        ({"k strides": (96, -24, 8, 1)}, "k: strides must not be negative"),
        ({"q_time": 0}, "q_time: null pointer"),
        ({"k_time": 2}, "k_time: misaligned address"),
        ({"own_time": 0}, "own_time: null pointer"),
        ({"k_time": 0}, "own_time comes with k_time alone"),
        ({"rates": 0}, "rates: null pointer"),
        ({"visible": 4}, "visible: misaligned address"),
        ({"seen": 0}, "visible must be from 1 to 4, got 0"),
        ({"seen": 5}, "visible must be from 1 to 4, got 5"),
        ({"threads": 0}, "threads must be from 1 to 4096, got 0"),
        ({"isa": "sse9"}, "isa must be auto or one of"),
        ({"grad": 0}, "the incoming gradient: null pointer"),
        ({"dk": 0}, "dk: null pointer"),
        ({"dv strides": (1, 1, 1, 0)}, "dv: channels must lie side by side"),
        ({"d_own_k": 0}, "d_own_k: null pointer"),
        ({"d_own_v dtype": 7}, "d_own_v: dtype must be"),
    ],
)
def test_arguments_are_checked_in_cpp(changes, message):
    with pytest.raises(ValueError, match=message):
        _call(changes)
    _call({})
