"""DeltaTok, the tokenizer: the change between two frames' features as one delta token, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from deltakern.models import checkpoint
from deltakern.models.dinov3 import patch_rope
from deltakern.models.validate import check_frames, check_positive
from deltakern.nn import Assembly, Block, Residual
from deltakern.nn.block import QK_NORM_ORDERS, Rope, add_and_norm, all_plain
from deltakern.nn.graphs import captured
from deltakern.nn.weights import Freezable, Part, compute_dtype, derived, hold, lasts, one_call, store_of, table


@dataclass(frozen=True)
class Savings:
    """Work of the release that need not be done. Each is exact algebra and can be switched off for comparison.

    Attributes:
        last_row: the encoder's last block computes q, attention output and MLP for the delta token's row alone.
        fold_value: with it, the value projection is applied after the pooling, to one vector a head.
        drop_row: the decoder's last block does not compute the delta token's row.
        black_frame: the black frame's features are computed once a call, frozen once per backbone and size, not for every clip.
        context_cache: keys and values of past tokens are projected once, for all rollout steps and all samples.
    """

    last_row: bool = True
    fold_value: bool = True
    drop_row: bool = True
    black_frame: bool = True
    context_cache: bool = True

    @classmethod
    def none(cls) -> Savings:
        """Everything computed as the release does."""
        return cls(False, False, False, False, False)


class DeltaTok(Freezable, Part):
    """The tokenizer of the paper, section 3 (DeltaTok), with the released names of arguments, methods and parameters.

    Args:
        backbone: frozen; maps frames (B,T,3,H,W) to features (B,T,N,D) and has ``hidden_size``, ``num_heads``, ``patch_size``
            and ``initializer_range``. :class:`deltakern.DINOv3`, the release's, or one's own.
        num_hidden_layers: blocks of the encoder, and of the decoder.
        use_delta: encode the pair of frames; False encodes the later frame alone, and decodes without the earlier.
        layer_scale_init: initial LayerScale.
        use_qk_norm, use_gated_attn, use_swiglu: parts of the block.
        use_rope_aug: while training, coordinates are stretched by one log-uniform factor in [1/2, 2] a step.
        ckpt_path: released or Lightning file to load; its QK-norm order, found from key names, wins over ``qk_norm_order``.
        qk_norm_order: "pre_rope" (the current release) or "post_rope".
        intermediate_size: of the MLP, before SwiGLU's 2/3.
        savings: which needless work to leave out.
        residual_dtype: of the residual stream; None promotes the features' and the parameters' (float32 under autocast).
        attention: see :func:`deltakern.nn.attend`.
        recompute: what the backward makes again instead of keeping it, see :class:`deltakern.nn.Block`.

    :meth:`train` leaves the frozen backbone in evaluation mode.
    """

    stay_evaluating = ("backbone",)

    def __init__(
        self,
        backbone: nn.Module,
        num_hidden_layers: int = 12,
        use_delta: bool = True,
        layer_scale_init: float = 1e-5,
        use_qk_norm: bool = True,
        use_gated_attn: bool = True,
        use_swiglu: bool = True,
        use_rope_aug: bool = True,
        ckpt_path: str | None = None,
        *,
        qk_norm_order: str = "pre_rope",
        intermediate_size: int = 3072,
        savings: Savings | None = None,
        residual_dtype: torch.dtype | None = None,
        attention: str = "auto",
        recompute: str = "auto",
    ) -> None:
        super().__init__()
        check_positive(num_hidden_layers=num_hidden_layers, intermediate_size=intermediate_size)
        for name in ("hidden_size", "num_heads", "patch_size", "initializer_range"):
            if not hasattr(backbone, name):
                raise TypeError(f"backbone must have the attribute {name!r}, got {type(backbone).__name__} without it")
        if qk_norm_order not in QK_NORM_ORDERS:
            raise ValueError(f"qk_norm_order must be one of {QK_NORM_ORDERS}, got {qk_norm_order!r}")
        weights = checkpoint.read(ckpt_path) if ckpt_path else None
        if weights is not None:
            qk_norm_order = weights.qk_norm_order or qk_norm_order
        self.ckpt_path = ckpt_path
        self.use_delta = use_delta
        self.use_rope_aug = use_rope_aug
        self.qk_norm_order = qk_norm_order
        self.savings = savings or Savings()
        self.residual_dtype = residual_dtype
        self.backbone = hold(backbone)
        width, std = backbone.hidden_size, backbone.initializer_range

        self.z_embed = nn.Embedding(1, width)
        self.xy_embed = nn.Embedding(2, width)
        self.encoder_blocks, self.decoder_blocks = (
            nn.ModuleList(
                Block(
                    width,
                    backbone.num_heads,
                    2 * intermediate_size // 3 if use_swiglu else intermediate_size,
                    swiglu=use_swiglu,
                    qk_norm=qk_norm_order if use_qk_norm else None,
                    gated=use_gated_attn,
                    layer_scale_init=layer_scale_init,
                    attention=attention,
                    recompute=recompute,
                )
                for _ in range(num_hidden_layers)
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width, eps=1e-5)
        nn.init.trunc_normal_(self.z_embed.weight, std=std)
        nn.init.trunc_normal_(self.xy_embed.weight, std=std)
        for module in chain(self.encoder_blocks.modules(), self.decoder_blocks.modules()):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if weights is not None:
            checkpoint.load_into(self, weights)

    @one_call
    @captured
    def encode(self, x: torch.Tensor, y: torch.Tensor, rope: Rope) -> torch.Tensor:
        """The delta token (B,1,D) of every pair of frames.

        Args:
            x, y: (B,N,D) features of the earlier and of the later frame.
            rope: of :meth:`_rope`.
        """
        x, mode = (x, "pair") if self.use_delta else (None, "current")
        entry = Assembly(x, y, table(self.z_embed, 1, y.device), table(self.xy_embed, 2, y.device), mode, self.residual_dtype)
        last = len(self.encoder_blocks) - 1
        for i, block in enumerate(self.encoder_blocks):
            rows = "first" if i == last and self.savings.last_row else "all"
            entry = block(entry, rope, num_prefix=1, rows=rows, fold_value=self.savings.fold_value)
        if not self.savings.last_row:
            entry = entry.rows(slice(1))
        return add_and_norm(entry, self.norm, None)[1]

    @one_call
    @captured
    def decode(self, z: torch.Tensor, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Features (B,N,D) of the later frame from its delta token and the earlier frame.

        Args:
            z: (B,1,D) delta tokens.
            x: (B,N,D) features of the earlier frame (their shape alone is read without ``use_delta``).
            rope: of :meth:`_rope`.
        """
        return self._decode(z, x, rope)

    @one_call
    @captured
    def decode_samples(self, z: torch.Tensor, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """:meth:`decode` of s delta tokens (B,s,D) that all begin at the same frame (B,N,D): (B,s,N,D).

        Sequences [z_i ; x] differ in one row, so what the first block does before its attention is done of [z_1 .. z_s ; x] once.
        """
        return self._decode(z, x, rope, samples=z.shape[1]).unflatten(0, z.shape[:2])

    def _decode(self, z: torch.Tensor, x: torch.Tensor, rope: Rope, samples: int = 0) -> torch.Tensor:
        if not self.use_delta:
            x = table(self.xy_embed, 2, x.device)[0].expand_as(x)
        if samples:
            dtype = self.residual_dtype or torch.promote_types(x.dtype, z.dtype)
            entry = Residual(torch.cat((z.to(dtype), x.to(dtype)), 1))
        else:
            entry = Assembly(x, None, z, None, "previous", self.residual_dtype)
        last = len(self.decoder_blocks) - 1
        for i, block in enumerate(self.decoder_blocks):
            rows = "rest" if i == last and self.savings.drop_row else "all"
            first = samples if i == 0 else 0
            entry = block(entry, rope, num_prefix=first or 1, rows=rows, samples=first)
        out = entry.add()
        return out if self.savings.drop_row else out[:, 1:]

    @one_call
    @captured
    def tokenize_offline(self, x: torch.Tensor, y: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Delta tokens (B,T,1,D) of consecutive frames: frame t is encoded against frame t-1, the first against ``x``.

        Args:
            x, y: features (B,N,D) before the first frame, and (B,T,N,D) of the frames.
            rope: of :meth:`_rope`.
        """
        before = torch.cat((x.unsqueeze(1), y[:, :-1]), 1)
        return self.encode(before.flatten(0, 1), y.flatten(0, 1), rope).unflatten(0, y.shape[:2])

    @one_call
    @captured
    def tokenize(self, frames: torch.Tensor) -> torch.Tensor:
        """From uint8 frames (B,T,3,H,W) to delta tokens (B,T,D), the first against the black frame."""
        features = self.features(frames)
        return self.tokenize_offline(self.black_features(frames), features, self._rope(frames)).squeeze(2)

    def features(self, frames: torch.Tensor) -> torch.Tensor:
        """The frozen backbone's features (B,T,N,D) of frames (B,T,3,H,W). No gradient."""
        check_frames(frames, self.backbone.patch_size)
        with torch.no_grad():
            return self.backbone(frames)

    @one_call
    def black_features(self, frames: torch.Tensor) -> torch.Tensor:
        """Features (B,N,D) of a black frame of the size, device and batch of ``frames``. Frozen, computed once a size; else once a call."""
        batch = frames.shape[0]
        if not self.savings.black_frame:
            return self.features(torch.zeros_like(frames[:, :1]))[:, 0]
        black, backbone = frames.new_zeros((1, 1, *frames.shape[2:])), self.backbone
        owner = backbone if isinstance(backbone, Freezable) else self
        if not (lasts(owner) and all_plain(backbone)):
            return self.features(black)[:, 0].expand(batch, -1, -1)
        key = ("black", black.shape, black.dtype, black.device, compute_dtype(black.device.type, torch.float32), *backbone.modules())
        weights = [*backbone.parameters(), *backbone.buffers()]
        return derived(store_of(owner), owner, key, weights, lambda: self.features(black)[:, 0]).expand(batch, -1, -1)

    def _rope(self, frames: torch.Tensor) -> Rope:
        """Cosines and sines (N, D / heads) for the patches of frames (..., H, W); stretched at random while training."""
        rows, columns = (size // self.backbone.patch_size for size in frames.shape[-2:])
        stretch = None
        if self.training and self.use_rope_aug:
            bound = math.log(2.0)
            stretch = torch.empty(1, device=frames.device).uniform_(-bound, bound).exp()
        return patch_rope(rows, columns, self.backbone.hidden_size // self.backbone.num_heads, frames.device, stretch=stretch)

    @one_call
    def forward(self, frames: torch.Tensor, *_: Any, horizon: int | None = None) -> tuple[torch.Tensor, ...]:
        """Reconstruction, as the released trainer calls it.

        Args:
            frames: uint8 (B,T,3,H,W); further positional arguments (timestamps, criterion) are ignored.
            horizon: in evaluation, how many last frames to reconstruct one after the other; by default all, from the black frame.

        Returns:
            While training (reconstruction, target), each (B,N,D), of the last frame from the one before. In evaluation
            (predictions (B,horizon,N,D), targets (B,horizon,N,D), context (B,T-horizon,N,D)).

        Raises:
            ValueError: shape of the frames, fewer than 2 in training, horizon outside 1..T.
        """
        check_frames(frames, self.backbone.patch_size, least=2 if self.training else 1)
        if self.training:
            features = self.features(frames[:, -2:])
            rope = self._rope(frames)
            z = self.encode(features[:, 0], features[:, 1], rope)
            return self.decode(z, features[:, 0], rope), features[:, 1]
        total = frames.shape[1]
        horizon = total if horizon is None else horizon
        check_positive(horizon=horizon)
        if horizon > total:
            raise ValueError(f"horizon must be at most the number of frames T={total}, got {horizon}")
        state, predictions = self.rollout_init(frames, horizon), []
        for t in range(total - horizon, total):
            prediction, _, state = self.rollout_step(state, t)
            predictions.append(prediction)
        return torch.stack(predictions, 1), state["y"][:, -horizon:].contiguous(), state["y"][:, :-horizon]

    @one_call
    def rollout_init(self, frames: torch.Tensor, horizon: int) -> dict[str, Any]:
        """State of a reconstruction of the last ``horizon`` frames: features ``y``, ``rope``, last features ``x``."""
        y = self.features(frames)
        x = self.black_features(frames) if horizon == y.shape[1] else y[:, -horizon - 1]
        return {"y": y, "rope": self._rope(frames), "x": x}

    @one_call
    def rollout_step(self, state: dict[str, Any], tgt_frame_idx: int, _: Any = None) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Reconstructs frame ``tgt_frame_idx`` from its token and the last reconstruction: (prediction, target, state)."""
        target = state["y"][:, tgt_frame_idx]
        z = self.encode(state["x"], target, state["rope"])
        prediction = self.decode(z, state["x"], state["rope"])
        return prediction, target, {**state, "x": prediction.detach()}
