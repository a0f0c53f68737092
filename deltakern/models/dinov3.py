"""The frozen backbone: a DINOv3 Vision Transformer on this package's blocks. transformers is not needed."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from deltakern.models import checkpoint
from deltakern.models.validate import check_frames, check_uint8
from deltakern.nn import Block, Residual
from deltakern.nn.block import Rope, add_and_norm
from deltakern.nn.graphs import captured
from deltakern.nn.weights import Freezable, Part, one_call

DEFAULT_WEIGHTS = "facebook/dinov3-vitb16-pretrain-lvd1689m"


@dataclass(frozen=True)
class DINOv3Config:
    """What a DINOv3 ViT's ``config.json`` says, by its names; the defaults are ViT-B/16."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    patch_size: int = 16
    num_register_tokens: int = 4
    use_gated_mlp: bool = False
    layerscale_value: float = 1.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_theta: float = 100.0
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DINOv3Config:
        """From a ``config.json``; keys that do not matter here are passed over.

        Raises:
            ValueError: the file describes an architecture that this ViT is not (a key bias, another activation).
        """
        fixed = {
            "model_type": "dinov3_vit",
            "key_bias": False,
            **dict.fromkeys(("query_bias", "value_bias", "proj_bias", "mlp_bias"), True),
            "hidden_act": "silu" if config.get("use_gated_mlp") else "gelu",
        }
        for key, value in fixed.items():
            if config.get(key, value) != value:
                raise ValueError(f"config.json: {key} must be {value!r}, got {config[key]!r}")
        known = {f.name for f in fields(cls)}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known})


@dataclass(frozen=True)
class Processor:
    """Pixel statistics, under the names that the released training code reads."""

    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]


def patch_rope(
    rows: int, columns: int, head_dim: int, device: torch.device, *, theta: float = 100.0, stretch: torch.Tensor | None = None
) -> Rope:
    """Cosines and sines of DINOv3's axial RoPE, each (rows * columns, head_dim), float32.

    Patch centres lie in [-1, 1]; ``stretch`` (a tensor of one element) multiplies them. head_dim / 4 frequencies an axis,
    the row's angles before the column's, tiled twice.
    """
    frequencies = 1.0 / theta ** torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=device)
    axes = [(torch.arange(n, dtype=torch.float32, device=device) + 0.5) / n * 2 - 1 for n in (rows, columns)]
    if stretch is not None:
        axes = [axis * stretch for axis in axes]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
    angles = ((2 * math.pi) * grid[:, :, None] * frequencies).flatten(1).tile(2)
    return angles.cos(), angles.sin()


class _Embeddings(nn.Module):
    def __init__(self, config: DINOv3Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * config.initializer_range)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))  # of the released files; masked training alone uses it
        self.register_tokens = nn.Parameter(torch.randn(1, config.num_register_tokens, width) * config.initializer_range)
        self.patch_embeddings = nn.Conv2d(3, width, config.patch_size, config.patch_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embeddings(pixels).flatten(2).transpose(1, 2)
        prefix = torch.cat((self.cls_token, self.register_tokens), 1).to(patches.dtype)
        return torch.cat((prefix.expand(patches.shape[0], -1, -1), patches), 1)


class VisionTransformer(nn.Module):
    """DINOv3's ViT: pixels (M,3,H,W), normalised, to the normed patch tokens (M,N,D). Modules are named as in the released files."""

    def __init__(self, config: DINOv3Config, attention: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        layers = nn.ModuleList(
            Block(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                swiglu=config.use_gated_mlp,
                layer_scale_init=config.layerscale_value,
                eps=config.layer_norm_eps,
                attention=attention,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.model = nn.ModuleDict({"layer": layers})
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self._tables: tuple[Any, Rope] | None = None
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _rope(self, pixels: torch.Tensor) -> Rope:
        """Tables (N,d) for the patches of pixels (M,3,H,W): the same at every call, so those of the last size are kept."""
        rows, columns = (size // self.config.patch_size for size in pixels.shape[2:])
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        arguments = (rows, columns, head_dim, pixels.device)
        if torch.compiler.is_compiling() or type(pixels) is not torch.Tensor:  # a traced or fake tensor must not be kept
            return patch_rope(*arguments, theta=self.config.rope_theta)
        if self._tables is None or self._tables[0] != arguments:
            with torch.inference_mode(False):
                self._tables = (arguments, patch_rope(*arguments, theta=self.config.rope_theta))
        return self._tables[1]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        prefix = 1 + self.config.num_register_tokens
        tokens = self.embeddings(pixels)
        # Autocast's convolution leaves bf16; the residual stream stays in the parameters' dtype, as LayerScale would make it.
        entry = Residual(tokens.to(self.embeddings.cls_token.dtype))
        rope = self._rope(pixels)
        for block in self.model["layer"]:
            entry = block(entry, rope, num_prefix=prefix)
        return add_and_norm(entry.rows(slice(prefix, None)), self.norm, None)[1]


@functools.lru_cache(maxsize=16)
def _statistics(processor: Processor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Mean and deviation of pixels, (2,3,1,1): brought to a GPU once, for the host would wait for it, and a graph cannot."""
    with torch.inference_mode(False):
        return torch.tensor((processor.image_mean, processor.image_std), dtype=dtype, device=device)[:, :, None, None]


class DINOv3(Freezable, Part):
    """DINOv3 as the frozen backbone: uint8 frames (B,T,3,H,W) to patch features (B,T,N,D), N = H/16 * W/16.

    Args:
        backbone_name: folder or hub repository of released weights; read when ``config`` is None.
        config: build this architecture with random weights instead.
        local_files_only: read no network.
        attention: see :func:`deltakern.nn.attend`.

    The attributes ``backbone``, ``processor``, ``hidden_size``, ``num_heads``, ``patch_size``, ``initializer_range`` and
    ``num_prefix_tokens`` are those that the released training code reads. It never trains: ``train()`` leaves it in evaluation mode.
    """

    def __init__(
        self,
        backbone_name: str = DEFAULT_WEIGHTS,
        *,
        config: DINOv3Config | None = None,
        local_files_only: bool = False,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        weights = None
        if config is None:
            raw, weights = checkpoint.read_dinov3(backbone_name, local_files_only=local_files_only)
            config = DINOv3Config.from_dict(raw)
        self.processor = Processor(tuple(config.image_mean), tuple(config.image_std))
        self.backbone = VisionTransformer(config, attention)
        self.patch_size = config.patch_size
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.initializer_range = config.initializer_range
        self.num_prefix_tokens = 1 + config.num_register_tokens
        if weights is not None:
            checkpoint.load_into(self, weights)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pretrained(cls, folder_or_repo_id: str, local_files_only: bool = False, *, attention: str = "auto") -> DINOv3:
        """The released weights of a folder or of a hub repository.

        Raises:
            FileNotFoundError, deltakern.models.checkpoint.CheckpointError: what is there is not a DINOv3 ViT.
        """
        return cls(str(folder_or_repo_id), local_files_only=local_files_only, attention=attention)

    def train(self, mode: bool = True) -> DINOv3:
        """Stays in evaluation mode."""
        return super().train(False)

    def normalize(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 (...,3,H,W) to pixels with the backbone's mean and deviation, in the parameters' dtype."""
        dtype = self.backbone.embeddings.cls_token.dtype
        wide = torch.promote_types(dtype, torch.float32)
        mean, std = _statistics(self.processor, wide, frames.device)
        return ((frames.to(wide) / 255 - mean) / std).to(dtype)

    @torch.no_grad()
    @one_call
    @captured
    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Features (B,T,N,D), in the parameters' dtype, of uint8 frames (B,T,3,H,W), H and W multiples of the patch size.

        Raises:
            TypeError: not uint8. ValueError: the shape.
        """
        check_frames(frames, self.patch_size)
        check_uint8(frames)
        with torch.autocast(frames.device.type, enabled=False):
            pixels = self.normalize(frames.flatten(0, 1))
        return self.backbone(pixels).unflatten(0, frames.shape[:2])
