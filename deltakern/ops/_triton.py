"""What the ops with kernels share on the host: the library they register in, the one place that starts Triton kernels, row views.

Importing this module does not import Triton: kernels live in ``deltakern/ops/kernels``, imported by the first call that runs one.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deltakern.launch import LibraryOp, count_launches, launch, needs_grad
from deltakern.ops.kernels.tiles import Tile

__all__ = [
    "LIBRARY",
    "architecture",
    "count_launches",
    "define",
    "launch",
    "needs_grad",
    "programs",
    "register",
    "rows",
    "segments",
    "unit",
]

LIBRARY = torch.library.Library("deltakern", "FRAGMENT")
"""Every low-level op is ``torch.ops.deltakern.<name>``."""


@functools.cache
def _kernels(module: str) -> Any:
    return importlib.import_module(f"deltakern.ops.kernels.{module}")


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, raising where autograd is recording: a library op has no formula, and torch would drop its gradient in silence."""

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled():
            for argument in args:
                if isinstance(argument, torch.Tensor) and argument.requires_grad:
                    raise RuntimeError(f"torch.ops.deltakern.{name} has no gradient of its own: call the public op in deltakern.ops")
        return function(*args)

    return run


def define(schema: str, *, module: str, fake: Callable[..., Any]) -> LibraryOp:
    """Registers a low-level op whose implementation is the launcher of the same name in ``deltakern/ops/kernels/<module>.py``.

    The launcher is imported by the first call. It takes the schema's arguments in order, returns new tensors, never writes into an argument
    and does nothing but allocate, operate on tensors and launch, so that its calls can be planned (:mod:`deltakern.launch`). Gradients
    belong to the ``autograd.Function`` that calls the op; a recorded direct call of ``torch.ops.deltakern.<name>`` raises.

    Args:
        schema: as for ``torch.library.define``, ``"name(Tensor x, ...) -> Tensor"``.
        module: file name, without ``.py``, in ``deltakern/ops/kernels``.
        fake: takes the same arguments, returns empty tensors of the shapes, dtypes and strides that the launcher returns.

    Returns:
        The op to call.
    """

    def launcher(*args: Any) -> Any:
        return getattr(_kernels(module), name)(*args)

    name = schema.split("(", 1)[0]
    return _register(schema, {"CPU": launcher, "CUDA": launcher}, fake, plans=True)


def register(schema: str, runs: dict[str, Callable[..., Any]], *, fake: Callable[..., Any]) -> LibraryOp:
    """Registers a low-level op of the extension's, as :func:`define`, with a function for each dispatch key; its calls are not planned."""
    return _register(schema, runs, fake, plans=False)


def _register(schema: str, runs: dict[str, Callable[..., Any]], fake: Callable[..., Any], *, plans: bool) -> LibraryOp:
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key, run in runs.items():
        LIBRARY.impl(name, _guarded(name, run), key)
    torch.library.register_fake(f"deltakern::{name}", _guarded(name, fake), lib=LIBRARY)
    return LibraryOp(getattr(torch.ops.deltakern, name).default, runs, plans=plans)


@functools.cache
def _properties(index: int) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(index)
    return 10 * found.major + found.minor, found.multi_processor_count


def architecture(device: torch.device) -> int:
    """90 for sm_90; 0 where the interpreter runs."""
    return _properties(device.index)[0] if device.type == "cuda" else 0


def programs(device: torch.device, tile: Tile, tiles: int) -> int:
    """How many programs share ``tiles`` of work when each keeps a partial sum: fixed for a device and a shape.

    The interpreter takes three, so that both the loop inside a program and the sum over programs have several terms.
    """
    most = tile.per_processor * _properties(device.index)[1] if device.type == "cuda" else 3
    return max(1, min(most, tiles))


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` (..., D) as (outer, inner, D) with unit stride in D: a view where one exists, else a contiguous copy.

    Two strides are enough for a slice of a bigger tensor, such as ``x[:, 1:]`` of (B,L,D). ``inner`` is always the last
    dimension but one, so tensors of one shape give views of one shape.
    """
    width = tensor.shape[-1]
    inner = tensor.shape[-2] if tensor.ndim > 1 else 1
    if tensor.stride(-1) != 1 and width > 1:
        tensor = tensor.contiguous()
    if tensor.ndim == 3:
        return tensor
    outer = tensor.numel() // max(1, inner * width)
    return tensor.reshape(outer, inner, width)


def unit(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` if its last dimension has unit stride, else a contiguous copy; the other strides go to the kernel as they are."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def segments(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of one shape as (S, M) views with unit stride in M, M as large as every tensor allows; a copy where none does."""
    first = tensors[0]
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, -1) for t in tensors]
    for split in range(1, first.ndim):
        size = first.shape[:split].numel()
        try:
            views = [t.view(size, -1) for t in tensors]
        except RuntimeError:  # no view of that shape
            continue
        if all(v.stride(1) == 1 for v in views):
            return views
    return [t.contiguous().view(1, -1) for t in tensors]
