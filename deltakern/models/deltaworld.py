"""DeltaWorld: many futures in one pass, as next delta tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltakern import ops
from deltakern.models import sampling
from deltakern.models.deltatok import DeltaTok, Savings
from deltakern.models.predictor import Predictor
from deltakern.models.sampling import MEMORY_BUDGET, Futures, Noise, Which
from deltakern.models.stream import Stream
from deltakern.models.validate import check_frames, check_positive
from deltakern.models.world import NOTHING_CACHED, World, behind
from deltakern.nn import Residual
from deltakern.nn.weights import hold, one_call


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
        candidate_chunk: candidates per clip and frame that are in memory at once, at most, in the search for the best.

    :meth:`train` leaves backbone and tokenizer in evaluation mode.
    """

    stay_evaluating = ("tokenizer", "backbone")

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
        super().__init__(tokenizer.backbone, predictor_hidden_size, use_bom, num_samples_train, num_samples_eval, savings, candidate_chunk)
        self.rope_axis_sizes = tuple(rope_axis_sizes)
        self.tokenizer = hold(tokenizer)
        self.backbone = tokenizer.backbone
        self.predictor = Predictor(
            self.backbone.hidden_size,
            self.initializer_range,
            rope_axis_sizes,
            rope_unrotated_size,
            layer_scale_init,
            predictor_hidden_size,
            predictor_num_hidden_layers,
            predictor_num_heads,
            mlp_ratio,
        )

    def _mix(self, q_time: torch.Tensor, k_time: torch.Tensor, visible: torch.Tensor | None = None, own=(None, None), own_time=None):
        """Attention of unrotated queries over unrotated keys; ``own`` is keys and values (B,Q,J,H,d) of each query, of times (B,J)."""
        more = {"own_k": own[0], "own_v": own[1], "own_time": own_time, "rope_size": self.rope_axis_sizes[0]}
        return lambda q, k, v: ops.context_attention(q, k, v, q_time, k_time, visible, **more)

    @one_call
    def predict(self, tokens: torch.Tensor, timestamps: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Next delta tokens after every prefix of a clip's tokens (teacher forcing): (B,T-1,K,D), of frames 1..T-1.

        Args:
            tokens, timestamps: (B,T-1,D) delta tokens of frames 0..T-2, and (B,T) seconds.
            queries: (B,T-1,K,D); those of frame t see tokens 0..t-1.
        """
        return self._predict(tokens, timestamps, queries)

    def _predict(self, memory, timestamps, queries, *, head: bool = True) -> torch.Tensor | Residual:
        """:meth:`predict`, of tokens or of their keys and values; without the head the predictor's last stream and branch, (B,T-1,K,D)
        each."""
        mix = self._mix(timestamps[:, 1:], timestamps[:, :-1], torch.arange(1, timestamps.shape[1], device=queries.device))
        out = self.predictor(queries.flatten(1, 2), memory, mix, head=head)
        return out.unflatten(1, queries.shape[1:3])

    def _forward_train(self, frames, timestamps, criterion, queries, generator) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            tokens = self.tokenizer.tokenize(frames)
        return self.train_on_tokens(tokens, timestamps, criterion, queries=queries, generator=generator)

    @one_call
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
        past, target, projected = tokens[:, :-1], tokens[:, 1:], []

        def search(q: torch.Tensor) -> Residual:
            if not projected:  # once for all chunks of candidates
                projected.append(self.predictor.keys_values(past) if self.predictor.projects_apart else past)
            return self._predict(projected[0], timestamps, q, head=False)

        best = self._training_queries(search, target, criterion, queries, generator)
        return self.predict(past, timestamps, best.unsqueeze(2)).squeeze(2), target

    @torch.no_grad()
    def _context(self, frames: torch.Tensor, ctx_len: int) -> dict[str, Any]:
        """Features ``y`` of all frames, ``rope``, ``tokens`` of the first ``ctx_len``."""
        y, rope = self.tokenizer.features(frames), self.tokenizer._rope(frames)
        tokens = self.tokenizer.tokenize_offline(self.tokenizer.black_features(frames), y[:, :ctx_len], rope).squeeze(2)
        return {"y": y, "rope": rope, "tokens": tokens}

    def rollout_init(self, frames: torch.Tensor, ctx_len: int) -> dict[str, Any]:
        """State of a rollout: features ``y`` of all frames, ``tokens`` of the context, every sample's last features ``x`` and
        its own generated tokens ``own``."""
        found, samples = self._context(frames, ctx_len), self.num_samples
        x = found["y"][:, ctx_len - 1, None].expand(-1, samples, -1, -1).flatten(0, 1)
        own = found["tokens"].new_empty((frames.shape[0], samples, 0, x.shape[2]))
        return {**found, "own": own, "x": x, **NOTHING_CACHED}

    def _step(self, state: dict[str, Any], q: torch.Tensor, frame: int, timestamps: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        tokens, own = state["tokens"], state["own"]
        batch, samples, generated = own.shape[:3]
        now, before, since = timestamps[:, frame : frame + 1], timestamps[:, : tokens.shape[1]], timestamps[:, tokens.shape[1] : frame]
        if self.savings.context_cache:
            cached, own_kv = state["context"], state["own_kv"]
            if cached is None:
                cached = self.predictor.keys_values(tokens)
            if generated:
                fresh = self.predictor.keys_values(own[:, :, -1])
                fresh = [(k[:, :, None], v[:, :, None]) for k, v in fresh]
                own_kv = fresh if own_kv is None else behind(own_kv, fresh, 2)
            mix = [self._mix(now, before, own=kv, own_time=since) for kv in own_kv] if own_kv else self._mix(now, before)
            predicted = self.predictor(q, cached, mix)
            state = {**state, "context": cached, "own_kv": own_kv}
        else:
            memory = torch.cat((tokens[:, None].expand(-1, samples, -1, -1), own), 2).flatten(0, 1)
            times = timestamps.repeat_interleave(samples, 0)
            mix = self._mix(times[:, frame : frame + 1], times[:, :frame])
            predicted = self.predictor(q.flatten(0, 1)[:, None], memory, mix).view(batch, samples, -1)
        features = self.tokenizer.decode(predicted.flatten(0, 1)[:, None], state["x"], state["rope"])
        appended = torch.cat((own, predicted.detach()[:, :, None].to(own.dtype)), 2)
        return features, {**state, "own": appended, "x": features.detach()}

    @torch.no_grad()
    @one_call
    def sample(
        self,
        z: torch.Tensor,
        timestamps: torch.Tensor,
        horizon: int,
        num_samples: int | None = None,
        *,
        generator: torch.Generator | None = None,
        queries: torch.Tensor | None = None,
        seed: int | None = None,
        noise: str = "normal",
        memory_budget: int = MEMORY_BUDGET,
        cuda_graph: bool = True,
    ) -> torch.Tensor:
        """Futures of a clip as delta tokens; nothing is decoded. The tokens are those of :meth:`forward`'s rollout for the same noise.

        Args:
            z: (B,C,D) delta tokens of the context.
            timestamps: (B,C+h) seconds, of the context and of the frames to predict.
            horizon: h, how many frames to predict, one after the other.
            num_samples: S futures a clip; ``num_samples_eval`` by default.
            generator: draws the noise as the release does, one step after the other.
            queries: (B,S,h,D) noise, instead of drawing it.
            seed: draws the noise of clip b, sample s and step t as a function of (seed, b, s, t): sample 7 of 20 is sample 7
                of 4,000. One of generator, queries and seed; none of them is torch's global generator.
            noise: with ``seed``, "normal", "antithetic" (sample 2i+1 negates sample 2i) or "sobol" (quasi-random); see
                :class:`deltakern.models.noise.IndexedNoise`.
            memory_budget: bytes that are used at once besides inputs and results; the samples are cut into portions that fit.
            cuda_graph: on a GPU, capture the steps once for each shape and replay them. False launches every kernel anew.

        Returns:
            (B,S,h,D) in z's dtype. No gradient.

        Raises:
            ValueError: shapes, timestamps that go backwards, noise arguments that do not fit together. TypeError: dtypes.
            A context of more than 7 tokens, longer than the released models were trained on, warns once.
        """
        if not isinstance(z, torch.Tensor) or z.ndim != 3 or z.shape[1] == 0 or z.shape[2] != self.backbone.hidden_size:
            got = tuple(z.shape) if isinstance(z, torch.Tensor) else type(z).__name__
            raise ValueError(f"z must be (B,C,D) delta tokens with C at least 1 and D={self.backbone.hidden_size}, got {got}")
        check_positive(horizon=horizon)
        sampling.check_times(timestamps, (z.shape[0], z.shape[1] + horizon), "(B,C+h)")
        return self._sample(z, timestamps, num_samples, Noise(queries, generator, seed, noise), memory_budget, cuda_graph)

    def _sample(self, z, timestamps, num_samples, noise: Noise, memory_budget: int, cuda_graph: bool) -> torch.Tensor:
        sampling.warn_of_long_context(z.shape[1])
        return sampling.sample(self, z, timestamps.to(z.device), num_samples, noise, memory_budget, cuda_graph)

    @torch.no_grad()
    @one_call
    def decode(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        which: Which = "all",
        *,
        size: tuple[int, int] | None = None,
        memory_budget: int = MEMORY_BUDGET,
    ) -> torch.Tensor:
        """Features of sampled tokens.

        Args:
            tokens: (B,S,h,D) of :meth:`sample`.
            features: (B,N,D) of the last context frame.
            which: "all" samples and frames; "last": of all samples the last frame; or indices of samples, an int, (K,), or (B,K),
                of which all frames are decoded; or a function of the tokens that returns such indices.
            size: (height, width) of the frames in pixels; by default N patches are taken as a square.
            memory_budget: as in :meth:`sample`.

        Returns:
            (B,K,F,N,D), F = h or 1, in the order of the indices. Frames come one after the other, so that a sample's last
            frame costs h decodes. No gradient.

        Raises:
            ValueError: shapes, indices.
        """
        if tokens.ndim != 4 or features.ndim != 3 or tokens.shape[0] != features.shape[0] or tokens.shape[3] != features.shape[2]:
            raise ValueError(f"tokens must be (B,S,h,D) and features (B,N,D), got shapes {tuple(tokens.shape)} and {tuple(features.shape)}")
        check_positive(memory_budget=memory_budget)
        indices = sampling.chosen_samples(which, tokens)
        if indices is None:
            raise ValueError("which must name samples to decode, got 'none'")
        size = sampling.grid_size(features.shape[1], size, self.backbone.patch_size)
        picked = tokens.gather(1, indices[:, :, None, None].expand(-1, -1, *tokens.shape[2:]))
        rope = self.tokenizer._rope(features.new_empty((1, 1)).expand(size))
        last_only = isinstance(which, str) and which == "last"
        return sampling.decode(self.tokenizer, picked, features, rope, last_only=last_only, memory_budget=memory_budget)

    @torch.no_grad()
    @one_call
    def rollout(
        self,
        frames: torch.Tensor,
        timestamps: torch.Tensor,
        horizon: int,
        num_samples: int | None = None,
        decode: Which = "all",
        *,
        generator: torch.Generator | None = None,
        queries: torch.Tensor | None = None,
        seed: int | None = None,
        noise: str = "normal",
        memory_budget: int = MEMORY_BUDGET,
        cuda_graph: bool = True,
    ) -> Futures:
        """Futures of a clip of context frames: sampled as tokens, decoded as far as asked for.

        :meth:`decode` makes further features of their ``tokens``, ``last`` and ``size``.

        Args:
            frames: uint8 (B,C,3,H,W), the context alone.
            decode: what to decode, as ``which`` of :meth:`decode`, or "none".
            The rest, and what is raised, as in :meth:`sample` and :meth:`decode`.
        """
        check_frames(frames, self.backbone.patch_size)
        check_positive(horizon=horizon)
        sampling.check_times(timestamps, (frames.shape[0], frames.shape[1] + horizon), "(B,C+h)")
        found = self._context(frames, frames.shape[1])
        noise = Noise(queries, generator, seed, noise)
        tokens = self._sample(found["tokens"], timestamps, num_samples, noise, memory_budget, cuda_graph)
        last, size = found["y"][:, -1].clone(), tuple(frames.shape[-2:])
        return self._futures(tokens, last, size, timestamps[:, -horizon:], found["tokens"], decode, memory_budget)

    def _futures(self, tokens, last, size, times, context, which: Which, memory_budget: int) -> Futures:
        """Decodes what ``which`` names."""
        indices, features = sampling.chosen_samples(which, tokens), None
        if indices is not None:
            what = which if isinstance(which, str) else indices
            features = self.decode(tokens, last, what, size=size, memory_budget=memory_budget)
        return Futures(tokens, features, times, indices, context, last, size)

    def stream(self, context: int = 4, *, first: str = "black", cuda_graph: bool = True) -> Stream:
        """Frames one at a time, as a camera gives them; futures at any moment. See :class:`deltakern.models.Stream`."""
        return Stream(self, context, first=first, cuda_graph=cuda_graph)
