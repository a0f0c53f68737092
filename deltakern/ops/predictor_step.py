"""``predictor_step``: whole steps of the predictor for a few samples in one launch, all blocks, head and key-value cache inside.

A step predicts one frame's token for every sample; h steps follow one another, each seeing the context and its own sample's tokens
of the steps before. Formula of step t (L blocks, H heads of d channels, D = H d, GELU by erf), x = noise_t in float32::

    q = rope(LN1_l(x) Wq_l + bq_l, time_t)                       for l = 0..L-1
    x = x + softmax(scale * q [keys_l ; own keys_l]) [values_l ; own values_l] Wo_l + bo_l
    x = x + gelu(LN2_l(x) Wu_l + bu_l) Wd_l + bd_l
    token_t = LN(x) Wh + bh
    own keys_l, own values_l of step t = rope(token_t Wk_l + bk_l, time_t), token_t Wv_l + bv_l

``rope`` is that of ``context_attention``: angles 2 pi time / 10 ** linspace(-2, 2, rope_size/2), channels (i, i + rope_size/2).
Weights are stacked over the blocks, as ``torch.nn.Linear`` holds them (out, in); a LayerScale is folded into Wo, bo, Wd, bd.
Shapes: noise (B,S,h,D); keys (rotated), values (L,B,T,H,d); times (B,h) seconds; norms (2L+1,2,D), weight and bias of LN1_0, LN2_0,
LN1_1, ..., LN; q (L,D,D), q_bias (L,D); kv (L,2D,Dm), keys first, kv_bias (L,2D); out (L,D,D), out_bias (L,D); up (L,M,D), up_bias
(L,M); down (L,D,M), down_bias (L,D); head (Dm,D), head_bias (Dm,). Result: tokens (B,S,h,Dm) in noise's dtype.
Dtypes: float32, bfloat16, float16 (float64 in the reference); keys, values and weights of one dtype, that of the products, noise,
times and norms of any. Residual stream, norms, softmax and sums in float32 (float64 for float64); angles at least so.
Gradient: none. Where autograd would record the call it raises.
Determinism: sums run in a fixed order, which does not depend on the number of programs.
Kernel: at most 64 rows B*S; 32 context tokens, or 16 of several clips together; width 2048; an even d of at most 128.
Source: Predictor of the released code in evaluation, with keys and values cached; paper, section 3 (DeltaWorld).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deltakern import backend
from deltakern.ops import _triton, _validate
from deltakern.ops.context_attention import temporal_angles, temporal_rope

MOST_ROWS = 64
"""Samples of all clips together: beyond, a step is bound by arithmetic, and general products are better at it."""

MOST_TOKENS = {"one clip": 32, "several clips together": 16}
"""Context tokens that the kernel's registers hold."""

MOST_WIDTH = 2048


def predictor_step_reference(
    noise: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    times: torch.Tensor,
    norms: torch.Tensor,
    q: torch.Tensor,
    q_bias: torch.Tensor,
    kv: torch.Tensor,
    kv_bias: torch.Tensor,
    out: torch.Tensor,
    out_bias: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    head: torch.Tensor,
    head_bias: torch.Tensor,
    *,
    rope_size: int = 60,
    eps: float = 1e-5,
    scale: float | None = None,
) -> torch.Tensor:
    """Plain PyTorch. See the module's docstring for the contract."""
    dtype, width = keys.dtype, noise.shape[-1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = keys.shape[-1] ** -0.5 if scale is None else scale

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, keys.shape[3:])

    def normed(x: torch.Tensor, index: int) -> torch.Tensor:
        return F.layer_norm(x, (width,), norms[index, 0].to(wide), norms[index, 1].to(wide), eps).to(dtype)

    with torch.autocast(noise.device.type, enabled=False):
        tokens, own = [], [([], []) for _ in keys]
        for step in range(noise.shape[2]):
            angles = temporal_angles(times[:, step], rope_size)[:, None, None]
            x = noise[:, :, step].to(wide)
            for i, (own_keys, own_values) in enumerate(own):
                query = temporal_rope(heads(F.linear(normed(x, 2 * i), q[i], q_bias[i])).to(wide), angles) * scale
                scores = [torch.einsum("bshd,bthd->bsht", query, keys[i].to(wide))]
                scores += [(query * key.to(wide)).sum(-1, keepdim=True) for key in own_keys]
                weights = torch.cat(scores, -1).softmax(-1)
                mixed = torch.einsum("bsht,bthd->bshd", weights[..., : keys.shape[2]], values[i].to(wide))
                for j, value in enumerate(own_values):
                    mixed = mixed + weights[..., keys.shape[2] + j, None] * value.to(wide)
                x = x + F.linear(mixed.flatten(2).to(dtype), out[i], out_bias[i])
                x = x + F.linear(F.gelu(F.linear(normed(x, 2 * i + 1), up[i], up_bias[i])), down[i], down_bias[i])
            tokens.append(F.linear(normed(x, -1), head, head_bias).to(noise.dtype))
            for i, (own_keys, own_values) in enumerate(own):
                key, value = F.linear(tokens[-1].to(dtype), kv[i], kv_bias[i]).chunk(2, -1)
                own_keys.append(temporal_rope(heads(key), angles))
                own_values.append(heads(value))
        return torch.stack(tokens, 2)


def _facts(noise, keys, values, times, *weights, **_) -> backend.Facts:
    """``weights`` may be left out, by a caller that asks before it stacks them."""
    products = (values, *weights[1:])
    note = backend.too_wide(noise.shape[-1], MOST_WIDTH) or backend.too_wide(keys.shape[-1], 128)
    clips = "one clip" if keys.shape[1] == 1 else "several clips together"
    if noise.shape[0] * noise.shape[1] > MOST_ROWS:
        note = f"the kernel takes at most {MOST_ROWS} samples, of all clips together"
    elif keys.shape[1] * keys.shape[2] > MOST_TOKENS[clips]:
        note = f"the kernel takes at most {MOST_TOKENS[clips]} context tokens of {clips}"
    elif keys.shape[-1] % 2:
        note = "the kernel takes heads with an even number of channels"
    elif any(t.dtype != keys.dtype for t in products):
        note = "the kernel takes keys, values and weights of one dtype"
    return backend.Facts(noise.device.type, tuple(t.dtype for t in (noise, keys, *weights[:1])), note)


def _check(noise, keys, values, times, norms, q, q_bias, kv, kv_bias, out, out_bias, up, up_bias, down, down_bias, head, head_bias, rope):
    op = "predictor_step"
    _validate.rank(op, "noise", noise, "(B,S,h,D)")
    _validate.rank(op, "keys", keys, "(L,B,T,H,d)")
    batch, _, steps, width = noise.shape
    layers, _, tokens, heads, channels = keys.shape
    _validate.shape(op, "keys", keys, (layers, batch, tokens, heads, channels), "(L,B,T,H,d)")
    _validate.shape(op, "values", values, keys.shape, "keys' shape (L,B,T,H,d)")
    if not tokens or not layers or heads * channels != width:
        raise ValueError(
            f"{op}: keys must be (L,B,T,H,d) with L and T at least 1 and H d = D = {width}, got {_validate.wanted_shape(keys)}"
        )
    _validate.rank(op, "up", up, "(L,M,D)")
    _validate.rank(op, "head", head, "(Dm,D)")
    hidden, memory = up.shape[1], head.shape[0]
    expected = {
        "times": (times, (batch, steps), "(B,h)"),
        "norms": (norms, (2 * layers + 1, 2, width), "(2L+1,2,D)"),
        "q": (q, (layers, width, width), "(L,D,D)"),
        "q_bias": (q_bias, (layers, width), "(L,D)"),
        "kv": (kv, (layers, 2 * width, memory), "(L,2D,Dm)"),
        "kv_bias": (kv_bias, (layers, 2 * width), "(L,2D)"),
        "out": (out, (layers, width, width), "(L,D,D)"),
        "out_bias": (out_bias, (layers, width), "(L,D)"),
        "up": (up, (layers, hidden, width), "(L,M,D)"),
        "up_bias": (up_bias, (layers, hidden), "(L,M)"),
        "down": (down, (layers, width, hidden), "(L,D,M)"),
        "down_bias": (down_bias, (layers, width), "(L,D)"),
        "head": (head, (memory, width), "(Dm,D)"),
        "head_bias": (head_bias, (memory,), "(Dm,)"),
    }
    for name, (tensor, shape, layout) in expected.items():
        _validate.shape(op, name, tensor, shape, layout)
    if rope % 2 or not 0 < rope <= channels:
        raise ValueError(f"{op}: rope_size must be even and at most d={channels}, got {rope}")
    everything = {"noise": noise, "keys": keys, "values": values, **{name: tensor for name, (tensor, _, _) in expected.items()}}
    _validate.floating(op, **everything)
    _validate.one_device(op, **everything)
    if _triton.needs_grad(*everything.values()):
        raise RuntimeError(f"{op} has no gradient: call it under torch.no_grad() or with tensors that require none")


def _forward_fake(noise, keys, values, times, norms, q, q_bias, kv, kv_bias, out, out_bias, up, up_bias, down, down_bias, head, *_):
    return noise.new_empty((*noise.shape[:3], head.shape[0]))


_forward = _triton.define(
    "predictor_step_forward(Tensor noise, Tensor keys, Tensor values, Tensor times, Tensor norms, Tensor q, Tensor q_bias, Tensor kv,"
    " Tensor kv_bias, Tensor out, Tensor out_bias, Tensor up, Tensor up_bias, Tensor down, Tensor down_bias, Tensor head,"
    " Tensor head_bias, int rope_size, float eps, float scale) -> Tensor",
    module="predictor_step",
    fake=_forward_fake,
)


@backend.op(reference=predictor_step_reference, facts=_facts, kernels={"triton": backend.triton_refuses})
def predictor_step(
    noise: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    times: torch.Tensor,
    norms: torch.Tensor,
    q: torch.Tensor,
    q_bias: torch.Tensor,
    kv: torch.Tensor,
    kv_bias: torch.Tensor,
    out: torch.Tensor,
    out_bias: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    head: torch.Tensor,
    head_bias: torch.Tensor,
    *,
    rope_size: int = 60,
    eps: float = 1e-5,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Whole steps of the predictor, one after the other. The module's docstring is the contract.

    Args:
        noise: (B,S,h,D), the query of every sample and step.
        keys, values: (L,B,T,H,d) of the context, shared by a clip's samples; keys rotated.
        times: (B,h) seconds of the predicted frames.
        norms: (2L+1,2,D) weights and biases of the LayerNorms, in the order of their use.
        q, kv, out, up, down, head and their biases: the projections, stacked over the blocks; see the module.
        rope_size: channels of a head that rotate.
        eps: of the LayerNorms.
        scale: of the scores; d ** -0.5 by default.
        impl: see :mod:`deltakern.backend`.

    Returns:
        Tokens (B,S,h,Dm) in noise's dtype.

    Raises:
        ValueError: shapes, devices, rope_size. TypeError: dtypes. RuntimeError: autograd would record the call.
    """
    arguments = (noise, keys, values, times, norms, q, q_bias, kv, kv_bias, out, out_bias, up, up_bias, down, down_bias, head, head_bias)
    _check(*arguments, rope_size)
    if backend.choose(predictor_step, impl, _facts(*arguments)) == "triton":
        return _forward(*arguments, rope_size, eps, keys.shape[-1] ** -0.5 if scale is None else scale)
    return predictor_step_reference(*arguments, rope_size=rope_size, eps=eps, scale=scale)
