"""DeltaWorld: many futures in one pass, as next delta tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltakern import ops
from deltakern.models.deltatok import DeltaTok, Savings
from deltakern.models.world import World, axis_angles, rotate_axes


class DeltaWorld(World):
    """The predictor of the paper, section 3 (DeltaWorld), with the released names of arguments, methods and parameters.

    Args:
        tokenizer: frozen; brings its backbone.
        rope_axis_sizes, rope_unrotated_size: channels of a head that rotate with time, and that do not.
        predictor_hidden_size, predictor_num_hidden_layers, predictor_num_heads, mlp_ratio: of the predictor.
        use_bom: best of many: queries are noise. False: one learned query, one future.
        num_samples_train, num_samples_eval: candidates K in training, futures S in evaluation.
        layer_scale_init: initial LayerScale.
        savings: which needless work to leave out; the tokenizer's own savings are the tokenizer's.
        candidate_chunk: candidates per clip and frame that are in memory at once in the search for the best.
    """

    def __init__(
        self,
        tokenizer: DeltaTok,
        rope_axis_sizes: tuple[int, ...] = (60,),
        predictor_hidden_size: int = 768,
        predictor_num_hidden_layers: int = 12,
        predictor_num_heads: int = 12,
        use_bom: bool = True,
        num_samples_train: int = 256,
        num_samples_eval: int = 20,
        layer_scale_init: float = 1e-5,
        rope_unrotated_size: int = 4,
        mlp_ratio: int = 4,
        *,
        savings: Savings | None = None,
        candidate_chunk: int = 256,
    ) -> None:
        if len(rope_axis_sizes) != 1:
            raise ValueError(f"rope_axis_sizes must name one axis, time, got {tuple(rope_axis_sizes)}")
        super().__init__(
            tokenizer.backbone,
            rope_axis_sizes=rope_axis_sizes,
            predictor_hidden_size=predictor_hidden_size,
            predictor_num_hidden_layers=predictor_num_hidden_layers,
            predictor_num_heads=predictor_num_heads,
            use_bom=use_bom,
            num_samples_train=num_samples_train,
            num_samples_eval=num_samples_eval,
            layer_scale_init=layer_scale_init,
            rope_unrotated_size=rope_unrotated_size,
            mlp_ratio=mlp_ratio,
            savings=savings,
            candidate_chunk=candidate_chunk,
        )
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.backbone = tokenizer.backbone
        self.predictor = self._make_predictor()

    def train(self, mode: bool = True) -> DeltaWorld:
        """Sets the predictor's mode; backbone and tokenizer stay in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def _rotate(self, time: torch.Tensor):
        """Rotation of keys (B,T,H,d) by their times (B,T)."""
        angles = axis_angles(time, self.rope_axis_sizes[0])[:, :, None]
        return lambda k: rotate_axes(k, [angles])

    def _mix(self, q_time: torch.Tensor, visible: torch.Tensor | None = None, own=None):
        """Attention of unrotated queries over rotated keys; ``own`` is keys and values (B,Q,J,H,d) of each query."""
        own_k, own_v = (None, None) if own is None else own
        return lambda q, k, v: ops.context_attention(
            q, k, v, q_time, None, visible, own_k=own_k, own_v=own_v, rope_size=self.rope_axis_sizes[0]
        )

    def predict(self, tokens: torch.Tensor, timestamps: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Next delta tokens after every prefix of a clip's tokens (teacher forcing).

        Args:
            tokens: (B,T-1,D) delta tokens of frames 0..T-2.
            timestamps: (B,T) seconds.
            queries: (B,T-1,K,D); those of frame t see tokens 0..t-1.

        Returns:
            (B,T-1,K,D) predictions of the tokens of frames 1..T-1.
        """
        visible = torch.arange(1, timestamps.shape[1], device=tokens.device)
        mix = self._mix(timestamps[:, 1:], visible)
        return self.predictor(queries.flatten(1, 2), tokens, self._rotate(timestamps[:, :-1]), mix).unflatten(1, queries.shape[1:3])

    def _forward_train(self, frames, timestamps, criterion, queries, generator) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            tokens = self.tokenizer.tokenize(frames)
        return self.train_on_tokens(tokens, timestamps, criterion, queries=queries, generator=generator)

    def train_on_tokens(
        self,
        tokens: torch.Tensor,
        timestamps: torch.Tensor,
        criterion: nn.Module | None = None,
        *,
        queries: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The training pass from delta tokens (B,T,D): (prediction, target), each (B,T-1,D). See :meth:`forward`."""
        batch, total = tokens.shape[:2]
        past, target = tokens[:, :-1], tokens[:, 1:]
        if self.use_bom:
            if queries is None:
                shape = (batch, total - 1, self.num_samples_train)
                queries = self.noise(*shape, device=tokens.device, dtype=tokens.dtype, generator=generator)
            else:
                self._check_queries(queries, (batch, total - 1, queries.shape[2] if queries.ndim == 4 else -1), "(B,T-1,K,D)")
            best = self._best_queries(queries, lambda q: self.predict(past, timestamps, q), target, criterion, 1)
        else:
            best = self.q_embed.weight.expand(batch, total - 1, -1)
        return self.predict(past, timestamps, best.unsqueeze(2)).squeeze(2), target

    def rollout_init(self, frames: torch.Tensor, ctx_len: int) -> dict[str, Any]:
        """State of a rollout: features ``y`` of all frames, ``tokens`` of the context, every sample's last features ``x`` and
        its own generated tokens ``own``."""
        with torch.no_grad():
            y = self.tokenizer.features(frames)
            rope = self.tokenizer._rope(frames)
            tokens = self.tokenizer.tokenize_offline(self.tokenizer.black_features(frames), y[:, :ctx_len], rope).squeeze(2)
        samples = self.num_samples
        x = y[:, ctx_len - 1, None].expand(-1, samples, -1, -1).flatten(0, 1)
        own = tokens.new_empty((tokens.shape[0], samples, 0, tokens.shape[2]))
        return {"y": y, "rope": rope, "tokens": tokens, "own": own, "x": x, "context": None, "own_kv": None}

    def rollout_step(
        self,
        state: dict[str, Any],
        tgt_frame_idx: int,
        timestamps: torch.Tensor,
        *,
        queries: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Predicts frame ``tgt_frame_idx`` for every sample: (features (B*S,N,D), target (B,N,D), state).

        Args:
            state: of :meth:`rollout_init` or of the step before.
            tgt_frame_idx: index of the frame; context and generated tokens must be those of all frames before it.
            timestamps: (B,T) seconds.
            queries: (B,S,D) noise, instead of drawing it.
            generator: draws the noise.
        """
        tokens, own = state["tokens"], state["own"]
        batch, context = tokens.shape[:2]
        samples, generated = own.shape[1:3]
        if tgt_frame_idx != context + generated:
            raise ValueError(f"tgt_frame_idx must be {context + generated}, the next frame of this state, got {tgt_frame_idx}")
        q = self._step_queries(batch, queries, tokens, generator)
        q_time = timestamps[:, tgt_frame_idx : tgt_frame_idx + 1]
        if self.savings.context_cache:
            cached, own_kv = state["context"], state["own_kv"]
            if cached is None:
                cached = self.predictor.keys_values(tokens, self._rotate(timestamps[:, :context]))
            if generated:
                own_kv = self._append(own_kv, own[:, :, -1], timestamps[:, tgt_frame_idx - 1 : tgt_frame_idx])
            mix = [self._mix(q_time, own=kv) for kv in own_kv] if own_kv else self._mix(q_time)
            predicted = self.predictor(q, cached, None, mix)
            state = {**state, "context": cached, "own_kv": own_kv}
        else:
            memory = torch.cat((tokens[:, None].expand(-1, samples, -1, -1), own), 2).flatten(0, 1)
            times = timestamps[:, None].expand(-1, samples, -1).flatten(0, 1)
            rotate, mix = self._rotate(times[:, :tgt_frame_idx]), self._mix(times[:, tgt_frame_idx : tgt_frame_idx + 1])
            predicted = self.predictor(q.flatten(0, 1)[:, None], memory, rotate, mix).view(batch, samples, -1)
        features = self.tokenizer.decode(predicted.flatten(0, 1)[:, None], state["x"], state["rope"])
        appended = torch.cat((own, predicted.detach()[:, :, None].to(own.dtype)), 2)
        return features, state["y"][:, tgt_frame_idx], {**state, "own": appended, "x": features.detach()}

    def _append(self, own_kv, token: torch.Tensor, time: torch.Tensor):
        """Keys and values of one more generated token a sample, (B,S,D) at times (B,1), behind those that there are."""
        fresh = self.predictor.keys_values(token, self._rotate(time))
        fresh = [(k[:, :, None], v[:, :, None]) for k, v in fresh]
        if own_kv is None:
            return fresh
        return [(torch.cat((k0, k), 2), torch.cat((v0, v), 2)) for (k0, v0), (k, v) in zip(own_kv, fresh, strict=True)]
