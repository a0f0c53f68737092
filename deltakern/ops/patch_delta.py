"""``patch_delta``: the token sequence of DeltaTok's encoder or decoder, with the first block's LayerNorm.

Formula, for prev = features of the earlier frame, curr = of the later, z = the token, r0 and r1 = the roles::

    mode="pair"        stream = [z ; prev + r0 ; curr + r1]      the released encoder
    mode="difference"  stream = [z ; (curr - prev) + r1]         explicit patch differencing, half the tokens
    mode="current"     stream = [z ; curr + r1]                  the released encoder with use_delta=False
    mode="previous"    stream = [z ; prev]                       the released decoder
    normed = LayerNorm(stream) * norm_weight + norm_bias

Shapes: prev, curr (B,N,D); token (D,), (1,D) or (B,1,D); role (2,D); norm_weight, norm_bias (D,). Out: stream and normed
(B,1+2N,D) for "pair", else (B,1+N,D).
Dtypes: float32, bfloat16, float16 (float64 in the reference). Sums and statistics are accumulated in float32 (float64 for
float64). ``stream`` has ``stream_dtype``, or the promotion of the features' and the token's dtype. ``normed`` is the norm of
the stream as stored and has ``out_dtype``, or the stream's.
Gradient: prev, curr, token, role, norm_weight, norm_bias, from both outputs.
Determinism: the same inputs give the same bits.
Source: DeltaTok.encode and DeltaTok.decode of the released code; paper, section 3 (DeltaTok).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deltakern import backend
from deltakern.ops import _validate

MODES = ("pair", "difference", "current", "previous")


def patch_delta_reference(
    prev: torch.Tensor,
    curr: torch.Tensor | None,
    token: torch.Tensor,
    role: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    *,
    mode: str,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    stream_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch. See the module's docstring for the contract."""
    base = prev if prev is not None else curr
    stream_dtype = stream_dtype or torch.promote_types(base.dtype, token.dtype)
    wide = torch.float64 if stream_dtype == torch.float64 else torch.float32
    batch, _, width = base.shape
    rows = [token.to(wide).reshape(-1, 1, width).expand(batch, 1, width)]
    if mode == "pair":
        rows += [prev.to(wide) + role[0].to(wide), curr.to(wide) + role[1].to(wide)]
    elif mode == "difference":
        rows += [(curr.to(wide) - prev.to(wide)) + role[1].to(wide)]
    elif mode == "current":
        rows += [curr.to(wide) + role[1].to(wide)]
    else:
        rows += [prev.to(wide)]
    stream = torch.cat(rows, 1).to(stream_dtype)
    normed = F.layer_norm(stream.to(wide), (width,), norm_weight.to(wide), norm_bias.to(wide), eps)
    return stream, normed.to(out_dtype or stream_dtype)


def _facts(prev, curr, token, role, norm_weight, norm_bias, **_) -> backend.Facts:
    tensors = [t for t in (prev, curr, token, role, norm_weight, norm_bias) if t is not None]
    return backend.Facts(tensors[0].device.type, tuple(t.dtype for t in tensors), backend.too_wide(tensors[0].shape[-1]))


def _check(prev, curr, token, role, norm_weight, norm_bias, mode) -> None:
    op = "patch_delta"
    _validate.choice(op, "mode", mode, MODES)
    for name, tensor, needed in (
        ("prev", prev, mode != "current"),
        ("curr", curr, mode != "previous"),
        ("role", role, mode != "previous"),
    ):
        if needed and tensor is None:
            raise ValueError(f"{op}: mode={mode!r} needs {name}, got None")
    base = prev if prev is not None else curr
    _validate.rank(op, "prev" if prev is not None else "curr", base, "(B,N,D)")
    batch, _, width = base.shape
    if curr is not None and prev is not None:
        _validate.shape(op, "curr", curr, prev.shape, "prev's shape (B,N,D)")
    if tuple(token.shape) not in ((width,), (1, width), (batch, 1, width), (1, 1, width)):
        raise ValueError(f"{op}: token must be (D,), (1,D) or (B,1,D) with B={batch}, D={width}, got {_validate.wanted_shape(token)}")
    if role is not None:
        _validate.shape(op, "role", role, (2, width), "(2,D)")
    _validate.shape(op, "norm_weight", norm_weight, (width,), "(D,)")
    _validate.shape(op, "norm_bias", norm_bias, (width,), "(D,)")
    tensors = {"prev": prev, "curr": curr, "token": token, "role": role, "norm_weight": norm_weight, "norm_bias": norm_bias}
    _validate.floating(op, **tensors)
    _validate.one_device(op, **tensors)


@backend.op(reference=patch_delta_reference, facts=_facts)
def patch_delta(
    prev: torch.Tensor | None,
    curr: torch.Tensor | None,
    token: torch.Tensor,
    role: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    *,
    mode: str,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    stream_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assembles the token sequence and its first LayerNorm: ``(stream, normed)``. The module's docstring is the contract.

    Args:
        prev: (B,N,D) features of the earlier frame; ``None`` where the mode does not read it.
        curr: (B,N,D) features of the later frame; ``None`` where the mode does not read it.
        token: (D,), (1,D) or (B,1,D), the row put first.
        role: (2,D), added to the rows of prev and of curr; ``None`` for ``mode="previous"``.
        norm_weight, norm_bias: (D,) of the first block's LayerNorm.
        mode: "pair", "difference", "current" or "previous".
        eps: of the LayerNorm.
        out_dtype: of ``normed``; the stream's by default.
        stream_dtype: of ``stream``; the promotion of features and token by default.
        impl: see :mod:`deltakern.backend`.

    Raises:
        ValueError: shapes, devices, mode. TypeError: dtypes.
    """
    _check(prev, curr, token, role, norm_weight, norm_bias, mode)
    backend.choose(patch_delta, impl, _facts(prev, curr, token, role, norm_weight, norm_bias))
    return patch_delta_reference(
        prev, curr, token, role, norm_weight, norm_bias, mode=mode, eps=eps, out_dtype=out_dtype, stream_dtype=stream_dtype
    )
