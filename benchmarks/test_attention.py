"""Every attention that can run here, at the encoder's shape and at a single query's: forward, and with its backward.

``pytest benchmarks/test_attention.py -s`` prints the table. What fails the self-check has no time; what cannot run says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from benchmarks.measure import apart
from deltakern.nn import attend
from deltakern.nn.attend import BACKENDS, check_backend, decide
from deltakern.nn.self_check import self_check
from deltakern.report import collect, latency

SHAPES = {"cuda": ((32, 2049, 2049, 12, 64), (32, 1, 2049, 12, 64)), "cpu": ((1, 513, 513, 12, 64), (1, 1, 513, 12, 64))}
"""Batch, queries, keys, heads, head size."""


def _by_heads(backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend(*(t.transpose(1, 2) for t in (q, k, v)), backend=backend).transpose(1, 2)


def _call(backend: str, tensors: list[torch.Tensor], cotangent: torch.Tensor | None) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return attend(*tensors, backend=backend)

    def both() -> object:
        return torch.autograd.grad(attend(*tensors, backend=backend), tensors, cotangent)

    return forward if cotangent is None else both


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("which", [0, 1], ids=["all-queries", "one-query"])
def test_attention(which, backward, device, dtype, request, capsys):
    batch, queries, keys, heads, head = shape = SHAPES[device.type][which]
    draws = torch.Generator().manual_seed(0)
    tensors = [torch.randn(batch, n, heads, head, generator=draws).to(device, dtype) for n in (queries, keys, keys)]
    cotangent = torch.randn(tensors[0].shape, generator=draws).to(device, dtype) if backward else None
    tensors = [t.requires_grad_(backward) for t in tensors]
    calls, missing = {}, {}
    for name in BACKENDS:
        try:
            check_backend(name)
            decide(*tensors, backend=name)
        except RuntimeError as problem:
            missing[name] = str(problem)
            continue
        if problem := self_check(functools.partial(_by_heads, name), device, dtype, head, queries, keys):
            missing[name] = f"no speed: {problem}"
        else:
            calls[name] = _call(name, tensors, cotangent)
    times = latency.interleaved(calls, device, budget=request.config.getoption("--budget"))
    with capsys.disabled():
        print(f"\nattention {shape}, {str(dtype)[6:]}, {'forward and backward' if backward else 'forward'}; auto is {decide(*tensors)}")
        for name, timing in sorted(times.items(), key=lambda item: item[1].seconds):
            figures = apart(collect.gpu_figures(calls[name], device)) if device.type == "cuda" else ""
            print(f"  {name:15s} median {1e3 * timing.seconds:8.3f} ms, from {1e3 * timing.low:.3f} to {1e3 * timing.high:.3f}{figures}")
        for name, problem in missing.items():
            print(f"  {name:15s} {problem}")
    assert "auto" in times, missing["auto"]
