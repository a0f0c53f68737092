"""``head_gate``: multiplies every head's attention output by the sigmoid of its gate.

Formula: ``out[b,l,h,:] = attn[b,l,h,:] * sigmoid(gate_logits[b,l,h])``.
Shapes: attn (B,L,H,d), gate_logits (B,L,H) -> (B,L,H,d) in attn's dtype.
Dtypes: float32, bfloat16, float16 (float64 in the reference); computed in float32 (float64 for float64).
Gradient: attn and gate_logits (a sum over d); the inputs are kept, the gates are not.
Source: gated_attn.py of the released code.
"""

from __future__ import annotations

import torch

from deltakern import backend
from deltakern.ops import _triton, _validate
from deltakern.ops._once import once_differentiable


def head_gate_reference(attn: torch.Tensor, gate_logits: torch.Tensor) -> torch.Tensor:
    """Plain PyTorch. See the module's docstring for the contract."""
    wide = torch.float64 if attn.dtype == torch.float64 else torch.float32
    return (attn.to(wide) * gate_logits.to(wide).sigmoid()[..., None]).to(attn.dtype)


def _facts(attn, gate_logits, **_) -> backend.Facts:
    return backend.Facts(attn.device.type, (attn.dtype, gate_logits.dtype), backend.too_wide(attn.shape[-1], 1024))


def _forward_fake(attn, gate_logits):
    return attn.new_empty(attn.shape)


def _backward_fake(attn, gate_logits, grad):
    return attn.new_empty(attn.shape), gate_logits.new_empty(gate_logits.shape)


_forward = _triton.define("head_gate_forward(Tensor attn, Tensor gate_logits) -> Tensor", module="head_gate", fake=_forward_fake)
_backward = _triton.define(
    "head_gate_backward(Tensor attn, Tensor gate_logits, Tensor grad) -> (Tensor, Tensor)", module="head_gate", fake=_backward_fake
)


class _HeadGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attn, gate_logits):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(attn, gate_logits)
        return _forward(attn, gate_logits)

    @staticmethod
    @once_differentiable("head_gate")
    def backward(ctx, grad):
        if grad is None:
            return None, None
        grads = _backward(*ctx.saved_tensors, grad)
        return tuple(g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad, strict=True))


def _check(attn, gate_logits) -> None:
    _validate.rank("head_gate", "attn", attn, "(B,L,H,d)")
    _validate.shape("head_gate", "gate_logits", gate_logits, attn.shape[:3], "(B,L,H)")
    _validate.floating_on_one_device("head_gate", attn=attn, gate_logits=gate_logits)


def _run(_, attn, gate_logits):
    return _HeadGate.apply(attn, gate_logits) if _triton.needs_grad(attn, gate_logits) else _forward(attn, gate_logits)


@backend.op(reference=head_gate_reference, check=_check, facts=_facts, run=_run, kernels={"triton": backend.triton_refuses})
def head_gate(attn: torch.Tensor, gate_logits: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """``attn * sigmoid(gate_logits)`` a token and head. The module's docstring is the contract.

    Args:
        attn: (B,L,H,d).
        gate_logits: (B,L,H).
        impl: see :mod:`deltakern.backend`.

    Raises:
        ValueError: shapes, devices. TypeError: dtypes.
    """
    return backend.call(head_gate, impl, attn, gate_logits)
