"""The predictor: queries attend to past tokens and to nothing else. Shared by DeltaWorld and DINO-world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from deltakern import ops
from deltakern.models.validate import check_positive
from deltakern.nn import MLP, Residual, TransformerBlock
from deltakern.nn.block import Rows, add_and_norm
from deltakern.nn.product import apply_linear, cast, evaluates, join, product
from deltakern.nn.weights import Freezable, Part, dtype_for, kernels_run, lasts, one_call, plain, read

KeysValues = tuple[torch.Tensor, torch.Tensor]
Mix = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class CrossAttention(Freezable):
    """Queries over memory. Parameters ``q_proj``, ``kv_proj`` (keys first), ``out_proj``, all with bias."""

    def __init__(self, width: int, memory_width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(memory_width, 2 * width)
        self.out_proj = nn.Linear(width, width)

    def project(self, memory: torch.Tensor) -> torch.Tensor:
        """Keys, not rotated, and values of memory tokens (B,T,Dm): (B,T,2,H,d)."""
        dtype = dtype_for(self.kv_proj, memory)
        return apply_linear(self, "kv", self.kv_proj, memory.to(dtype), dtype).unflatten(-1, (2, self.num_heads, -1))

    def forward(
        self,
        normed: torch.Tensor,
        memory: torch.Tensor | KeysValues,
        mix: Mix,
        *,
        rows: Rows,
        scale: torch.Tensor | None = None,
        into: torch.Tensor | None = None,
        recompute: bool = False,
    ) -> torch.Tensor:
        """(B,Q,D) -> (B,Q,D).

        Args:
            normed: the queries.
            memory: (B,T,Dm) tokens, projected here, or keys and values (B,T,H,d) of theirs.
            mix: ``mix(q, k, v)`` is the attention itself with its RoPE, as the caller defines it.
            rows, recompute: of blocks whose rows see each other; here all go on, and nothing is made again.
            scale: (D,) folded into the output projection.
            into: (B,Q,D) that the result is added to.
        """
        query, out, query_known, out_known = self.known()
        kv = self.project(memory).unbind(2) if isinstance(memory, torch.Tensor) else memory
        q = apply_linear(self, "q", query, normed, normed.dtype, known=query_known).unflatten(-1, (self.num_heads, -1))
        return apply_linear(self, "out", out, mix(q, *kv).flatten(2), normed.dtype, scale=scale, into=into, known=out_known)

    def ask(self) -> tuple[Any, ...]:
        """The layers of every step, and what is read of them."""
        layers = self.q_proj, self.out_proj
        return *layers, *(read(nn.Linear, layer) for layer in layers)

    def groups(self) -> dict[str, tuple[nn.Module, ...]]:
        """What goes through one product each, by a name for it."""
        return {"query": (self.q_proj,), "keys and values": (self.kv_proj,), "output": (self.out_proj,)}


class PredictorBlock(TransformerBlock):
    """q += ls1 * attention(LN(q), memory); q += ls2 * MLP(LN(q)). Called with the queries' :class:`deltakern.nn.Residual`, ``memory`` and
    ``mix``, see :class:`CrossAttention`."""

    def __init__(self, width: int, memory_width: int, heads: int, mlp_ratio: int, layer_scale_init: float) -> None:
        super().__init__(
            CrossAttention(width, memory_width, heads),
            MLP(width, mlp_ratio * width),
            width,
            layer_scale_init=layer_scale_init,
            eps=1e-5,
            recompute="none",
            folds=False,
        )

    def project(self, memory: torch.Tensor) -> torch.Tensor:
        """:meth:`CrossAttention.project`; by way of the block, because a sharded one gathers its weights where it is called."""
        return self.attention.project(memory)


class Predictor(Freezable, Part):
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
        check_positive(
            predictor_num_hidden_layers=predictor_num_hidden_layers, predictor_num_heads=predictor_num_heads, mlp_ratio=mlp_ratio
        )
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

    @property
    def projects_apart(self) -> bool:
        """Whether keys and values may be projected outside of the blocks' forward at no price: a sharded block gathers its weights anew."""
        return plain(nn.Linear, *(block.attention.kv_proj for block in self.blocks))

    def keys_values(self, memory: torch.Tensor) -> list[KeysValues]:
        """:meth:`project`, as a list of each block's keys and values, (B,T,H,d) each."""
        return list(zip(*self.project(memory).unbind(), strict=True))

    @one_call
    def project(self, memory: torch.Tensor) -> torch.Tensor:
        """Keys and values of memory tokens (B,T,Dm) in all L blocks: (2,L,B,T,H,d), keys first, not rotated.

        By one product where the blocks' weights are joined (frozen, or on a GPU), else block by block.
        """
        layers = [block.attention.kv_proj for block in self.blocks]
        joined = lasts(self) and all(block.attention._frozen is self._frozen for block in self.blocks)
        if (joined or kernels_run(memory)) and plain(nn.Linear, *layers) and all(layer.bias is not None for layer in layers):
            dtype = dtype_for(layers[0], memory)
            parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
            together = product(self, "kv", parameters, dtype, join, memory.to(dtype))
            together = together.unflatten(-1, (len(layers), 2, self.blocks[0].attention.num_heads, -1))
        else:
            together = torch.stack([block.project(memory) for block in self.blocks], 2)
        return together.permute(3, 2, 0, 1, 4, 5)

    @one_call
    def forward(
        self,
        queries: torch.Tensor,
        memory: torch.Tensor | Sequence[KeysValues],
        mix: Mix | Sequence[Mix],
        *,
        head: bool = True,
    ) -> torch.Tensor | Residual:
        """Predictions (B,Q,Dm) of queries (B,Q,D).

        Args:
            memory: tokens (B,T,Dm), or the list of :meth:`keys_values`.
            mix: the attention, one for all blocks or one a block.
            head: False stops before the last norm and the head: the stream and the last branch, (B,Q,D) each, for
                :meth:`predictions` or :meth:`best`.
        """
        entry = Residual(queries)
        for i, block in enumerate(self.blocks):
            own = memory if isinstance(memory, torch.Tensor) else memory[i]
            entry = block(entry, own, mix if callable(mix) else mix[i])
        return self.predictions(entry) if head else entry

    def predictions(self, entry: Residual) -> torch.Tensor:
        """The last norm and the head: (...,Dm) of a stream and branch (...,D)."""
        dtype = dtype_for(self.head, entry.stream)
        return apply_linear(self, "head", self.head, add_and_norm(entry, self.norm, dtype)[1], dtype)

    def best(self, entry: Residual, target: torch.Tensor, **loss: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of N candidates the head predicts best, and its loss: ``ops.best_of_n_head``, which stores no predictions on a GPU.

        Where a CPU's product is oneDNN's it is that and ``ops.best_of_n``, because no op fuses the two there; and where norm or head is
        not plain.

        Args:
            entry: stream and branch (...,N,R...,D).
            target: (...,R...,Dm).
            loss: ``loss``, ``beta`` and ``reduce_dims`` as there.
        """
        dtype = dtype_for(self.head, entry.stream)
        fuses = plain(nn.Linear, self.head) and plain(nn.LayerNorm, self.norm)
        if evaluates(entry.stream, dtype) or not (fuses and self.head.bias is not None and self.norm.elementwise_affine):
            return ops.best_of_n(self.predictions(entry), target, **loss)
        head, bias = cast(self, "head", (self.head.weight, self.head.bias), dtype)
        return ops.best_of_n_head(*entry, self.norm.weight, self.norm.bias, head, bias, target, eps=self.norm.eps, **loss)
