"""rope_qk_norm and split_qkv in C++ beyond what test_cpp_kernels.py asks: random problems, rounding, bits, what C++ refuses."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from compare import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    assert_case_accurate,
    inputs,
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
TINY = cases("rope_qk_norm", "tiny")
BY_NAME = {case.name: case for case in cases("rope_qk_norm")}
# The models' heads of 64 channels, few tokens of them
WIDE = [
    dataclasses.replace(case, make=lambda *a, case=case: case.make(*a[:3], 1e-6))
    for case in (BY_NAME[name] for name in ("encoder-512", "encoder-512-post-rope", "encoder-512-last", "backbone-512"))
]
PACKED = cases("split_qkv", "tiny")
each_case = pytest.mark.parametrize("case", TINY + WIDE + PACKED, ids=lambda case: f"{case.op}-{case.name}")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# --- values ------------------------------------------------------------------------------------------------------------------


@each_case
def test_any_subset_of_gradients_and_any_output(case: Case):
    for wanted in itertools.chain.from_iterable(itertools.combinations(case.differentiable, n) for n in (1, 2, 3)):
        assert_case_accurate(case, torch.float32, CPU, wanted=wanted, impl="cpp")
    outputs = case.function(*inputs(case, torch.float32, CPU)[0], **inputs(case, torch.float32, CPU)[1])
    for only in range(sum(output is not None for output in outputs)):
        assert_case_accurate(case, torch.float32, CPU, only=only, impl="cpp")


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(data=st.data())
def test_random_problems_of_every_width_on_every_instruction_set(data):
    width = 2 * data.draw(st.integers(1, 128))
    period, frames, prefix = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    shape = (data.draw(st.integers(0, 2)), prefix + frames * period, data.draw(st.integers(1, 3)), width)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    dtypes = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    q, k = (torch.randn(shape, generator=generator).to(dtype) for dtype in dtypes)
    cos, sin = torch.randn((2, period, width), generator=generator)
    weights = [torch.randn(width, generator=generator) if data.draw(st.booleans()) else None for _ in range(2)]
    order = data.draw(st.sampled_from(["pre_rope", "post_rope"]))
    kwargs = {"order": order, "num_prefix": prefix, "eps": 1e-3}
    double = [None if t is None else t.double() for t in (q, k, cos, sin, *weights)]
    found = ops.rope_qk_norm(q, k, cos, sin, *weights, impl="cpp", **kwargs)
    plain = ops.rope_qk_norm.reference(q, k, cos, sin, *weights, **kwargs)
    truth = ops.rope_qk_norm.reference(*double, **kwargs)
    for ours, theirs, right, dtype in zip(found, plain, truth, dtypes, strict=True):
        assert (ours.dtype, ours.shape, ours.is_contiguous()) == (dtype, shape, True)
        assert_as_accurate(ours, theirs, right)

    fused = []
    for isa in _C.build_info()["cpu_isas"]:
        outputs = torch.empty(shape, dtype=dtypes[0]), torch.empty(shape, dtype=dtypes[1])
        sides = [
            (x.data_ptr(), DTYPES.index(x.dtype), x.stride(), 0 if w is None else w.data_ptr(), out.data_ptr())
            for x, w, out in zip((q, k), weights, outputs, strict=True)
        ]
        tables = (cos.data_ptr(), width, sin.data_ptr(), width, period)
        if q.numel():
            _C.rope_qk_norm_forward_cpu(*sides, shape, tables, (order == "pre_rope", prefix, 1e-3), 1, isa)
        for ours, theirs, right in zip(outputs, plain, truth, strict=True):
            assert_as_accurate(ours, theirs, right, name=isa)
        if isa != "baseline":
            fused.append(outputs)
    assert all(same(fused[0], other) for other in fused[1:]), "AVX2 and AVX-512 differ"


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounding_is_torchs(dtype: torch.dtype):
    """Every value of 16 bits times a few factors, rounded once on either side; infinities, NaN and subnormals too."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 1024, 1, 64)
    for width in (64, 16):
        k = x.view(1, -1, 1, width)
        factors = torch.tensor([1.0, 1 + 2**-9, 0.7, 3e-3, -1.7])
        for factor in factors:
            cos, sin = torch.full((k.shape[1], width), factor), torch.zeros(k.shape[1], width)
            _, out = ops.rope_qk_norm(None, k, cos, sin, None, None, impl="cpp")
            _, expected = ops.rope_qk_norm.reference(None, k, cos, sin, None, None)
            assert torch.equal(out.nan_to_num(nan=0.123), expected.nan_to_num(nan=0.123))
            assert torch.equal(out.isnan(), expected.isnan())


def test_a_negated_view():
    """``.imag`` of a conjugate is a float tensor whose sign is only marked."""
    (q, k, *rest), kwargs = inputs(BY_NAME["pair"], torch.float32, CPU)
    marked = torch.complex(k, -k).conj().imag
    assert marked.is_neg()
    assert same(ops.rope_qk_norm(q, marked, *rest, impl="cpp", **kwargs), ops.rope_qk_norm(q, k, *rest, impl="cpp", **kwargs))


@each_case
def test_tables_and_weights_of_other_dtypes_and_strides(case: Case):
    args, kwargs = inputs(case, torch.float32, CPU)
    *first, cos, sin, q_weight, k_weight = args
    rounded = [None if t is None else t.bfloat16() for t in (cos, sin, q_weight, k_weight)]
    expected = case.function(*first, *[None if t is None else t.float() for t in rounded], impl="cpp", **kwargs)
    spread = [None if t is None else t.repeat_interleave(2, -1)[..., ::2] for t in rounded]
    for given_ in (rounded, spread, [None if t is None else t.float() for t in spread]):
        found = case.function(*first, *given_, impl="cpp", **kwargs)
        assert same([t for t in found if t is not None], [t for t in expected if t is not None])


# --- bits, inputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 9, 3, 10), (2, 333, 4, 64)])
@each_dtype
def test_the_same_bits_on_every_run_and_for_any_number_of_threads(shape, dtype: torch.dtype):
    torch.manual_seed(0)
    args = [torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)]
    args += [*torch.randn(2, shape[1], shape[3]), torch.randn(shape[3]), torch.randn(shape[3])]
    case = Case("rope_qk_norm", "threads", lambda *_: (args, {}), (0, 1, 4, 5))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            outputs, grads = run_kernel(case, args, {}, impl="cpp")
            found.append([*outputs, *grads])
    finally:
        torch.set_num_threads(threads)
    assert all(same(found[0], other) for other in found[1:])


def test_fake_tensors():
    args, kwargs = inputs(BY_NAME["pair"], torch.bfloat16, CPU)
    with FakeTensorMode() as mode:
        q, k = ops.rope_qk_norm(*[mode.from_tensor(a) for a in args], impl="cpp", **kwargs)
    assert (q.shape, k.dtype, q.is_contiguous()) == (args[0].shape, torch.bfloat16, True)


def test_a_head_too_wide_is_refused_with_the_reason():
    k, table = torch.randn(1, 2, 1, 258), torch.randn(2, 258)
    with pytest.raises(deltakern.BackendError, match="the kernel takes at most 256 channels"):
        ops.rope_qk_norm(None, k, table, table, None, None, impl="cpp")


# --- what C++ refuses --------------------------------------------------------------------------------------------------------


def _call(changes):
    q, k, out, dk = (torch.randn(2, 5, 3, 8) for _ in range(4))
    table, sums = torch.randn(2, 8), torch.empty(2, 8)
    nowhere = (0, (0, 0, 0, 1), 0, (0, 0, 0, 1))
    values = {
        "x": k.data_ptr(), "dtype": 0, "strides": k.stride(), "weight": 0, "out": out.data_ptr(), "sizes": k.shape,
        "cos": table.data_ptr(), "sin": table.data_ptr(), "rows": 2, "prefix": 1, "threads": 1, "isa": "auto",
        "grad": q.data_ptr(), "grad_strides": q.stride(), "dx": dk.data_ptr(), "sums": sums.data_ptr(),
    }  # fmt: skip
    assert set(changes) <= set(values)
    v = {**values, **changes}
    tables, options = (v["cos"], 8, v["sin"], 8, v["rows"]), (True, v["prefix"], 1e-5)
    side = (v["x"], v["dtype"], v["strides"], v["weight"])
    none = (0, 0, (0, 0, 0, 1), 0)
    if set(changes) & {"grad", "grad_strides", "dx", "sums"}:
        gradient = (v["grad"], v["grad_strides"], v["dx"], k.stride())
        _C.rope_qk_norm_backward_cpu((*none, nowhere), (*side, gradient), v["sizes"], tables, options, v["sums"], v["threads"], v["isa"])
    else:
        _C.rope_qk_norm_forward_cpu((*none, 0), (*side, v["out"]), v["sizes"], tables, options, v["threads"], v["isa"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": 4098}, "k: misaligned"),
        ({"dtype": 3}, "k: dtype must be 0"),
        ({"strides": (120, 24, 8, 2)}, "k: channels must lie side by side"),
        ({"strides": (120, -24, 8, 1)}, "k: strides must not be negative"),
        ({"weight": 2}, "k's weight: misaligned"),
        ({"out": 0}, "k's output: null pointer"),
        ({"sizes": (2, 5, 3, 7)}, "even number of channels from 2 to 256, got 7"),
        ({"sizes": (2, 5, 3, 258)}, "even number of channels from 2 to 256, got 258"),
        ({"sizes": (-2, 5, 3, 8)}, "must not be negative"),
        ({"sizes": (2**30, 5, 2**30, 8)}, "overflow"),
        ({"cos": 0}, "cos: null pointer"),
        ({"sin": 2}, "sin: misaligned"),
        ({"rows": 3}, "the tables' rows must divide the tokens that rotate, got 3"),
        ({"rows": 0}, "the tables' rows must divide"),
        ({"prefix": 6}, "num_prefix must be from 0"),
        ({"prefix": -1}, "num_prefix must be from 0"),
        ({"threads": 0}, "threads must be from 1"),
        ({"isa": "sse9"}, "isa must be auto or one of"),
        ({"grad": 0}, "k's incoming gradient: null pointer"),
        ({"grad_strides": (0, 0, 0, 0)}, "k: channels must lie side by side"),
        ({"dx": 0}, "k's output: null pointer"),
        ({"sums": 0}, "sums: null pointer"),
    ],
)
def test_arguments_are_checked_in_cpp(changes, message):
    with pytest.raises(ValueError, match=message):
        _call(changes)
    _call({})
