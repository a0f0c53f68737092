"""Products with the weights that a module packs, and what may follow them in the same pass.

Where nothing needs a gradient, float32 products on a CPU go to oneDNN with the weight reordered once and kept, in place of the
packed one: torch's own product reorders the weight at every call, and through MKL takes half of the machine's rate on processors that
are not Intel's. oneDNN's product also applies an activation, multiplies by or adds a second tensor before it writes its result,
which saves the passes over memory that these cost by themselves. Everywhere else it is ``F.linear`` and the ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from deltakern import backend, ops
from deltakern.nn.packing import PackedModule
from deltakern.nn.recompute import Fleeting, linear

WORTHWHILE = 9 << 17
"""Multiply-adds from which oneDNN's product is faster than MKL's for all its dearer call, where MKL leaves AVX-512 unused: on AMD's
processors that have it. Measured on one of the Zen 5 family."""
WORTHWHILE_ACTIVATED = 3 << 17
"""The same where an activation follows, which is then no call of its own."""
WORTHWHILE_WEIGHT = 1 << 18
"""Elements of a weight from which it is so on the others, up to ``FEW_ROWS`` rows, for which MKL reorders what no cache holds, or where
the result is wider than x. Measured on a Zen 3, which has AVX2."""
FEW_ROWS = 192
ROWS_TRAINING = 1024
"""Rows from which reordering pays in training, where the weights are others at every step."""


class Processor(NamedTuple):
    """What the choice of a library depends on."""

    avx512: bool
    amd: bool


@functools.cache
def processor() -> Processor:
    """This machine's; without both where this torch does not say."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return Processor(bool(known.get("avx512_f")), "AMD" in str(known.get("cpu_name")))


def takes(rows: int, width: int, elements: int, activated: bool = False) -> bool:
    """Whether oneDNN's product of x (rows,width) with a kept weight of so many elements is the faster one; ``activated``: with an
    activation in it, which with AVX2 takes longer than one of PyTorch's behind it."""
    avx512, amd = processor()
    if avx512 and amd:
        return rows * elements >= (WORTHWHILE_ACTIVATED if activated else WORTHWHILE)
    if activated and not avx512:
        return False
    return rows > 0 and elements >= WORTHWHILE_WEIGHT and (rows <= FEW_ROWS or elements > width * width)


@functools.cache
def available() -> bool:
    """Whether this torch has oneDNN's product with a reordered weight, which Inductor's frozen graphs call too."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def evaluates(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether products of x in ``dtype`` are float32 ones on a CPU, without gradient and with no interpreted kernels asked for: what
    oneDNN may take."""
    return (
        x.is_cpu
        and x.dtype == dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and backend.preferred() in (None, "reference", "cpp")
        and available()
    )


def fuses(
    module: PackedModule,
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor | None],
    dtype: torch.dtype,
    activation: str = "none",
) -> bool:
    """Whether the product of x (...,D) with what is packed from ``parameters`` goes to oneDNN, and what follows it with it."""
    if not evaluates(x, dtype):
        return False
    rows = x.numel() // x.shape[-1]
    if rows < (ROWS_TRAINING if module.training else 1):
        return False
    packed = 0  # elements; a plain loop, because this stands before every product
    for parameter in parameters:
        if parameter is not None:
            if parameter.is_inference():
                return False
            packed += parameter.numel()
    return takes(rows, x.shape[-1], packed, activation != "none")


def reorder(weight: torch.Tensor) -> torch.Tensor:
    """A weight (E,D) as oneDNN wants it, for :func:`pointwise`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def pointwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, then: str = "none", other: torch.Tensor | None = None
) -> torch.Tensor:
    """The product with a reordered weight; ``then`` "none", "gelu" (exact), "swish", or with ``other`` (...,E) "add" or "mul"."""
    if other is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, then)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, then, [], "none" if then == "gelu" else "")


def product(
    module: PackedModule,
    name: str,
    parameters: Sequence[torch.Tensor | None],
    dtype: torch.dtype,
    build: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    x: torch.Tensor | Fleeting,
    *,
    activation: str = "none",
) -> torch.Tensor:
    """``activation(x W^T + b)``.

    Args:
        module: keeps what is derived from ``parameters``, under ``name``.
        parameters: what weight and bias are made of.
        dtype: of the product.
        build: takes the parameters and returns weight (E,D) and bias (E,) or None.
        x: (...,D); one that is made again in the backward is for the product alone.
        activation: "none" or "gelu" (exact).

    Returns:
        (...,E).
    """
    if isinstance(x, Fleeting):
        return linear(x, *module.packed(name, parameters, dtype, build))
    if not fuses(module, x, parameters, dtype, activation):
        if activation == "gelu":
            return ops.gelu(product(module, name, parameters, dtype, build, x))
        return F.linear(x, *module.packed(name, parameters, dtype, build))

    def reordered(*given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = build(*given)
        return reorder(weight), bias

    return pointwise(x, *module.packed(f"{name}, reordered", parameters, dtype, reordered), activation)
