"""Noise that is a function of (seed, clip, sample, step, channel): sample 7 of 20 is sample 7 of 4,000, on any device.

Bits come from SplitMix64 (Steele, Lea and Flood, 2014), counted instead of stepped: the seed, the clip, the sample and the step
are hashed one after the other into the start of a row, and the row's channels are that generator's numbers. Normal deviates
come from the bits by a table of the normal quantile with linear interpolation (error below 1e-5 deviations, up to 6.3 of
them). Both use integer operations and single float32 products and sums alone, which IEEE 754 fixes to the last bit, so that
CPU and GPU agree where ``log`` and ``cos`` of a Box-Muller would not.
"""

from __future__ import annotations

import functools

import torch

KINDS = ("normal", "antithetic", "sobol")

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, SplitMix64's increment
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_PER_OCTAVE = 7  # the table holds 2^7 quantiles for every halving of the tail's probability
_SOBOL_BITS = 30  # of torch.quasirandom.SobolEngine


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that has it."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer of int64, which wraps as two's complement does."""
    for shift, multiplier in _MULTIPLIERS:
        x = (x ^ _shifted(x, shift)) * _signed(multiplier)
    return x ^ _shifted(x, 31)


def _rows(seed: int, clips: torch.Tensor, samples: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Start values (b,s,h) of the rows, int64."""
    row = torch.tensor(_signed(seed), dtype=torch.int64, device=clips.device)
    for index in (clips[:, None, None], samples[:, None], steps):
        row = _mixed(_mixed(row) + (index + 1) * _signed(_GOLDEN))
    return row


@functools.lru_cache(maxsize=16)
def _quantiles(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Deviations whose tail has probability 2^octave * (1 + i/128) / 2^33, and the steps between them; float32."""
    with torch.inference_mode(False):
        steps = 1 << _PER_OCTAVE
        octave = torch.arange(32, dtype=torch.float64)[:, None]
        tail = (torch.exp2(octave - 33) * (1 + torch.arange(steps, dtype=torch.float64) / steps)).flatten()
        knots = -torch.special.ndtri(torch.cat((tail, tail.new_tensor((0.5, 0.5)))))
        knots = knots.float()
        return knots[:-1].to(device), (knots[1:] - knots[:-1]).to(device)


def _normal(bits: torch.Tensor) -> torch.Tensor:
    """The normal quantile of (bits + 1/2) / 2^32, float32, for int64 bits of 32; increasing, and odd about the middle."""
    knots, slopes = _quantiles(bits.device)
    upper = bits >= 1 << 31
    tail = torch.where(upper, (1 << 32) - 1 - bits, bits)
    # Twice the tail plus one, as a float32: its exponent is the octave, its leading 7 mantissa bits the place in the table
    pattern = (2 * tail + 1).to(torch.float32).view(torch.int32)
    place = (pattern >> (23 - _PER_OCTAVE)) - (127 << _PER_OCTAVE)
    rest = 23 - _PER_OCTAVE
    part = (pattern & ((1 << rest) - 1)).to(torch.float32) * 2.0**-rest
    size = slopes[place] * part
    size = size + knots[place]
    return torch.where(upper, size, -size)


class IndexedNoise:
    """N(0, deviation^2), drawn anywhere, in any order and in any portions, always the same.

    Args:
        seed: any integer; 64 bits of it count.
        width: channels D.
        deviation: the standard deviation.
        kind: "normal"; "antithetic": sample 2i+1 is the negative of sample 2i; "sobol": a clip's samples are the points of one
            scrambled Sobol sequence over all channels of all steps (quasi-random; best for a power of two of samples, and
            the number of steps is part of the draw).

    Raises:
        TypeError, ValueError: the seed is not an integer, the kind is unknown.
    """

    def __init__(self, seed: int, width: int, deviation: float = 1.0, kind: str = "normal") -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
        if kind not in KINDS:
            raise ValueError(f"noise must be one of {KINDS}, got {kind!r}")
        self.seed, self.width, self.deviation, self.kind = seed, width, deviation, kind
        self._engines: dict[tuple[int, int], torch.quasirandom.SobolEngine] = {}

    def draw(self, clips: range, samples: range, horizon: int, *, device: torch.device | str = "cpu") -> torch.Tensor:
        """Noise (b,s,h,D), float32, of the clips, samples and steps 0..horizon-1 named.

        Raises:
            ValueError: more Sobol dimensions, horizon times D, than the sequence has.
        """
        if self.kind == "sobol":
            bits = torch.stack([self._sobol(clip, samples, horizon) for clip in clips]).to(device)
            return _normal(bits) * self.deviation
        signs = 2 if self.kind == "antithetic" else 1
        drawn = range(samples.start // signs, -(-samples.stop // signs))
        axes = (torch.arange(r.start, r.stop, device=device) for r in (clips, drawn, range(horizon)))
        rows = _rows(self.seed, *axes)
        counters = torch.arange(1, self.width // 2 + self.width % 2 + 1, device=device) * _signed(_GOLDEN)
        both = _mixed(rows[..., None] + counters)
        bits = torch.stack((_shifted(both, 32), both & 0xFFFFFFFF), -1).flatten(-2)[..., : self.width]
        values = _normal(bits) * self.deviation
        if signs == 2:
            values = torch.stack((values, -values), 2).flatten(1, 2)
        return values[:, samples.start - signs * drawn.start :][:, : len(samples)]

    def _sobol(self, clip: int, samples: range, horizon: int) -> torch.Tensor:
        """32-bit integers (s,h,D) of a clip's points."""
        dimension = horizon * self.width
        limit = torch.quasirandom.SobolEngine.MAXDIM
        if dimension > limit:
            raise ValueError(f"noise='sobol' takes at most {limit} dimensions, got horizon x D = {horizon} x {self.width}")
        engine = self._engines.get((clip, dimension))
        if engine is None or engine.num_generated > samples.start:
            start = torch.arange(clip, clip + 1)
            own_seed = _rows(self.seed, start, torch.zeros_like(start), torch.zeros_like(start)).item()
            engine = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=own_seed & ((1 << 63) - 1))
            self._engines[clip, dimension] = engine
        if samples.start > engine.num_generated:
            engine.fast_forward(samples.start - engine.num_generated)
        points = (engine.draw(len(samples), dtype=torch.float64) * (1 << _SOBOL_BITS)).to(torch.int64)
        # The middle of each of the sequence's 2^30 cells
        return ((points << (32 - _SOBOL_BITS)) + (1 << (31 - _SOBOL_BITS))).view(len(samples), horizon, self.width)
