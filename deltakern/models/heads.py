"""The released task heads on backbone features: segmentation, depth, and RGB for looking at features.

All take a feature map (B,D,h,w), h x w the patch grid, and have the parameter names and arguments of the release. Features of
the models, (..., N, D), become such a map by :func:`feature_map`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deltakern.models import checkpoint
from deltakern.models.checkpoint import Source
from deltakern.models.validate import check_positive
from deltakern.nn import attend

KITTI_DEPTHS = (1e-3, 80.0)  # metres, of the released depth head
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HEAD_WIDTH = 72  # channels of an attention head in the released RGB head


def feature_map(features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Patch tokens (...,N,D), N = rows * columns in row-major order, as a map (M,D,rows,columns), M the leading sizes' product.

    Raises:
        ValueError: N is not rows * columns.
    """
    if features.ndim < 2 or features.shape[-2] != rows * columns:
        raise ValueError(f"features must be (...,N,D) with N = {rows} * {columns} = {rows * columns}, got {tuple(features.shape)}")
    return features.reshape(-1, rows * columns, features.shape[-1]).transpose(1, 2).unflatten(2, (rows, columns))


class _MapHead(nn.Module):
    """BatchNorm and a 1x1 convolution."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_size)
        self.head = nn.Conv2d(in_size, out_size, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B,D,h,w) to (B,out,h,w): the logits of a segmentation, to be resized bilinearly to the labels."""
        _check_map(x, self.bn.num_features)
        return self.head(self.bn(x))

    @staticmethod
    def _sizes(source: Source, what: str) -> tuple[checkpoint.Checkpoint, int, int]:
        """A released file of such a head, its D and its number of outputs."""
        found = checkpoint.expect(source, "map_head", what)
        shape = tuple(found.state_dict["head.weight"].shape)
        if len(shape) != 4:
            raise checkpoint.CheckpointError(f"{found.path}: head.weight must be (out,D,1,1), got {shape}")
        return found, shape[1], shape[0]


class SegHead(_MapHead):
    """Segmentation: BatchNorm and a 1x1 convolution to logits. Released for VSPW (124 classes) and Cityscapes (19).

    Args:
        in_size, num_classes: D, and the number of logits.
    """

    def __init__(self, in_size: int, num_classes: int) -> None:
        check_positive(in_size=in_size, num_classes=num_classes)
        super().__init__(in_size, num_classes)

    @classmethod
    def from_checkpoint(cls, source: Source) -> SegHead:
        """The head of a released file, in evaluation mode; its sizes are those of the weights.

        Raises:
            deltakern.models.checkpoint.CheckpointError: another model's file.
        """
        found, in_size, classes = cls._sizes(source, "a segmentation head")
        return _loaded(cls(in_size, classes), found)


class DepthHead(_MapHead):
    """Depth: BatchNorm and a 1x1 convolution to bins of depth, whose normalised activations weigh the bins' depths.

    Args:
        in_size, num_bins: D, and the number of bins.
        min_depth, max_depth: of the first and last bin, metres; between them the bins are evenly spaced.
    """

    def __init__(self, in_size: int, min_depth: float, max_depth: float, num_bins: int = 256) -> None:
        check_positive(in_size=in_size, num_bins=num_bins)
        if not 0 <= min_depth < max_depth < math.inf:
            raise ValueError(f"min_depth and max_depth must be 0 <= min_depth < max_depth, got {min_depth} and {max_depth}")
        super().__init__(in_size, num_bins)
        self.min_depth = min_depth
        self.max_depth = max_depth

    @classmethod
    def from_checkpoint(cls, source: Source, min_depth: float = KITTI_DEPTHS[0], max_depth: float = KITTI_DEPTHS[1]) -> DepthHead:
        """As :meth:`SegHead.from_checkpoint`; the range of depth is not in the file."""
        found, in_size, bins = cls._sizes(source, "a depth head")
        return _loaded(cls(in_size, min_depth, max_depth, bins), found)

    def forward(self, x: torch.Tensor, eps: float = 0.1) -> torch.Tensor:
        """Features (B,D,h,w) to depths (B,1,h,w) in metres; ``eps`` is added to every bin's activation."""
        weights = super().forward(x).relu() + eps
        depths = torch.linspace(self.min_depth, self.max_depth, self.head.out_channels, device=x.device, dtype=weights.dtype)
        return (weights * depths[:, None, None]).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


class RGBHead(nn.Module):
    """Pixels from features: a ViT decoder on features whose final LayerNorm is undone.

    Args:
        in_size: D.
        norm_weight, norm_bias: (D,) of the backbone's final LayerNorm. Not part of the state dict.
        img_mean, img_std: pixel statistics of the backbone, three each. Not part of the state dict.
        hidden_size, depth, num_heads, mlp_size: of the decoder.
        patch: pixels of a patch's side.
        img_size: pixels of the side of the square image that the table of positions is for; other grids interpolate it.
    """

    def __init__(
        self,
        in_size: int,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        img_mean: Sequence[float],
        img_std: Sequence[float],
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_size: int = 4096,
        patch: int = 16,
        img_size: int = 512,
    ) -> None:
        super().__init__()
        check_positive(in_size=in_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads, mlp_size=mlp_size, patch=patch)
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4 and of num_heads={num_heads}, got {hidden_size}")
        if img_size < patch:
            raise ValueError(f"img_size must be at least one patch of {patch} pixels, got {img_size}")
        if len(img_mean) != 3 or len(img_std) != 3:
            raise ValueError(f"img_mean and img_std must have three values each, got {len(img_mean)} and {len(img_std)}")
        for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
            if tuple(value.shape) != (in_size,):
                raise ValueError(f"{name} must be (in_size,) = ({in_size},), got {tuple(value.shape)}")
            self.register_buffer(name, value.detach().clone(), persistent=False)
        for name, value in (("img_mean", img_mean), ("img_std", img_std)):
            value = torch.as_tensor(value, dtype=norm_weight.dtype).view(3, 1, 1)
            self.register_buffer(name, value.detach().clone(), persistent=False)
        self.patch = patch
        self.decoder_embed = nn.Linear(in_size, hidden_size)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.decoder_pos_embed = nn.Parameter(position_table(hidden_size, img_size // patch), requires_grad=False)
        self.decoder_layers = nn.ModuleList(_DecoderBlock(hidden_size, num_heads, mlp_size) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.decoder_pred = nn.Linear(hidden_size, patch * patch * 3)

    @classmethod
    def from_checkpoint(
        cls,
        source: Source,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        img_mean: Sequence[float] = _IMAGENET_MEAN,
        img_std: Sequence[float] = _IMAGENET_STD,
        *,
        num_heads: int | None = None,
        img_size: int = 512,
    ) -> RGBHead:
        """The head of a released file, in evaluation mode; its sizes are those of the weights.

        Args:
            norm_weight, norm_bias, img_mean, img_std: as in the class; the LayerNorm is ``dinov3.backbone.norm``.
            num_heads: by default heads of 72 channels, as released.
            img_size: where the file has no table of positions, the side of the square image that one is built for.

        Raises:
            deltakern.models.checkpoint.CheckpointError: another model's file.
        """
        found = checkpoint.expect(source, "rgb_head")
        state = found.state_dict
        embed, pred, mlp = (
            checkpoint.matrix_shape(state, key, found.path)
            for key in ("decoder_embed.weight", "decoder_pred.weight", "decoder_layers.0.intermediate.dense.weight")
        )
        patch = math.isqrt(pred[0] // 3)
        table = state.get("decoder_pos_embed")
        if table is not None:
            side = math.isqrt(table.shape[1] - 1) if table.ndim == 3 else 0
            if side < 1 or side * side + 1 != table.shape[1]:
                raise checkpoint.CheckpointError(
                    f"{found.path}: decoder_pos_embed must be (1,1+n*n,width) for a square grid, got {tuple(table.shape)}"
                )
            img_size = side * patch
        sizes = {
            "hidden_size": embed[0],
            "depth": len({k.split(".")[1] for k in state if k.startswith("decoder_layers.")}),
            "num_heads": num_heads or max(1, embed[0] // _HEAD_WIDTH),
            "mlp_size": mlp[0],
        }
        head = cls(embed[1], norm_weight, norm_bias, img_mean, img_std, **sizes, patch=patch, img_size=img_size)
        return _loaded(head, found)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B,D,h,w) to RGB (B,3,h*patch,w*patch), in [0,1] but for what the decoder overshoots."""
        _check_map(x, self.decoder_embed.in_features)
        rows, columns = x.shape[2:]
        tokens = (x.flatten(2).transpose(1, 2) - self.norm_bias) / self.norm_weight
        tokens = self.decoder_embed(tokens)
        tokens = torch.cat((self.trainable_cls_token.to(tokens.dtype).expand(x.shape[0], -1, -1), tokens), 1)
        tokens = tokens + self._positions(rows, columns)
        for layer in self.decoder_layers:
            tokens = layer(tokens)
        patches = self.decoder_pred(self.decoder_norm(tokens)[:, 1:])
        pixels = patches.unflatten(2, (self.patch, self.patch, 3)).unflatten(1, (rows, columns))  # (B, h, w, row, column, channel)
        image = pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        return image * self.img_std + self.img_mean

    def _positions(self, rows: int, columns: int) -> torch.Tensor:
        """The table (1,1+rows*columns,width), interpolated bicubically where the grid is not its own."""
        table = self.decoder_pos_embed
        side = math.isqrt(table.shape[1] - 1)
        if (rows, columns) == (side, side):
            return table
        grid = table[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        resized = F.interpolate(grid, (rows, columns), mode="bicubic")
        return torch.cat((table[:, :1], resized.flatten(2).transpose(1, 2)), 1)


def position_table(width: int, side: int) -> torch.Tensor:
    """The fixed positions (1,1+side*side,width) of the RGB head, float32: zeros for the leading token, then for every patch in
    row-major order sines and cosines of its row times w, sines and cosines of its column times w; w_i = 10000^(-i / (width/4))."""
    quarter = width // 4
    frequencies = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat((angles.sin(), angles.cos()), 1)
    patches = torch.cat((waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)), 2)
    return torch.cat((torch.zeros(1, width, dtype=torch.float64), patches.flatten(0, 1)))[None].float()


def _dense(in_size: int, out_size: int) -> nn.ModuleDict:
    """A linear layer under the released name."""
    return nn.ModuleDict({"dense": nn.Linear(in_size, out_size)})


class _DecoderBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp_size: int) -> None:
        super().__init__()
        self.heads = heads
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"attention": projections, "output": _dense(width, width)})
        self.layernorm_before = nn.LayerNorm(width, eps=1e-12)
        self.layernorm_after = nn.LayerNorm(width, eps=1e-12)
        self.intermediate = _dense(width, mlp_size)
        self.output = _dense(mlp_size, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.layernorm_before(x)
        q, k, v = (layer(normed).unflatten(2, (self.heads, -1)) for layer in self.attention["attention"].values())
        x = x + self.attention["output"]["dense"](attend(q, k, v).flatten(2))
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))


def _check_map(x: torch.Tensor, width: int) -> None:
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.shape[1] != width:
        got = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"x must be a feature map (B,{width},h,w), got {got}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype}")


def _loaded(head: Any, found: checkpoint.Checkpoint) -> Any:
    checkpoint.load_into(head, found)
    return head.requires_grad_(False).eval()
