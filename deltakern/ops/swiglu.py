"""``swiglu``: the gated activation of a packed gate-and-up projection.

Formula: ``out = silu(gate) * up`` with ``gate, up = gate_up[..., :I], gate_up[..., I:]``, gate first.
Shapes: gate_up (..., 2I) -> (..., I) in its dtype.
Dtypes: float32, bfloat16, float16 (float64 in the reference); computed in float32 (float64 for float64), rounded once.
Gradient: gate_up, of which alone is kept for the backward.
Source: DINOv3's gated MLP as the released DeltaTok configures it (use_swiglu).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deltakern import backend
from deltakern.ops import _triton, _validate
from deltakern.ops._once import once_differentiable


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """Plain PyTorch. See the module's docstring for the contract."""
    wide = torch.float64 if gate_up.dtype == torch.float64 else torch.float32
    gate, up = gate_up.to(wide).chunk(2, -1)
    hidden = F.silu(gate)
    if torch.is_grad_enabled():
        return (hidden * up).to(gate_up.dtype)
    return hidden.mul_(up).to(gate_up.dtype)  # where nothing is recorded, the widest tensor of a block is written once


def _facts(gate_up, **_) -> backend.Facts:
    return backend.Facts(gate_up.device.type, (gate_up.dtype,))


_forward = _triton.define(
    "swiglu_forward(Tensor gate_up) -> Tensor",
    module="swiglu",
    fake=lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)
_backward = _triton.define(
    "swiglu_backward(Tensor gate_up, Tensor d_out) -> Tensor",
    module="swiglu",
    fake=lambda gate_up, d_out: gate_up.new_empty(gate_up.shape),
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return _forward(gate_up)

    @staticmethod
    @once_differentiable("swiglu")
    def backward(ctx, d_out):
        return _backward(*ctx.saved_tensors, d_out)


def _check(gate_up) -> None:
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: gate_up must be (...,2I), got {_validate.wanted_shape(gate_up)}")
    _validate.floating("swiglu", gate_up=gate_up)


def _run(_, gate_up):
    return _SwiGLU.apply(gate_up) if _triton.needs_grad(gate_up) else _forward(gate_up)


@backend.op(reference=swiglu_reference, check=_check, facts=_facts, run=_run, kernels={"triton": backend.triton_refuses})
def swiglu(gate_up: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """``silu(gate) * up`` of (..., 2I) -> (..., I), gate first. The module's docstring is the contract.

    Raises:
        ValueError: an odd last dimension. TypeError: the dtype.
    """
    return backend.call(swiglu, impl, gate_up)
