"""The ops: one file each, a contract, a PyTorch reference, kernels. ``deltakern.ops.<name>.reference`` is the reference.

An op's file reads from contract to public function and imports no Triton. Its Triton kernels and their launchers stand in the
file of the same name in ``deltakern/ops/kernels``, which the first call imports: a launcher has the name of the library op
that ``_triton.define`` registers for it, takes its sizes from ``kernels/tiles.py`` and starts kernels with ``_triton.launch``.
"""

from deltakern.ops.best_of_n import BestOfN, best_of_n
from deltakern.ops.best_of_n_head import best_of_n_head
from deltakern.ops.context_attention import context_attention
from deltakern.ops.delta_pool import delta_pool
from deltakern.ops.gelu import gelu
from deltakern.ops.head_gate import head_gate
from deltakern.ops.layer_norm import layer_norm
from deltakern.ops.patch_delta import patch_delta
from deltakern.ops.recon_loss import recon_loss
from deltakern.ops.residual_norm import residual_norm
from deltakern.ops.rope_qk_norm import rope_qk_norm
from deltakern.ops.split_qkv import split_qkv
from deltakern.ops.swiglu import swiglu

__all__ = [
    "BestOfN",
    "best_of_n",
    "best_of_n_head",
    "context_attention",
    "delta_pool",
    "gelu",
    "head_gate",
    "layer_norm",
    "patch_delta",
    "recon_loss",
    "residual_norm",
    "rope_qk_norm",
    "split_qkv",
    "swiglu",
]
