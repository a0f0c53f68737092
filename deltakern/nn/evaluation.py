"""Blocks evaluated in float32 on a CPU, without gradient: a straight line over tensors that are derived once.

In a small model a call costs as much as its arithmetic, and the general way through a block asks at every step what there is to know:
which op, which implementation, which weights, whether they have changed. Here a block is asked once, when its weights are first seen,
and then only whether they are the same. LayerScale is folded into the projections, the residual is added in place, and QK-norm and
RoPE take q and k together, as they lie in the packed projection: by the extension's kernel, or by tables that hold the norm's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as modules

from deltakern import backend, ops
from deltakern.nn.attend import attend
from deltakern.nn.packing import PackedModule, Watch
from deltakern.nn.product import available, pointwise, reorder, takes
from deltakern.ops import _extension

Rope = tuple[torch.Tensor, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor | None]
Made = TypeVar("Made")


def straight(x: torch.Tensor) -> bool:
    """Whether a pass over x may leave the general way: a plain float32 tensor on a CPU, no gradient, no tracing, no autocast, and no
    kernels of Triton's asked for."""
    return (
        type(x) is torch.Tensor
        and x.is_cpu
        and x.dtype is torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()  # a mode, such as one that counts FLOPs, is to see the ops
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._get_tracing_state()
        and backend.preferred() in (None, "reference", "cpp")
    )


def of(module: PackedModule, make: Callable[[], Made | None], *parts: nn.Module, settings: tuple[Any, ...] = ()) -> Made | None:
    """What ``make`` derives of a module's parameters and of ``settings``, kept until one of them changes, or None where the general way
    must be taken: in training, for parameters that are no ordinary ones in float32 on a CPU, and where somebody wants to see what goes
    into one of ``parts``, which are not called, or comes out of it."""
    if module.training or modules._has_any_global_hook():
        return None
    for part in parts:
        if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
            return None
    kept = module._packed.get("evaluation")
    if kept is not None and kept[2] == settings and kept[0].unchanged():
        return kept[1]
    if any(type(p) is not nn.Parameter or not p.is_cpu or p.dtype != torch.float32 or p.is_inference() for p in module.parameters()):
        return None
    with torch.inference_mode(False), torch.no_grad():
        kept = Watch(module), make(), settings
    module._packed["evaluation"] = kept
    return kept[1]


def of_norm(norm: nn.LayerNorm) -> tuple[Any, ...]:
    """What ``F.layer_norm`` takes behind its input."""
    return norm.normalized_shape, norm.weight, norm.bias, norm.eps


class Projection:
    """``x W^T + b`` of x (...,D), with the weight (E,D) and bias (E,) or None that ``build(*parameters)`` makes.

    The weight is kept in the forms that were asked for: plain, and as oneDNN reorders it.
    """

    def __init__(self, build: Callable[..., Pair], *parameters: torch.Tensor | None) -> None:
        self._build, self._parameters = build, parameters
        matrices = [p for p in parameters if p is not None and p.ndim == 2]
        self._size, self._width = sum(p.numel() for p in matrices), matrices[0].shape[1]
        self._plain: Pair | None = None
        self._reordered: Pair | None = None

    def plain(self) -> Pair:
        """Weight and bias."""
        if self._plain is None:
            self._plain = self._made()
        return self._plain

    def _made(self) -> Pair:
        with torch.inference_mode(False), torch.no_grad():
            return self._build(*self._parameters)

    def onednn(self, x: torch.Tensor, activated: bool = False) -> Pair | None:
        """The weight as oneDNN wants it, and the bias, where oneDNN is to take the product."""
        if not (takes(x.numel() // self._width, self._width, self._size, activated) and available()):
            return None
        return self.reordered()

    def reordered(self) -> Pair:
        """The weight as oneDNN wants it, and the bias."""
        if self._reordered is None:
            weight, bias = self._made()
            with torch.inference_mode(False), torch.no_grad():
                self._reordered = reorder(weight), bias
        return self._reordered

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.onednn(x)
        return F.linear(x, *self.plain()) if kept is None else pointwise(x, *kept)

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """With ``other`` (...,E) added."""
        kept = self.onednn(x)
        return F.linear(x, *self.plain()).add_(other) if kept is None else pointwise(x, *kept, "add", other)


class GELU:
    """``deltakern.nn.MLP`` with its residual."""

    def __init__(self, up: Projection, down: Projection) -> None:
        self.up, self.down = up, down

    def __call__(self, normed: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        kept = self.up.onednn(normed, activated=True)
        hidden = F.gelu(self.up(normed)) if kept is None else pointwise(normed, *kept, "gelu")
        return self.down.plus(hidden, stream)


class SwiGLU:
    """``deltakern.nn.SwiGLU`` with its residual. One product for gate and up, or two of oneDNN's that activate and multiply."""

    def __init__(self, gate: Projection, up: Projection, both: Projection, down: Projection) -> None:
        self.gate, self.up, self.both, self.down = gate, up, both, down

    def __call__(self, normed: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        kept = self.gate.onednn(normed, activated=True)
        if kept is None:
            gate, up = self.both(normed).chunk(2, -1)
            hidden = F.silu(gate).mul_(up)
        else:
            hidden = pointwise(normed, *self.up.reordered(), "mul", pointwise(normed, *kept, "swish"))
        return self.down.plus(hidden, stream)


class Turn:
    """``ops.rope_qk_norm`` of one or two tensors that lie side by side in rows of (...,count*H*d), with the same tables.

    Args:
        weights: of the QK-norm, (d,) each; Nones without a norm.
        heads, head: H and d.
        order, eps: as in the op.
    """

    def __init__(self, weights: Sequence[torch.Tensor | None], heads: int, head: int, order: str, eps: float) -> None:
        self.weights = tuple(None if w is None else w.contiguous() for w in weights)
        self.heads, self.head, self.order, self.eps = heads, head, order, eps
        # (count,1,2,d/2), or None without a norm
        self.weight = None if weights[0] is None else torch.stack(self.weights).unflatten(-1, (1, 2, -1))
        self._tables: tuple[tuple[int, ...], Rope, Rope] | None = None  # by what, the tables, and what must not be freed meanwhile

    def fits(self, length: int, rope: Rope, num_prefix: int) -> bool:
        """Whether the tables are float32 on the CPU and turn so many tokens."""
        cos, sin = rope
        return (
            cos.dtype is sin.dtype is torch.float32
            and cos.is_cpu
            and sin.is_cpu
            and cos.ndim == 2
            and cos.shape == sin.shape
            and cos.shape[1] == self.head
            and cos.shape[0] > 0
            and 0 <= num_prefix <= length
            and (length - num_prefix) % cos.shape[0] == 0
            and not (cos.requires_grad or sin.requires_grad)
            and cos.stride(1) == sin.stride(1) == 1
        )

    def __call__(self, rows: torch.Tensor, rope: Rope, num_prefix: int, native: bool) -> torch.Tensor:
        """(count,B,L,H,d) of rows (B,L,E)."""
        return self._kernel(rows, rope, num_prefix) if native else self._plain(rows, rope, num_prefix)

    def _kernel(self, rows: torch.Tensor, rope: Rope, num_prefix: int) -> torch.Tensor:
        (batch, length, _), (cos, sin), count = rows.shape, rope, len(self.weights)
        out = rows.new_empty((count, batch, length, self.heads, self.head))
        address, step = rows.data_ptr(), 4 * self.heads * self.head
        result, size = out.data_ptr(), step * batch * length
        strides = (*rows.stride()[:2], self.head, 1)
        sides = [
            (address + i * step, 0, strides, 0 if weight is None else weight.data_ptr(), result + i * size)
            for i, weight in enumerate(self.weights)
        ]
        if count == 1:
            sides = [(0, 0, (0, 0, 0, 1), 0, 0), *sides]
        _extension.module("rope_qk_norm").rope_qk_norm_forward_cpu(
            *sides,
            (batch, length, self.heads, self.head),
            (cos.data_ptr(), cos.stride(0), sin.data_ptr(), sin.stride(0), cos.shape[0]),
            (self.order == "pre_rope", num_prefix, self.eps),
            torch.get_num_threads(),
        )
        return out

    def _plain(self, rows: torch.Tensor, rope: Rope, num_prefix: int) -> torch.Tensor:
        count, head = len(self.weights), self.head
        halves = (2, head // 2)
        x = rows[..., : count * self.heads * head].unflatten(-1, (count, self.heads, *halves))
        before = self.weight is not None and self.order == "pre_rope"
        if before:
            x = F.layer_norm(x, halves, None, None, self.eps)
        cosines, sines = self._folded(rope, rows.shape[1], num_prefix, before)
        out = torch.addcmul(x * cosines, x.flip(-2), sines)
        if self.weight is not None and not before:
            out = F.layer_norm(out, halves, None, None, self.eps).mul_(self.weight)
        return out.flatten(-2).movedim(2, 0)

    def _folded(self, rope: Rope, length: int, num_prefix: int, weighted: bool) -> Rope:
        """What a row's channels and their partners are multiplied by, (L,count,1,2,d/2) each: with the norm's weights in them, ones and
        zeros for tokens that do not rotate, and the sign of the first half's sines."""
        counted = not any(t.is_inference() for t in rope)  # such a tensor counts no versions: nothing to keep by
        key = (*map(id, rope), length, num_prefix, *(t._version for t in rope)) if counted else None
        kept = self._tables  # read once: another thread may put others in its place
        if counted and kept is not None and kept[0] == key:
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():
            cos, sin = (t.repeat((length - num_prefix) // len(t), 1) for t in rope)
            cos, sin = F.pad(cos, (0, 0, num_prefix, 0), value=1.0), F.pad(sin, (0, 0, num_prefix, 0))
            cos, sin = (t.unflatten(1, (1, 1, 2, -1)) for t in (cos, sin))
            sin = torch.cat((-sin[..., :1, :], sin[..., 1:, :]), -2)
            made = (cos * self.weight, sin * self.weight.flip(-2)) if weighted else (cos, sin)
        if counted:
            self._tables = (key, made, rope)
        return made


class Attention:
    """``deltakern.nn.SelfAttention`` with its residual, of all rows or all but the first."""

    def __init__(self, qkv: Projection, out: Projection, turn: Turn, *, gated: bool, backend: str) -> None:
        self.qkv, self.out, self.turn, self.gated, self.backend = qkv, out, turn, gated, backend

    def __call__(self, normed: torch.Tensor, stream: torch.Tensor, rope: Rope, num_prefix: int, native: bool) -> torch.Tensor:
        """Attention of the last rows of ``normed`` (B,L,D), as many as ``stream`` has, over all rows, added to ``stream``.
        ``native``: the extension's kernel runs."""
        heads, head = self.turn.heads, self.turn.head
        width, skip = heads * head, normed.shape[1] - stream.shape[1]
        packed = self.qkv(normed)
        q, k = self.turn(packed, rope, num_prefix, native).unbind()
        v = packed[..., 2 * width : 3 * width].unflatten(-1, (heads, head))
        mixed = attend(q[:, skip:] if skip else q, k, v, backend=self.backend)
        if self.gated:
            mixed = mixed.mul_(packed[:, skip:, 3 * width : 3 * width + heads].sigmoid()[..., None])
        return self.out.plus(mixed.flatten(2), stream)


class FirstRow:
    """``deltakern.nn.SelfAttention.first_row`` with its residual: keys of every token, one query, the value projection behind the pooling.

    Args:
        q_gate: query, and the gate's logits behind it where there is a gate.
        k: keys.
        v, v_bias: (H,d,D) and (H,1,d) of the value projection.
        q_weight: (d,) of the query's norm, or None.
    """

    def __init__(
        self,
        q_gate: Projection,
        k: Projection,
        v: torch.Tensor,
        v_bias: torch.Tensor,
        out: Projection,
        q_weight: torch.Tensor | None,
        turn: Turn,
        *,
        gated: bool,
    ) -> None:
        self.q_gate, self.k, self.out, self.q_weight, self.turn, self.gated = q_gate, k, out, q_weight, turn, gated
        self.v, self.v_bias = v.transpose(1, 2), v_bias

    def __call__(self, normed: torch.Tensor, stream: torch.Tensor, rope: Rope, num_prefix: int, native: bool) -> torch.Tensor:
        """Of row 0 of ``normed`` (B,L,D), added to ``stream`` (B,1,D)."""
        heads, head = self.turn.heads, self.turn.head
        width = heads * head
        first = self.q_gate(normed[:, 0])
        q = first[:, :width].unflatten(-1, (heads, head))
        if self.q_weight is not None:
            q = F.layer_norm(q, (head,), self.q_weight, None, self.turn.eps)
        k = self.turn(self.k(normed), rope, num_prefix, native)[0]
        pooled = ops.delta_pool(normed, q, k, scale=head**-0.5)
        mixed = torch.baddbmm(self.v_bias, pooled.transpose(0, 1), self.v).transpose(0, 1)
        if self.gated:
            mixed = mixed * first[:, width:].sigmoid()[..., None]
        return self.out.plus(mixed.reshape(len(normed), 1, width), stream)


class Evaluation:
    """A block, given the first LayerNorm's output.

    Args:
        norm1, attention, first_row, norm2, mlp: its parts, as above.
    """

    def __init__(self, norm1: nn.LayerNorm, attention: Attention, first_row: FirstRow, norm2: nn.LayerNorm, mlp: GELU | SwiGLU) -> None:
        self.attention, self.first_row, self.mlp = attention, first_row, mlp
        self.norm1, self.norm2 = of_norm(norm1), of_norm(norm2)
        self._native: dict[str | None, bool] = {}

    def native(self) -> bool:
        """Whether the extension's kernel turns q and k; asked anew where it is missed, which is to be heard of."""
        want = backend.preferred()
        found = self._native.get(want)
        if found is None:
            found = backend.choose(ops.split_qkv, "auto", backend.Facts("cpu", (torch.float32,))) == "cpp"
            if found or want == "reference":
                self._native[want] = found
        return found

    def fits(self, length: int, width: int, rope: Rope, num_prefix: int) -> bool:
        """Whether tokens (B,L,D) and tables are what the block takes."""
        turn = self.attention.turn
        return length > 0 and width == turn.heads * turn.head and turn.fits(length, rope, num_prefix)

    def __call__(self, stream: torch.Tensor, normed: torch.Tensor, rope: Rope, num_prefix: int, rows: str) -> torch.Tensor:
        """The block's output for the rows of the stream (B,L,D) that go on."""
        if rows == "first":
            stream = self.first_row(normed, stream[:, :1], rope, num_prefix, self.native())
        else:
            stream = self.attention(normed, stream[:, 1:] if rows == "rest" else stream, rope, num_prefix, self.native())
        return self.mlp(F.layer_norm(stream, *self.norm2), stream)
