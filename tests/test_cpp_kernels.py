"""Every op with a C++ kernel that has gradients and dtypes of its own: the checks of ``kernel_checks.py``, tracing, the choice of it."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from kernel_checks import (
    LibraryCalls,
    assert_case_accurate,
    far_apart,
    forward_backward,
    inputs,
    random_cotangents,
    run_kernel,
    same,
    sliced,
    transposed,
)

import deltakern
from deltakern import backend, launch
from deltakern.cases import Case, cases

pytestmark = pytest.mark.skipif(backend.extension().module is None, reason=f"no compiled extension: {backend.extension().error}")
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# best_of_n has tests of its own; best_of_n_head's is made of that and the library's product
OPS = ["rope_qk_norm", "split_qkv", "context_attention"]
FORWARD = {"split_qkv": "rope_qk_norm"}  # whose forward kernel it is


def of_models(op: str, *names: str) -> list[Case]:
    """Cases of the models' heads of 64 channels, few clips of them."""
    by_name = {case.name: case for case in cases(op)}
    return [dataclasses.replace(by_name[n], make=lambda *a, case=by_name[n]: case.make(*a[:3], 1e-6)) for n in names]


CASES = [case for op in OPS for case in cases(op, "tiny")]
CASES += of_models("rope_qk_norm", "encoder-512", "encoder-512-post-rope", "encoder-512-last", "backbone-512")
CASES += of_models("context_attention", "chosen", "rollout", "rollout-own")
FIRST = [cases(op, "tiny")[0] for op in OPS]


def named(case: Case) -> str:
    return f"{case.op}-{case.name}"


each_case = pytest.mark.parametrize("case", CASES, ids=named)
first_case = pytest.mark.parametrize("case", FIRST, ids=named)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def everything(tensors) -> tuple[torch.Tensor, ...]:
    return tuple(t for t in (tensors if isinstance(tensors, tuple) else (tensors,)) if t is not None)


@each_dtype
@each_case
def test_as_accurate_as_plain_torch(case: Case, dtype: torch.dtype):
    assert_case_accurate(case, dtype, CPU, impl="cpp")


@pytest.mark.parametrize("lay", [sliced, transposed], ids=lambda f: f.__name__)
@each_case
def test_layouts(case: Case, lay):
    assert_case_accurate(case, torch.float32, CPU, lay=lay, impl="cpp")


@each_case
def test_offsets_beyond_2_to_31(case: Case):
    assert_case_accurate(case, torch.bfloat16, CPU, lay=far_apart, impl="cpp")


@each_case
def test_inputs_and_incoming_gradients_are_left_alone(case: Case):
    args, kwargs = inputs(case, torch.float32, CPU)
    held = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    kept, given = [t.clone() for t in held], []

    def cotangents(output, index):
        made = random_cotangents()(output, index)
        given.append((made, made.clone()))
        return made

    forward_backward(case.function, args, {**kwargs, "impl": "cpp"}, case.differentiable, cotangents)
    for now, before in [*zip(held, kept, strict=True), *given]:
        assert torch.equal(now.detach(), before)


@each_case
def test_library_ops_pass_opcheck(case: Case):
    args, kwargs = inputs(case, torch.float32, CPU)
    with LibraryCalls() as seen:
        run_kernel(case, args, kwargs, impl="cpp")
    forward = FORWARD.get(case.op, case.op)
    assert {func._schema.name for func, _, _ in seen.calls} == {f"deltakern::{forward}_forward_cpp", f"deltakern::{case.op}_backward_cpp"}
    for func, given, options in seen.calls:
        torch.library.opcheck(func, [a.detach() if isinstance(a, torch.Tensor) else a for a in given], options)


@pytest.mark.parametrize("case", [case for op in OPS for case in cases(op, "tiny")[:4]], ids=named)
def test_compiles_in_one_graph_forward_and_backward(case: Case):
    args, kwargs = inputs(case, torch.float32, CPU)
    torch._dynamo.reset()

    def call(*a, **k):
        return case.function(*a, impl="cpp", **k)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    plain = forward_backward(call, args, kwargs, case.differentiable, random_cotangents())
    traced = forward_backward(compiled, args, kwargs, case.differentiable, random_cotangents())
    assert all(same(a, b) for a, b in zip(plain, traced, strict=True))


# --- choice ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    for name in ("DELTAKERN_STRICT", "DELTAKERN_IMPL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backend, "_warned", set())
    launch.forget_plans()
    yield monkeypatch
    launch.forget_plans()


@pytest.mark.usefixtures("fresh")
@first_case
def test_auto_takes_it_on_a_cpu_and_float64_asks_for_the_reference_in_silence(case: Case):
    args, kwargs = inputs(case, torch.float32, CPU)
    assert deltakern.explain(case.function, *args, **kwargs).chosen == "cpp"
    double = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert everything(case.function(*double, **kwargs))[0].dtype == torch.float64
    said = str(deltakern.explain(case.function, *double, **kwargs))
    assert f"{case.op}: reference (float64 is the reference's)" in said
    assert "not cpp: the kernel takes float32, bfloat16, float16, got float64" in said


@first_case
def test_without_the_extension_the_reference_runs_and_warns_once(case: Case, fresh):
    fresh.setattr(backend, "extension", lambda: backend.Loaded(None, "ImportError: none was built"))
    args, kwargs = inputs(case, torch.float32, CPU)
    with pytest.warns(backend.BackendWarning, match=rf"{case.op}: the PyTorch reference runs.*none was built"):
        found = case.function(*args, **kwargs)
    assert same(everything(found), everything(case.function.reference(*args, **kwargs)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.function(*args, **kwargs)
    with pytest.raises(deltakern.BackendError, match="impl='cpp' cannot run: the compiled extension could not be imported"):
        case.function(*args, impl="cpp", **kwargs)
