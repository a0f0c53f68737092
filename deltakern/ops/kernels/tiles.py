"""Launch sizes: one table, a function of (kernel, width, dtype, architecture). Imports nothing but torch, so that it can be read anywhere.

There is no tuning at run time. A row whose ``architecture`` or ``dtype`` is set is a measured exception and stands before the
general one; the first row that fits is taken.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """What one program takes at a time: ``rows`` rows of ``block`` columns, a power of two.

    ``per_processor`` is how many programs a streaming multiprocessor is given by kernels that keep partial sums and walk
    over their rows; the others start one program a tile.
    """

    rows: int
    block: int
    num_warps: int
    num_stages: int
    per_processor: int


class Row(NamedTuple):
    """One line of the table, for widths up to ``up_to``. ``block=None`` is the next power of two of the width."""

    kernel: str
    up_to: int
    rows: int
    block: int | None
    num_warps: int
    num_stages: int = 1
    per_processor: int = 4
    dtype: torch.dtype | None = None
    architecture: int | None = None


WIDEST = 1 << 62

# Row kernels: about a thousand columns a tile and four warps, so that a thread holds 8 to 16 elements of an array and loads
# 16 bytes at a time; rows up to 8192 channels stay in registers by adding warps. 768 channels fill three quarters of 1024
# lanes: the last warp's loads are masked off, which costs issue slots and no bandwidth.
TABLE: tuple[Row, ...] = (
    Row("residual_norm_forward", 256, 8, None, 4),
    Row("residual_norm_forward", 512, 4, None, 4),
    Row("residual_norm_forward", 1024, 2, None, 4),
    Row("residual_norm_forward", 2048, 1, None, 4),
    Row("residual_norm_forward", 4096, 1, None, 8),
    Row("residual_norm_forward", 8192, 1, None, 16),
    Row("residual_norm_backward", 256, 8, None, 4),
    Row("residual_norm_backward", 512, 4, None, 4),
    Row("residual_norm_backward", 1024, 2, None, 4),
    Row("residual_norm_backward", 2048, 1, None, 8),
    Row("residual_norm_backward", 4096, 1, None, 16),
    Row("residual_norm_backward", 8192, 1, None, 32),
    Row("patch_delta_forward", 256, 8, None, 4),
    Row("patch_delta_forward", 512, 4, None, 4),
    Row("patch_delta_forward", 1024, 2, None, 4),
    Row("patch_delta_forward", 2048, 1, None, 4),
    Row("patch_delta_forward", 4096, 1, None, 8),
    Row("patch_delta_forward", 8192, 1, None, 16),
    Row("patch_delta_backward", 256, 8, None, 4),
    Row("patch_delta_backward", 512, 4, None, 4),
    Row("patch_delta_backward", 1024, 2, None, 4),
    Row("patch_delta_backward", 2048, 1, None, 8),
    Row("patch_delta_backward", 4096, 1, None, 16),
    Row("patch_delta_backward", 8192, 1, None, 32),
    # Element by element: a thread holds 8 elements of an array. Segments shorter than a tile waste lanes, not bandwidth.
    Row("gelu_forward", WIDEST, 1, 1024, 4),
    Row("gelu_backward", WIDEST, 1, 1024, 4),
    Row("swiglu_forward", WIDEST, 1, 1024, 4),
    Row("swiglu_backward", WIDEST, 1, 1024, 4),
    Row("recon_loss_forward", WIDEST, 1, 2048, 4, per_processor=8),
    Row("recon_loss_mean", 4096, 1, None, 4),
    Row("recon_loss_backward", WIDEST, 1, 1024, 4),
    # Rows of a token and a head: half a row is 32 lanes at d=64, two tiles a tensor. A backward that walks keeps three programs a
    # processor, what its registers allow.
    Row("rope_qk_norm_forward", 64, 32, None, 4),
    Row("rope_qk_norm_forward", 128, 16, None, 4),
    Row("rope_qk_norm_forward", 256, 8, None, 4),
    Row("rope_qk_norm_backward", 64, 32, None, 4, per_processor=3),
    Row("rope_qk_norm_backward", 128, 16, None, 4, per_processor=3),
    Row("rope_qk_norm_backward", 256, 8, None, 4, per_processor=3),
    Row("head_gate", 64, 32, None, 4),
    Row("head_gate", 128, 16, None, 4),
    Row("head_gate", 1024, 4, None, 4),
    # Two passes over a clip's tokens, tiles of 64 tokens; float32 products run on the general cores and take smaller tiles.
    Row("delta_pool_scores", 64, 32, None, 4),
    Row("delta_pool_scores", 128, 16, None, 4),
    Row("delta_pool_scores", 1024, 4, None, 4),
    Row("delta_pool_split", WIDEST, 32, 64, 4, 2, dtype=torch.float32),
    Row("delta_pool_split", WIDEST, 64, 128, 4, 3),
    Row("delta_pool_split_many", WIDEST, 32, 64, 8, 2, dtype=torch.float32),  # more than 32 heads
    Row("delta_pool_split_many", WIDEST, 64, 64, 8, 3),
    Row("delta_pool_combine", WIDEST, 1, 256, 4),
    Row("delta_pool_products", WIDEST, 32, 64, 4, 2, dtype=torch.float32),
    Row("delta_pool_products", WIDEST, 64, 128, 4, 3),
    Row("delta_pool_query", 64, 64, None, 4),
    Row("delta_pool_query", 128, 32, None, 4),
    Row("delta_pool_query", 1024, 4, None, 4),
    Row("delta_pool_spread", WIDEST, 32, 64, 4, 2, dtype=torch.float32),
    Row("delta_pool_spread", WIDEST, 64, 128, 4, 2),
    # Tiles of queries against at most 32 keys; the backward holds ten tiles and fills the registers, more so in float32.
    Row("context_attention_forward", 64, 32, None, 4, 1, dtype=torch.float32),
    Row("context_attention_forward", 64, 64, None, 4, 2),
    Row("context_attention_forward", 128, 32, None, 8, 1),
    Row("context_attention_backward", 64, 16, None, 8, 1, dtype=torch.float32),
    Row("context_attention_backward", 64, 16, None, 4, 2),
    Row("context_attention_backward", 128, 16, None, 8, 1),
    Row("context_attention_reduce", 128, 4, None, 1),
    # Tiles of candidates and of the head's rows, as dense products take them. A tile twice as wide reads a quarter less from the
    # cache; sm_80 has no registers for it, nor has an epilogue of many terms (log-cosh, or a target of its own for every row).
    Row("best_of_n_head", WIDEST, 32, 64, 4, 2, dtype=torch.float32),
    Row("best_of_n_head", WIDEST, 128, 128, 8, 3, per_processor=1, architecture=80),
    Row("best_of_n_head", WIDEST, 128, 256, 8, 3, per_processor=1),
    Row("best_of_n_head_narrow", WIDEST, 32, 64, 4, 2, dtype=torch.float32),
    Row("best_of_n_head_narrow", WIDEST, 128, 64, 8, 3, per_processor=1),
    Row("best_of_n_head_pick", WIDEST, 1, 1024, 4),
)


@functools.lru_cache(maxsize=1024)
def tile(kernel: str, width: int, dtype: torch.dtype, architecture: int) -> Tile:
    """The launch sizes of ``kernel`` for rows of ``width`` channels.

    Raises:
        KeyError: the table has no line for it.
    """
    for row in TABLE:
        if row.kernel == kernel and width <= row.up_to and row.dtype in (None, dtype) and row.architecture in (None, architecture):
            block = row.block or 1 << max(0, width - 1).bit_length()
            return Tile(row.rows, block, row.num_warps, row.num_stages, row.per_processor)
    raise KeyError(f"no launch sizes for {kernel} at width {width}, {dtype}, architecture {architecture}")
