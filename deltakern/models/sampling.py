"""Sampling futures as delta tokens, decoding those that somebody wants to see, scoring them.

The engine behind ``DeltaWorld.sample``, ``rollout``, ``decode`` and ``stream``. What it does not do over again, all of it exact:
the context's keys and values are projected once for all samples, steps and layers, by one product; a generated token's once;
nothing is decoded unless asked for; the samples' first decoded frames, which begin at the same features, share their patches'
queries, keys and values in the decoder's first block.

Work is cut into portions by a memory budget. A sample's noise does not depend on the portions; its tokens do as far as a matrix
product's rounding depends on its number of rows, and no further.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from deltakern import ops
from deltakern.models.noise import KINDS, IndexedNoise
from deltakern.models.validate import check_floating, check_positive
from deltakern.nn import graphs
from deltakern.nn.weights import outside

if TYPE_CHECKING:
    from deltakern.models.deltatok import DeltaTok, Rope
    from deltakern.models.deltaworld import DeltaWorld

MEMORY_BUDGET = 1 << 30
"""Bytes that a portion of samples or of decoded frames may take, besides inputs and results."""

TRAINED_CONTEXT = 7
"""Tokens that a query of the released models has seen at most: they were trained on clips of 8 frames."""

Which = str | int | Sequence[int] | torch.Tensor | Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Futures:
    """What a rollout returns.

    Attributes:
        tokens: (B,S,h,D) delta tokens of every sample.
        features: (B,K,F,N,D) decoded features of K samples, F = h frames or only the last; None where nothing was decoded.
        timestamps: (B,h) seconds of the predicted frames.
        indices: (B,K) which sample each of ``features`` is; None where nothing was decoded.
        context: (B,C,D) delta tokens of the context.
        last: (B,N,D) features of the last context frame, which ``DeltaWorld.decode`` starts from.
        size: (height, width) of the frames in pixels.
    """

    tokens: torch.Tensor
    features: torch.Tensor | None
    timestamps: torch.Tensor
    indices: torch.Tensor | None
    context: torch.Tensor
    last: torch.Tensor
    size: tuple[int, int]


def check_times(timestamps: torch.Tensor, shape: tuple[int, int], layout: str) -> None:
    """Timestamps must be floating, (B, C+h), finite, and must not go backwards. Those on a GPU are held to it there, by an assertion that
    ends the process's use of the GPU."""
    check_floating("timestamps", timestamps, layout, shape, of=" of seconds")
    if timestamps.is_cuda:  # where the host does not wait for the answer
        right = (timestamps.diff(dim=1) >= 0).all() & timestamps.isfinite().all()
        torch._assert_async(right, "timestamps must be finite seconds that do not go backwards")
        return
    if not bool(timestamps.isfinite().all()):
        raise ValueError("timestamps must be finite seconds, got NaN or infinity")
    backwards = (timestamps.diff(dim=1) < 0).nonzero()
    if not len(backwards):
        return
    clip, place = backwards[0].tolist()
    earlier, later = timestamps[clip, place : place + 2].tolist()
    raise ValueError(f"timestamps must not go backwards, got {later:g} s after {earlier:g} s at index {place + 1} of clip {clip}")


_warned_long = False


def warn_of_long_context(context: int) -> None:
    """Warns once a process where more context tokens are given than the released models were trained on."""
    global _warned_long
    if context > TRAINED_CONTEXT and not _warned_long:
        _warned_long = True
        warnings.warn(
            f"a context of {context} tokens is longer than trained on ({TRAINED_CONTEXT} in the released models); this works, the "
            "predictions may be worse",
            stacklevel=4,
        )


def portions(clips: int, samples: int, at_once: int) -> Iterator[tuple[range, range]]:
    """Cuts (clips, samples) into rectangles of at most ``at_once`` elements: whole clips where they fit, else parts of one."""
    group, part = max(1, at_once // samples), min(samples, max(1, at_once))
    for clip in range(0, clips, group):
        for sample in range(0, samples, part):
            yield range(clip, min(clip + group, clips)), range(sample, min(sample + part, samples))


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)


class Noise(NamedTuple):
    """Where a rollout's queries come from, as ``DeltaWorld.sample`` takes it."""

    queries: torch.Tensor | None
    generator: torch.Generator | None
    seed: int | None
    kind: str

    def source(self, world: DeltaWorld, shape: tuple[int, int, int], like: torch.Tensor) -> Callable[[range, range], torch.Tensor]:
        """Queries (b,s,h,D) by clips and samples: given, drawn as the release draws them, by seed and index, or learned."""
        given = [name for name in ("queries", "generator", "seed") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"queries, generator and seed are three ways to the noise, got {' and '.join(given)}")
        if self.kind not in KINDS:
            raise ValueError(f"noise must be one of {KINDS}, got {self.kind!r}")
        if self.kind != "normal" and self.seed is None:
            raise ValueError(f"noise={self.kind!r} is drawn by seed and sample index and needs seed=, got None")
        batch, samples, horizon = shape
        if self.queries is not None:
            world._check_queries(self.queries, shape, "(B,S,h,D)")
            whole = self.queries
        elif given and not world.use_bom:
            raise ValueError(f"{given[0]} is for best-of-many models, this one has one learned query (use_bom=False)")
        elif self.seed is not None:
            indexed = IndexedNoise(self.seed, world.predictor_hidden_size, world.initializer_range, self.kind)
            return lambda clips, part: indexed.draw(clips, part, horizon, device=like.device).to(like.dtype)
        else:  # one draw a step, as in the release
            whole = torch.cat([world._drawn(like, self.generator, batch, samples, 1) for _ in range(horizon)], 2)
        return lambda clips, part: whole[_slice(clips), _slice(part)]


def _steps(world: DeltaWorld, past: torch.Tensor, timestamps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Tokens (B,s,h,Dm) of all steps of one portion, in the dtype of its noise (B,s,h,D).

    ``past`` is the context, delta tokens (B,T,Dm) or what ``Predictor.project`` made of them; timestamps (B,T+h). Shapes alone decide what
    is launched, so that it can be captured in a CUDA graph.
    """
    predictor = world.predictor
    memory = predictor.project(past) if past.ndim == 3 else past
    (batch, samples, horizon), (_, layers, _, context) = noise.shape[:3], memory.shape[:4]
    keys_values, before = list(zip(*memory.unbind(), strict=True)), timestamps[:, :context]
    tokens = noise.new_empty((batch, samples, horizon, world.backbone.hidden_size))
    own = memory.new_empty((2, layers, batch, samples, horizon - 1, *memory.shape[4:]))
    for step in range(horizon):
        now, since = timestamps[:, context + step, None], timestamps[:, context : context + step]
        mix = [world._mix(now, before, own=own[:, i, :, :, :step].unbind(), own_time=since) for i in range(layers if step else 1)]
        tokens[:, :, step] = predictor(noise[:, :, step], keys_values, mix if step else mix[0])
        if step + 1 < horizon:
            own[:, :, :, :, step] = predictor.project(tokens[:, :, step])
    return tokens


def _sample_bytes(world: DeltaWorld, z: torch.Tensor, horizon: int) -> int:
    """About what one sample of a portion takes: its own keys and values, noise and tokens, activations of MLP and attention."""
    layers, width, size = len(world.predictor.blocks), world.predictor_hidden_size, z.element_size()
    hidden = world.predictor.blocks[0].mlp.hidden
    cached = 2 * layers * (horizon - 1) * width * size
    wide = 4 * width * (2 * (horizon - 1) + 4)  # what the attention's reference casts to float32
    noise = 40 * horizon * width  # with the integers that it is made of
    return cached + wide + noise + size * (3 * hidden + 8 * width)


def sample(
    world: DeltaWorld,
    z: torch.Tensor,
    timestamps: torch.Tensor,
    num_samples: int | None,
    noise: Noise,
    memory_budget: int,
    cuda_graph: bool,
    memory: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tokens (B,S,h,D) after delta tokens z (B,T,D) at timestamps (B,T+h). ``memory``, for one clip: what ``Predictor.project`` made of z
    before."""
    num_samples = world.num_samples if num_samples is None else num_samples
    check_positive(num_samples=num_samples, memory_budget=memory_budget)
    batch, context = z.shape[:2]
    tokens = z.new_empty((batch, num_samples, timestamps.shape[1] - context, world.backbone.hidden_size))
    draw = noise.source(world, tuple(tokens.shape[:3]), z)
    at_once = memory_budget // _sample_bytes(world, z, tokens.shape[2])
    captured = cuda_graph and graphs.captures(z.device)
    past = memory if memory is not None else z if captured else world.predictor.project(z)  # captured, the graph projects
    for clips, samples in portions(batch, num_samples, at_once):
        some = _slice(clips)
        inputs = (past[some] if past is z else past[:, :, some], timestamps[some], draw(clips, samples))
        steps, what = functools.partial(_steps, world), ("steps", world.rope_axis_sizes)
        made = graphs.graphs_of(world.predictor).run(world.predictor, what, steps, inputs) if captured else steps(*inputs)
        tokens[some, _slice(samples)] = made
    return tokens


def chosen_samples(which: Which, tokens: torch.Tensor) -> torch.Tensor | None:
    """(B,K) samples that ``which`` names of tokens (B,S,h,D); None for "none"."""
    batch, samples = tokens.shape[:2]
    if callable(which):
        with outside():
            which = which(tokens)
    if isinstance(which, str):
        if which not in ("all", "last", "none"):
            raise ValueError(f"decode must be 'all', 'last', 'none' or indices of samples, got {which!r}")
        return None if which == "none" else torch.arange(samples, device=tokens.device).expand(batch, -1)
    indices = torch.as_tensor(which, device=tokens.device)
    if indices.dtype not in (torch.int64, torch.int32) or indices.ndim > 2:
        raise ValueError(f"indices of samples must be integers, (K,) or (B,K), got {indices.dtype} of shape {tuple(indices.shape)}")
    indices = indices.long() if indices.ndim == 2 else indices.long().reshape(1, -1).expand(batch, -1)
    if indices.shape[0] != batch or indices.shape[1] == 0:
        raise ValueError(f"indices of samples must be (K,) or (B,K) with B={batch} and K at least 1, got {tuple(indices.shape)}")
    if bool(((indices < 0) | (indices >= samples)).any()):
        raise ValueError(f"indices of samples must lie in 0..{samples - 1}, got {indices.flatten().tolist()[:8]}")
    return indices


def grid_size(patches: int, size: tuple[int, int] | None, patch_size: int) -> tuple[int, int]:
    """(height, width) in pixels of frames of so many patches: as given, or square."""
    if size is None:
        side = round(patches**0.5)
        if side * side != patches:
            raise ValueError(f"size must be given as (height, width) in pixels, because N={patches} patches are no square")
        size = side * patch_size, side * patch_size
    height, width = size
    if height % patch_size or width % patch_size or (height // patch_size) * (width // patch_size) != patches:
        raise ValueError(f"size must be (height, width) in pixels of N={patches} patches of {patch_size}, got {tuple(size)}")
    return height, width


def _decode_bytes(tokenizer: DeltaTok, features: torch.Tensor) -> int:
    """About what decoding one frame takes."""
    _, patches, width = features.shape
    hidden = tokenizer.decoder_blocks[0].mlp.hidden
    return (patches + 1) * (14 * width + 3 * hidden) * features.element_size()


def decode(
    tokenizer: DeltaTok, tokens: torch.Tensor, features: torch.Tensor, rope: Rope, *, last_only: bool, memory_budget: int
) -> torch.Tensor:
    """Features (B,K,F,N,D), F = h or 1, of tokens (B,K,h,D) that follow features (B,N,D)."""
    batch, count, horizon = tokens.shape[:3]
    out = None
    for clips, samples in portions(batch, count, memory_budget // _decode_bytes(tokenizer, features)):
        z, start = tokens[_slice(clips), _slice(samples)], features[_slice(clips)]
        if len(samples) > 1:
            x = tokenizer.decode_samples(z[:, :, 0], start, rope)
        else:
            x = tokenizer.decode(z[:, :, 0], start, rope)[:, None]
        if out is None:
            out = x.new_empty((batch, count, 1 if last_only else horizon, *x.shape[2:]))
        for step in range(horizon):
            if step:
                x = tokenizer.decode(z[:, :, step].flatten(0, 1)[:, None], x.flatten(0, 1), rope).unflatten(0, z.shape[:2])
            if not last_only or step == horizon - 1:
                out[_slice(clips), _slice(samples), 0 if last_only else step] = x
    return out


def score(samples: torch.Tensor, goal: torch.Tensor, *, loss: str = "smooth_l1", beta: float = 0.1) -> torch.Tensor:
    """How far every sample is from a goal, the mean loss (B,S) in float32 (float64 for float64 samples); less is better.

    Args:
        samples: tokens (B,S,h,D), or features (B,S,F,N,D).
        goal: of the last frame, (B,D) or (B,N,D), or of every frame, (B,h,D) or (B,F,N,D).
        loss, beta: as in ``ops.best_of_n``.

    Raises:
        ValueError: shapes, the loss.
    """
    if samples.ndim not in (4, 5):
        raise ValueError(f"samples must be tokens (B,S,h,D) or features (B,S,F,N,D), got a tensor of shape {tuple(samples.shape)}")
    whole = (samples.shape[0], *samples.shape[2:])
    last = (samples.shape[0], *samples.shape[3:])
    if tuple(goal.shape) not in (whole, last):
        raise ValueError(f"goal must be {last}, of the last frame, or {whole}, of every frame, got a tensor of shape {tuple(goal.shape)}")
    if goal.ndim == len(last):
        samples = samples[:, :, -1]
    return ops.best_of_n(samples, goal, loss=loss, beta=beta, reduce_dims=goal.ndim - 1, return_losses=True)[2]


def top(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (B,k) of the k least scores (B,S), best first; equal ones by index, NaN last.

    Raises:
        ValueError: k is not in 1..S.
    """
    check_positive(k=k)
    if scores.ndim != 2 or k > scores.shape[1]:
        raise ValueError(f"scores must be (B,S) with S at least k={k}, got a tensor of shape {tuple(scores.shape)}")
    return scores.sort(dim=-1, stable=True).indices[:, :k]
