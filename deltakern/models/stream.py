"""Frames one at a time, as a camera gives them, and futures at any moment: the control loop's side of DeltaWorld."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from deltakern.models import sampling
from deltakern.models.sampling import MEMORY_BUDGET, Futures, Noise, Which
from deltakern.models.validate import check_frames, check_positive
from deltakern.nn.weights import Derived, Snapshot, StaleCacheError, calling, outside

if TYPE_CHECKING:
    from deltakern.models.deltaworld import DeltaWorld

FIRSTS = ("black", "previous")


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a public method of :class:`Stream`: no gradient, the stream's derived weights, and a look whether they are still right."""

    @functools.wraps(method)
    def run(self: Stream, *args: Any, **kwargs: Any) -> Any:
        if self._count == 0:
            self._weights, self._derived = Snapshot(self.world), Derived(lasting=True, owners=self.world)
        else:
            self._look()
        with torch.no_grad(), calling(self._derived):
            return method(self, *args, **kwargs)

    return run


class Stream:
    """A rolling window over the latest frames of one camera.

    Each pushed frame costs one backbone pass, one encode and one projection to keys and values, which are kept for the window's tokens:
    memory does not grow with the number of frames. Times are kept in float64 and rotated relative to the window's latest frame, so that
    hours of video lose no precision.

    The first token of every clip that the predictor was trained on, and of every context that the release evaluates, is its first
    frame encoded against black: it alone carries the scene, the later ones carry changes. A window that has rolled begins with
    a frame that was encoded against one that is no longer there. ``first="black"``, the default, encodes it against black instead, so
    that futures are those of ``DeltaWorld.rollout`` of the window's frames: one more encode for the first sample after a push alone, and
    the features of the window's frames are kept. ``first="previous"`` leaves the token as it was made: cheaper, but a context such as the
    predictor never saw. What :meth:`push` returns is the same with both: the tokens of the whole video.

    The stream keeps what it derives from the weights, as frozen ones do, and leaves the world itself as it is, live or frozen. Every call
    looks whether the weights are those of the first frame, as :mod:`deltakern.nn.weights` says, and raises where they are not.

    Args:
        world: in evaluation mode; its weights must not change while the stream holds what they made.
        context: frames in the window. More than 7 warns once, see ``DeltaWorld.sample``, also for ``cuda_graph``.
        first: "black" or "previous".

    Example::

        stream = world.stream()
        for frame, seconds in camera:
            stream.push(frame, seconds)
            tokens = stream.sample([seconds + 0.2, seconds + 0.4], num_samples=64, seed=0)
    """

    def __init__(self, world: DeltaWorld, context: int = 4, *, first: str = "black", cuda_graph: bool = True) -> None:
        check_positive(context=context)
        if first not in FIRSTS:
            raise ValueError(f"first must be one of {FIRSTS}, got {first!r}")
        sampling.warn_of_long_context(context)
        self.world, self.context, self.first, self.cuda_graph = world, context, first, cuda_graph
        self.reset()

    def reset(self) -> None:
        """Forgets all frames; needed before a new video and after weights changed."""
        self._weights: Snapshot | None = None
        self._derived: Derived | None = None
        self._count = 0
        self._size: tuple[int, int] | None = None
        # (1,N,D) each: the last frame's, or the window's with first="black"
        self._features: deque[torch.Tensor] = deque(maxlen=self.context if self.first == "black" else 1)
        self._tokens: deque[torch.Tensor] = deque(maxlen=self.context)  # (1,1,D) each
        self._projected: deque[torch.Tensor] = deque(maxlen=self.context)  # (2,L,1,1,H,d) each, keys not rotated
        self._times: deque[float] = deque(maxlen=self.context)
        self._anchor: tuple[torch.Tensor, torch.Tensor] | None = None  # token and projection of the first frame against black

    def __len__(self) -> int:
        """Frames pushed since the last reset."""
        return self._count

    @property
    @_guarded
    def tokens(self) -> torch.Tensor:
        """(1,C,D) delta tokens of the window, as sampling would use them, oldest first. RuntimeError before the first frame."""
        return self._window()[0]

    @property
    def timestamps(self) -> list[float]:
        """Seconds of the window's frames, oldest first."""
        return list(self._times)

    @_guarded
    def push(self, frame: torch.Tensor, timestamp: float | torch.Tensor) -> torch.Tensor:
        """Takes the next frame. Returns its delta token (1,D): against the frame before, the first against black.

        Args:
            frame: uint8 (3,H,W) or (1,3,H,W), always of one size.
            timestamp: seconds, later than the last frame's or equal.

        Raises:
            ValueError: the frame's shape or size, a timestamp that goes backwards. TypeError: not uint8.
            StaleCacheError: weights changed since an earlier push.
        """
        tokenizer = self.world.tokenizer
        if not isinstance(frame, torch.Tensor) or frame.ndim not in (3, 4) or (frame.ndim == 4 and frame.shape[0] != 1):
            got = tuple(frame.shape) if isinstance(frame, torch.Tensor) else type(frame).__name__
            raise ValueError(f"frame must be one frame, uint8 (3,H,W) or (1,3,H,W), got {got}")
        frames = frame.reshape(1, 1, *frame.shape[-3:])
        check_frames(frames, self.world.backbone.patch_size)
        size = tuple(frames.shape[-2:])
        if self._size not in (None, size):
            raise ValueError(f"frame must be {self._size[0]} x {self._size[1]} as those before, got {size[0]} x {size[1]}; reset() first")
        time = float(timestamp)
        if not math.isfinite(time):
            raise ValueError(f"timestamp must be finite seconds, got {time}")
        if self._times and time < self._times[-1]:
            raise ValueError(f"timestamp must not go backwards, got {time:g} s after {self._times[-1]:g} s; reset() before a new video")

        features = tokenizer.features(frames)[:, 0]
        before = self._features[-1] if self._features else tokenizer.black_features(frames)
        token = tokenizer.encode(before, features, tokenizer._rope(frames))
        projected = self.world.predictor.project(token)
        self._size = size  # nothing is kept of a frame until all is computed
        self._features.append(features)
        self._tokens.append(token)
        self._projected.append(projected)
        self._times.append(time)
        self._anchor = None
        self._count += 1
        return token[:, 0]

    @_guarded
    def sample(
        self,
        timestamps: torch.Tensor | list[float],
        num_samples: int | None = None,
        *,
        generator: torch.Generator | None = None,
        queries: torch.Tensor | None = None,
        seed: int | None = None,
        noise: str = "normal",
        memory_budget: int = MEMORY_BUDGET,
    ) -> torch.Tensor:
        """Futures of the window as delta tokens (1,S,h,D).

        Args:
            timestamps: (h,) seconds of the frames to predict, on the clock of :meth:`push`.
            The rest as in ``DeltaWorld.sample``, with B=1.

        Raises:
            RuntimeError: before the first frame. StaleCacheError: weights changed since a push.
            ValueError: timestamps that go backwards, also from the last frame's; noise arguments.
        """
        tokens, projected = self._window()
        times = torch.as_tensor(timestamps, dtype=torch.float64).reshape(-1)
        if times.numel() == 0:
            raise ValueError("timestamps must hold at least one frame to predict, got none")
        every = torch.cat((torch.tensor(self._times, dtype=torch.float64), times.cpu()))[None]
        sampling.check_times(every, (1, every.numel()), "(1,C+h)")
        relative = (every - self._times[-1]).to(device=tokens.device, dtype=torch.promote_types(tokens.dtype, torch.float32))
        noise = Noise(queries, generator, seed, noise)
        return sampling.sample(self.world, tokens, relative, num_samples, noise, memory_budget, self.cuda_graph, projected)

    @_guarded
    def rollout(
        self,
        timestamps: torch.Tensor | list[float],
        num_samples: int | None = None,
        decode: Which = "all",
        *,
        memory_budget: int = MEMORY_BUDGET,
        **noise,
    ) -> Futures:
        """Futures of the window, decoded as far as asked for: :meth:`sample`, which takes the generator, queries, seed and noise, then
        ``DeltaWorld.decode``, with ``decode`` as in ``DeltaWorld.rollout``."""
        tokens = type(self).sample.__wrapped__(self, timestamps, num_samples, memory_budget=memory_budget, **noise)
        if callable(decode):
            with outside():
                decode = decode(tokens)
            self._look()
        times = torch.as_tensor(timestamps, dtype=torch.float64).reshape(1, -1)
        last = self._features[-1]
        return self.world._futures(tokens, last, self._size, times, self._window()[0], decode, memory_budget)

    def _look(self) -> None:
        """Raises :class:`StaleCacheError` where the weights are known not to be those of the first frame."""
        if (what := self._weights.changed()) is not None:
            raise StaleCacheError(
                f"the model's weights changed since this stream's frames were pushed; call reset() and push them again ({what})"
            )

    def _window(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (1,C,D) and their projection (2,L,1,C,H,d)."""
        if self._count == 0:
            raise RuntimeError("no frame was pushed yet; push at least one before sampling")
        tokens, projected = list(self._tokens), list(self._projected)
        if self.first == "black" and self._count > self.context:
            if self._anchor is None:
                tokenizer = self.world.tokenizer
                like = torch.empty((), dtype=torch.uint8, device=tokens[0].device).expand(1, 1, 3, *self._size)
                token = tokenizer.encode(tokenizer.black_features(like), self._features[0], tokenizer._rope(like))
                self._anchor = token, self.world.predictor.project(token)
            tokens[0], projected[0] = self._anchor
        return torch.cat(tokens, 1), torch.cat(projected, 3)
