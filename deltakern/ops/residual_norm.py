"""``residual_norm``: adds a block's branch to the residual stream and norms the result for the next branch.

Formula::

    stream' = stream + scale * branch                      rounded to the stream's dtype
    normed  = LayerNorm(stream') * weight + bias           of stream' as stored, in out_dtype

Shapes: stream, branch (..., D); scale, weight, bias (D,). ``scale=None`` stands for ones (LayerScale folded into the
projection); ``weight=None`` (then ``bias=None``) leaves the norm out and returns ``(stream', None)``.
Dtypes: stream float32 or bfloat16 (float16, float64), branch any of them; accumulated in float32 (float64 for float64).
Gradient: stream, branch, scale, weight, bias, from both outputs. ``stream'`` is kept for the norm's and the branch for the
scale's; without a scale the branch is not.
Determinism: partial sums for scale, weight and bias are added in a fixed order; the same inputs give the same bits.
Source: DINOv3ViTLayer's LayerScale and residual with the LayerNorm that follows, as the released DeltaTok runs them.
"""

from __future__ import annotations

import torch

from deltakern import backend
from deltakern.ops import _triton, _validate
from deltakern.ops._once import as_dtype, once_differentiable


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
    dtype = stream.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # A cast that casts nothing takes as long as adding two small tensors
    if not (dtype is branch.dtype is wide):
        stream, branch = stream.to(wide), branch.to(wide)
    total = stream + branch if scale is None else torch.addcmul(stream, branch, scale.to(wide))
    stored = total if dtype is wide else total.to(dtype)
    if weight is None:
        return stored, None
    if not (dtype is weight.dtype is wide and (bias is None or bias.dtype is wide)):
        weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    normed = torch.layer_norm(stored if dtype is wide else stored.to(wide), stored.shape[-1:], weight, bias, eps)
    return stored, normed if (out_dtype or dtype) is wide else normed.to(out_dtype or dtype)


def _facts(stream, branch, scale, weight, bias, *, out_dtype=None, **_) -> backend.Facts:
    dtypes = [t.dtype for t in (stream, branch, scale, weight, bias) if t is not None]
    return backend.Facts(stream.device.type, (*dtypes, out_dtype or stream.dtype), backend.too_wide(stream.shape[-1]))


def _check(stream, branch, scale, weight, bias, **_) -> None:
    op = "residual_norm"
    _validate.shape(op, "branch", branch, stream.shape, "stream's shape (...,D)")
    width = stream.shape[-1]
    for name, tensor in (("scale", scale), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            _validate.shape(op, name, tensor, (width,), "(D,)")
    if weight is None and bias is not None:
        raise ValueError(f"{op}: bias without weight; weight must be (D,) = ({width},), got None")
    tensors = {"stream": stream, "branch": branch, "scale": scale, "weight": weight, "bias": bias}
    _validate.floating_on_one_device(op, **tensors)


def _forward_fake(stream, branch, scale, weight, bias, eps, out_dtype, want_statistics):
    total = stream.new_empty(stream.shape)
    if weight is None:
        return total, stream.new_empty(0, dtype=out_dtype), stream.new_empty(0, dtype=torch.float32)
    statistics = stream.new_empty((2, stream[..., 0].numel()) if want_statistics else 0, dtype=torch.float32)
    return total, stream.new_empty(stream.shape, dtype=out_dtype), statistics


_forward = _triton.define(
    "residual_norm_forward(Tensor stream, Tensor branch, Tensor? scale, Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype,"
    " bool want_statistics) -> (Tensor, Tensor, Tensor)",
    module="residual_norm",
    fake=_forward_fake,
)


def _backward_fake(total, branch, scale, weight, statistics, d_total, d_normed, branch_dtype, want_stream, want_scale, want_weight):
    like = d_total if total is None else total
    return (
        like.new_empty(like.shape if want_stream else 0),
        like.new_empty(like.shape if branch_dtype else 0, dtype=branch_dtype or torch.float32),
        like.new_empty((3, like.shape[-1]), dtype=torch.float32),
    )


_backward = _triton.define(
    "residual_norm_backward(Tensor? total, Tensor? branch, Tensor? scale, Tensor? weight, Tensor? statistics, Tensor? d_total,"
    " Tensor? d_normed, ScalarType? branch_dtype, bool want_stream, bool want_scale, bool want_weight) -> (Tensor, Tensor, Tensor)",
    module="residual_norm",
    fake=_backward_fake,
)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stream, branch, scale, weight, bias, eps, out_dtype):
        total, normed, statistics = _forward(stream, branch, scale, weight, bias, eps, out_dtype, True)
        ctx.set_materialize_grads(False)
        # The norm's gradient needs the sum, the scale's the branch; nothing else does.
        norm, scaled = weight is not None, scale is not None and ctx.needs_input_grad[2]
        kept = (total if norm else None, branch if scaled else None, scale, weight, statistics if norm else None)
        ctx.save_for_backward(*kept)
        ctx.dtypes = stream.dtype, branch.dtype, None if bias is None else bias.dtype
        return total, normed if norm else None

    @staticmethod
    @once_differentiable("residual_norm")
    def backward(ctx, d_total, d_normed):
        total, branch, scale, weight, statistics = ctx.saved_tensors
        stream_dtype, branch_dtype, bias_dtype = ctx.dtypes
        want_stream, want_branch, want_scale, want_weight, want_bias, _, _ = ctx.needs_input_grad
        if d_total is None and d_normed is None:
            return (None,) * 7
        # The branch's gradient is the stream's where no scale stands between them and the dtypes agree, and the stream's is
        # the incoming one where nothing was normed: one tensor then serves for both, as in torch's own addition.
        passed = d_total if d_normed is None else None
        shared = scale is None and branch_dtype == stream_dtype
        kernel_stream = passed is None and (want_stream or (want_branch and shared))
        kernel_branch = branch_dtype if want_branch and not shared else None
        want_affine = (want_weight or want_bias) and d_normed is not None
        d_stream, d_branch, sums = passed, None, None
        if kernel_stream or kernel_branch or want_scale or want_affine:
            made, d_branch, sums = _backward(
                total, branch, scale, weight, statistics, d_total, d_normed, kernel_branch, kernel_stream, want_scale, want_affine
            )
            d_stream = made if kernel_stream else passed
        if want_branch and shared:
            d_branch = d_stream
        d_scale, d_weight, d_bias = (None, None, None) if sums is None else sums.unbind()
        return (
            d_stream if want_stream else None,
            d_branch if want_branch else None,
            as_dtype(d_scale, scale.dtype) if want_scale else None,
            as_dtype(d_weight, weight.dtype) if want_affine and want_weight else None,
            as_dtype(d_bias, bias_dtype) if want_affine and want_bias else None,
            None,
            None,
        )


def _run(_, stream, branch, scale, weight, bias, *, eps, out_dtype):
    out_dtype = out_dtype or stream.dtype
    if _triton.needs_grad(stream, branch, scale, weight, bias):
        return _ResidualNorm.apply(stream, branch, scale, weight, bias, eps, out_dtype)
    total, normed, _ = _forward(stream, branch, scale, weight, bias, eps, out_dtype, False)
    return total, None if weight is None else normed


@backend.op(reference=residual_norm_reference, check=_check, facts=_facts, run=_run, kernels={"triton": backend.triton_refuses})
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
    return backend.call(residual_norm, impl, stream, branch, scale, weight, bias, eps=eps, out_dtype=out_dtype)
