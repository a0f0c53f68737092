"""The predictor: queries attend to past tokens and to nothing else. Shared by DeltaWorld and DINO-world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deltakern import ops
from deltakern.nn import MLP, LayerScale, PackedModule, Residual, evaluation
from deltakern.nn.block import add_and_norm, as_they_are, fold_scale, join
from deltakern.nn.packing import compute_dtype
from deltakern.nn.product import evaluates, product

KeysValues = tuple[torch.Tensor, torch.Tensor]
Rotate = Callable[[torch.Tensor], torch.Tensor]
Mix = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class CrossAttention(PackedModule):
    """Parameters ``q_proj``, ``kv_proj`` (keys first), ``out_proj``, all with bias."""

    def __init__(self, width: int, memory_width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(memory_width, 2 * width)
        self.out_proj = nn.Linear(width, width)

    def keys_values(self, memory: torch.Tensor, rotate: Rotate) -> KeysValues:
        """Keys, rotated, and values of memory tokens (B,T,Dm): each (B,T,H,d)."""
        dtype = compute_dtype(memory.device.type, self.kv_proj.weight.dtype)
        both = product(self, "kv", (self.kv_proj.weight, self.kv_proj.bias), dtype, lambda *p: p, memory.to(dtype))
        both = both.unflatten(-1, (2, self.num_heads, -1))
        return rotate(both[:, :, 0]), both[:, :, 1]

    def forward(self, normed: torch.Tensor, kv: KeysValues, mix: Mix, scale: torch.Tensor | None = None) -> torch.Tensor:
        """(B,Q,D) -> (B,Q,D); ``mix(q, k, v)`` is the attention itself, ``scale`` is folded into the output projection."""
        dtype = compute_dtype(normed.device.type, self.q_proj.weight.dtype)
        q = product(self, "q", (self.q_proj.weight, self.q_proj.bias), dtype, lambda *p: p, normed).unflatten(-1, (self.num_heads, -1))
        parts = (self.out_proj.weight, self.out_proj.bias, scale)
        return product(self, "out", parts, dtype, fold_scale, mix(q, *kv).flatten(2))


class _Evaluation:
    """A block with keys and values at hand, in float32 on a CPU without gradient, see :mod:`deltakern.nn.evaluation`."""

    def __init__(self, block: PredictorBlock) -> None:
        attention = block.attention
        self.heads = attention.num_heads
        self.q = evaluation.Projection(as_they_are, attention.q_proj.weight, attention.q_proj.bias)
        scale = block.layer_scale1.lambda1
        self.out = evaluation.Projection(fold_scale, attention.out_proj.weight, attention.out_proj.bias, scale)
        self.mlp = block.mlp.for_evaluation(block.layer_scale2.lambda1)
        self.norm1, self.norm2 = evaluation.of_norm(block.norm1), evaluation.of_norm(block.norm2)

    def __call__(self, stream: torch.Tensor, kv: KeysValues, mix: Mix) -> torch.Tensor:
        """(B,Q,D) -> (B,Q,D)."""
        q = self.q(F.layer_norm(stream, *self.norm1)).unflatten(-1, (self.heads, -1))
        stream = self.out.plus(mix(q, *kv).flatten(2), stream)
        return self.mlp(F.layer_norm(stream, *self.norm2), stream)


class PredictorBlock(PackedModule):
    """q += ls1 * attention(LN(q), memory); q += ls2 * MLP(LN(q))."""

    def __init__(self, width: int, memory_width: int, heads: int, mlp_ratio: int, layer_scale_init: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CrossAttention(width, memory_width, heads)
        self.layer_scale1 = LayerScale(width, layer_scale_init)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio * width)
        self.layer_scale2 = LayerScale(width, layer_scale_init)

    def forward(self, entry: Residual, memory: torch.Tensor | KeysValues, rotate: Rotate | None, mix: Mix) -> Residual:
        """One block.

        Args:
            entry: the queries' stream and the branch that the block before left to add.
            memory: (B,T,Dm) tokens, projected here, or the keys and values that :meth:`CrossAttention.keys_values` made of them.
            rotate: applies the keys' RoPE; not read when ``memory`` is keys and values.
            mix: the attention of rotated or unrotated queries, as the caller defines it.
        """
        if entry.branch is None and not isinstance(memory, torch.Tensor) and evaluation.straight(entry.stream):
            settings = self.norm1.eps, self.norm2.eps
            straight = evaluation.of(self, self._evaluation, self.attention, self.mlp, settings=settings)
            if straight is not None:
                return Residual(straight(entry.stream, memory, mix))
        fold = not (torch.is_grad_enabled() or self.training or torch.compiler.is_compiling())
        scale1, scale2 = self.layer_scale1.lambda1, self.layer_scale2.lambda1
        dtype = compute_dtype(self.norm1.weight.device.type, self.norm1.weight.dtype)
        kv = self.attention.keys_values(memory, rotate) if isinstance(memory, torch.Tensor) else memory
        stream, normed = add_and_norm(entry, self.norm1, dtype)
        branch = self.attention(normed, kv, mix, scale1 if fold else None)
        stream, normed = add_and_norm(Residual(stream, branch, None if fold else scale1), self.norm2, dtype)
        # A clone, because a sharded block's parameters may be freed before the next block adds the branch.
        return Residual(stream, self.mlp(normed, scale2 if fold else None), None if fold else scale2.clone())

    def _evaluation(self) -> _Evaluation | None:
        """The block as a straight line, or None where parts of it are others than this module's."""
        return _Evaluation(self) if type(self.attention) is CrossAttention and type(self.mlp) is MLP else None


class Predictor(PackedModule):
    """Blocks, LayerNorm and a linear head, under the released names.

    Args:
        backbone_hidden_size: Dm, of the memory tokens and of the output.
        initializer_range: deviation of the initial weights.
        rope_axis_sizes, rope_unrotated_size: channels of a head that each axis rotates, and that none does.
        layer_scale_init: initial LayerScale.
        predictor_hidden_size, predictor_num_hidden_layers, predictor_num_heads, mlp_ratio: D, depth, heads, MLP over D.
    """

    def __init__(
        self,
        backbone_hidden_size: int,
        initializer_range: float,
        rope_axis_sizes: Sequence[int],
        rope_unrotated_size: int,
        layer_scale_init: float,
        predictor_hidden_size: int,
        predictor_num_hidden_layers: int,
        predictor_num_heads: int,
        mlp_ratio: int,
    ) -> None:
        super().__init__()
        if predictor_hidden_size % predictor_num_heads:
            raise ValueError(
                f"predictor_hidden_size must be a multiple of predictor_num_heads, got {predictor_hidden_size} and {predictor_num_heads}"
            )
        head = predictor_hidden_size // predictor_num_heads
        if sum(rope_axis_sizes) + rope_unrotated_size != head or any(size % 2 for size in rope_axis_sizes):
            raise ValueError(
                f"rope_axis_sizes must be even and add up with rope_unrotated_size to the head size {head}, "
                f"got {tuple(rope_axis_sizes)} and {rope_unrotated_size}"
            )
        self.blocks = nn.ModuleList(
            PredictorBlock(predictor_hidden_size, backbone_hidden_size, predictor_num_heads, mlp_ratio, layer_scale_init)
            for _ in range(predictor_num_hidden_layers)
        )
        self.norm = nn.LayerNorm(predictor_hidden_size)
        self.head = nn.Linear(predictor_hidden_size, backbone_hidden_size)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=initializer_range)
                nn.init.zeros_(module.bias)

    def keys_values(self, memory: torch.Tensor, rotate: Rotate) -> list[KeysValues]:
        """Keys and values of memory tokens (B,T,Dm) in every block; they depend on no query."""
        return [block.attention.keys_values(memory, rotate) for block in self.blocks]

    def _every_kv(self) -> list[torch.Tensor]:
        return [p for block in self.blocks for p in (block.attention.kv_proj.weight, block.attention.kv_proj.bias)]

    def project(self, memory: torch.Tensor) -> torch.Tensor:
        """Keys and values of memory tokens (B,T,Dm) in all L blocks by one product: (2,L,B,T,H,d), keys first, not rotated.

        The packed weight is a copy of the blocks' own, 2 L D Dm elements, made without gradient and kept as
        :class:`deltakern.nn.PackedModule` says.
        """
        dtype = compute_dtype(memory.device.type, self.blocks[0].attention.kv_proj.weight.dtype)
        together = product(self, "kv", self._every_kv(), dtype, join, memory.to(dtype))
        return together.unflatten(-1, (len(self.blocks), 2, self.blocks[0].attention.num_heads, -1)).permute(3, 2, 0, 1, 4, 5)

    def stacked(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """The weights as ``ops.predictor_step`` takes them, ``norms`` to ``head_bias``: a copy, kept like that of :meth:`project`."""
        blocks = list(self.blocks)

        def stack(name: str, layers: Sequence[nn.Linear], scales: Sequence[LayerScale] | None = None) -> tuple[torch.Tensor | None, ...]:
            given = []
            for i, layer in enumerate(layers):
                given += [layer.weight, layer.bias, None if scales is None else scales[i].lambda1]

            def build(*p: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
                return tuple(torch.stack(t) for t in zip(*(fold_scale(*p[i : i + 3]) for i in range(0, len(p), 3)), strict=True))

            return self.packed(name, given, dtype, build)

        layers = [norm for block in blocks for norm in (block.norm1, block.norm2)] + [self.norm]
        norms = [p for norm in layers for p in (norm.weight, norm.bias)]
        return (
            *self.packed("norms", norms, norms[0].dtype, lambda *p: (torch.stack(p).unflatten(0, (-1, 2)),)),
            *stack("q", [block.attention.q_proj for block in blocks]),
            *(t.unflatten(0, (len(blocks), -1)) for t in self.packed("kv", self._every_kv(), dtype, join)),
            *stack("out", [block.attention.out_proj for block in blocks], [block.layer_scale1 for block in blocks]),
            *stack("up", [block.mlp.up_proj for block in blocks]),
            *stack("down", [block.mlp.down_proj for block in blocks], [block.layer_scale2 for block in blocks]),
            *self.packed("head", (self.head.weight, self.head.bias), dtype, lambda *p: p),
        )

    def forward(
        self,
        queries: torch.Tensor,
        memory: torch.Tensor | Sequence[KeysValues],
        rotate: Rotate | None,
        mix: Mix | Sequence[Mix],
        *,
        head: bool = True,
    ) -> torch.Tensor | Residual:
        """Predictions (B,Q,Dm) of queries (B,Q,D).

        Args:
            queries: (B,Q,D).
            memory: tokens (B,T,Dm), or the list of :meth:`keys_values`.
            rotate: the keys' RoPE; None when ``memory`` is keys and values.
            mix: the attention, one for all blocks or one a block.
            head: False stops before the last norm and the head: the stream and the last branch, (B,Q,D) each, for
                :meth:`predictions` or :meth:`best`.
        """
        entry = Residual(queries)
        for i, block in enumerate(self.blocks):
            own = memory if isinstance(memory, torch.Tensor) else memory[i]
            entry = block(entry, own, rotate, mix if callable(mix) else mix[i])
        return self.predictions(entry) if head else entry

    def predictions(self, entry: Residual) -> torch.Tensor:
        """The last norm and the head: (...,Dm) of a stream and branch (...,D)."""
        dtype = compute_dtype(entry.stream.device.type, self.head.weight.dtype)
        return product(self, "head", (self.head.weight, self.head.bias), dtype, lambda *p: p, add_and_norm(entry, self.norm, dtype)[1])

    def best(self, entry: Residual, target: torch.Tensor, **loss: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of N candidates the head predicts best, and its loss: ``ops.best_of_n_head``, which stores no predictions on a GPU.

        Where a CPU's product is oneDNN's, it is that and ``ops.best_of_n``: no op fuses the two there, and this weight is kept.

        Args:
            entry: stream and branch (...,N,R...,D).
            target: (...,R...,Dm).
            loss: ``loss``, ``beta`` and ``reduce_dims`` as there.
        """
        dtype = compute_dtype(entry.stream.device.type, self.head.weight.dtype)
        if evaluates(entry.stream, dtype):
            return ops.best_of_n(self.predictions(entry), target, **loss)
        head, bias = self.head.weight.to(dtype), self.head.bias.to(dtype)
        return ops.best_of_n_head(*entry, self.norm.weight, self.norm.bias, head, bias, target, eps=self.norm.eps, **loss)
