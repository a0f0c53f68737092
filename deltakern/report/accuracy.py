"""How far an implementation of an op is from float64, against how far plain PyTorch is: the package's one tolerance rule.

An implementation passes where, for every output and every gradient, its relative RMS error against the float64 reference is at
most twice that of the reference in the same dtype, plus one eps of that dtype. Integer outputs must be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltakern import backend
from deltakern.cases import Case

FACTOR = 2.0


@dataclass(frozen=True)
class Deviation:
    """One output or gradient: relative RMS errors against float64, and what was allowed."""

    what: str
    error: float
    plain: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN


@dataclass(frozen=True)
class Verdict:
    """One implementation on one case. ``problem`` is empty when all is well."""

    op: str
    case: str
    impl: str
    dtype: str
    device: str
    deviations: tuple[Deviation, ...]
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem

    @property
    def error(self) -> float:
        """The greatest error over outputs and gradients."""
        return max((d.error for d in self.deviations), default=float("nan"))

    @property
    def plain(self) -> float:
        """The greatest error of plain PyTorch in the same dtype."""
        return max((d.plain for d in self.deviations), default=float("nan"))


Tensors = list[torch.Tensor]


def _run(function: Any, args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[int]) -> tuple[Tensors, Tensors]:
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]  # strides stay what the case made them
    for i in wanted:
        args[i].requires_grad_(True)
    out = function(*args, **kwargs)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    pairs = []
    for i, o in enumerate(outs):
        if o.requires_grad:
            noise = torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).bfloat16()  # the same for every dtype
            pairs.append((o, noise.to(o.device, o.dtype)))
    grads: Sequence[torch.Tensor | None] = ()
    if pairs and wanted:
        grads = torch.autograd.grad([o for o, _ in pairs], [args[i] for i in wanted], [c for _, c in pairs], allow_unused=True)
    return [o.detach() for o in outs], [torch.zeros_like(args[i]) if g is None else g for i, g in zip(wanted, grads, strict=False)]


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """RMS of the difference over the RMS of ``truth``; infinite where non-finite values are not where ``truth`` has them."""
    if value.shape != truth.shape:
        return float("inf")
    value, truth = value.double().cpu(), truth.double().cpu()
    finite = truth.isfinite()
    if not torch.equal(finite, value.isfinite()):
        return float("inf")
    value, truth = value[finite], truth[finite]
    if not truth.numel():
        return 0.0
    error, norm = (value - truth).square().mean().sqrt().item(), truth.square().mean().sqrt().item()
    return error / norm if norm else error


def check(case: Case, impl: str, dtype: torch.dtype, device: torch.device | str, *, scale: float = 1.0, seed: int = 0) -> Verdict:
    """Runs one case forward and backward in ``impl`` and judges it.

    Args:
        case: of ``deltakern.cases``.
        impl: an implementation of the case's op that can run here.
        dtype, device: of the inputs.
        scale: shrinks what only repeats work, as ``Case.make`` does.
        seed: of the inputs.
    """
    args, kwargs = case.make(dtype, device, torch.Generator().manual_seed(seed), scale)
    names = {
        "op": case.op,
        "case": case.name,
        "impl": impl,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.device(device).type,
    }
    reference = case.function.reference
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    unrounded = {k: v for k, v in kwargs.items() if not isinstance(v, torch.dtype)}
    try:
        truths = _run(reference, wide, unrounded, case.differentiable)
        plains = _run(reference, args, kwargs, case.differentiable)
        ours = _run(case.function, args, {**kwargs, "impl": impl}, case.differentiable)
    except Exception as problem:  # whatever a kernel raises is a finding, not the end of the report
        return Verdict(**names, deviations=(), problem=f"{type(problem).__name__}: {problem}")
    found, wrong = [], []
    for kind, values, theirs, exact in zip(("output", "gradient"), ours, plains, truths, strict=True):
        for i, (value, plain, truth) in enumerate(zip(values, theirs, exact, strict=True)):
            what = f"{kind} {i}" if kind == "output" else f"gradient of argument {case.differentiable[i]}"
            if not value.is_floating_point():
                if not torch.equal(value.cpu(), truth.cpu()):
                    wrong.append(f"{what} differs from the float64 reference's")
                continue
            error, by_torch = relative_error(value, truth), relative_error(plain.to(value.dtype), truth)
            deviation = Deviation(what, error, by_torch, FACTOR * by_torch + torch.finfo(value.dtype).eps)
            found.append(deviation)
            if not deviation.ok:
                wrong.append(f"{what}: relative error {error:.1e}, allowed {deviation.allowed:.1e}")
    return Verdict(**names, deviations=tuple(found), problem="; ".join(wrong))


def runnable(case: Case, dtype: torch.dtype, device: torch.device | str, *, scale: float = 1.0) -> tuple[list[str], dict[str, str]]:
    """Implementations that can run a case here, the reference first, and why the others cannot."""
    args, kwargs = case.make(dtype, device, torch.Generator().manual_seed(0), scale)
    able, refused = ["reference"], {}
    for name in case.function.op.kernels:
        try:
            backend.explain(case.function, *args, impl=name, **kwargs)
            able.append(name)
        except backend.BackendError as problem:
            refused[name] = str(problem).partition("cannot run: ")[2] or str(problem)
    return able, refused
