"""Gradients that are differentiated once: what every autograd.Function of the package declares of its backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


class _Refusal(torch.autograd.Function):
    """A gradient that raises where it is itself differentiated."""

    @staticmethod
    def forward(ctx, gradient, name, *_):
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.name}: a second derivative is not supported; impl='reference' has one")


class _Opened:
    """A Function's context whose saved tensors are looked up once: under activation checkpointing a second look raises."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def once_differentiable(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the backward of op ``name``: what it returns raises where it is differentiated again.

    ``torch.autograd.function.once_differentiable`` lets a second derivative be a constant, in silence, where the incoming gradient
    needs none, as that of ``out.sum()`` does: what was saved carries no graph, and its term is lost. Under torch.compile torch
    itself refuses a second derivative.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx, *grads):
            # Grad mode is on where the caller asked for create_graph.
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            if torch.compiler.is_compiling():
                with torch.no_grad():
                    return backward(ctx, *grads)
            ctx = _Opened(ctx)
            with torch.no_grad():
                found = backward(ctx, *grads)
            found = found if isinstance(found, tuple) else (found,)
            # What the gradient depends on goes in too, so that the refusal lies on every way to it. detach, because a gradient
            # may be the incoming one, whose flag is not ours to set.
            beside = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
            return tuple(None if g is None else _Refusal.apply(g.detach().requires_grad_(), name, *beside) for g in found)

        return run

    return decorate


def as_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor.to(dtype)``, which takes as long to find that there is nothing to do as a short kernel to start."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)
