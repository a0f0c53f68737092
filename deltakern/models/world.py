"""What DeltaWorld and DINO-world share: noise queries, the best-of-many search, training and evaluation as the trainer calls them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from deltakern import ops
from deltakern.models.deltatok import Savings
from deltakern.models.predictor import KeysValues
from deltakern.models.validate import check_floating, check_frames, check_positive
from deltakern.nn import Residual, StaleCacheError
from deltakern.nn.product import ROWS_ONE_CALL
from deltakern.nn.weights import Freezable, Snapshot, one_call, outside, table
from deltakern.ops.context_attention import temporal_angles as axis_angles  # the same formula on every axis

__all__ = ["NOTHING_CACHED", "World", "axis_angles", "behind", "loss_name", "rotate_axes"]

NOISE_DRAW = 256
"""Candidates whose noise is drawn at once in training: the release's number, so that its draw is this one for the same seed."""

CPU_BYTES = 24 << 20
"""Size of the widest activation in a CPU's search. From 32 MiB on the C library maps and unmaps every allocation anew, which costs
more than the GELU on it."""


NOTHING_CACHED = {"context": None, "own_kv": None, "weights": None}
"""Of a rollout's state: keys and values of the context, of generated frames, and the weights that made them."""


def rotate_axes(x: torch.Tensor, angles: list[torch.Tensor]) -> torch.Tensor:
    """Rotates the channels of x (..., d), one consecutive slice an axis, in pairs (i, i + half) within the slice.

    The angles are (..., half) for every axis and broadcast against x's leading dimensions. In x's dtype; channels beyond the last
    axis are as they were.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    sizes = [size for a in angles for size in (a.shape[-1], a.shape[-1])]
    *halves, rest = x.to(wide).split((*sizes, x.shape[-1] - sum(sizes)), -1)
    turned = []
    for angle, first, second in zip(angles, halves[::2], halves[1::2], strict=True):
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        turned += [first * cos - second * sin, first * sin + second * cos]
    return torch.cat((*turned, rest), -1).to(x.dtype)


def behind(past: list[KeysValues], fresh: list[KeysValues], dim: int) -> list[KeysValues]:
    """Keys and values of every block, those of ``fresh`` behind those of ``past``."""
    return [(torch.cat((k0, k), dim), torch.cat((v0, v), dim)) for (k0, v0), (k, v) in zip(past, fresh, strict=True)]


def loss_name(criterion: nn.Module | None) -> dict[str, Any] | None:
    """The arguments of ``ops.best_of_n`` that mean ``criterion`` (elementwise, reduction "none"); None if it has no name there."""
    if getattr(criterion, "reduction", "none") != "none":
        raise ValueError(f"criterion must not reduce (reduction='none'), got reduction={criterion.reduction!r}")
    if type(criterion) is nn.SmoothL1Loss and criterion.beta > 0:
        return {"loss": "smooth_l1", "beta": float(criterion.beta)}
    if type(criterion).__name__ == "LogCoshLoss":  # the released training code's own class, not importable here
        return {"loss": "log_cosh"}
    name = {nn.MSELoss: "mse", nn.L1Loss: "l1"}.get(type(criterion))
    return None if name is None else {"loss": name}


class World(Freezable, ABC):
    """Base of the world models. Subclasses say how queries meet the past, and have the ``predictor``."""

    _dense = False
    """Whether every patch is a token of ``tokens`` and ``own`` of a rollout's state, or a frame one."""

    def __init__(
        self,
        backbone: nn.Module,
        predictor_hidden_size: int,
        use_bom: bool,
        num_samples_train: int,
        num_samples_eval: int,
        savings: Savings | None,
        candidate_chunk: int,
    ) -> None:
        super().__init__()
        check_positive(
            predictor_hidden_size=predictor_hidden_size,
            num_samples_train=num_samples_train,
            num_samples_eval=num_samples_eval,
            candidate_chunk=candidate_chunk,
        )
        self.predictor_hidden_size = predictor_hidden_size
        self.use_bom = use_bom
        self.num_samples_train = num_samples_train
        self.num_samples_eval = num_samples_eval
        self.initializer_range = backbone.initializer_range
        self.savings = savings or Savings()
        self.candidate_chunk = candidate_chunk
        if not use_bom:
            self.q_embed = nn.Embedding(1, predictor_hidden_size)
            nn.init.trunc_normal_(self.q_embed.weight, std=self.initializer_range)

    @property
    def num_samples(self) -> int:
        """Futures sampled in evaluation: 1 without best-of-many."""
        return self.num_samples_eval if self.use_bom else 1

    def noise(self, *shape: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator | None = None) -> torch.Tensor:
        """Queries: N(0, initializer_range^2) of shape (*shape, D)."""
        drawn = {} if generator is None else {"generator": generator}  # torch.compile has no dynamic sizes where it is named
        return torch.randn(*shape, self.predictor_hidden_size, device=device, dtype=dtype, **drawn) * self.initializer_range

    @one_call
    def forward(
        self,
        frames: torch.Tensor,
        timestamps: torch.Tensor,
        criterion: nn.Module | None = None,
        ctx_len: int | None = None,
        *,
        queries: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Prediction, as the released trainer calls it.

        Args:
            frames, timestamps: uint8 (B,T,3,H,W), and (B,T) seconds.
            criterion: elementwise loss that picks the best candidate while training with best-of-many.
            ctx_len: in evaluation, the number of context frames, 1..T-1.
            queries: the noise, instead of drawing it: (B,T-1,K,D) while training, (B,S,T-ctx_len,D) in evaluation.
            generator: draws the noise: in training 256 candidates at a time (for K=256 the release's draw), in evaluation a
                step at a time.

        Returns:
            While training (prediction, target), both of frames 1..T-1. In evaluation (predictions (B,S,h,N,D), targets
            (B,h,N,D), context features (B,ctx_len,N,D)) with h = T - ctx_len.

        Raises:
            ValueError: shapes, ctx_len, a criterion that is missing or reduces. TypeError: dtypes.
        """
        check_frames(frames, self.backbone.patch_size, least=2)
        check_floating("timestamps", timestamps, "(B,T)", tuple(frames.shape[:2]), of=" of seconds", like=" as the frames")
        if self.training:
            if self.use_bom and criterion is None:
                raise ValueError("criterion must be an elementwise loss for best-of-many training, got None")
            return self._forward_train(frames, timestamps, criterion, queries, generator)
        total = frames.shape[1]
        if not isinstance(ctx_len, int) or not 1 <= ctx_len < total:
            raise ValueError(f"ctx_len must be between 1 and T-1={total - 1} in evaluation, got {ctx_len!r}")
        horizon, samples = total - ctx_len, self.num_samples
        if queries is not None:
            self._check_queries(queries, (frames.shape[0], samples, horizon), "(B,S,h,D)")
        state, predictions = self.rollout_init(frames, ctx_len), []
        for t in range(horizon):
            given = None if queries is None else queries[:, :, t]
            prediction, _, state = self.rollout_step(state, ctx_len + t, timestamps, queries=given, generator=generator)
            predictions.append(prediction.unflatten(0, (-1, samples)))
        return torch.stack(predictions, 2), state["y"][:, ctx_len:].contiguous(), state["y"][:, :ctx_len]

    def _check_queries(self, queries: torch.Tensor, leading: tuple[int, ...], layout: str) -> None:
        check_floating("queries", queries, layout, (*leading, self.predictor_hidden_size))

    def _drawn(self, like: torch.Tensor, generator: torch.Generator | None, *shape: int) -> torch.Tensor:
        """Queries (*shape,D) on like's device: noise in its dtype, or the learned one."""
        if not self.use_bom:
            return table(self.q_embed, 1, like.device).expand(*shape, -1)
        return self.noise(*shape, device=like.device, dtype=like.dtype, generator=generator)

    def _candidate_noise(self, batch: int, groups: int, like: torch.Tensor, generator: torch.Generator | None) -> Iterator[torch.Tensor]:
        """Noise of ``num_samples_train`` candidates, (B,G,k,D) and :data:`NOISE_DRAW` at a time: in memory it does not grow with K."""
        for start in range(0, self.num_samples_train, NOISE_DRAW):
            count = min(NOISE_DRAW, self.num_samples_train - start)
            yield self._drawn(like, generator, batch, groups, count)

    def _together(self, count: int, target: torch.Tensor) -> int:
        """Candidates of every clip and frame that are predicted together, of a portion of ``count``."""
        most = self.candidate_chunk
        if target.device.type == "cpu" and not torch.compiler.is_compiling():
            rows = max(1, target[..., 0].numel())  # of one candidate
            fitting = CPU_BYTES // (4 * self.predictor.blocks[0].mlp.hidden * rows)
            most = max(1, min(most, max(fitting, -(-ROWS_ONE_CALL // rows))))
        return -(-count // -(-count // most))  # equal parts

    def _training_queries(
        self,
        run: Callable[[torch.Tensor], Residual],
        target: torch.Tensor,
        criterion: nn.Module,
        queries: torch.Tensor | None,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """(B,G,D) queries that a training pass predicts with: the best of those given or drawn, or the learned one."""
        batch, groups = target.shape[:2]
        if not self.use_bom:
            return self._drawn(target, None, batch, groups)
        if queries is None:
            portions = self._candidate_noise(batch, groups, target, generator)
        else:
            count = queries.shape[2] if isinstance(queries, torch.Tensor) and queries.ndim == 4 else -1
            self._check_queries(queries, (batch, groups, count), "(B,T-1,K,D)")
            portions = (queries,)
        return self._best_queries(portions, run, target, criterion)

    @torch.no_grad()
    def _best_queries(
        self,
        queries: Iterable[torch.Tensor],
        run: Callable[[torch.Tensor], Residual],
        target: torch.Tensor,
        criterion: nn.Module,
    ) -> torch.Tensor:
        """The query of every (clip, frame) whose prediction has the least loss.

        Args:
            queries: portions (B,G,k,D) of the noise, of any k.
            run: (B,G,k,D) queries to the predictor's last stream and branch, (B,G,k,R...,D).
            target: (B,G,R...,Dm).
            criterion: elementwise loss. One that :func:`loss_name` knows is taken by ``ops.best_of_n_head``, which stores no
                predictions where its kernel runs; any other judges the predictions of a chunk.

        Returns:
            (B,G,D). Candidates are made and judged ``candidate_chunk`` at a time, on a CPU fewer, never all in memory.
        """
        named, search, best = loss_name(criterion), ops.BestOfN(), None
        for portion in queries:
            for chunk in portion.split(self._together(portion.shape[2], target), 2):
                entry = run(chunk)
                if named is not None:
                    index, loss = self.predictor.best(entry, target, reduce_dims=target.ndim - 2, **named)
                else:
                    candidates = self.predictor.predictions(entry)
                    with outside():
                        losses = criterion(candidates, target.unsqueeze(2).expand_as(candidates)).flatten(3).mean(-1)
                    loss, index = losses.min(-1)
                    del candidates
                better = search.merge(index, loss, chunk.shape[2])
                chosen = chunk.gather(2, index[..., None, None].expand(*index.shape, 1, chunk.shape[-1])).squeeze(2)
                best = chosen if best is None else torch.where(better[..., None], chosen, best)
                del entry, chunk
            del portion  # before the next is drawn
        return best

    @abstractmethod
    def _forward_train(self, frames, timestamps, criterion, queries, generator) -> tuple[torch.Tensor, torch.Tensor]: ...

    @abstractmethod
    def rollout_init(self, frames: torch.Tensor, ctx_len: int) -> dict[str, Any]: ...

    @one_call
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
            queries, generator: (B,S,D) noise, or what draws it.

        Raises:
            ValueError: another frame than the next, shapes. StaleCacheError: the predictor's weights changed since the first step.
        """
        tokens, per_frame = state["tokens"], state["y"].shape[2] if self._dense else 1
        known = (tokens.shape[-2] + state["own"].shape[-2]) // per_frame
        if tgt_frame_idx != known:
            raise ValueError(f"tgt_frame_idx must be {known}, the next frame of this state, got {tgt_frame_idx}")
        shape = (tokens.shape[0], self.num_samples)
        if queries is None:
            queries = self._drawn(tokens, generator, *shape, 1)[:, :, 0]
        else:
            self._check_queries(queries, shape, "(B,S,D)")
        if self.savings.context_cache and not torch.compiler.is_compiling():
            weights = Snapshot(self.predictor) if state["weights"] is None else state["weights"]
            if (what := weights.changed()) is not None:
                raise StaleCacheError(
                    f"the predictor's weights changed since this rollout's first step; begin again with rollout_init ({what})"
                )
            state = {**state, "weights": weights}
        features, state = self._step(state, queries, known, timestamps)
        return features, state["y"][:, known], state

    @abstractmethod
    def _step(self, state: dict[str, Any], q: torch.Tensor, frame: int, timestamps: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """Features and state of :meth:`rollout_step`, with queries (B,S,D)."""
