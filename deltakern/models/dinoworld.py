"""DINO-world, the dense baseline of the same release: every patch is a token, for queries and for the past."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltakern.models.deltatok import Savings
from deltakern.models.predictor import Predictor
from deltakern.models.validate import check_frames
from deltakern.models.world import NOTHING_CACHED, World, axis_angles, behind, rotate_axes
from deltakern.nn import Residual, attend
from deltakern.nn.weights import hold


class DINOWorld(World):
    """The dense predictor, with the released names. A query of frame t sees all patches of frames 0..t-1.

    The released mask is a tensor over all queries and keys; here the queries of a frame attend to the slice of keys that
    they may see, which is the same and costs half.

    Args:
        backbone: frozen, as :class:`deltakern.DINOv3`.
        rope_axis_sizes, rope_unrotated_size: channels of a head that rotate with time, x and y, and that do not.
        use_bom: one noise vector a frame and candidate, shared by its patches. False: one learned query vector at every patch.
        The rest as in :class:`deltakern.DeltaWorld`.

    :meth:`train` leaves the backbone in evaluation mode.
    """

    stay_evaluating = ("backbone",)
    _dense = True

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
        rope_unrotated_size: int = 4,
        mlp_ratio: int = 4,
        *,
        savings: Savings | None = None,
        candidate_chunk: int = 16,
    ) -> None:
        if len(rope_axis_sizes) != 3:
            raise ValueError(f"rope_axis_sizes must name three axes, time, x and y, got {tuple(rope_axis_sizes)}")
        super().__init__(backbone, predictor_hidden_size, use_bom, num_samples_train, num_samples_eval, savings, candidate_chunk)
        self.rope_axis_sizes = tuple(rope_axis_sizes)
        self.backbone = hold(backbone)
        self.predictor = Predictor(
            backbone.hidden_size,
            self.initializer_range,
            rope_axis_sizes,
            rope_unrotated_size,
            layer_scale_init,
            predictor_hidden_size,
            predictor_num_hidden_layers,
            predictor_num_heads,
            mlp_ratio,
        )

    def _features(self, frames: torch.Tensor) -> torch.Tensor:
        check_frames(frames, self.backbone.patch_size)
        with torch.no_grad():
            return self.backbone(frames)

    def _rotate(self, t: torch.Tensor, frames: torch.Tensor, time: torch.Tensor, candidates: int = 1) -> torch.Tensor:
        """Keys or queries (B,T*K*N,H,d), rotated, of K candidates at every patch of frames at times (B,T)."""
        rows, columns = (size // self.backbone.patch_size for size in frames.shape[-2:])
        lines = (torch.linspace(-1, 1, n, device=frames.device) for n in (rows, columns))
        y, x = (grid.flatten()[None, None] for grid in torch.meshgrid(*lines, indexing="ij"))
        places = zip((time[..., None], x, y), self.rope_axis_sizes, strict=True)
        angles = [axis_angles(place, size)[:, :, None, :, None] for place, size in places]
        return rotate_axes(t.unflatten(1, (time.shape[1], candidates, rows * columns)), angles).flatten(1, 3)

    def _keys_values(self, tokens: torch.Tensor, frames: torch.Tensor, time: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of every block, keys rotated."""
        return [(self._rotate(k, frames, time), v) for k, v in self.predictor.keys_values(tokens)]

    def _predict(
        self, frames: torch.Tensor, past: torch.Tensor, timestamps: torch.Tensor, queries: torch.Tensor, *, head: bool = True
    ) -> torch.Tensor | Residual:
        """Teacher forcing: queries (B,T-1,K,D), one vector for all patches of a candidate, to predictions (B,T-1,K,N,D).

        Without the head the predictor's last stream and branch, of that shape.
        """
        batch, groups, candidates, width = queries.shape
        patches = past.shape[1] // groups

        def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q = self._rotate(q, frames, timestamps[:, 1:], candidates).unflatten(1, (groups, -1))
            k = self._rotate(k, frames, timestamps[:, :-1])
            seen = [patches * (g + 1) for g in range(groups)]
            return torch.cat([attend(q[:, g], k[:, :n], v[:, :n]) for g, n in enumerate(seen)], 1)

        q = queries[:, :, :, None].expand(-1, -1, -1, patches, -1).reshape(batch, -1, width)
        out = self.predictor(q, past, mix, head=head)
        return out.unflatten(1, (groups, candidates, patches))

    def _forward_train(self, frames, timestamps, criterion, queries, generator) -> tuple[torch.Tensor, torch.Tensor]:
        y = self._features(frames)
        past, target = y[:, :-1].flatten(1, 2), y[:, 1:]
        best = self._training_queries(
            lambda q: self._predict(frames, past, timestamps, q, head=False), target, criterion, queries, generator
        )
        return self._predict(frames, past, timestamps, best[:, :, None])[:, :, 0], target

    def rollout_init(self, frames: torch.Tensor, ctx_len: int) -> dict[str, Any]:
        """State of a rollout: features ``y`` of all frames, the context's ``tokens`` (B,C*N,D) and every sample's ``own`` (B*S,J*N,D)."""
        y = self._features(frames)
        own = y.new_empty((y.shape[0] * self.num_samples, 0, y.shape[3]))
        return {"y": y, "frames": frames[:, :1], "tokens": y[:, :ctx_len].flatten(1, 2), "own": own, **NOTHING_CACHED}

    def _step(self, state: dict[str, Any], q: torch.Tensor, frame: int, timestamps: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        frames, tokens, own, samples = state["frames"], state["tokens"], state["own"], self.num_samples
        patches = state["y"].shape[2]
        context = tokens.shape[1] // patches
        times = timestamps.repeat_interleave(samples, 0)
        cached, own_kv = state["context"], state["own_kv"]
        if cached is None or not self.savings.context_cache:
            cached = self._keys_values(tokens, frames, timestamps[:, :context])
            own_kv = self._keys_values(own, frames, times[:, context:frame])
        elif own.shape[1]:
            own_kv = behind(own_kv, self._keys_values(own[:, -patches:], frames, times[:, frame - 1 : frame]), 1)
        memory = behind([tuple(t.repeat_interleave(samples, 0) for t in kv) for kv in cached], own_kv, 1)
        q = q.flatten(0, 1)[:, None].expand(-1, patches, -1)

        def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend(self._rotate(q, frames, times[:, frame : frame + 1]), k, v)

        features = self.predictor(q, memory, mix)
        appended = torch.cat((own, features.detach().to(own.dtype)), 1)
        return features, {**state, "own": appended, "context": cached, "own_kv": own_kv}
