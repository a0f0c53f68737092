"""``context_attention``: the predictor's attention of many queries over a clip's few delta tokens, temporal RoPE inside.

Queries never see each other. They come in G groups of R consecutive ones (Q = G * R); a group shares the time of the frame
that it predicts and the number of context tokens that it may see. In training a group is one target frame and R = K
candidates; in sampling G = 1 and R = S samples.

Formula, for every head (d channels, the first ``rope_size`` rotate in pairs (i, i + rope_size/2), the rest do not)::

    angle_i(t) = 2 pi t / 10 ** linspace(-2, 2, rope_size/2)[i]
    s_qj = scale * <rope(q, q_time[group(q)]), rope(k_j, k_time[j])>      j < visible[group(q)]
    out_q = sum_j softmax_j(s_qj) v_j

Each query may bring J keys and values of its own (``own_k``, ``own_v``: the tokens that its sample has generated so far);
they join the softmax and are always visible. ``k_time=None`` says that ``k`` is rotated already (and then ``own_k`` too).
Shapes: q (B,Q,H,d); k, v (B,T,H,d); q_time (B,G); k_time (B,T) or None; visible (G,) integers in 1..T, or None for all;
own_k, own_v (B,Q,J,H,d); own_time (B,J). Out: (B,Q,H,d) in q's dtype.
Dtypes: q, k, v float32, bfloat16, float16 (float64 in the reference); times float32 or float64. Angles, scores and sums in
float32 (float64 for float64, angles too when the times are float64).
Gradient: q, k, v, own_k, own_v (not the times: a time that requires grad raises).
Determinism: sums run in a fixed order.
Kernels: scores and sums in float32. Triton: angles in float64 for any times, of the seconds from the query to the token; at most 32
context tokens (16 of more than 64 channels in float32) and 128 channels, q, k and v of one dtype. C++, on a CPU: angles as above; at
most 256 channels.
Source: Predictor._CrossAttn of the released code with causal_mask; paper, section 3 (DeltaWorld).
"""

from __future__ import annotations

import functools
import math

import torch

from deltakern import backend
from deltakern.ops import _extension, _triton, _validate
from deltakern.ops._once import once_differentiable

MOST_TOKENS = 32
"""Context tokens that the Triton kernels take: they are held by every program."""


def temporal_angles(time: torch.Tensor, rope_size: int) -> torch.Tensor:
    """Angles of the temporal RoPE, (..., rope_size/2), for times in seconds (...). At least float32."""
    wide = torch.promote_types(time.dtype, torch.float32)
    if time.is_cpu and wide == torch.float32 and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack():
        rates = _single_revolutions(rope_size // 2)
    else:
        rates = _revolutions(rope_size // 2, time.device, wide)
    return (2 * math.pi) * time.to(wide)[..., None] * rates


def _revolutions(half: int, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """Revolutions a second of every pair of channels, (half,)."""
    return 1.0 / (10.0 ** torch.linspace(-2, 2, half, device=device, dtype=dtype))


@functools.cache
def _single_revolutions(half: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return _revolutions(half, "cpu", torch.float32)


def temporal_rope(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotates channels (i, i + half) of x (..., d) by ``angles`` (..., half), which broadcast; the channels beyond stay."""
    half = angles.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    first, second, rest = x.to(wide).split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos, rest), -1).to(x.dtype)


def context_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_time: torch.Tensor,
    k_time: torch.Tensor | None,
    visible: torch.Tensor | None = None,
    *,
    own_k: torch.Tensor | None = None,
    own_v: torch.Tensor | None = None,
    own_time: torch.Tensor | None = None,
    rope_size: int = 60,
    scale: float | None = None,
) -> torch.Tensor:
    """Plain PyTorch. See the module's docstring for the contract."""
    batch, queries, heads, head = q.shape
    groups = q_time.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = head**-0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        turned = temporal_rope(q.to(wide).unflatten(1, (groups, -1)), temporal_angles(q_time, rope_size)[:, :, None, None])
        keys, own = k.to(wide), None if own_k is None else own_k.to(wide)
        if k_time is not None:
            keys = temporal_rope(keys, temporal_angles(k_time, rope_size)[:, :, None])
            if own is not None:
                own = temporal_rope(own, temporal_angles(own_time, rope_size)[:, None, :, None])
        scores = torch.einsum("bgrhd,bthd->bhgrt", turned * scale, keys)
        if visible is not None:
            hidden = torch.arange(k.shape[1], device=k.device) >= visible[:, None]
            scores = scores.masked_fill(hidden[None, None, :, None], float("-inf"))
        if own is None:
            out = torch.einsum("bhgrt,bthd->bgrhd", scores.softmax(-1), v.to(wide))
        else:
            of_query = own.unflatten(1, (groups, -1))
            beside = torch.einsum("bgrhd,bgrjhd->bhgrj", turned * scale, of_query)
            weights = torch.cat((scores, beside), -1).softmax(-1)
            out = torch.einsum("bhgrt,bthd->bgrhd", weights[..., : k.shape[1]], v.to(wide))
            own_values = own_v.to(wide).unflatten(1, (groups, -1))
            out = out + torch.einsum("bhgrj,bgrjhd->bgrhd", weights[..., k.shape[1] :], own_values)
        return out.reshape(batch, queries, heads, head).to(q.dtype)


def _facts(q, k, v, q_time, k_time, visible=None, *, own_k=None, own_v=None, **_) -> backend.Facts:
    dtypes = tuple([t.dtype for t in (q, k, v, own_k, own_v) if t is not None])
    head, tokens = k.shape[3], k.shape[1]
    triton = backend.too_wide(head, 128)
    if tokens > MOST_TOKENS:
        triton = f"the kernel takes at most {MOST_TOKENS} context tokens"
    elif dtypes[0] == torch.float32 and head > 64 and tokens > MOST_TOKENS // 2:
        triton = f"in float32 the kernel takes at most {MOST_TOKENS // 2} context tokens of more than 64 channels: registers hold no more"
    elif not dtypes[0] == dtypes[1] == dtypes[2]:
        triton = "the kernel takes q, k and v of one dtype"
    return backend.Facts(q.device.type, dtypes, backend.too_wide(head, 256), triton)


def _check(q, k, v, q_time, k_time, visible, *, own_k, own_v, own_time, rope_size, **_) -> None:
    op = "context_attention"
    _validate.rank(op, "q", q, "(B,Q,H,d)")
    batch, queries, heads, head = q.shape
    _validate.rank(op, "k", k, "(B,T,H,d)")
    tokens = k.shape[1]
    _validate.shape(op, "k", k, (batch, tokens, heads, head), "(B,T,H,d)")
    _validate.shape(op, "v", v, k.shape, "k's shape (B,T,H,d)")
    if tokens == 0:
        raise ValueError(f"{op}: k must hold at least one context token, got {_validate.wanted_shape(k)}")
    _validate.rank(op, "q_time", q_time, "(B,G)")
    groups = q_time.shape[1]
    _validate.shape(op, "q_time", q_time, (batch, groups), "(B,G)")
    if groups == 0 or queries % groups:
        raise ValueError(f"{op}: q_time must be (B,G) with Q={queries} a multiple of G, got G={groups}")
    if k_time is not None:
        _validate.shape(op, "k_time", k_time, (batch, tokens), "(B,T)")
    if visible is not None:
        _validate.shape(op, "visible", visible, (groups,), "(G,)")
        if visible.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{op}: visible must be int64 or int32, got {visible.dtype}")
    if (own_k is None) != (own_v is None):
        raise ValueError(f"{op}: own_k and own_v come together, got {'own_v' if own_k is None else 'own_k'} alone")
    if own_k is not None:
        _validate.rank(op, "own_k", own_k, "(B,Q,J,H,d)")
        _validate.shape(op, "own_k", own_k, (batch, queries, own_k.shape[2], heads, head), "(B,Q,J,H,d)")
        _validate.shape(op, "own_v", own_v, own_k.shape, "own_k's shape (B,Q,J,H,d)")
        if k_time is not None:
            if own_time is None:
                raise ValueError(f"{op}: own_k that is not rotated needs own_time (B,J), got None")
            _validate.shape(op, "own_time", own_time, (batch, own_k.shape[2]), "(B,J)")
    if rope_size % 2 or not 0 < rope_size <= head:
        raise ValueError(f"{op}: rope_size must be even and at most d={head}, got {rope_size}")
    for name, tensor in (("q_time", q_time), ("k_time", k_time), ("own_time", own_time)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{op}: {name} has no gradient, got a tensor that requires grad")
    _validate.floating_on_one_device(op, q=q, k=k, v=v, q_time=q_time, k_time=k_time, own_k=own_k, own_v=own_v, own_time=own_time)
    if visible is not None:
        _validate.one_device(op, q=q, visible=visible)


def _forward_fake(q, k, v, q_time, k_time, visible, own_k, own_v, own_time, rope_size, scale):
    return q.new_empty(q.shape)


_forward = _triton.define(
    "context_attention_forward(Tensor q, Tensor k, Tensor v, Tensor q_time, Tensor? k_time, Tensor? visible, Tensor? own_k, Tensor? own_v,"
    " Tensor? own_time, int rope_size, float scale) -> Tensor",
    module="context_attention",
    fake=_forward_fake,
)


def _backward_fake(q, k, v, q_time, k_time, visible, own_k, own_v, own_time, grad, rope_size, scale, want_keys):
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape if want_keys else 0),
        v.new_empty(v.shape if want_keys else 0),
        q.new_empty(0) if own_k is None else own_k.new_empty(own_k.shape),
        q.new_empty(0) if own_v is None else own_v.new_empty(own_v.shape),
    )


_backward = _triton.define(
    "context_attention_backward(Tensor q, Tensor k, Tensor v, Tensor q_time, Tensor? k_time, Tensor? visible, Tensor? own_k, Tensor? own_v,"
    " Tensor? own_time, Tensor grad, int rope_size, float scale, bool want_keys) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    module="context_attention",
    fake=_backward_fake,
)


# What csrc/bindings.cpp unpacks. Addresses keep nothing alive: the caller holds the tensors.


def _rows(x: torch.Tensor | None):
    return (0, 0, ()) if x is None else (x.data_ptr(), _extension.DTYPES[x.dtype], x.stride())


def _seconds(time: torch.Tensor | None) -> torch.Tensor | None:
    """Times as the extension reads them: float32 or float64 side by side."""
    if time is None:
        return None
    return (time if time.dtype in (torch.float32, torch.float64) else time.float()).contiguous()


def _problem(q, k, v, q_time, k_time, visible, own_k, own_v, own_time, rope_size, scale):
    """The arguments that forward and backward share, and the tensors that they point into."""
    q, k, v, own_k, own_v = (None if t is None else _triton.unit(t) for t in (q, k, v, own_k, own_v))
    if own_k is not None and own_k.shape[2] == 0:
        own_k = own_v = own_time = None
    times = _seconds(q_time), _seconds(k_time), None if k_time is None else _seconds(own_time)
    if visible is not None:
        visible = visible.long().contiguous()
    own, rates = 0 if own_k is None else own_k.shape[2], _single_revolutions(rope_size // 2)
    arguments = (
        (q.shape[0], q.shape[1], q_time.shape[1], k.shape[1], own, *q.shape[2:], rope_size // 2),
        _rows(q),
        _rows(k),
        _rows(v),
        (_rows(own_k), _rows(own_v)),
        (*((0, False) if t is None else (t.data_ptr(), t.dtype == torch.float64) for t in times), rates.data_ptr()),
        0 if visible is None else visible.data_ptr(),
        scale,
    )
    return arguments, (q, k, v, own_k, own_v, times, rates, visible)


def _run_forward(q, *rest):
    arguments, _held = _problem(q, *rest)
    out = q.new_empty(q.shape)
    _extension.module("context_attention").context_attention_forward_cpu(*arguments, _rows(out), torch.get_num_threads())
    return out


def _run_backward(q, k, v, q_time, k_time, visible, own_k, own_v, own_time, grad, rope_size, scale, want_keys):
    arguments, _held = _problem(q, k, v, q_time, k_time, visible, own_k, own_v, own_time, rope_size, scale)
    grad, given = _triton.unit(grad), (k, v, own_k, own_v)
    dq, *others = q.new_empty(q.shape), *(q.new_empty(0) if t is None else t.new_empty(t.shape) for t in given)
    _extension.module("context_attention").context_attention_backward_cpu(
        *arguments, _rows(grad), _rows(dq), [_rows(t) for t in others], torch.get_num_threads()
    )
    if not want_keys:
        others[:2] = k.new_empty(0), v.new_empty(0)
    return dq, *others


_forward_cpp = _triton.register(
    "context_attention_forward_cpp(Tensor q, Tensor k, Tensor v, Tensor q_time, Tensor? k_time, Tensor? visible, Tensor? own_k,"
    " Tensor? own_v, Tensor? own_time, int rope_size, float scale) -> Tensor",
    {"CPU": _run_forward},
    fake=_forward_fake,
)
_backward_cpp = _triton.register(
    "context_attention_backward_cpp(Tensor q, Tensor k, Tensor v, Tensor q_time, Tensor? k_time, Tensor? visible, Tensor? own_k,"
    " Tensor? own_v, Tensor? own_time, Tensor grad, int rope_size, float scale, bool want_keys)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"CPU": _run_backward},
    fake=_backward_fake,
)
_LIBRARY_OPS = {"triton": (_forward, _backward), "cpp": (_forward_cpp, _backward_cpp)}


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, q_time, k_time, visible, own_k, own_v, own_time, rope_size, scale, impl):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, q_time, k_time, visible, own_k, own_v, own_time)
        ctx.options, ctx.impl = (rope_size, scale), impl
        return _LIBRARY_OPS[impl][0](q, k, v, q_time, k_time, visible, own_k, own_v, own_time, rope_size, scale)

    @staticmethod
    @once_differentiable("context_attention")
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 12
        want_q, want_k, want_v, _, _, _, want_own_k, want_own_v, *_ = ctx.needs_input_grad
        dq, dk, dv, d_own_k, d_own_v = _LIBRARY_OPS[ctx.impl][1](*ctx.saved_tensors, grad, *ctx.options, want_k or want_v)
        return (
            dq if want_q else None,
            dk if want_k else None,
            dv if want_v else None,
            None,
            None,
            None,
            d_own_k if want_own_k else None,
            d_own_v if want_own_v else None,
            *(None,) * 4,
        )


def _run(impl, q, k, v, q_time, k_time, visible, *, own_k, own_v, own_time, rope_size, scale):
    arguments = (q, k, v, q_time, k_time, visible, own_k, own_v, own_time, rope_size, q.shape[-1] ** -0.5 if scale is None else scale)
    if _triton.needs_grad(q, k, v, own_k, own_v):
        return _ContextAttention.apply(*arguments, impl)
    return _LIBRARY_OPS[impl][0](*arguments)


@backend.op(
    reference=context_attention_reference,
    check=_check,
    facts=_facts,
    run=_run,
    kernels={"triton": backend.triton_refuses, "cpp": _extension.cpp_refuses},
)
def context_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_time: torch.Tensor,
    k_time: torch.Tensor | None,
    visible: torch.Tensor | None = None,
    *,
    own_k: torch.Tensor | None = None,
    own_v: torch.Tensor | None = None,
    own_time: torch.Tensor | None = None,
    rope_size: int = 60,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Attention of many queries over few context tokens, with temporal RoPE. The module's docstring is the contract.

    Args:
        q: (B,Q,H,d), not rotated.
        k, v: (B,T,H,d) of the context.
        q_time: (B,G) seconds; query i belongs to group i // (Q/G).
        k_time: (B,T) seconds, or ``None`` when the keys are rotated already.
        visible: (G,) how many leading context tokens a group sees; ``None`` for all.
        own_k, own_v: (B,Q,J,H,d) keys and values that only their query sees.
        own_time: (B,J) seconds of them.
        rope_size: channels that rotate.
        scale: of the scores; d ** -0.5 by default.
        impl: see :mod:`deltakern.backend`.

    Returns:
        (B,Q,H,d) in q's dtype.

    Raises:
        ValueError: shapes, devices, rope_size, a time that requires grad. TypeError: dtypes.
    """
    options = {"own_k": own_k, "own_v": own_v, "own_time": own_time, "rope_size": rope_size, "scale": scale}
    return backend.call(context_attention, impl, q, k, v, q_time, k_time, visible, **options)
