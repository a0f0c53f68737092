"""``rope_qk_norm``: rotary position embedding and per-head QK LayerNorm of q and k, in either order.

Formula, for every token and head (x one of q, k; d channels; w its weight)::

    rope(x) = x * cos + [-x2, x1] * sin              x1, x2 the first and last d/2 channels
    norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * w  mean subtracted, no bias
    order="pre_rope"   rope(norm(x))                 the current release, parameters q_norm_prerope, k_norm_prerope
    order="post_rope"  norm(rope(x))                 the first release, parameters q_norm, k_norm

The first ``num_prefix`` tokens are normed but not rotated. Either weight ``None`` means no norm for that tensor. ``cos`` and
``sin`` (N,d) are used (L - num_prefix) / N times over: twice for the two frames of a pair. ``q=None`` does k alone and returns
``(None, k)``: the encoder's last block needs keys of all tokens but one query.
Shapes: q, k (B,L,H,d), any strides with unit stride in d (slices of a packed projection); cos, sin (N,d); weights (d,).
Out: q, k contiguous (B,L,H,d) in the dtype of the inputs. d is even.
Dtypes: float32, bfloat16, float16 (float64 in the reference); accumulated in float32 (float64 for float64).
Gradient: q, k, q_weight, k_weight (not the tables: a table that requires grad raises).
Determinism: partial sums for the weights are added in a fixed order, on a CPU one that does not depend on the number of threads
nor on whether AVX2 or AVX-512 runs.
Source: qk_norm.py of the released code and DINOv3's apply_rotary_pos_emb; paper, appendix (architecture).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deltakern import backend
from deltakern.ops import _extension, _triton, _validate
from deltakern.ops._once import as_dtype, once_differentiable

ORDERS = ("pre_rope", "post_rope")


def rope_qk_norm_reference(
    q: torch.Tensor | None,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    *,
    order: str = "pre_rope",
    num_prefix: int = 0,
    eps: float = 1e-5,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Plain PyTorch. See the module's docstring for the contract."""
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    repeats = (k.shape[1] - num_prefix) // cos.shape[0]
    head = cos.shape[1]
    half = head // 2
    cos, sin = cos.to(wide), sin.to(wide)
    if num_prefix or repeats != 1:
        # Rows for the prefix (cosine 1, sine 0), in the small tables, so that no tensor of x's size is split and joined.
        cos = F.pad(cos.repeat(repeats, 1), (0, 0, num_prefix, 0), value=1.0)
        sin = F.pad(sin.repeat(repeats, 1), (0, 0, num_prefix, 0))
    cos, sin = cos[:, None], sin[:, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    def both(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        y = x.to(wide)
        if weight is None:
            return rotate(y).to(x.dtype)
        if order == "pre_rope":
            return rotate(F.layer_norm(y, (head,), weight.to(wide), None, eps)).to(x.dtype)
        return F.layer_norm(rotate(y), (head,), weight.to(wide), None, eps).to(x.dtype)

    return None if q is None else both(q, q_weight), both(k, k_weight)


def _facts(q, k, cos, sin, q_weight, k_weight, **_) -> backend.Facts:
    dtypes = tuple([t.dtype for t in (q, k, cos, sin, None if q is None else q_weight, k_weight) if t is not None])
    return backend.Facts(k.device.type, dtypes, backend.too_wide(k.shape[-1], 256))


def _check(q, k, cos, sin, q_weight, k_weight, *, order, num_prefix, eps) -> None:
    op, shape = "rope_qk_norm", k.shape
    if len(shape) != 4:
        _validate.rank(op, "k", k, "(B,L,H,d)")
    if q is not None and q.shape != shape:
        _validate.rank(op, "q", q, "(B,L,H,d)")
        _validate.shape(op, "k", k, q.shape, "q's shape (B,L,H,d)")
    check_turn(op, shape[1], shape[3], cos, sin, q_weight, k_weight, order, num_prefix)
    _validate.floating_on_one_device(op, q=q, k=k, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight)


def check_turn(op, length, head, cos, sin, q_weight, k_weight, order, num_prefix) -> None:
    """What turns and norms L tokens with heads of d channels, for the op of that name."""
    # What is compared here and again in _validate is so because a call costs more than all of its comparisons.
    table = cos.shape
    _validate.choice(op, "order", order, ORDERS)
    if head % 2 or head == 0:
        raise ValueError(f"{op}: a head must have an even number of channels, and at least 2, got {head}")
    if len(table) != 2 or table[1] != head:
        _validate.rank(op, "cos", cos, "(N,d)")
        _validate.shape(op, "cos", cos, (table[0], head), "(N,d)")
    if sin.shape != table:
        _validate.shape(op, "sin", sin, table, "cos's shape (N,d)")
    if not 0 <= num_prefix <= length:
        raise ValueError(f"{op}: num_prefix must be between 0 and L={length}, got {num_prefix}")
    if table[0] == 0 or (length - num_prefix) % table[0]:
        raise ValueError(f"{op}: cos must have N rows with L - num_prefix = {length - num_prefix} a multiple of N, got N={table[0]}")
    for name, tensor in (("q_weight", q_weight), ("k_weight", k_weight)):
        if tensor is not None:
            _validate.shape(op, name, tensor, (head,), "(d,)")
    if cos.requires_grad or sin.requires_grad:
        name = "cos" if cos.requires_grad else "sin"
        raise ValueError(f"{op}: {name} has no gradient, got a tensor that requires grad")


def _forward_fake(q, k, cos, sin, q_weight, k_weight, pre_rope, num_prefix, eps):
    return k.new_empty(0) if q is None else q.new_empty(q.shape), k.new_empty(k.shape)


_forward = _triton.define(
    "rope_qk_norm_forward(Tensor? q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight,"
    " bool pre_rope, int num_prefix, float eps) -> (Tensor, Tensor)",
    module="rope_qk_norm",
    fake=_forward_fake,
)


def _backward_fake(q, k, cos, sin, q_weight, k_weight, grad_q, grad_k, pre_rope, num_prefix, eps):
    return (
        k.new_empty(0) if q is None or grad_q is None else q.new_empty(q.shape),
        k.new_empty(0 if grad_k is None else k.shape),
        k.new_empty((2, k.shape[-1]), dtype=torch.float32),
    )


_backward = _triton.define(
    "rope_qk_norm_backward(Tensor? q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight,"
    " Tensor? grad_q, Tensor? grad_k, bool pre_rope, int num_prefix, float eps) -> (Tensor, Tensor, Tensor)",
    module="rope_qk_norm",
    fake=_backward_fake,
)


def _single(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A table or a weight as the extension reads it: float32 with unit stride."""
    if tensor is None or (tensor.dtype == torch.float32 and tensor.stride(-1) == 1):
        return tensor
    return tensor.float().contiguous()


def _fresh(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)  # faster than torch.empty of a shape


# A side is what csrc/bindings.cpp unpacks. Addresses keep nothing alive: the caller holds x, weight and grad.


def _forward_side(x, weight, out):
    if x is None:
        return 0, 0, _NOWHERE, 0, 0
    return x.data_ptr(), _extension.DTYPES[x.dtype], x.stride(), 0 if weight is None else weight.data_ptr(), out.data_ptr()


def _backward_side(x, weight, grad, dx):
    if grad is None:
        return 0, 0, _NOWHERE, 0, (0, _NOWHERE, 0, _NOWHERE)
    return *_forward_side(x, weight, dx)[:4], (grad.data_ptr(), grad.stride(), dx.data_ptr(), dx.stride())


_NOWHERE = (0, 0, 0, 1)  # strides


def _run_forward(q, k, cos, sin, q_weight, k_weight, pre_rope, num_prefix, eps):
    k, k_weight, cos, sin = _triton.unit(k), _single(k_weight), _single(cos), _single(sin)
    k_out = _fresh(k)
    if q is None:
        q_out = k.new_empty(0)
    else:
        q, q_weight = _triton.unit(q), _single(q_weight)
        q_out = _fresh(q)
    _extension.module("rope_qk_norm").rope_qk_norm_forward_cpu(
        _forward_side(q, q_weight, q_out),
        _forward_side(k, k_weight, k_out),
        k.shape,
        (cos.data_ptr(), cos.stride(0), sin.data_ptr(), sin.stride(0), cos.shape[0]),
        (pre_rope, num_prefix, eps),
        torch.get_num_threads(),
    )
    return q_out, k_out


def _run_backward(q, k, cos, sin, q_weight, k_weight, grad_q, grad_k, pre_rope, num_prefix, eps):
    if q is None:
        grad_q = None
    dq, dk = (k.new_empty(0) if grad is None else _fresh(x) for x, grad in ((q, grad_q), (k, grad_k)))
    return dq, dk, backward_into(dq, dk, q, k, cos, sin, q_weight, k_weight, grad_q, grad_k, pre_rope, num_prefix, eps)


def backward_into(dq, dk, q, k, cos, sin, q_weight, k_weight, grad_q, grad_k, pre_rope, num_prefix, eps) -> torch.Tensor:
    """Fills dq and dk, of any strides but one in d, where there is a gradient; returns the weights' sums (2, d). By the extension."""
    k, k_weight, cos, sin = _triton.unit(k), _single(k_weight), _single(cos), _single(sin)
    if grad_q is not None:
        q, q_weight, grad_q = _triton.unit(q), _single(q_weight), _triton.unit(grad_q)
    if grad_k is not None:
        grad_k = _triton.unit(grad_k)
    sums = k.new_empty((2, k.shape[3]), dtype=torch.float32)
    _extension.module("rope_qk_norm").rope_qk_norm_backward_cpu(
        _backward_side(q, q_weight, grad_q, dq),
        _backward_side(k, k_weight, grad_k, dk),
        k.shape,
        (cos.data_ptr(), cos.stride(0), sin.data_ptr(), sin.stride(0), cos.shape[0]),
        (pre_rope, num_prefix, eps),
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return sums


_forward_cpp = _triton.register(
    "rope_qk_norm_forward_cpp(Tensor? q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight,"
    " bool pre_rope, int num_prefix, float eps) -> (Tensor, Tensor)",
    {"CPU": _run_forward},
    fake=_forward_fake,
)
_backward_cpp = _triton.register(
    "rope_qk_norm_backward_cpp(Tensor? q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight,"
    " Tensor? grad_q, Tensor? grad_k, bool pre_rope, int num_prefix, float eps) -> (Tensor, Tensor, Tensor)",
    {"CPU": _run_backward},
    fake=_backward_fake,
)
_LIBRARY_OPS = {"triton": (_forward, _backward), "cpp": (_forward_cpp, _backward_cpp)}


class _RopeQKNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, q_weight, k_weight, pre_rope, num_prefix, eps, impl):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, cos, sin, q_weight, k_weight)
        ctx.options, ctx.impl = (pre_rope, num_prefix, eps), impl
        q_out, k_out = _LIBRARY_OPS[impl][0](q, k, cos, sin, q_weight, k_weight, pre_rope, num_prefix, eps)
        return None if q is None else q_out, k_out

    @staticmethod
    @once_differentiable("rope_qk_norm")
    def backward(ctx, grad_q, grad_k):
        q, k, cos, sin, q_weight, k_weight = ctx.saved_tensors
        want_q, want_k, _, _, want_q_weight, want_k_weight = ctx.needs_input_grad[:6]
        grad_q = grad_q if want_q or want_q_weight else None
        grad_k = grad_k if want_k or want_k_weight else None
        if grad_q is None and grad_k is None:
            return (None,) * 10
        dq, dk, sums = _LIBRARY_OPS[ctx.impl][1](q, k, cos, sin, q_weight, k_weight, grad_q, grad_k, *ctx.options)
        return (
            dq if want_q and grad_q is not None else None,
            dk if want_k and grad_k is not None else None,
            None,
            None,
            as_dtype(sums[0], q_weight.dtype) if want_q_weight and grad_q is not None else None,
            as_dtype(sums[1], k_weight.dtype) if want_k_weight and grad_k is not None else None,
            *(None,) * 4,
        )


def run(
    impl: str,
    q: torch.Tensor | None,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    pre_rope: bool,
    num_prefix: int,
    eps: float,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The kernels of ``impl`` on checked arguments, with their gradient where one is needed."""
    if _triton.needs_grad(q, k, q_weight, k_weight):
        return _RopeQKNorm.apply(q, k, cos, sin, q_weight, k_weight, pre_rope, num_prefix, eps, impl)
    q_out, k_out = _LIBRARY_OPS[impl][0](q, k, cos, sin, q_weight, k_weight, pre_rope, num_prefix, eps)
    return None if q is None else q_out, k_out


def _run(impl, q, k, cos, sin, q_weight, k_weight, *, order, num_prefix, eps):
    return run(impl, q, k, cos, sin, None if q is None else q_weight, k_weight, order == "pre_rope", num_prefix, eps)


@backend.op(
    reference=rope_qk_norm_reference,
    check=_check,
    facts=_facts,
    run=_run,
    kernels={"triton": backend.triton_refuses, "cpp": _extension.cpp_refuses},
)
def rope_qk_norm(
    q: torch.Tensor | None,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    *,
    order: str = "pre_rope",
    num_prefix: int = 0,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Rotates and norms q and k: ``(q, k)``. The module's docstring is the contract.

    Args:
        q, k: (B,L,H,d); ``q=None`` does k alone.
        cos, sin: (N,d) tables, used (L - num_prefix) / N times.
        q_weight, k_weight: (d,) of the per-head LayerNorms, or ``None`` for plain RoPE.
        order: "pre_rope" (norm, then rotate) or "post_rope".
        num_prefix: leading tokens that are not rotated.
        eps: of the LayerNorms.
        impl: see :mod:`deltakern.backend`.

    Raises:
        ValueError: shapes, devices, order, num_prefix, a table that requires grad. TypeError: dtypes.
    """
    options = {"order": order, "num_prefix": num_prefix, "eps": eps}
    return backend.call(rope_qk_norm, impl, q, k, cos, sin, q_weight, k_weight, **options)
