"""Thin modules over :mod:`deltakern.ops`, with the released parameter names; weights live or frozen."""

from deltakern.nn.attend import attend
from deltakern.nn.block import MLP, Assembly, Block, LayerScale, Residual, SelfAttention, SwiGLU, TransformerBlock, explain
from deltakern.nn.weights import FrozenWeightsError, StaleCacheError, freeze, frozen, is_frozen, unfreeze

__all__ = [
    "MLP",
    "Assembly",
    "Block",
    "FrozenWeightsError",
    "LayerScale",
    "Residual",
    "SelfAttention",
    "StaleCacheError",
    "SwiGLU",
    "TransformerBlock",
    "attend",
    "explain",
    "freeze",
    "frozen",
    "is_frozen",
    "unfreeze",
]
