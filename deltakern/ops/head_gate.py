"""``head_gate``: multiplies every head's attention output by the sigmoid of its gate.

Formula: ``out[b,l,h,:] = attn[b,l,h,:] * sigmoid(gate_logits[b,l,h])``.
Shapes: attn (B,L,H,d), gate_logits (B,L,H) -> (B,L,H,d) in attn's dtype.
Dtypes: float32, bfloat16, float16 (float64 in the reference); computed in float32 (float64 for float64).
Gradient: attn and gate_logits (a sum over d).
Source: gated_attn.py of the released code.
"""

from __future__ import annotations

import torch

from deltakern import backend
from deltakern.ops import _validate


def head_gate_reference(attn: torch.Tensor, gate_logits: torch.Tensor) -> torch.Tensor:
    """Plain PyTorch. See the module's docstring for the contract."""
    wide = torch.float64 if attn.dtype == torch.float64 else torch.float32
    return (attn.to(wide) * gate_logits.to(wide).sigmoid()[..., None]).to(attn.dtype)


def _facts(attn, gate_logits, **_) -> backend.Facts:
    return backend.Facts(attn.device.type, (attn.dtype, gate_logits.dtype), backend.too_wide(attn.shape[-1], 1024))


@backend.op(reference=head_gate_reference, facts=_facts)
def head_gate(attn: torch.Tensor, gate_logits: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """``attn * sigmoid(gate_logits)`` a token and head. The module's docstring is the contract.

    Args:
        attn: (B,L,H,d).
        gate_logits: (B,L,H).
        impl: see :mod:`deltakern.backend`.

    Raises:
        ValueError: shapes, devices. TypeError: dtypes.
    """
    _validate.rank("head_gate", "attn", attn, "(B,L,H,d)")
    _validate.shape("head_gate", "gate_logits", gate_logits, attn.shape[:3], "(B,L,H)")
    _validate.floating("head_gate", attn=attn, gate_logits=gate_logits)
    _validate.one_device("head_gate", attn=attn, gate_logits=gate_logits)
    backend.choose(head_gate, impl, _facts(attn, gate_logits))
    return head_gate_reference(attn, gate_logits)
