"""Which attention runs, that it is checked before it is trusted, and that no thread sees another's choice."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from deltakern import doctor
from deltakern.backend import BackendWarning
from deltakern.nn import Block, attend, explain
from deltakern.nn.attend import BACKENDS, PACKAGES, SDPA, check_backend, choose, decide
from deltakern.nn.self_check import self_check

module = importlib.import_module("deltakern.nn.attend")  # the package's name for it is the function's
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ON_CPU = ("sdpa-flash", "sdpa-math")


def _tensors(queries: int = 5, keys: int = 7, head: int = 16, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries + 31 * keys)
    return [torch.randn(2, n, 3, head, generator=generator).to(dtype) for n in (queries, keys, keys)]


# ---------------------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("backend", "arch", "dtype", "head", "queries", "flash_attn", "kernel", "checked"),
    [
        ("auto", 0, torch.bfloat16, 64, 2049, True, "sdpa", False),
        ("auto", 1, torch.bfloat16, 64, 2049, True, "flash-attn", False),
        ("auto", 80, torch.bfloat16, 64, 2049, True, "flash-attn", False),
        ("auto", 89, torch.float16, 64, 1, True, "flash-attn", False),
        ("auto", 80, torch.float32, 64, 2049, True, "sdpa", False),
        ("auto", 80, torch.bfloat16, 64, 2049, False, "sdpa", False),
        ("auto", 90, torch.bfloat16, 64, 2049, True, "sdpa", True),
        ("auto", 90, torch.float16, 128, 2, False, "sdpa", True),
        ("auto", 100, torch.bfloat16, 64, 2049, False, "sdpa", True),
        ("auto", 90, torch.float32, 64, 2049, False, "sdpa", False),
        ("auto", 90, torch.bfloat16, 60, 2049, False, "sdpa", False),
        ("auto", 90, torch.bfloat16, 64, 1, False, "sdpa-flash", False),
        ("auto", 120, torch.float16, 64, 1, True, "sdpa-flash", False),
        *((name, arch, torch.bfloat16, 64, 1, True, name, False) for name in BACKENDS[1:] for arch in (0, 80, 90)),
    ],
)
def test_the_rule(backend, arch, dtype, head, queries, flash_attn, kernel, checked):
    found = choose(backend, arch, dtype, head, queries, flash_attn)
    assert (found.kernel, found.checked) == (kernel, checked)
    assert found.why


def test_no_name_is_lost():
    old = {"auto", "flash-attn", "sdpa", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math"}
    assert set(BACKENDS) == old | {"flash-attn-3", "flash-attn-4"}
    with pytest.raises(ValueError, match="attention must be one of"):
        check_backend("flash")


# --------------------------------------------------------------------------------------------------------------- the self-check


class _Spoilt(torch.autograd.Function):
    """SDPA, of whose outputs (0) or gradients (1 to 3) one is spoilt in one element."""

    @staticmethod
    def forward(ctx, q, k, v, which, spoil):
        with torch.enable_grad():
            ctx.inner = [t.detach().requires_grad_() for t in (q, k, v)]
            ctx.out = F.scaled_dot_product_attention(*ctx.inner)
        ctx.which, ctx.spoil = which, spoil
        out = ctx.out.detach().clone()
        if which == 0:
            out[0, 1, -1, 2] = spoil(out[0, 1, -1, 2])
        return out

    @staticmethod
    def backward(ctx, grad):
        grads = list(torch.autograd.grad(ctx.out, ctx.inner, grad))
        if ctx.which:
            grads[ctx.which - 1][0, 1, -1, 2] = ctx.spoil(grads[ctx.which - 1][0, 1, -1, 2])
        return *grads, None, None


def _spoilt(which: int, spoil: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda q, k, v: _Spoilt.apply(q, k, v, which, spoil)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys", "head"), [(2, 2, 8), (5, 7, 64), (300, 257, 64), (1, 129, 128), (5000, 3, 16)])
def test_a_right_attention_passes(dtype, queries, keys, head):
    assert self_check(F.scaled_dot_product_attention, CPU, dtype, head, queries, keys) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("which", "name"), list(enumerate(["the output", "q's gradient", "k's gradient", "v's gradient"])))
def test_a_wrong_attention_is_found(which, name, dtype):
    """One element of one result that is not finite, or off by a few times what the dtype leaves plain math attention."""
    for spoil, said in (
        (lambda t: t * torch.nan, "is not finite"),
        (lambda t: t + torch.inf, "is not finite"),
        (lambda t: t + 0.1, "is off by"),
    ):
        assert self_check(_spoilt(which, spoil), CPU, dtype, 64, 33, 65).startswith(f"{name} {said}")
    assert self_check(_spoilt(which, lambda t: t), CPU, dtype, 64, 33, 65) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerance_is_the_dtypes(dtype):
    """An error of every value in proportion: one eps passes, sixteen do not."""
    eps = torch.finfo(dtype).eps

    def scaled(by: float) -> str | None:
        def attention(*tensors):
            return (F.scaled_dot_product_attention(*(t.double() for t in tensors)) * by).to(dtype)

        return self_check(attention, CPU, dtype, 64, 65, 65)

    assert scaled(1 + 0.5 * eps) is None
    assert "is off by" in scaled(1 + 16 * eps)


def test_what_raises_has_failed():
    def broken(q, k, v):
        raise RuntimeError("no execution plan")

    assert self_check(broken, CPU, torch.bfloat16, 64, 5, 7) == "RuntimeError: no execution plan"


def test_the_callers_state_does_not_reach_it_nor_its_the_callers():
    def checked() -> str | None:
        return self_check(F.scaled_dot_product_attention, CPU, torch.float32, 16, 5, 7)

    def spoil(*_):
        raise AssertionError("the caller's hooks are not for what the check keeps")

    state = torch.random.get_rng_state()
    for context in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        torch.autograd.graph.saved_tensors_hooks(spoil, spoil),
        FakeTensorMode(),
        torch.autograd.set_multithreading_enabled(False),
    ):
        with context:
            assert checked() is None, context
    counter = FlopCounterMode(display=False)
    with counter:
        assert checked() is None
    assert counter.get_total_flops() == 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_it_runs_within_a_backward():
    class Checks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            found.append(self_check(F.scaled_dot_product_attention, CPU, torch.float32, 16, 5, 7))
            return grad

    found: list[str | None] = []
    Checks.apply(torch.ones(1, requires_grad=True)).backward()
    assert found == [None]


# ------------------------------------------------------------------------------------------------- sm_90, played by the CPU


class _Hopper:
    """What a GPU would do: which kernels were called, and how often cuDNN was checked."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.checks: list[tuple] = []
        self.cudnn: Callable[..., torch.Tensor] = F.scaled_dot_product_attention
        self.own = "sdpa-cudnn"
        self.capturing = False


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Hopper]:
    played, call, check = _Hopper(), module._call, module.self_check

    def called(kernel, q, k, v, scale=None):
        played.called.append(kernel)
        return played.cudnn(q, k, v) if kernel == "sdpa-cudnn" else call(kernel, q, k, v, scale)

    def checked(attention, *what):
        played.checks.append(what)
        found = check(attention, *what)
        played.called.clear()
        return found

    monkeypatch.setattr(module, "_arch", lambda *_: 90)
    monkeypatch.setattr(module, "_own", lambda *_: played.own)
    monkeypatch.setattr(module, "_call", called)
    monkeypatch.setattr(module, "self_check", checked)
    monkeypatch.setattr(module, "CHECKED", {})
    monkeypatch.setattr(module, "_said", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: played.capturing)
    return played


def _nan_backward(q, k, v):
    return _Spoilt.apply(q, k, v, 1, lambda t: t * torch.nan)


def test_cudnn_runs_once_it_is_checked(hopper):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            attend(*_tensors())
    assert hopper.called == ["sdpa-cudnn"] * 3
    assert hopper.checks == [(CPU, torch.bfloat16, 16, 5, 7)]
    assert list(module.CHECKED.values()) == [None]


def test_what_shares_a_check(hopper):
    for shape in ((5, 7, 16), (8, 6, 16), (9, 7, 16), (5, 9, 16), (5, 7, 32)):
        attend(*_tensors(*shape))
    attend(*_tensors(dtype=torch.float16))
    assert hopper.checks == [
        (CPU, torch.bfloat16, 16, 5, 7),
        (CPU, torch.bfloat16, 16, 9, 7),
        (CPU, torch.bfloat16, 16, 5, 9),
        (CPU, torch.bfloat16, 32, 5, 7),
        (CPU, torch.float16, 16, 5, 7),
    ]


def test_a_failure_falls_back_warns_once_and_shows(hopper, monkeypatch):
    hopper.cudnn = _nan_backward
    q, k, v = _tensors()
    with pytest.warns(BackendWarning, match="flash attention runs for bfloat16.*q's gradient is not finite") as said:
        attend(q, k, v)
    assert len(said) == 1
    assert said[0].filename == __file__
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        attend(q, k, v)
        out = attend(q, k, v)
    assert hopper.called == ["sdpa-flash"] * 3
    assert len(hopper.checks) == 1
    torch.testing.assert_close(out, attend(q, k, v, backend="sdpa-math"), rtol=0.02, atol=0.02)
    assert decide(q, k, v).why == "cuDNN failed the self-check: q's gradient is not finite"

    block = Block(32, 2, 16)
    line = explain(block).parts["attention, kernel"]
    assert "up to 8 queries and 8 keys: cuDNN failed the self-check: q's gradient is not finite" in line
    assert "nothing checked yet" in explain(Block(48, 2, 16)).parts["attention, kernel"]
    found = {f.name: f for f in doctor._attention()}
    assert found["cpu, 2049 by 2049"].status == doctor.NOTE
    assert "q's gradient is not finite" in found["cpu, 2049 by 2049"].detail
    assert found["cpu, 2049 by 2049"].value == "sdpa-flash in bfloat16"
    assert found["cpu, 1 by 2049"].status == doctor.OK


def test_a_right_cudnn_shows_too(hopper):
    attend(*_tensors())
    assert explain(Block(32, 2, 16)).parts["attention, kernel"].endswith("up to 8 queries and 8 keys: passed)")
    found = {f.name: f for f in doctor._attention()}
    assert (found["cpu, 2049 by 2049"].status, found["cpu, 2049 by 2049"].value) == (doctor.OK, "sdpa-cudnn in bfloat16")
    assert found["cpu, 1 by 2049"].value == "sdpa-flash in bfloat16"


def test_here_doctor_and_explain_say_the_cpus():
    assert explain(Block(32, 2, 16)).parts["attention, kernel"].startswith("sdpa: PyTorch's own order")
    assert explain(Block(32, 2, 16, attention="sdpa-math")).parts["attention, kernel"] == "sdpa-math: named"
    found = {f.name: f for f in doctor._attention()}
    assert found["cpu, 2049 by 2049"].value == "sdpa-flash in bfloat16"
    assert set(PACKAGES) <= set(found)


def test_threads_that_come_at_once_get_one_verdict_and_one_warning(hopper):
    hopper.cudnn = _nan_backward
    start, kernels = threading.Barrier(8), []

    def run() -> None:
        start.wait()
        kernels.append(decide(*_tensors()).kernel)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert kernels == ["sdpa-flash"] * 8
    assert len(module.CHECKED) == 1
    assert len(said) == 1


def test_a_single_query_never_goes_to_cudnn(hopper):
    for keys in (1, 2, 2049):
        attend(*_tensors(1, keys))
    assert hopper.called == ["sdpa-flash"] * 3
    assert not hopper.checks


def test_capture_does_not_check(hopper):
    hopper.capturing = True
    with pytest.warns(BackendWarning, match="was not checked before this CUDA graph was captured") as said:
        attend(*_tensors())
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(*_tensors())
    assert hopper.called == ["sdpa-flash"] * 2
    assert not hopper.checks
    assert not module.CHECKED
    hopper.capturing = False
    attend(*_tensors())
    hopper.capturing = True
    attend(*_tensors())
    assert len(hopper.checks) == 1
    assert hopper.called == ["sdpa-cudnn"] * 2


def test_another_order_of_pytorchs_is_kept(hopper):
    """Where cuDNN is switched off, or too old for PyTorch to put it first, SDPA itself runs."""
    hopper.own = "sdpa-efficient"
    tensors = _tensors()
    assert torch.equal(attend(*tensors), F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in tensors)).transpose(1, 2))
    assert not hopper.called
    assert not hopper.checks


def test_under_transforms_and_for_tensors_that_are_not_there_nothing_is_checked(hopper):
    q, k, v = _tensors(dtype=torch.float16)
    gradient = torch.func.grad(lambda q: attend(q, k, v).float().sum())(q)
    leaf = q.clone().requires_grad_()
    attend(leaf, k, v, backend="sdpa-math").float().sum().backward()
    torch.testing.assert_close(gradient, leaf.grad, rtol=0.02, atol=0.02)
    mode = FakeTensorMode()
    assert attend(*(mode.from_tensor(t) for t in (q, k, v))).shape == q.shape
    assert not hopper.checks
    assert "sdpa-cudnn" not in hopper.called


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("backend", ["auto", "sdpa", *ON_CPU])
def test_under_torch_compile_nothing_is_checked(backend, queries, hopper):
    torch._dynamo.reset()
    tensors = _tensors(queries)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, backend=backend), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), attend(*tensors, backend="sdpa-math"), rtol=0.02, atol=0.02)
    assert not hopper.checks
    assert not module.CHECKED


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_first_use_may_be_within_a_checkpoint(reentrant, hopper):
    q, k, v = (t.requires_grad_() for t in _tensors())
    out = checkpoint(lambda q, k, v: attend(q * 1, k, v), q, k, v, use_reentrant=reentrant)
    out.float().sum().backward()
    assert len(hopper.checks) == 1
    assert q.grad.isfinite().all()


def test_under_autocast_the_dtype_is_that_which_runs(hopper):
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*_tensors(dtype=torch.float32))
    assert out.dtype == torch.bfloat16
    assert hopper.checks == [(CPU, torch.bfloat16, 16, 5, 7)]


# ------------------------------------------------------------------------------------------------------- kernels and their flags


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("name", ON_CPU)
def test_a_named_kernel_is_sdpas(name, dtype, autocast):
    """Bit by bit with its gradients, though no flag is set."""

    def flagged(q, k, v):
        with sdpa_kernel(SDPA[name]):
            return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=0.3).transpose(1, 2)

    found = []
    for run in (functools.partial(attend, backend=name, scale=0.3), flagged):
        inputs = [t.requires_grad_() for t in _tensors(dtype=dtype)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run(*inputs)
        found.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["sdpa-efficient", "sdpa-cudnn"])
def test_a_named_kernel_that_cannot_run_raises(name):
    with pytest.raises(RuntimeError, match=f"attention='{name}' cannot run for q .*; name another backend"):
        attend(*_tensors(), backend=name)


def test_flash_is_refused_what_it_would_read_wrongly():
    q, k, v = _tensors(16, 16, 16)
    with pytest.raises(RuntimeError, match="attention='sdpa-flash' cannot run"):
        attend(q.transpose(1, 3), k.transpose(1, 3), v.transpose(1, 3), backend="sdpa-flash")


def test_no_flag_is_set(monkeypatch):
    """Not for a moment: what sets one raises."""

    def refuse(*_):
        raise AssertionError("a process-wide flag was set")

    for setter in [name for name in dir(torch._C) if name.startswith("_set_sdp_")]:
        monkeypatch.setattr(torch._C, setter, refuse)
    tensors = _tensors()
    with pytest.raises(AssertionError, match="process-wide"), sdpa_kernel(SDPA["sdpa-math"]):
        pass
    for backend in ("auto", "sdpa", *ON_CPU):
        attend(*tensors, backend=backend)


def test_threads_do_not_mix_their_kernels():
    tensors = _tensors(64, 96, dtype=torch.float32)
    wanted = {name: attend(*tensors, backend=name) for name in ON_CPU}
    assert not torch.equal(*wanted.values())
    wanted["auto"] = wanted["sdpa-flash"]
    wrong: list[str] = []

    def run(name: str) -> None:
        for _ in range(200):
            if not torch.equal(attend(*tensors, backend=name), wanted[name]):
                wrong.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in [*wanted] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


SCHEMAS = {
    "_scaled_dot_product_cudnn_attention": (
        "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask scale",
        9,
    ),
    "_scaled_dot_product_cudnn_attention_backward": (
        "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q cum_seq_k max_q max_k dropout_p is_causal"
        " scale",
        3,
    ),
    "_scaled_dot_product_flash_attention": ("query key value dropout_p is_causal return_debug_mask scale", 9),
    "_scaled_dot_product_flash_attention_backward": (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal philox_seed philox_offset scale",
        3,
    ),
    "_scaled_dot_product_flash_attention_for_cpu": ("query key value dropout_p is_causal attn_mask scale", 2),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "grad_out query key value out logsumexp dropout_p is_causal attn_mask scale",
        3,
    ),
    "_scaled_dot_product_efficient_attention": ("query key value attn_bias compute_log_sumexp dropout_p is_causal scale", 4),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_pytorchs_operators_have_the_arguments_that_are_passed(name):
    schema = getattr(torch.ops.aten, name).default._schema
    arguments, returns = SCHEMAS[name]
    assert " ".join(a.name for a in schema.arguments) == arguments
    assert len(schema.returns) == returns
    if name in ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention"):
        assert [str(r.type) for r in schema.returns] == ["Tensor"] * 4 + ["int"] * 2 + ["Tensor"] * 3


@pytest.fixture
def cudnn_on_cpu() -> Iterator[list[tuple]]:
    """PyTorch's cuDNN operators computed by its flash kernel for CPUs; the arguments of every backward beside q, k, v and their like."""
    aten, rest = torch.ops.aten, []

    def forward(q, k, v, bias, logsumexp, dropout=0.0, causal=False, debug=False, *, scale=None):
        assert logsumexp
        out, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        starts = torch.tensor([1]), torch.tensor([2])
        return out, sums, *starts, q.shape[2], k.shape[2], torch.tensor(3), torch.tensor(4), out.new_empty(0)

    def backward(grad, q, k, v, out, sums, *others, scale=None):
        rest.append((*others, scale))
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, sums, 0.0, False, scale=scale)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_dot_product_cudnn_attention", forward, "CPU")
        library.impl("_scaled_dot_product_cudnn_attention_backward", backward, "CPU")
        yield rest


def test_cudnn_that_makes_q_and_k_again_is_called_as_autograd_calls_it(cudnn_on_cpu, monkeypatch):
    monkeypatch.setattr(module, "_own", lambda *_: "sdpa-cudnn")
    monkeypatch.setattr(module, "_arch", lambda *_: 90)
    monkeypatch.setattr(module, "CHECKED", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kept: list[torch.Tensor] = []

    def plain(q, k, v):
        return attend(q, k, v, scale=0.3)

    def again(q, k, v):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            return attend(q * 1.0, k * 1.0, v, scale=0.3, again=(lambda q, k: (q * 1.0, k * 1.0), (q, k)))

    found = []
    for run in (plain, again):
        inputs = [t.requires_grad_() for t in _tensors()]
        out = run(*inputs)
        assert ("Again" in type(out.grad_fn.next_functions[0][0]).__name__) is (run is again)
        found.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert list(module.CHECKED.values()) == [None]
    checks, by_autograd, by_us = cudnn_on_cpu
    assert len(checks) == len(by_autograd) == len(by_us)
    assert by_autograd == by_us == (torch.tensor(3), torch.tensor(4), None, torch.tensor([1]), torch.tensor([2]), 5, 7, 0.0, False, 0.3)
    assert len(kept) == 9  # what q and k are made of, v, the output and the six that cuDNN returns beside it
    assert {t.data_ptr() for t in inputs} <= {t.data_ptr() for t in kept}


# -------------------------------------------------------------------------------------------------------------------- packages


@pytest.fixture
def packages() -> Iterator[None]:
    module._package.cache_clear()
    yield
    module._package.cache_clear()


@pytest.mark.parametrize("returns_sums", [False, True])
@pytest.mark.parametrize("name", PACKAGES)
def test_flash_attn_of_every_version(name, returns_sums, packages, monkeypatch):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        assert not causal
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=softmax_scale).transpose(1, 2)
        return (out, None) if returns_sums else out

    path = PACKAGES[name][0]
    for parent in (path.partition(".")[0], path):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    sys.modules[path].flash_attn_func = flash_attn_func
    assert check_backend(name) == name
    tensors = _tensors()
    torch.testing.assert_close(attend(*tensors, backend=name, scale=0.3), attend(*tensors, backend="sdpa", scale=0.3))


@pytest.mark.parametrize("name", PACKAGES)
def test_flash_attn_that_is_missing(name, packages, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name][0], None)
    with pytest.raises(RuntimeError, match=f"attention='{name}' cannot run: {PACKAGES[name][0]}.flash_attn_func cannot be") as raised:
        Block(16, 2, 16, attention=name)
    assert PACKAGES[name][1] in str(raised.value)
    assert "name another backend" in str(raised.value)


def test_auto_does_not_import_flash_attn_where_it_is_not_taken(packages, hopper):
    attend(*_tensors())
    assert module._package.cache_info().currsize == 0


# -------------------------------------------------------------------------------------------------------------------- on a GPU

REAL = [(2, 2049, 2049, 12, 64), (32, 1, 2049, 12, 64), (4, 1025, 1025, 12, 64), (2, 257, 1281, 16, 64), (8, 2, 2, 12, 64)]


def _on_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    batch, queries, keys, heads, head = shape
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, n, heads, head, generator=generator).cuda().to(dtype).requires_grad_() for n in (queries, keys, keys)]


def _by_heads(name: str) -> Callable[..., torch.Tensor]:
    return lambda q, k, v: attend(*(t.transpose(1, 2) for t in (q, k, v)), backend=name).transpose(1, 2)


def _exact(tensors: list[torch.Tensor], cotangent: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Math attention's output and gradients, sample by sample."""
    found = []
    for *sample, grad in zip(*tensors, cotangent, strict=True):
        q, k, v = inputs = [t.detach().to(dtype).requires_grad_() for t in sample]
        logits = torch.einsum("qhd,khd->hqk", q * q.shape[-1] ** -0.5, k)
        out = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))])
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("remade", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_auto_on_a_gpu_is_finite_and_right(shape, dtype, remade):
    tensors = _on_gpu(shape, dtype)
    q, k, v = tensors
    found = decide(q, k, v)
    assert found.kernel != "sdpa-cudnn" or shape[1] > 1
    again = (lambda q, k: (q * 1, k * 1), (q, k)) if remade else None
    out = attend(q * 1, k * 1, v, again=again)
    cotangent = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, tensors, cotangent)]
    exact, usual = (_exact(tensors, cotangent, wide) for wide in (torch.float64, dtype))
    for a, b, x in zip(ours, usual, exact, strict=True):
        assert a.isfinite().all()
        assert (a - x).abs().max() <= 2 * (b - x).abs().max() + torch.finfo(dtype).eps * x.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_making_again_on_a_gpu_changes_no_bit_of_the_output(shape):
    q, k, v = _on_gpu(shape, torch.bfloat16)
    out = attend(q, k, v)
    assert torch.equal(out, attend(q, k, v, again=(lambda q, k: (q, k), (q, k))))
    with torch.no_grad():
        torch.testing.assert_close(out, attend(q, k, v), rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SDPA)
@pytest.mark.parametrize("head", [40, 44, 64])
def test_every_kernel_on_a_gpu_is_that_of_sdpa(name, head):
    tensors = [t.cuda().requires_grad_() for t in _tensors(65, 129, head)]
    heads = [t.transpose(1, 2) for t in tensors]
    with sdpa_kernel(SDPA[name]):
        try:
            wanted = F.scaled_dot_product_attention(*heads)
        except RuntimeError:
            with pytest.raises(RuntimeError, match="cannot run"):
                attend(*tensors, backend=name)
            return
    out = attend(*tensors, backend=name)
    assert torch.equal(out, wanted.transpose(1, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("head", [40, 44, 64])
def test_auto_on_a_gpu_passes_the_check(head):
    assert self_check(_by_heads("auto"), torch.device("cuda", 0), torch.bfloat16, head, 65, 129) is None


@pytest.mark.gpu
def test_capture_after_a_first_use_keeps_the_kernel():
    tensors = [t.detach() for t in _on_gpu((2, 257, 257, 12, 64), torch.bfloat16)]
    eager = attend(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*tensors)
    graph.replay()
    assert torch.equal(out, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKAGES)
def test_packages_on_a_gpu(name):
    try:
        check_backend(name)
    except RuntimeError as problem:
        pytest.skip(str(problem))
    assert self_check(_by_heads(name), torch.device("cuda", 0), torch.bfloat16, 64, 257, 257) is None
