"""Every op at the shapes of the models, forward and with its backward: reference, torch.compile of it, kernels."""

from __future__ import annotations

import pytest
import torch

from deltakern.cases import Case, cases
from deltakern.report import collect

TIMED = [pytest.param(case, id=f"{case.op}-{case.name}") for case in cases(tag="benchmark")]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", TIMED)
def test_op(case: Case, backward: bool, benchmark, request, device, dtype, where, checked, record):
    """All implementations take turns; pytest-benchmark's own table shows the one that ``impl="auto"`` takes."""
    if backward and not case.differentiable:
        pytest.skip("has no gradient")
    try:
        made = collect.op_rows(
            case,
            device,
            dtype,
            most_bytes=1 << 26 if device.type == "cpu" else 1 << 40,
            budget=request.config.getoption("--budget"),
            compiled=True,
            backward=backward,
            checked=checked,
            where=where,
        )
    except collect.RedError as problem:
        pytest.fail(f"no speed: {problem}", pytrace=False)
    record(made)
    benchmark.group = f"{case.op} {'forward and backward' if backward else 'forward'}"
    benchmark.extra_info.update({row.impl: row.seconds for row in made})
    args, kwargs = case.make(dtype, device, torch.Generator().manual_seed(0), made[0].shape["scale"])
    if backward:
        call = collect.forward_backward(case.function, args, kwargs, case.differentiable)
    else:

        def call():
            with torch.no_grad():
                return case.function(*args, **kwargs)

    def timed():
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.pedantic(timed, rounds=5, iterations=1, warmup_rounds=1)
