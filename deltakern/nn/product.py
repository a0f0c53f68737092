"""Products with live or frozen weights: the one place where a linear layer is computed.

A plain ``nn.Linear`` is read: its weight is cast to the dtype of the computation, packed with its neighbours' or has a LayerScale folded
in, see :mod:`deltakern.nn.weights` for how long that is kept. Anything else (an adapter, a quantised weight, a hook, a parametrisation)
is called as the module that it is.

Float32 products without gradient on a CPU go to oneDNN with the weight reordered, a form of a frozen weight: torch's own product reorders
the weight at every call, and through MKL takes half of the machine's rate on processors that are not Intel's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import EllipsisType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from deltakern import backend, ops
from deltakern.nn.recompute import Fleeting, recomputed_linear
from deltakern.nn.weights import Derived, Parameters, Reading, derived, read, store_of

Pair = tuple[torch.Tensor, torch.Tensor | None]

WORTHWHILE = 9 << 17
"""Multiply-adds from which oneDNN's product is faster than MKL's for all its dearer call, where MKL leaves AVX-512 unused: on AMD's
processors that have it. Measured on one of the Zen 5 family."""
WORTHWHILE_ACTIVATED = 3 << 17
"""The same where an activation follows, which is then no call of its own."""
WORTHWHILE_WEIGHT = 1 << 18
"""Elements of a weight from which it is so on the others, up to ``FEW_ROWS`` rows, for which MKL reorders what no cache holds, or
``SOME_ROWS`` where the result is wider than x. Measured on a Zen 3, which has AVX2: at 513 rows MKL's is faster by 2 to 15 %."""
FEW_ROWS, SOME_ROWS = 192, 384
ROWS_ONE_CALL = 1024
"""Rows from which reordering pays for one call, where weights are live."""


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
    return elements >= WORTHWHILE_WEIGHT and 0 < rows <= (SOME_ROWS if elements > width * width else FEW_ROWS)


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
        and x.dtype is dtype is torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._get_tracing_state()
        and backend.preferred() in (None, "reference", "cpp")
        and available()
    )


def reorders(store: Derived | None, x: torch.Tensor, parameters: Parameters, dtype: torch.dtype, activation: str = "none") -> str | None:
    """What goes to oneDNN of the product of x (...,D) with what is derived from ``parameters``, to be kept in ``store``, and of the
    activation behind it: ``activation``, "none" for the product alone, or None for neither."""
    if store is None or not evaluates(x, dtype):
        return None
    width = x.shape[-1]
    rows = x.numel() // width
    if not store.lasting and rows < ROWS_ONE_CALL:
        return None
    elements = 0
    for parameter in parameters:
        if parameter is not None and parameter.ndim == 2:
            elements += parameter.numel()
    if activation != "none" and takes(rows, width, elements, True):
        return activation
    return "none" if takes(rows, width, elements) else None


def reorder(weight: torch.Tensor) -> torch.Tensor:
    """A weight (E,D) as oneDNN wants it, for :func:`pointwise`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def pointwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, then: str = "none", into: torch.Tensor | None = None
) -> torch.Tensor:
    """The product with a reordered weight, added to ``into`` where that is given; ``then`` "none" or "gelu" (exact)."""
    if into is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, into, weight, bias, "add")
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, then, [], "none" if then == "gelu" else "")


def as_they_are(weight: torch.Tensor, bias: torch.Tensor | None) -> Pair:
    return weight, bias


def join(*p: torch.Tensor) -> Pair:
    """Weights and biases, in turn, as one weight and one bias."""
    return torch.cat(p[::2]), torch.cat(p[1::2])


def fold_scale(weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor) -> Pair:
    """A projection whose output is multiplied by ``scale``: (weight, bias)."""
    return weight * scale[:, None], None if bias is None else bias * scale


def cast(
    owner: nn.Module,
    name: str,
    parameters: Parameters,
    dtype: torch.dtype,
    build: Callable[..., Pair] = as_they_are,
    store: Derived | EllipsisType | None = ...,
) -> Pair:
    """``build(*parameters)``, weight (E,D) and bias (E,) or None, in ``dtype``; kept in ``store``, :func:`store_of` the owner's."""
    if build is as_they_are and parameters[0].dtype is dtype and (parameters[1] is None or parameters[1].dtype is dtype):
        return parameters[0], parameters[1]

    def make() -> Pair:
        return tuple(None if t is None else t.to(dtype) for t in build(*parameters))

    return derived(store_of(owner) if store is ... else store, owner, (name, dtype), parameters, make)


def product(
    owner: nn.Module,
    name: str,
    parameters: Parameters,
    dtype: torch.dtype,
    build: Callable[..., Pair],
    x: torch.Tensor | Fleeting,
    *,
    activation: str = "none",
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """``activation(x W^T + b)``, added to ``into``.

    Args:
        owner: whose weights are live or frozen; what is derived from them goes by ``name`` there.
        parameters: what weight and bias are made of.
        dtype: of the product.
        build: takes the parameters and returns weight (E,D) and bias (E,) or None.
        x: (...,D); one that is made again in the backward is for the product alone.
        activation: "none" or "gelu" (exact).
        into: (...,E) or None; with it no activation, and no gradient.

    Returns:
        (...,E).
    """
    if isinstance(x, Fleeting):
        return recomputed_linear(x, *cast(owner, name, parameters, dtype, build))
    store = store_of(owner)
    then = reorders(store, x, parameters, dtype, activation)
    if then is not None:

        def make() -> Pair:
            weight, bias = build(*parameters)
            return reorder(weight.to(dtype)), None if bias is None else bias.to(dtype)

        out = pointwise(x, *derived(store, owner, (name, "reordered"), parameters, make), then, into)
    else:
        out = F.linear(x, *cast(owner, name, parameters, dtype, build, store))
        out = out if into is None else out.add_(into)
    return out if activation in ("none", then) else backend.direct(ops.gelu, out)(out)


def value_of(x: torch.Tensor | Fleeting) -> torch.Tensor:
    """The tensor itself."""
    return x.value if isinstance(x, Fleeting) else x


def apply_linear(
    owner: nn.Module,
    name: str,
    layer: nn.Module,
    x: torch.Tensor | Fleeting,
    dtype: torch.dtype,
    *,
    scale: torch.Tensor | None = None,
    into: torch.Tensor | None = None,
    activation: str = "none",
    known: Reading | EllipsisType | None = ...,
) -> torch.Tensor:
    """``activation(scale * layer(x))`` of one layer (...,D) -> (...,E), ``scale`` (E,) folded into it where that can be;
    added to ``into`` (...,E), see :func:`product`. ``known``: what :func:`deltakern.nn.weights.read` says of the layer."""
    known = read(nn.Linear, layer) if known is ... else known
    if known is None:
        out = layer(value_of(x))
        out = out if scale is None else out * scale.to(out.dtype)
        out = out if into is None else into + out
        return ops.gelu(out) if activation == "gelu" else out
    weight, bias, _ = known
    if scale is None:
        return product(owner, name, (weight, bias), dtype, as_they_are, x, activation=activation, into=into)
    return product(owner, f"{name}, scaled", (weight, bias, scale), dtype, fold_scale, x, activation=activation, into=into)
