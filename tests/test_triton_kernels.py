"""Every op with a Triton kernel, every tiny case of the registry: the checks of ``kernel_checks.py``."""

from __future__ import annotations

import pytest
import torch
from compare import to_double
from kernel_checks import (
    LibraryCalls,
    assert_case_accurate,
    far_apart,
    forward_backward,
    inputs,
    random_cotangents,
    run_kernel,
    sliced,
    transposed,
)

from deltakern import backend, launch, ops
from deltakern.cases import Case, cases
from deltakern.ops import _triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = [name for name, op in backend.ops().items() if "triton" in op.kernels]
CASES = [case for name in OPS for case in cases(name, "tiny")]
FIRST = [cases(name, "tiny")[0] for name in OPS if cases(name, "tiny")]


def named(case: Case) -> str:
    return f"{case.op}-{case.name}"


every_case = pytest.mark.parametrize("case", CASES, ids=named)
first_case = pytest.mark.parametrize("case", FIRST, ids=named)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.mark.parametrize("op", OPS)
def test_has_cases(op: str) -> None:
    assert cases(op, "tiny"), "no tiny case: no kernel of this op is tested"
    assert cases(op, "real"), "no real case: no kernel of this op is compiled ahead of time"


@every_dtype
@every_case
def test_as_accurate_as_torch(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    assert_case_accurate(case, dtype, device)


@every_case
def test_each_gradient_alone(case: Case, device: torch.device) -> None:
    for i in case.differentiable:
        assert_case_accurate(case, torch.float32, device, wanted=(i,))


@every_case
def test_each_output_alone(case: Case, device: torch.device) -> None:
    args, kwargs = inputs(case, torch.float32, device)
    outs, _ = forward_backward(case.function.reference, args, kwargs, (), random_cotangents())
    for i in range(len(outs)):
        assert_case_accurate(case, torch.float32, device, only=i)


@pytest.mark.parametrize("lay", [sliced, transposed], ids=lambda f: f.__name__)
@every_case
def test_strided(case: Case, lay, device: torch.device) -> None:
    assert_case_accurate(case, torch.bfloat16, device, lay=lay)


@pytest.mark.large
@every_case
def test_offsets_past_31_bits(case: Case, device: torch.device) -> None:
    assert_case_accurate(case, torch.bfloat16, device, lay=far_apart)


@every_case
def test_expanded_gradients(case: Case, device: torch.device) -> None:
    """``out.sum().backward()`` hands in a gradient with every stride zero."""
    args, kwargs = inputs(case, torch.float32, device)
    kwargs["impl"] = "triton"

    def dense(output: torch.Tensor, index: int) -> torch.Tensor:
        return torch.ones_like(output)

    def expanded(output: torch.Tensor, index: int) -> torch.Tensor:
        return torch.ones((), dtype=output.dtype, device=device).expand(output.shape)

    _, wanted = forward_backward(case.function, args, kwargs, case.differentiable, dense)
    _, grads = forward_backward(case.function, args, kwargs, case.differentiable, expanded)
    for ours, theirs in zip(grads, wanted, strict=True):
        assert torch.equal(ours, theirs)


@every_case
def test_inputs_and_incoming_gradients_stay(case: Case, device: torch.device) -> None:
    args, kwargs = inputs(case, torch.bfloat16, device)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def remembered(output: torch.Tensor, index: int) -> torch.Tensor | None:
        made = random_cotangents()(output, index)
        if made is not None:
            given.append((made, made.clone()))
        return made

    outs, _ = forward_backward(case.function, args, {**kwargs, "impl": "triton"}, case.differentiable, remembered)
    assert given or not case.differentiable
    for now, then in [*zip(args, before, strict=True), *given]:
        if isinstance(now, torch.Tensor):
            assert torch.equal(now, then)
    for out in outs:
        assert all(out.data_ptr() != a.data_ptr() for a in args if isinstance(a, torch.Tensor) and a.numel())


@every_case
def test_backward_leaves_what_it_saved(case: Case, device: torch.device) -> None:
    """A second backward through the same graph gives the same bits, and the outputs have not moved."""
    if not case.differentiable:
        pytest.skip("has no gradient")
    args, kwargs = inputs(case, torch.bfloat16, device)
    for i in case.differentiable:
        args[i].requires_grad_(True)
    out = case.function(*args, **kwargs, impl="triton")
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    before = [o.detach().clone() for o in outs]
    cotangents = [random_cotangents()(o, i) for i, o in enumerate(outs)]
    wanted = [args[i] for i in case.differentiable]
    first = torch.autograd.grad(outs, wanted, cotangents, retain_graph=True)
    second = torch.autograd.grad(outs, wanted, cotangents)
    for a, b in [*zip(first, second, strict=True), *zip(before, outs, strict=True)]:
        assert torch.equal(a, b)


@every_case
def test_same_bits_again(case: Case, device: torch.device) -> None:
    args, kwargs = inputs(case, torch.bfloat16, device)
    first, second = run_kernel(case, args, kwargs), run_kernel(case, args, kwargs)
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


@every_case
def test_recording_changes_nothing(case: Case, device: torch.device) -> None:
    args, kwargs = inputs(case, torch.bfloat16, device)
    recorded, _ = run_kernel(case, args, kwargs)
    with torch.no_grad():
        plain, _ = forward_backward(case.function, args, {**kwargs, "impl": "triton"}, (), random_cotangents())
    for a, b in zip(recorded, plain, strict=True):
        assert torch.equal(a, b)


@every_case
def test_launches_kernels(case: Case, device: torch.device) -> None:
    args, kwargs = inputs(case, torch.float32, device)
    with torch.no_grad(), _triton.count_launches() as forward:
        case.function(*args, **kwargs, impl="triton")
    assert forward.total() > 0
    with _triton.count_launches() as none:
        case.function(*args, **kwargs, impl="reference")
    assert none.total() == 0


@pytest.mark.parametrize("op", OPS)
def test_backward_launches_kernels(op: str, device: torch.device) -> None:
    """In the first case of each op; a sum without scale or norm, for one, hands its gradient on and starts nothing."""
    case = cases(op, "tiny")[0]
    if not case.differentiable:
        pytest.skip("has no gradient")
    args, kwargs = inputs(case, torch.float32, device)
    with _triton.count_launches() as forward:
        forward_backward(case.function, args, {**kwargs, "impl": "triton"}, (), random_cotangents())
    with _triton.count_launches() as both:
        run_kernel(case, args, kwargs)
    assert both.total() > forward.total()


@every_case
def test_library_ops_pass_opcheck(case: Case, device: torch.device) -> None:
    args, kwargs = inputs(case, torch.float32, device)
    with LibraryCalls() as recorded:
        run_kernel(case, args, kwargs)
    assert recorded.calls
    for func, func_args, func_kwargs in recorded.calls:
        func_args = [a.detach() if isinstance(a, torch.Tensor) else a for a in func_args]
        fewer = {} if case in FIRST else {"test_utils": ("test_schema", "test_faketensor")}  # tracing again would show nothing new
        torch.library.opcheck(func, func_args, func_kwargs, **fewer)


@first_case
def test_library_op_refuses_to_be_recorded(case: Case, device: torch.device) -> None:
    """It has no gradient of its own, and torch would drop the missing term without an error."""
    args, kwargs = inputs(case, torch.float32, device)
    with LibraryCalls() as recorded, torch.no_grad():
        case.function(*args, **kwargs, impl="triton")
    func, func_args, _ = recorded.calls[0]
    func_args = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in func_args]
    with pytest.raises(RuntimeError, match="has no gradient of its own"):
        func(*func_args)


@pytest.mark.parametrize(
    ("case", "dynamic"), [(c, False) for c in CASES] + [(c, True) for c in FIRST], ids=lambda v: named(v) if isinstance(v, Case) else str(v)
)
def test_compiles_in_one_graph(case: Case, dynamic: bool, device: torch.device) -> None:
    args, kwargs = inputs(case, torch.bfloat16, device)
    eager = run_kernel(case, args, kwargs)
    torch._dynamo.reset()

    def call(*call_args):
        return case.function(*call_args, **kwargs, impl="triton")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with _triton.count_launches() as counted:
        graphed = forward_backward(compiled, args, {}, case.differentiable, random_cotangents())
    assert counted.total() > 0
    for ours, theirs in zip(graphed, eager, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("incoming", ["recorded", "constant"])
@first_case
def test_double_backward_raises(case: Case, incoming: str, device: torch.device) -> None:
    """Where the incoming gradient needs a gradient itself, and where it is a constant, as that of a sum."""
    if not case.differentiable:
        pytest.skip("has no gradient")
    args, kwargs = inputs(case, torch.float32, device)
    for i in case.differentiable:
        args[i].requires_grad_(True)
    out = case.function(*args, **kwargs, impl="triton")
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    loss = sum(o.square().sum() if incoming == "recorded" else o.sum() for o in outs)
    wanted = [args[i] for i in case.differentiable]
    for gradient in torch.autograd.grad(loss, wanted, create_graph=True):
        with pytest.raises(RuntimeError, match=rf"{case.op}: a second derivative is not supported"):
            gradient.sum().backward(retain_graph=True)
        if case.op != "recon_loss":  # it keeps neither input, so that no way leads back to them
            with pytest.raises(RuntimeError, match=rf"{case.op}: a second derivative is not supported"):
                torch.autograd.grad(gradient.sum(), wanted, retain_graph=True, allow_unused=True)


def test_a_gradient_of_an_incoming_one_leaves_its_flag_alone(device: torch.device) -> None:
    """A sum without scale or norm hands the incoming gradient on."""
    stream, branch = torch.randn(2, 3, 5, device=device).requires_grad_().unbind(0)
    incoming = torch.randn(3, 5, device=device)
    total, _ = ops.residual_norm(stream, branch, None, None, None, impl="triton")
    torch.autograd.grad(total, [stream, branch], incoming, create_graph=True)
    assert not incoming.requires_grad


@first_case
def test_refuses_float64(case: Case, device: torch.device) -> None:
    args, kwargs = inputs(case, torch.float32, device)
    with pytest.raises(backend.BackendError, match=r"impl='triton' cannot run.*float64"):
        case.function(*to_double(args), **kwargs, impl="triton")


@first_case
def test_refuses_a_cpu_without_the_interpreter(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    args, kwargs = inputs(case, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(backend, "triton_interprets", lambda: False)
    launch.forget_plans()
    try:
        with pytest.raises(backend.BackendError, match="interpreter is off"):
            case.function(*args, **kwargs, impl="triton")
    finally:
        launch.forget_plans()


@every_case
def test_gradients_of_the_reference(case: Case) -> None:
    if not case.differentiable:
        pytest.skip("has no gradient")
    args, kwargs = inputs(case, torch.float64, torch.device("cpu"))
    kwargs = {k: v for k, v in kwargs.items() if not isinstance(v, torch.dtype)}
    args = to_double(args)

    def call(*leaves):
        full = list(args)
        for i, leaf in zip(case.differentiable, leaves, strict=True):
            full[i] = leaf
        out = case.function.reference(*full, **kwargs)
        return tuple(o for o in out if o is not None) if isinstance(out, tuple) else out

    assert torch.autograd.gradcheck(call, [args[i].requires_grad_() for i in case.differentiable], fast_mode=True)
