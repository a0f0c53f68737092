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
from deltakern.ops import _triton, _validate
from deltakern.ops._once import once_differentiable

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


def _facts(prev, curr, token, role, norm_weight, norm_bias, *, out_dtype=None, stream_dtype=None, **_) -> backend.Facts:
    tensors = [t for t in (prev, curr, token, role, norm_weight, norm_bias) if t is not None]
    dtypes = [t.dtype for t in tensors] + [d for d in (out_dtype, stream_dtype) if d is not None]
    return backend.Facts(tensors[0].device.type, tuple(dtypes), backend.too_wide(tensors[0].shape[-1]))


def _check(prev, curr, token, role, norm_weight, norm_bias, *, mode, **_) -> None:
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
    _validate.floating_on_one_device(op, prev=prev, curr=curr, token=token, role=role, norm_weight=norm_weight, norm_bias=norm_bias)


def _forward_fake(prev, curr, token, role, norm_weight, norm_bias, mode, eps, out_dtype, stream_dtype):
    base = prev if prev is not None else curr
    batch, patches, width = base.shape
    length = 1 + patches * (2 if mode == "pair" else 1)
    stream = base.new_empty((batch, length, width), dtype=stream_dtype)
    return stream, base.new_empty(stream.shape, dtype=out_dtype), base.new_empty((2, batch * length), dtype=torch.float32)


_forward = _triton.define(
    "patch_delta_forward(Tensor? prev, Tensor? curr, Tensor token, Tensor? role, Tensor norm_weight, Tensor norm_bias, str mode,"
    " float eps, ScalarType out_dtype, ScalarType stream_dtype) -> (Tensor, Tensor, Tensor)",
    module="patch_delta",
    fake=_forward_fake,
)


def _backward_fake(stream, norm_weight, statistics, d_stream, d_normed, mode, prev_dtype, curr_dtype, want_token, want_sums):
    batch, length, width = stream.shape
    features = (batch, (length - 1) // 2 if mode == "pair" else length - 1, width)
    return (
        stream.new_empty(features if prev_dtype else (0,), dtype=prev_dtype or torch.float32),
        stream.new_empty(features if curr_dtype else (0,), dtype=curr_dtype or torch.float32),
        stream.new_empty((batch, width) if want_token else (0,), dtype=torch.float32),
        stream.new_empty((4, width), dtype=torch.float32),
    )


_backward = _triton.define(
    "patch_delta_backward(Tensor stream, Tensor norm_weight, Tensor statistics, Tensor? d_stream, Tensor? d_normed, str mode,"
    " ScalarType? prev_dtype, ScalarType? curr_dtype, bool want_token, bool want_sums) -> (Tensor, Tensor, Tensor, Tensor)",
    module="patch_delta",
    fake=_backward_fake,
)


class _PatchDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prev, curr, token, role, norm_weight, norm_bias, mode, eps, out_dtype, stream_dtype):
        stream, normed, statistics = _forward(prev, curr, token, role, norm_weight, norm_bias, mode, eps, out_dtype, stream_dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(stream, norm_weight, statistics)
        ctx.mode, ctx.token_shape = mode, token.shape
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (prev, curr, token, role, norm_weight, norm_bias))
        return stream, normed

    @staticmethod
    @once_differentiable("patch_delta")
    def backward(ctx, d_stream, d_normed):
        if d_stream is None and d_normed is None:
            return (None,) * 10
        prev, curr, token, role, weight, bias = (
            dtype if wanted else None for dtype, wanted in zip(ctx.dtypes, ctx.needs_input_grad, strict=False)
        )  # the dtypes of the gradients that are wanted
        stream, norm_weight, statistics = ctx.saved_tensors
        want_sums = any(dtype is not None for dtype in (role, weight, bias))
        d_prev, d_curr, d_token, sums = _backward(
            stream, norm_weight, statistics, d_stream, d_normed, ctx.mode, prev, curr, token is not None, want_sums
        )
        if token is not None:
            if ctx.token_shape.numel() == d_token.shape[-1]:
                d_token = d_token.sum(0)  # one token for every clip
            d_token = d_token.reshape(ctx.token_shape).to(token)
        return (
            None if prev is None else d_prev,
            None if curr is None else d_curr,
            None if token is None else d_token,
            None if role is None else sums[:2].to(role),
            None if weight is None else sums[2].to(weight),
            None if bias is None else sums[3].to(bias),
            None,
            None,
            None,
            None,
        )


def _run(_, prev, curr, token, role, norm_weight, norm_bias, *, mode, eps, out_dtype, stream_dtype):
    stream_dtype = stream_dtype or torch.promote_types((prev if prev is not None else curr).dtype, token.dtype)
    args = (
        None if mode == "current" else prev,
        None if mode == "previous" else curr,
        token,
        None if mode == "previous" else role,
        norm_weight,
        norm_bias,
    )
    run = _PatchDelta.apply if _triton.needs_grad(*args) else _forward
    return run(*args, mode, eps, out_dtype or stream_dtype, stream_dtype)[:2]


@backend.op(reference=patch_delta_reference, check=_check, facts=_facts, run=_run, kernels={"triton": backend.triton_refuses})
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
    options = {"mode": mode, "eps": eps, "out_dtype": out_dtype, "stream_dtype": stream_dtype}
    return backend.call(patch_delta, impl, prev, curr, token, role, norm_weight, norm_bias, **options)
