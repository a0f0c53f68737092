"""Plans: whatever was called before, a call does what its first one would have done."""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import assert_as_accurate
from kernel_checks import LibraryCalls, forward_backward, random_cotangents, sliced, transposed
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from deltakern import backend, launch, ops, use_impl
from deltakern.cases import Case, cases
from deltakern.ops import _triton

TESTS = Path(__file__).parent
CASES = [case for name, op in backend.ops().items() if "triton" in op.kernels for case in cases(name, "tiny")]
WIDTH = 24


@pytest.fixture(autouse=True)
def _plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("DELTAKERN_STRICT", "DELTAKERN_IMPL"):
        monkeypatch.delenv(name, raising=False)
    launch.forget_plans()
    yield
    launch.forget_plans()


def identical(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """The same bits, laid out the same way, in the same mode."""
    if a is None or b is None:
        return a is b
    same = (a.shape, a.stride(), a.dtype, a.device, a.is_inference()) == (b.shape, b.stride(), b.dtype, b.device, b.is_inference())
    return same and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def norm(x: torch.Tensor, weight: torch.Tensor, eps: Any = 1e-5, **options: Any) -> torch.Tensor:
    return ops.layer_norm(x, weight, None, eps=eps, impl="triton", **options)


def fresh(run: Callable[[], Any]) -> Any:
    """What ``run`` does with no plan of any call, which stay for later."""
    kept = [(table, dict(table)) for table in launch._tables]
    launch.forget_plans()
    try:
        return run()
    finally:
        for table, plans in kept:
            table.clear()
            table.update(plans)


def test_fresh_leaves_plans_alone(device: torch.device) -> None:
    """Of the helper above."""
    x = torch.randn(3, WIDTH, device=device)
    for _ in range(3):
        ops.gelu(x, impl="triton")
    before = dict(ops.gelu.op.plans)
    (plan,) = before.values()
    assert "plan" in plan.source
    fresh(lambda: ops.gelu(x, impl="triton"))
    assert dict(ops.gelu.op.plans) == before


# --- Every op ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "case"), enumerate(CASES), ids=[f"{case.op}-{case.name}" for case in CASES])
def test_the_same_bits_from_the_first_call_to_the_fourth(number: int, case: Case, device: torch.device) -> None:
    """New, recorded, and twice planned; with the numbers and the memory of the first call the third time, of the second the fourth."""
    dtype, lay = ((torch.float32, sliced), (torch.bfloat16, transposed), (torch.float16, torch.clone))[number % 3]
    args, kwargs = case.make(dtype, device, torch.Generator().manual_seed(0), 0.4)
    laid = [lay(a) if isinstance(a, torch.Tensor) else a for a in args]
    others = [lay(a.flip(0) if a.ndim else -a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    for wanted in {case.differentiable, ()}:

        def call(args: list[Any], wanted: tuple[int, ...] = wanted) -> list[torch.Tensor]:
            out, gradients = forward_backward(case.function, args, {**kwargs, "impl": "triton"}, wanted, random_cotangents())
            return [*out, *gradients]

        first, second, third, fourth = call(laid), call(others), call(laid), call(others)
        assert all(map(identical, first, third))
        assert all(map(identical, second, fourth))
    # A plan refers to no tensor but to the table that context_attention keeps itself
    kept = [v for table in launch._tables for plan in table.values() if hasattr(plan, "source") for v in plan.__globals__.values()]
    assert kept
    assert {type(v) for v in kept if isinstance(v, torch.Tensor)} <= ({torch.Tensor} if case.op == "context_attention" else set())


# --- What a key is made of ---------------------------------------------------------------------------------------------------


def layouts(device: torch.device) -> dict[str, torch.Tensor]:
    """(4, WIDTH), in memory in many ways."""
    flat = torch.randn(4000, device=device)
    x = flat[: 4 * WIDTH].view(4, WIDTH)
    return {
        "contiguous": x,
        "one element on": flat[1 : 1 + 4 * WIDTH].view(4, WIDTH),
        "four elements on": flat[4 : 4 + 4 * WIDTH].view(4, WIDTH),
        "rows apart": flat.view(20, 200)[:4, :WIDTH],
        "rows apart, unaligned": flat.view(20, 200)[:4, 3 : 3 + WIDTH],
        "columns": flat[: 4 * WIDTH].view(WIDTH, 4).mT,
        "every other": flat[: 8 * WIDTH].view(4, 2 * WIDTH)[:, ::2],
        "expanded": flat[:WIDTH].expand(4, WIDTH),
        "expanded channels": flat[:4, None].expand(4, WIDTH),
        "overlapping": flat.as_strided((4, WIDTH), (2, 1)),
        "overlapping, unaligned": flat.as_strided((4, WIDTH), (2, 1), 1),
        "parameter": nn.Parameter(x, requires_grad=False),
        "negated": torch.complex(x, x).conj().imag,
        "negated rows": torch._neg_view(x),
    }


def test_every_layout_after_every_other(device: torch.device) -> None:
    """Two tensors at once, so that each is of its own layout."""
    made, weight = layouts(device), torch.randn(WIDTH, device=device)
    rounds = [(a, b) for a, b in itertools.product(made, made) if a == b or "contiguous" in (a, b)]

    def call(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ops.residual_norm(a, b, None, weight, None, impl="triton")

    expected = {(a, b): fresh(lambda a=a, b=b: call(made[a], made[b])) for a, b in rounds}
    for _ in range(3):
        for a, b in rounds:
            got = call(made[a], made[b])
            assert all(map(identical, got, expected[a, b])), f"{a} and {b}"
    for a, b in rounds:
        exact = ops.residual_norm.reference(made[a].double(), made[b].double(), None, weight.double(), None)
        plain = ops.residual_norm.reference(made[a], made[b], None, weight, None)
        for ours, theirs, truth in zip(expected[a, b], plain, exact, strict=True):
            assert_as_accurate(ours, theirs, truth, name=f"{a} and {b}")


def test_strides_of_dimensions_of_size_one(device: torch.device) -> None:
    """A contiguous tensor may have any stride where its size is one; what is allocated like it has not."""
    for x in (torch.randn(1, 100, device=device)[:, :WIDTH], torch.randn(500, device=device).as_strided((2, 1, 3, 8), (24, 5, 8, 1))):
        outs = [ops.gelu(x, impl="triton") for _ in range(4)]
        assert len({out.stride() for out in outs}) == 1
        assert all(identical(out, outs[0]) for out in outs)


@pytest.mark.parametrize("distinct_first", [False, True])
def test_one_tensor_given_twice(distinct_first: bool, device: torch.device) -> None:
    x, y, weight = torch.randn(4, WIDTH, device=device), torch.randn(4, WIDTH, device=device), torch.randn(WIDTH, device=device)
    twice, distinct = [(x, x), (y, y)], [(x, y), (y, x), (x, x[:]), (x[:], x)]
    for stream, branch in [*distinct, *twice] * 3 if distinct_first else [*twice, *distinct] * 3:
        total, normed = ops.residual_norm(stream, branch, None, weight, None, impl="triton")
        assert torch.equal(total, stream + branch)
        assert identical(normed, norm(total.clone(), weight))


def test_views_of_one_memory(device: torch.device) -> None:
    """Arguments that overlap, after such as do not, and results that are views of an argument."""
    x, weight = torch.randn(5, WIDTH, device=device), torch.randn(WIDTH, device=device)
    for _ in range(4):
        for a, b in ((x[:4], x[1:]), (x[1:], x[:4]), (x[:4].clone(), x[1:].clone()), (x[:4], x[:4].view(4, WIDTH))):
            total, _ = ops.residual_norm(a, b, None, weight, None, impl="triton")
            assert torch.equal(total, a + b)
            assert total.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    packed, table = torch.randn(2, 5, 3 * WIDTH, device=device), torch.randn(5, 8, device=device)
    for _ in range(4):
        q, _, v, _ = ops.split_qkv(packed, table, table, None, None, heads=3, impl="triton")
        assert v._base is packed
        packed.add_(1)
        assert torch.equal(v.flatten(2), packed[..., 2 * WIDTH :])
        assert q._base is None


def test_empty_and_0d(device: torch.device) -> None:
    weight = torch.randn(WIDTH, device=device)
    for _ in range(4):
        for shape in ((0, WIDTH), (3, 0, WIDTH), (3, WIDTH)):
            x = torch.randn(shape, device=device, requires_grad=True)
            out = norm(x, weight)
            assert out.shape == shape
            assert torch.autograd.grad(out.sum(), x)[0].shape == shape
        assert ops.recon_loss(torch.empty(0, 3, device=device), torch.empty(0, 3, device=device), impl="triton").isnan()
        a, b = torch.randn(2, device=device).unbind()
        torch.testing.assert_close(ops.recon_loss(a, b, impl="triton"), ops.recon_loss.reference(a, b))


EPSILONS = [
    1e-5,
    1,
    1.0,
    True,
    0,
    0.0,
    -0.0,
    np.float64(1e-5),
    np.float32(1e-5),
    np.int64(1),
    np.array(1e-3),
    float("nan"),
    float("inf"),
    0.5,
]


def test_numbers_of_every_type(device: torch.device) -> None:
    """Of equal numbers, one may be compiled for another type than the next; a library op's schema converts what is no Python number."""
    x, weight = torch.randn(4, WIDTH, device=device), torch.randn(WIDTH, device=device)
    for eps in [*EPSILONS, *reversed(EPSILONS)] * 3:
        expected = ops.layer_norm.reference(x, weight, None, eps=float(eps))
        torch.testing.assert_close(norm(x, weight, eps), expected, equal_nan=True, msg=lambda m, eps=eps: f"{eps!r}: {m}")
    eps = torch.tensor(1e-5)
    for power in range(5):  # the same object, of another value
        eps.fill_(10.0**-power)
        torch.testing.assert_close(norm(x, weight, eps), ops.layer_norm.reference(x, weight, None, eps=float(eps)))


def test_dtypes_and_options(device: torch.device) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for _ in range(3):
        for dtype, of_weight, out_dtype in itertools.product(dtypes, dtypes, (None, *dtypes)):
            x, weight = torch.ones(2, WIDTH, device=device, dtype=dtype), torch.ones(WIDTH, device=device, dtype=of_weight)
            assert norm(x, weight, out_dtype=out_dtype).dtype == (out_dtype or dtype)
            assert ops.layer_norm(x, weight, weight, out_dtype=out_dtype, impl="triton").eq(1).all()
            assert norm(x, weight, out_dtype=out_dtype).eq(0).all()
        with pytest.raises(TypeError, match="layer_norm"):
            norm(torch.ones(2, WIDTH, device=device, dtype=torch.int32), weight)
        with pytest.raises(ValueError, match="weight"):
            norm(x, weight[1:])


def test_numbers_that_equal_none_fill_the_table(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_PLANS", 5)
    weight = torch.randn(WIDTH, device=device)
    for _ in range(3):
        for rows in range(1, 9):
            x = torch.randn(rows, WIDTH, device=device)
            torch.testing.assert_close(norm(x, weight), ops.layer_norm.reference(x, weight, None))
            norm(x, weight, float("nan"))
            assert max(map(len, launch._tables)) <= 5


# --- Modes ---------------------------------------------------------------------------------------------------------------


MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "constant": torch.enable_grad, "gradient": torch.enable_grad}


@pytest.mark.parametrize("order", list(itertools.permutations(MODES)), ids="-".join)
def test_gradient_modes_in_every_order(order: tuple[str, ...], device: torch.device) -> None:
    given, weight = torch.randn(4, WIDTH, device=device), torch.randn(WIDTH, device=device)
    expected = ops.layer_norm.reference(given, weight, None)
    for mode in order * 3:
        with MODES[mode]():
            x = given.clone().requires_grad_(mode == "gradient")
            out = norm(x, weight)
        torch.testing.assert_close(out.detach(), expected)
        assert (out.requires_grad, out.is_inference()) == (mode == "gradient", mode == "inference")
        if mode == "gradient":
            out.sum().backward()
            assert x.grad is not None


@pytest.mark.parametrize("order", list(itertools.product((False, True), repeat=3)))
def test_autocast_in_every_order(order: tuple[bool, ...], device: torch.device) -> None:
    results = []
    generator = torch.Generator().manual_seed(0)
    base, weight = torch.randn(WIDTH, 4, generator=generator).to(device).mT, torch.randn(WIDTH, generator=generator).to(device)
    for on in order * 2:
        with torch.autocast(device.type, torch.bfloat16, enabled=on):
            x, w = base.clone().requires_grad_(), weight.clone().requires_grad_()
            out = norm(x, w)
            results.append((out.detach(), norm(base, weight), *torch.autograd.grad(out.float().square().sum(), (x, w))))
    for result in results[1:]:
        assert all(map(identical, result, results[0]))


def test_a_second_derivative_raises(device: torch.device) -> None:
    weight = torch.randn(WIDTH, device=device)
    for _ in range(4):
        x = torch.randn(4, WIDTH, device=device, requires_grad=True)
        (gradient,) = torch.autograd.grad(norm(x, weight).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            gradient.sum().backward()


def test_what_was_saved_and_written_to_is_noticed(device: torch.device) -> None:
    for _ in range(4):
        x = torch.randn(4, WIDTH, device=device, requires_grad=True)
        y = x * 1
        out = ops.gelu(y, impl="triton")
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_checkpointing(device: torch.device) -> None:
    weight = torch.randn(WIDTH, device=device, requires_grad=True)
    given = torch.randn(4, WIDTH, device=device)

    def block(x: torch.Tensor) -> torch.Tensor:
        return ops.gelu(norm(x, weight), impl="triton")

    def gradients(way: bool | None) -> list[torch.Tensor]:
        x = given.clone().requires_grad_()
        out = block(x) if way is None else checkpoint(block, x, use_reentrant=way)
        out.square().sum().backward()
        found, weight.grad = [x.grad, weight.grad], None
        return found

    results = [gradients(way) for way in (None, True, False, True, None, False) * 2]
    for result in results[1:]:
        assert all(map(identical, result, results[0]))


def test_implementations_in_every_order(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, WIDTH, device=device)
    usual = "triton" if device.type == "cuda" else "reference"
    for _ in range(2):
        for impl, variable, context in itertools.product(
            ("auto", "reference", "triton"), (None, "", "reference", "triton"), (None, "reference", "triton")
        ):
            if variable is None:
                monkeypatch.delenv("DELTAKERN_IMPL", raising=False)
            else:
                monkeypatch.setenv("DELTAKERN_IMPL", variable)
            with use_impl(context) if context else contextlib.nullcontext(), _triton.count_launches() as counter:
                ops.gelu(x, impl=impl)
            wanted = impl if impl != "auto" else context or variable or usual
            assert (counter.total() == 1) is (wanted == "triton"), (impl, variable, context)
        monkeypatch.setenv("DELTAKERN_IMPL", "fastest")
        with pytest.raises(backend.BackendError, match="DELTAKERN_IMPL"):
            ops.gelu(x)
    monkeypatch.delenv("DELTAKERN_IMPL")


def test_launches_are_counted(device: torch.device) -> None:
    x, weight = torch.randn(4, WIDTH, device=device), torch.randn(WIDTH, device=device)
    for _ in range(5):
        with _triton.count_launches() as counter:
            norm(x.clone().requires_grad_(), weight).sum().backward()
            with _triton.count_launches() as inner:
                norm(x, weight)
        assert counter == {"residual_norm_forward_kernel": 2, "residual_norm_backward_kernel": 1}
        assert inner == {"residual_norm_forward_kernel": 1}


# --- Who looks on --------------------------------------------------------------------------------------------------------


class Tagged(torch.Tensor):
    """A tensor that says of every result that it is one too."""


def test_whoever_looks_on_sees_the_registered_op(device: torch.device) -> None:
    x, weight = torch.randn(4, WIDTH, device=device), torch.randn(WIDTH, device=device)
    expected = norm(x, weight)
    for _ in range(3):
        with LibraryCalls() as seen:
            assert identical(norm(x, weight), expected)
        assert [str(op) for op, *_ in seen.calls] == ["deltakern.layer_norm_forward.default"]
        with FlopCounterMode(display=False):
            assert identical(norm(x, weight), expected)
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(x), mode.from_tensor(weight)
            assert norm(*fake).shape == x.shape
        assert type(norm(*fake)) is type(fake[0])
        assert type(norm(x.as_subclass(Tagged), weight)) is Tagged
        with torch.device("meta"):  # a function mode, that has nothing to say of a call that names its device
            assert identical(norm(x, weight), expected)
        assert identical(norm(x, weight), expected)
        nothing = x.to("meta")
        assert ops.layer_norm(nothing, weight.to("meta"), None).is_meta
    traced = torch.jit.trace(lambda x: norm(x, weight), (x,))
    assert torch.equal(traced(x + 1), norm(x + 1, weight))


def test_transforms_after_plans(device: torch.device) -> None:
    x, weight = torch.randn(4, WIDTH, device=device), torch.randn(WIDTH, device=device)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return ops.layer_norm(x, weight, None).square().sum()

    def expected(x: torch.Tensor) -> torch.Tensor:
        return ops.layer_norm.reference(x, weight, None).square().sum()

    for _ in range(4):
        loss(x)
        loss(x.clone().requires_grad_()).backward()
    with pytest.warns(backend.BackendWarning) if device.type == "cuda" else contextlib.nullcontext():
        for _ in range(2):
            torch.testing.assert_close(torch.func.grad(loss)(x), torch.func.grad(expected)(x))
            torch.testing.assert_close(torch.func.vmap(loss)(x), torch.func.vmap(expected)(x))
            torch.testing.assert_close(torch.func.jvp(loss, (x,), (x,)), torch.func.jvp(expected, (x,), (x,)))
            loss(x)
    with pytest.raises(backend.BackendError, match=r"torch\.func"):
        torch.func.grad(lambda x: norm(x, weight).sum())(x)


def test_compiled_after_eager_and_eager_after_compiled(device: torch.device) -> None:
    x, weight = torch.randn(4, WIDTH, device=device), torch.randn(WIDTH, device=device)

    def function(x: torch.Tensor) -> torch.Tensor:
        return ops.gelu(norm(x, weight), impl="triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        eager = function(x)
    for _ in range(3):
        assert torch.equal(compiled(x), eager)
        assert identical(function(x), eager)
    torch._dynamo.reset()
    launch.forget_plans()
    for _ in range(3):
        assert torch.equal(compiled(x), eager)
        assert identical(function(x), eager)


# --- What is recorded --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["named tuple", "kept tensor", "number", "argument", "random", "in place"])
def test_what_cannot_be_recorded_is_called(kind: str, device: torch.device) -> None:
    pair, kept, plans = collections.namedtuple("pair", "a b"), torch.zeros(3, device=device), launch.Plans()
    run = {
        "named tuple": lambda x: pair(x + 1, x.sum()),
        "kept tensor": lambda x: kept.add_(1).clone(),
        "number": lambda x: x * x.sum().item(),
        "argument": lambda x: (x, x[1:]),
        "random": lambda x: torch.rand_like(x),
        "in place": lambda x: torch.empty_like(x).copy_(x).add_(1),
    }[kind]
    outs = []
    for number in range(5):
        x = torch.full((3,), float(number), device=device)
        plan = plans.get((kind,))
        outs.append((x, run if plan is None else plan, plan(x) if plan is not None else plans.first((kind,), run, (x,))))
    if kind == "named tuple":
        assert [out.a[0].item() for _, _, out in outs] == [1, 2, 3, 4, 5]
    elif kind == "kept tensor":
        assert [out[0].item() for _, _, out in outs] == [1, 2, 3, 4, 5]
    elif kind == "number":
        assert [out[0].item() for _, _, out in outs] == [0, 3, 12, 27, 48]
    elif kind == "argument":
        assert all(out[0] is x and out[1]._base is x for x, _, out in outs)
    elif kind == "random":
        assert len({out[0].item() for _, _, out in outs}) == 5
    else:
        assert [out[0].item() for _, _, out in outs] == [1, 2, 3, 4, 5]


def test_what_autocast_may_change_is_called(device: torch.device) -> None:
    plans, x = launch.Plans(), torch.randn(3, 3, device=device)
    for on in (True, True, False, True, False):
        with torch.autocast(device.type, torch.bfloat16, enabled=on):
            out = plans["product"](x, x) if "product" in plans else plans.first("product", torch.mm, (x, x))
        assert out.dtype is (torch.bfloat16 if on else torch.float32)


def test_copies_of_arguments(device: torch.device) -> None:
    x, weight = torch.randn(4, WIDTH, device=device), nn.Parameter(torch.randn(WIDTH, device=device))
    for _ in range(4):
        again, of_weight = copy.deepcopy((x, weight))
        assert identical(norm(again, of_weight).detach(), norm(x, weight).detach())


# --- In processes of their own ---------------------------------------------------------------------------------------------


def test_plans_start_what_triton_would() -> None:
    """Every launch of every op, forward and backward, over every case: its grid, stream, function, metadata and arguments in order."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, TESTS / "stand_in_driver.py"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": 0 faults") == 8


def test_calls_on_a_cpu_load_neither_triton_nor_dynamo() -> None:
    code = """
import sys, torch, deltakern
from deltakern.cases import cases
from deltakern.nn import Block
for case in cases(tag="tiny"):
    args, kwargs = case.make(torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0), 1.0)
    for _ in range(3):
        args = [a.detach().requires_grad_(i in case.differentiable) if isinstance(a, torch.Tensor) else a for i, a in enumerate(args)]
        out = case.function(*args, **kwargs)
        out = out if isinstance(out, tuple) else (out,)
        wanted = [o for o in out if o is not None and o.requires_grad]
        if wanted:
            sum(o.sum() for o in wanted).backward()
print(sorted({"triton", "torch._dynamo"} & set(sys.modules)))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_forward_mode_gradients_are_the_references():
    """Whose tangents kernels would drop; asked for by name, they refuse."""
    x, weight, tangent = torch.randn(2, 3, 8), torch.rand(8), torch.randn(2, 3, 8)
    for _ in range(3):  # so that there are plans
        ops.layer_norm(x, weight, None)
    with torch.autograd.forward_ad.dual_level(), use_impl("triton"):
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        with pytest.raises(backend.BackendError, match="kernels have no forward-mode gradients"):
            ops.layer_norm(dual, weight, None)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(ops.layer_norm(dual, weight, None)).tangent
        expected = torch.autograd.forward_ad.unpack_dual(ops.layer_norm.reference(dual, weight, None)).tangent
        assert torch.equal(found, expected)
