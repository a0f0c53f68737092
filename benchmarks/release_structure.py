"""The released models' structure in plain PyTorch, op for op as wasteful as the release: the baseline of every comparison.

Written from the description of what the released code computes, to be timed in eager and under torch.compile. Nothing is saved
here that the release does not save: q, k, v and the head gate are separate products; RoPE negates and concatenates halves and
splits off the prefix tokens; QK-norm and LayerScale are modules and ops of their own; the encoder runs its last block for all
tokens; the black frame's features are computed for every clip of every step; the predictor projects keys and values and rebuilds
sines and cosines in every block for every head and candidate, attends through a mask tensor, keeps all candidates in memory and
expands the target to their size; rollouts decode every sample, tokenize the frames that they are to predict, and recompute their
past at every step. Parameters carry the released names, so that one state dict loads here and in ``deltakern``.

The only additions: noise can be given (``queries=``), so that two implementations can be compared on the same futures, and the
sizes can be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

EPS = 1e-5
Rope = tuple[torch.Tensor, torch.Tensor]


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), -1)


def rotate_patches(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B,H,L,d); the leading tokens for which the table has no row pass through."""
    prefix, patches = x.split((x.shape[-2] - cos.shape[-2], cos.shape[-2]), -2)
    return torch.cat((prefix, patches * cos + rotate_half(patches) * sin), -2)


class LayerScale(nn.Module):
    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((width,), init))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.lambda1


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class GatedMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden)
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: str | None, gated: bool) -> None:
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.qk_norm = qk_norm
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        if qk_norm == "post_rope":
            self.q_norm = nn.LayerNorm(self.head, EPS, bias=False)
            self.k_norm = nn.LayerNorm(self.head, EPS, bias=False)
        elif qk_norm == "pre_rope":
            self.q_norm_prerope = nn.LayerNorm(self.head, EPS, bias=False)
            self.k_norm_prerope = nn.LayerNorm(self.head, EPS, bias=False)
        if gated:
            self.attn_gate = nn.Linear(width, heads)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], self.heads, self.head).transpose(1, 2)

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        q, k, v = self._split(self.q_proj(x)), self._split(self.k_proj(x)), self._split(self.v_proj(x))
        if self.qk_norm == "pre_rope":
            q, k = self.q_norm_prerope(q), self.k_norm_prerope(k)
        q, k = rotate_patches(q, *rope), rotate_patches(k, *rope)
        if self.qk_norm == "post_rope":
            q, k = self.q_norm(q), self.k_norm(k)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.head**-0.5)
        if hasattr(self, "attn_gate"):
            out = out * self.attn_gate(x).transpose(1, 2).unsqueeze(-1).sigmoid()
        return self.o_proj(out.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, *, swiglu: bool, qk_norm: str | None, gated: bool, layer_scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, EPS)
        self.attention = SelfAttention(width, heads, qk_norm, gated)
        self.layer_scale1 = LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, EPS)
        self.mlp = GatedMLP(width, hidden) if swiglu else MLP(width, hidden)
        self.layer_scale2 = LayerScale(width, layer_scale)

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        x = self.layer_scale1(self.attention(self.norm1(x), rope)) + x
        return self.layer_scale2(self.mlp(self.norm2(x))) + x


class PatchRope(nn.Module):
    """Sines and cosines of the patches' centres, (N,d) each, rebuilt at every call; augmented while training."""

    def __init__(self, head: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.register_buffer("inv_freq", 1 / 100.0 ** torch.arange(0, 1, 4 / head), persistent=False)

    def forward(self, height: int, width: int) -> Rope:
        device = self.inv_freq.device
        rows, columns = ((torch.arange(n, device=device) + 0.5) / n for n in (height // self.patch_size, width // self.patch_size))
        centres = 2.0 * torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1) - 1.0
        if self.training:
            centres = centres * torch.empty(1, device=device).uniform_(-math.log(2.0), math.log(2.0)).exp()
        angles = (2 * math.pi * centres[:, :, None] * self.inv_freq).flatten(1, 2).tile(2)
        return angles.cos(), angles.sin()


def _initialize(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class _Embeddings(nn.Module):
    def __init__(self, width: int, patch_size: int, registers: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_tokens = nn.Parameter(torch.randn(1, registers, width) * 0.02)
        self.patch_embeddings = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embeddings(pixels).flatten(2).transpose(1, 2)
        batch = pixels.shape[0]
        return torch.cat((self.cls_token.expand(batch, -1, -1), self.register_tokens.expand(batch, -1, -1), patches), 1)


class DINOv3(nn.Module):
    """uint8 frames (B,T,3,H,W) -> features (B,T,N,D); the backbone as the release calls it."""

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_heads: int = 12,
        intermediate_size: int = 3072,
        patch_size: int = 16,
        num_register_tokens: int = 4,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.patch_size = hidden_size, num_heads, patch_size
        self.initializer_range = 0.02
        self.num_prefix_tokens = num_register_tokens + 1
        self.rope = PatchRope(hidden_size // num_heads, patch_size)
        self.backbone = nn.Module()
        self.backbone.embeddings = _Embeddings(hidden_size, patch_size, num_register_tokens)
        self.backbone.model = nn.Module()
        kind = {"swiglu": False, "qk_norm": None, "gated": False, "layer_scale": 1.0}
        self.backbone.model.layer = nn.ModuleList(
            Block(hidden_size, num_heads, intermediate_size, **kind) for _ in range(num_hidden_layers)
        )
        self.backbone.norm = nn.LayerNorm(hidden_size, EPS)
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406))[:, None, None] * 255, persistent=False)
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225))[:, None, None] * 255, persistent=False)
        _initialize(self)
        self.requires_grad_(False).eval()

    @torch.no_grad
    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        batch, time = frames.shape[:2]
        pixels = (frames.flatten(0, 1).to(self.mean.dtype) - self.mean) / self.std
        x = self.backbone.embeddings(pixels)
        rope = self.rope(*frames.shape[-2:])
        for block in self.backbone.model.layer:
            x = block(x, rope)
        return self.backbone.norm(x)[:, self.num_prefix_tokens :].reshape(batch, time, -1, self.hidden_size)


class DeltaTok(nn.Module):
    """The tokenizer. ``intermediate_size`` is the width before the SwiGLU rule of two thirds, fixed at 3072 in the release."""

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
        *,
        qk_norm_order: str = "pre_rope",
        intermediate_size: int = 3072,
    ) -> None:
        super().__init__()
        self.use_delta = use_delta
        self.backbone = backbone.requires_grad_(False).eval()
        width, heads = backbone.hidden_size, backbone.num_heads
        self.use_rope_aug = use_rope_aug
        self.rope_embeddings = PatchRope(width // heads, backbone.patch_size)
        self.z_embed = nn.Embedding(1, width)
        self.xy_embed = nn.Embedding(2, width)
        kind = {"swiglu": use_swiglu, "qk_norm": qk_norm_order if use_qk_norm else None, "gated": use_gated_attn}
        hidden = 2 * intermediate_size // 3 if use_swiglu else intermediate_size
        self.encoder_blocks = nn.ModuleList(
            Block(width, heads, hidden, **kind, layer_scale=layer_scale_init) for _ in range(num_hidden_layers)
        )
        self.decoder_blocks = nn.ModuleList(
            Block(width, heads, hidden, **kind, layer_scale=layer_scale_init) for _ in range(num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, EPS)
        _initialize(self.encoder_blocks)
        _initialize(self.decoder_blocks)
        nn.init.trunc_normal_(self.z_embed.weight, std=0.02)
        nn.init.trunc_normal_(self.xy_embed.weight, std=0.02)

    def train(self, mode: bool = True) -> DeltaTok:
        super().train(mode)
        self.backbone.eval()
        self.rope_embeddings.train(mode and self.use_rope_aug)
        return self

    def _rope(self, frames: torch.Tensor) -> Rope:
        return self.rope_embeddings(*frames.shape[-2:])

    def encode(self, x: torch.Tensor, y: torch.Tensor, rope: Rope) -> torch.Tensor:
        """x, y (B,N,D) features of the earlier and the later frame -> (B,1,D)."""
        z = self.z_embed.weight[None].repeat(y.shape[0], 1, 1)
        if self.use_delta:
            hidden = torch.cat((z, x + self.xy_embed.weight[0], y + self.xy_embed.weight[1]), 1)
            rope = (torch.cat((rope[0], rope[0]), -2), torch.cat((rope[1], rope[1]), -2))
        else:
            hidden = torch.cat((z, y + self.xy_embed.weight[1]), 1)
        for block in self.encoder_blocks:
            hidden = block(hidden, rope)
        return self.norm(hidden[:, :1])

    def decode(self, z: torch.Tensor, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """z (B,1,D), x (B,N,D) -> (B,N,D)."""
        if not self.use_delta:
            x = self.xy_embed.weight[0][None, None].expand_as(x)
        hidden = torch.cat((z, x), 1)
        for block in self.decoder_blocks:
            hidden = block(hidden, rope)
        return hidden[:, 1:]

    def tokenize_offline(self, first: torch.Tensor, y: torch.Tensor, rope: Rope) -> torch.Tensor:
        """first (B,N,D) before frame 0, y (B,T,N,D) -> (B,T,1,D)."""
        x = torch.cat((first.unsqueeze(1), y[:, :-1]), 1)
        return self.encode(x.flatten(0, 1), y.flatten(0, 1), rope).unflatten(0, (y.shape[0], -1))

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The training pass on the last two frames: (prediction, target), (B,N,D) each."""
        rope = self._rope(frames)
        y = self.backbone(frames)
        z = self.encode(y[:, -2], y[:, -1], rope)
        return self.decode(z, y[:, -2], rope), y[:, -1]


def log_cosh(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The tokenizer's loss, elementwise."""
    size = (pred - target).abs()
    return size + F.softplus(-2.0 * size) - math.log(2.0)


def smooth_l1(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The predictor's loss, elementwise, beta 0.1."""
    return F.smooth_l1_loss(pred, target, reduction="none", beta=0.1)


def causal_mask(q_frame: torch.Tensor, k_frame: torch.Tensor) -> torch.Tensor:
    """(1,1,Q,K) of 0 and -inf: a query sees the frames before its own."""
    return torch.where((k_frame[None] >= q_frame[:, None])[None, None], float("-inf"), 0.0)


def _rotate_axis(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    inverse = 1.0 / (10.0 ** torch.linspace(-2, 2, half, device=x.device))
    angle = (2 * math.pi) * position * inverse.view(1, 1, 1, half)
    sin, cos = angle.sin(), angle.cos()
    first, second = x[..., :half], x[..., half : 2 * half]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


Positions = tuple[torch.Tensor, ...]


class CrossAttention(nn.Module):
    def __init__(self, backbone_width: int, width: int, heads: int, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.heads, self.head, self.axes = heads, width // heads, axes
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(backbone_width, 2 * width)
        self.out_proj = nn.Linear(width, width)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:2], self.heads, self.head).permute(0, 2, 1, 3)

    def _rotate(self, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        turned, offset = [], 0
        for size, position in zip(self.axes, positions, strict=True):
            everywhere = position[:, None, :, None].expand(-1, self.heads, -1, 1)
            turned.append(_rotate_axis(x[..., offset : offset + size], everywhere))
            offset += size
        return torch.cat((*turned, x[..., offset:]), -1)

    def forward(self, x: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None, pos_q: Positions, pos_k: Positions) -> torch.Tensor:
        q = self._split(self.q_proj(x))
        k, v = (self._split(part) for part in self.kv_proj(kv).chunk(2, -1))
        out = F.scaled_dot_product_attention(self._rotate(q, pos_q), self._rotate(k, pos_k), v, mask)
        return self.out_proj(out.permute(0, 2, 1, 3).reshape(x.shape))


class PredictorBlock(nn.Module):
    def __init__(self, backbone_width: int, width: int, heads: int, hidden: int, axes: tuple[int, ...], layer_scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CrossAttention(backbone_width, width, heads, axes)
        self.layer_scale1 = LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden)
        self.layer_scale2 = LayerScale(width, layer_scale)

    def forward(self, q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None, pos_q: Positions, pos_k: Positions) -> torch.Tensor:
        q = q + self.layer_scale1(self.attention(self.norm1(q), kv, mask, pos_q, pos_k))
        return q + self.layer_scale2(self.mlp(self.norm2(q)))


class Predictor(nn.Module):
    """Queries (B,Q,D) against context (B,K,D) at positions in seconds (and x, y): (B,Q,D)."""

    def __init__(
        self, backbone_width: int, width: int, layers: int, heads: int, axes: tuple[int, ...], layer_scale: float, mlp_ratio: int
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            PredictorBlock(backbone_width, width, heads, width * mlp_ratio, axes, layer_scale) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, backbone_width)
        _initialize(self)

    def forward(self, q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None, pos_q: Positions, pos_k: Positions) -> torch.Tensor:
        for block in self.blocks:
            q = block(q, kv, mask, pos_q, pos_k)
        return self.head(self.norm(q))


Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _World(nn.Module):
    """What DeltaWorld and DINOWorld share: noise, the search among candidates, the expansion over samples."""

    num_samples_train: int
    num_samples_eval: int
    predictor: Predictor
    width: int
    use_bom: bool

    def _noise(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        return torch.randn(*shape, self.width, device=device) * 0.02

    def _learned(self, batch: int, length: int) -> torch.Tensor:
        return self.q_embed.weight.expand(batch, length, -1)

    @property
    def _samples(self) -> int:
        return self.num_samples_eval if self.use_bom else 1

    def _per_sample(self, x: torch.Tensor) -> torch.Tensor:
        """(B,...) -> (B*S,...), copied."""
        return x.unsqueeze(1).expand(-1, self._samples, *[-1] * (x.ndim - 1)).reshape(x.shape[0] * self._samples, *x.shape[1:])

    def candidates(
        self, noise: torch.Tensor, kv: torch.Tensor, pos_q: Positions, pos_k: Positions, tokens_per_frame: int = 1
    ) -> torch.Tensor:
        """Noise (B,T,K,D) and its context (B,T*P,D) -> every candidate's prediction (B,T,K,P,D), without gradient."""
        batch, frames, count = noise.shape[:3]
        q = noise.flatten(1, 2).repeat_interleave(tokens_per_frame, 1)
        time_q = pos_q[0].repeat_interleave(count, 1).repeat_interleave(tokens_per_frame, 1)
        space_q = (p[:, None, None].expand(-1, frames, count, -1).flatten(1, 3) for p in pos_q[1:])
        time_k = pos_k[0].repeat_interleave(tokens_per_frame, 1)
        space_k = (p[:, None].expand(-1, frames, -1).flatten(1, 2) for p in pos_k[1:])
        index = torch.arange(frames * tokens_per_frame, device=noise.device)
        mask = causal_mask(index.repeat_interleave(count) // tokens_per_frame + 1, index // tokens_per_frame)
        frozen = {name: value.detach() for name, value in self.predictor.named_parameters()}
        out = functional_call(self.predictor, frozen, (q, kv, mask, (time_q, *space_q), (time_k, *space_k)))
        return out.reshape(batch, frames, count, tokens_per_frame, -1)

    def _best_noise(
        self,
        noise: torch.Tensor,
        kv: torch.Tensor,
        pos_q: Positions,
        pos_k: Positions,
        target: torch.Tensor,
        criterion: Criterion,
        tokens_per_frame: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The noise with the least loss, (B,T*P,D), its index (B,T) and all losses (B,T,K)."""
        predictions = self.candidates(noise, kv, pos_q, pos_k, tokens_per_frame)
        target = target.reshape(*noise.shape[:2], -1, target.shape[-1])
        losses = criterion(predictions, target.unsqueeze(2).expand_as(predictions)).flatten(3).mean(-1)
        index = losses.argmin(-1)
        clips = torch.arange(noise.shape[0], device=noise.device)[:, None]
        frames = torch.arange(noise.shape[1], device=noise.device)[None]
        return noise[clips, frames, index].repeat_interleave(tokens_per_frame, 1), index, losses


class DeltaWorld(_World):
    """The predictor over delta tokens, with the tokenizer that makes and undoes them."""

    def __init__(
        self,
        tokenizer: DeltaTok,
        rope_axis_sizes: tuple[int, ...] = (60,),
        predictor_hidden_size: int = 768,
        predictor_num_hidden_layers: int = 12,
        predictor_num_heads: int = 12,
        num_samples_train: int = 256,
        num_samples_eval: int = 20,
        layer_scale_init: float = 1e-5,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        self.use_bom = True
        self.num_samples_train, self.num_samples_eval = num_samples_train, num_samples_eval
        self.width = predictor_hidden_size
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.backbone = tokenizer.backbone
        self.predictor = Predictor(
            self.backbone.hidden_size,
            predictor_hidden_size,
            predictor_num_hidden_layers,
            predictor_num_heads,
            tuple(rope_axis_sizes),
            layer_scale_init,
            mlp_ratio,
        )

    def train(self, mode: bool = True) -> DeltaWorld:
        super().train(mode)
        self.tokenizer.eval()
        return self

    @torch.no_grad
    def encode_frames(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Rope]:
        """Delta tokens (B,T,D), features (B,T,N,D) and the RoPE table of a clip; one black frame a clip."""
        y = self.backbone(frames)
        first = self.backbone(torch.zeros_like(frames[:, :1]))[:, 0]
        rope = self.tokenizer._rope(frames)
        return self.tokenizer.tokenize_offline(first, y, rope).squeeze(2), y, rope

    def train_on_tokens(
        self, z: torch.Tensor, timestamps: torch.Tensor, criterion: Criterion, queries: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The search and the winner's pass: prediction, target (B,T-1,D), index of the winner (B,T-1), losses (B,T-1,K)."""
        pos_q, pos_k = (timestamps[:, 1:],), (timestamps[:, :-1],)
        context, target = z[:, :-1], z[:, 1:]
        noise = queries if queries is not None else self._noise((*target.shape[:2], self.num_samples_train), z.device)
        best, index, losses = self._best_noise(noise, context, pos_q, pos_k, target, criterion)
        frames = torch.arange(target.shape[1], device=z.device)
        return self.predictor(best, context, causal_mask(frames + 1, frames), pos_q, pos_k), target, index, losses

    def forward(
        self, frames: torch.Tensor, timestamps: torch.Tensor, criterion: Criterion = smooth_l1, queries: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The training pass: (prediction, target), (B,T-1,D) each."""
        z, _, _ = self.encode_frames(frames)
        return self.train_on_tokens(z, timestamps, criterion, queries)[:2]

    def predict_step(self, z: torch.Tensor, own: torch.Tensor, timestamps: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """One predictor step of a rollout: context z (B,T,D), generated tokens (B*S,J,D), noise (B,S,D) -> (B*S,1,D).

        Every sample's past is expanded, projected and rotated anew.
        """
        kv = torch.cat((self._per_sample(z), own), 1)
        known = kv.shape[1]
        noise = self._noise((z.shape[0], self.num_samples_eval), z.device) if noise is None else noise
        pos_q, pos_k = (self._per_sample(t) for t in (timestamps[:, known : known + 1], timestamps[:, :known]))
        return self.predictor(noise.flatten(0, 1).unsqueeze(1), kv, None, (pos_q,), (pos_k,))

    def sample(self, z: torch.Tensor, timestamps: torch.Tensor, horizon: int, queries: torch.Tensor | None = None) -> torch.Tensor:
        """The predictor's steps of a rollout alone: tokens (B,S,h,D) after the context z; ``queries`` is (B,S,h,D)."""
        own = z.new_empty((z.shape[0] * self.num_samples_eval, 0, z.shape[2]))
        for step in range(horizon):
            z_hat = self.predict_step(z, own, timestamps, None if queries is None else queries[:, :, step])
            own = torch.cat((own, z_hat), 1)
        return own.unflatten(0, (z.shape[0], self.num_samples_eval))

    def rollout(
        self, frames: torch.Tensor, timestamps: torch.Tensor, ctx_len: int, queries: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B,S,h,N,D) and tokens (B,S,h,D) of the frames after ``ctx_len``; ``queries`` is (B,S,h,D)."""
        z, y, rope = self.encode_frames(frames)
        x = self._per_sample(y[:, ctx_len - 1])
        own = z.new_empty((x.shape[0], 0, z.shape[2]))
        features = []
        for step in range(frames.shape[1] - ctx_len):
            z_hat = self.predict_step(z[:, :ctx_len], own, timestamps, None if queries is None else queries[:, :, step])
            x = self.tokenizer.decode(z_hat, x, rope)
            own = torch.cat((own, z_hat), 1)
            features.append(x)
        shape = (frames.shape[0], self.num_samples_eval)
        return torch.stack(features, 1).unflatten(0, shape), own.unflatten(0, shape)


class DINOWorld(_World):
    """The dense baseline of the same release: every patch a query and a key, 3-axis RoPE over time, x and y."""

    def __init__(
        self,
        backbone: nn.Module,
        rope_axis_sizes: tuple[int, ...] = (20, 20, 20),
        predictor_hidden_size: int = 768,
        predictor_num_hidden_layers: int = 12,
        predictor_num_heads: int = 12,
        use_bom: bool = False,
        num_samples_train: int = 16,
        num_samples_eval: int = 20,
        layer_scale_init: float = 1e-5,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        self.use_bom = use_bom
        self.num_samples_train, self.num_samples_eval = num_samples_train, num_samples_eval
        self.width = predictor_hidden_size
        self.backbone = backbone.requires_grad_(False).eval()
        if not use_bom:
            self.q_embed = nn.Embedding(1, predictor_hidden_size)
            nn.init.trunc_normal_(self.q_embed.weight, std=0.02)
        self.predictor = Predictor(
            backbone.hidden_size,
            predictor_hidden_size,
            predictor_num_hidden_layers,
            predictor_num_heads,
            tuple(rope_axis_sizes),
            layer_scale_init,
            mlp_ratio,
        )

    def train(self, mode: bool = True) -> DINOWorld:
        super().train(mode)
        self.backbone.eval()
        return self

    def _space(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y of the patches, (B,N) each, endpoints of [-1, 1] included."""
        rows, columns = (n // self.backbone.patch_size for n in frames.shape[-2:])
        ends = {"device": frames.device}
        y, x = torch.meshgrid(torch.linspace(-1, 1, rows, **ends), torch.linspace(-1, 1, columns, **ends), indexing="ij")
        return tuple(p.flatten().unsqueeze(0).expand(frames.shape[0], -1) for p in (x, y))

    def forward(
        self, frames: torch.Tensor, timestamps: torch.Tensor, criterion: Criterion = smooth_l1, queries: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The training pass: (prediction, target), (B,T-1,N,D) each; ``queries`` (B,T-1,K,D) with best of many."""
        features = self.backbone(frames)
        x, y = self._space(frames)
        past, patches = features.shape[1] - 1, x.shape[1]
        kv = features[:, :-1].flatten(1, 2)
        pos_q = (timestamps[:, 1:].repeat_interleave(patches, 1), x.repeat(1, past), y.repeat(1, past))
        pos_k = (timestamps[:, :-1].repeat_interleave(patches, 1), x.repeat(1, past), y.repeat(1, past))
        if self.use_bom:
            noise = queries if queries is not None else self._noise((frames.shape[0], past, self.num_samples_train), frames.device)
            q, _, _ = self._best_noise(
                noise, kv, (timestamps[:, 1:], x, y), (timestamps[:, :-1], x, y), features[:, 1:], criterion, patches
            )
        else:
            q = self._learned(frames.shape[0], past * patches)
        frame = torch.arange(past * patches, device=frames.device) // patches
        out = self.predictor(q, kv, causal_mask(frame + 1, frame), pos_q, pos_k)
        return out.unflatten(1, (past, patches)), features[:, 1:]

    def rollout(self, frames: torch.Tensor, timestamps: torch.Tensor, ctx_len: int, queries: torch.Tensor | None = None) -> torch.Tensor:
        """Features (B,S,h,N,D) of the frames after ``ctx_len``; ``queries`` (B,S,h,D) with best of many, else S = 1."""
        features = self.backbone(frames)
        x, y = self._space(frames)
        patches, batch, horizon = x.shape[1], frames.shape[0], frames.shape[1] - ctx_len
        kv = self._per_sample(features[:, :ctx_len].flatten(1, 2))
        out = []
        for step in range(horizon):
            if self.use_bom:
                noise = self._noise((batch, self.num_samples_eval), frames.device) if queries is None else queries[:, :, step]
                q = noise.flatten(0, 1).unsqueeze(1)
            else:
                q = self._learned(batch, 1)
            known = ctx_len + step
            pos_q = (timestamps[:, known : known + 1].repeat_interleave(patches, 1), x, y)
            pos_k = (timestamps[:, :known].repeat_interleave(patches, 1), x.repeat(1, known), y.repeat(1, known))
            expanded = [tuple(self._per_sample(p) for p in pos) for pos in (pos_q, pos_k)]
            y_hat = self.predictor(q.repeat_interleave(patches, 1), kv, None, *expanded)
            kv = torch.cat((kv, y_hat), 1)
            out.append(y_hat)
        return torch.stack(out, 1).unflatten(0, (batch, self._samples))
