"""Inputs of products that the backward makes again instead of keeping them.

The gradient of a product's weight needs the product's input. Where that is a LayerNorm, an activation or a gate, what it was made
of is kept anyway, for its own gradient, and one pass over memory makes it again: a :class:`Fleeting` tensor is passed to
:func:`recomputed_linear` in its place. The same kernels on the same values, so the same bits. Only in eager mode: under torch.compile the
partitioner decides what is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from deltakern import backend
from deltakern.ops._once import once_differentiable

MODES = ("auto", "cheap", "none")


class Fleeting(NamedTuple):
    """A tensor, and how to make it again: ``make(*sources)``."""

    value: torch.Tensor
    make: Callable[..., torch.Tensor]
    sources: tuple[torch.Tensor | None, ...]


def check_mode(mode: str) -> str:
    """Returns ``mode``; raises ValueError where there is no such one."""
    if mode not in MODES:
        raise ValueError(f"recompute must be one of {MODES}, got {mode!r}")
    return mode


def recomputes(mode: str, device_type: str) -> bool:
    """Whether a pass now, on this device, makes cheap tensors again. "auto" does where kernels run: memory is scarce there, and
    a pass over it short; with the reference ops of a CPU it is neither."""
    if mode == "none" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():  # whose gradients are the references'
        return False
    return mode == "cheap" or device_type == "cuda" or backend.preferred() == "triton"


def apply(op: Callable[..., torch.Tensor], *args: torch.Tensor, recompute: bool) -> torch.Tensor | Fleeting:
    """``op(*args)``, one of :mod:`deltakern.ops`, to be made again by the implementation that makes it now."""
    if not recompute:
        return op(*args)
    make = functools.partial(op, impl=backend.chosen(op, *args))
    return Fleeting(make(*args), make, args)


def sources(tensors: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    """Without their graphs: what is made again takes no gradient of its own."""
    return tuple(None if t is None else t.detach() for t in tensors)


def recomputed_linear(x: Fleeting, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear``, which keeps the sources of ``x`` and not ``x``."""
    return _Linear.apply(x.value, weight, bias, x.make, *sources(x.sources))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, make, *made_of):
        ctx.save_for_backward(weight, *made_of)
        ctx.make, ctx.shape = make, x.shape
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable("linear")
    def backward(ctx, grad):
        weight, *made_of = ctx.saved_tensors
        want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
        rows = grad.reshape(-1, grad.shape[-1])
        d_weight = rows.t().mm(ctx.make(*made_of).reshape(-1, weight.shape[1])) if want_weight else None
        d_bias = rows.sum(0) if want_bias else None
        d_x = rows.mm(weight).view(ctx.shape) if want_x else None
        rest: tuple[Any, ...] = (None,) * (1 + len(made_of))
        return d_x, d_weight, d_bias, *rest
