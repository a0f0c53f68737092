"""``residual_norm``: adds a block's branch to the residual stream and norms the result for the next branch.

Formula::

    stream' = stream + scale * branch                      rounded to the stream's dtype
    normed  = LayerNorm(stream') * weight + bias           of stream' as stored, in out_dtype

Shapes: stream, branch (..., D); scale, weight, bias (D,). ``scale=None`` stands for ones (LayerScale folded into the
projection); ``weight=None`` (then ``bias=None``) leaves the norm out and returns ``(stream', None)``.
Dtypes: stream float32 or bfloat16 (float16, float64), branch any of them; accumulated in float32 (float64 for float64).
Gradient: stream, branch, scale, weight, bias, from both outputs.
Determinism: partial sums for scale, weight and bias are added in a fixed order; the same inputs give the same bits.
Source: DINOv3ViTLayer's LayerScale and residual with the LayerNorm that follows, as the released DeltaTok runs them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deltakern import backend
from deltakern.ops import _validate


def residual_norm_reference(
    stream: torch.Tensor,
    branch: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Plain PyTorch. See the module's docstring for the contract."""
    wide = torch.float64 if stream.dtype == torch.float64 else torch.float32
    width = stream.shape[-1]
    if scale is None:
        total = stream.to(wide) + branch.to(wide)
    else:
        total = torch.addcmul(stream.to(wide), branch.to(wide), scale.to(wide))
    total = total.to(stream.dtype)
    if weight is None:
        return total, None
    normed = F.layer_norm(total.to(wide), (width,), weight.to(wide), None if bias is None else bias.to(wide), eps)
    return total, normed.to(out_dtype or stream.dtype)


def _facts(stream, branch, scale, weight, bias, **_) -> backend.Facts:
    tensors = [t for t in (stream, branch, scale, weight, bias) if t is not None]
    return backend.Facts(stream.device.type, tuple(t.dtype for t in tensors), backend.too_wide(stream.shape[-1]))


def _check(stream, branch, scale, weight, bias) -> None:
    op = "residual_norm"
    _validate.shape(op, "branch", branch, stream.shape, "stream's shape (...,D)")
    width = stream.shape[-1]
    for name, tensor in (("scale", scale), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            _validate.shape(op, name, tensor, (width,), "(D,)")
    if weight is None and bias is not None:
        raise ValueError(f"{op}: bias without weight; weight must be (D,) = ({width},), got None")
    tensors = {"stream": stream, "branch": branch, "scale": scale, "weight": weight, "bias": bias}
    _validate.floating(op, **tensors)
    _validate.one_device(op, **tensors)


@backend.op(reference=residual_norm_reference, facts=_facts)
def residual_norm(
    stream: torch.Tensor,
    branch: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(stream + scale * branch, LayerNorm of it)``. The module's docstring is the contract.

    Args:
        stream, branch: (..., D).
        scale: (D,) LayerScale, or ``None`` for ones.
        weight, bias: (D,) of the LayerNorm; ``weight=None`` leaves it out.
        eps: of the LayerNorm.
        out_dtype: of ``normed``; the stream's by default.
        impl: see :mod:`deltakern.backend`.

    Raises:
        ValueError: shapes, devices. TypeError: dtypes.
    """
    _check(stream, branch, scale, weight, bias)
    backend.choose(residual_norm, impl, _facts(stream, branch, scale, weight, bias))
    return residual_norm_reference(stream, branch, scale, weight, bias, eps=eps, out_dtype=out_dtype)
