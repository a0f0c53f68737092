"""Thin modules over :mod:`deltakern.ops`, with the released parameter names."""

from deltakern.nn.attend import attend
from deltakern.nn.block import MLP, Assembly, Block, LayerScale, Residual, SelfAttention, SwiGLU
from deltakern.nn.packing import PackedModule, forget_packed

__all__ = ["MLP", "Assembly", "Block", "LayerScale", "PackedModule", "Residual", "SelfAttention", "SwiGLU", "attend", "forget_packed"]
