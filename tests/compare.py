"""The one tolerance rule: against float64, a kernel may err at most twice as much as plain torch in the same dtype, plus eps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def relative_rmse(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the error over that of the truth. Non-finite values must agree exactly and then do not count."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    assert value.shape == truth.shape, f"shape {tuple(value.shape)} against {tuple(truth.shape)}"
    finite = truth.isfinite()
    assert torch.equal(finite, value.isfinite()), "non-finite values are not where the truth has them"
    odd = ~finite
    assert torch.equal(truth[odd].nan_to_num(nan=0.5), value[odd].nan_to_num(nan=0.5)), "infinities and NaNs differ"
    value, truth = value[finite], truth[finite]
    if truth.numel() == 0:
        return 0.0
    norm = truth.square().mean().sqrt().item()
    error = (value - truth).square().mean().sqrt().item()
    return error / norm if norm > 0 else error


def assert_as_accurate(
    kernel: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, *, name: str = "output", factor: float = 2.0
) -> None:
    """``kernel`` errs from ``truth`` (float64) at most ``factor`` times as much as ``plain``, plus one eps of its dtype."""
    eps = torch.finfo(kernel.dtype).eps
    ours, theirs = relative_rmse(kernel, truth), relative_rmse(plain.to(kernel.dtype), truth)
    assert ours <= factor * theirs + eps, f"{name}: relative RMSE {ours:.3e}, plain torch {theirs:.3e}, eps {eps:.1e}"


def to_double(args: Sequence[Any]) -> list[Any]:
    """A float64 copy of every floating tensor; the rest as it is."""
    return [a.detach().double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def outputs_and_grads(
    function: Callable[..., Any], args: Sequence[Any], differentiable: Sequence[int], cotangents: Sequence[torch.Tensor], **kwargs: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs of ``function(*args)`` and the gradients, for the given cotangents, of ``args[i]`` for i in ``differentiable``."""
    args = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
    for i in differentiable:
        args[i].requires_grad_(True)
    out = function(*args, **kwargs)
    out = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    pairs = [(o, c) for o, c in zip(out, cotangents, strict=False) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in pairs], [args[i] for i in differentiable], [c.to(o.dtype) for o, c in pairs])
    return [o.detach() for o in out], list(grads)
