"""Timing that can be believed: implementations take turns in one run, medians with spread, ceilings of the same minute.

On a GPU every sample is one call between two events behind a queued flush of the L2 cache, so that what is timed reads its
inputs from memory; ``graphed`` gives the same call as a CUDA graph. On a CPU short calls are repeated within a sample.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
SHORTEST = 2e-3  # seconds that a sample on a CPU lasts at least


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over ``rounds`` samples, and the 10th and 90th percentiles."""

    seconds: float
    low: float
    high: float
    rounds: int


def summary(samples: list[float]) -> Timing:
    """Median and percentiles of samples in seconds."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


class _Flush:
    """Overwrites more than the L2 cache holds."""

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.empty(max(size, 1 << 26), dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self.buffer.zero_()


def _cpu_sample(call: Call, repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def _cuda_sample(call: Call, flush: _Flush) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(
    calls: Mapping[str, Call],
    device: torch.device | str = "cpu",
    *,
    budget: float = 2.0,
    least: int = 3,
    most: int = 200,
    known: Mapping[str, float] | None = None,
) -> dict[str, Timing]:
    """Times several calls in turn, so that whatever the machine does in between hits all of them alike.

    Args:
        calls: by name. Each is called once before, unmeasured.
        device: whose clock is used.
        budget: seconds for all of it, after the first calls.
        least, most: rounds. The order turns by one from round to round. The budget is exceeded to reach ``least`` rounds, unless
            a single round takes longer than the budget: then one must do.
        known: seconds of calls that were made before and need no first call here.
    """
    device = torch.device(device)
    samplers: dict[str, Call] = {}
    flush = _Flush(device) if device.type == "cuda" else None
    for name, call in calls.items():
        once = (known or {}).get(name)
        if once is None:
            begin = time.perf_counter()
            call()
            once = time.perf_counter() - begin
        if flush is not None:
            torch.cuda.synchronize(device)
            samplers[name] = lambda call=call: _cuda_sample(call, flush)
            continue
        if once < 10 * SHORTEST:  # the first call may have warmed something up
            once = _cpu_sample(call, 1)
        repeats = max(1, min(1000, round(SHORTEST / max(once, 1e-7))))
        samplers[name] = lambda call=call, repeats=repeats: _cpu_sample(call, repeats)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, begin, collecting = list(calls), time.perf_counter(), gc.isenabled()
    gc.disable()
    try:
        for done in range(most):
            spent = time.perf_counter() - begin
            if done and spent > budget and (done >= least or spent / done > budget):
                break
            turn = done % len(names)
            for name in names[turn:] + names[:turn]:
                samples[name].append(samplers[name]())
    finally:
        if collecting:
            gc.enable()
    return {name: summary(values) for name, values in samples.items()}


def graphed(call: Call, device: torch.device | str) -> Call:
    """``call`` captured as a CUDA graph over its static inputs; what is returned replays it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def launch_overhead(call: Call, device: torch.device | str, rounds: int = 20, budget: float = 2.0) -> float:
    """Median seconds that the CPU spends issuing a call, the GPU's own time left out; three rounds may exceed the budget."""
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < rounds and (len(samples) < 3 or time.perf_counter() - start < budget):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    torch.cuda.synchronize(device)
    return statistics.median(samples)


Spent = list[tuple[str, int, float]]  # what, how often, seconds altogether; the most first


def profile(call: Call, device: torch.device | str, *, host: bool = False) -> tuple[Spent, Spent]:
    """What one call starts on the GPU, copies among it, and with ``host`` the operations that the CPU itself spends its time in."""
    device = torch.device(device)
    activities = [torch.profiler.ProfilerActivity.CPU] if host else []
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    call()
    wait()
    with _no_profiler_chatter(), torch.profiler.profile(activities=activities) as profiler:
        call()
        wait()
    kernels: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            kernels.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e6)
    operations = [(e.key, e.count, e.self_cpu_time_total / 1e6) for e in profiler.key_averages()] if host else []
    started = [(name, len(took), sum(took)) for name, took in kernels.items()]
    return tuple(sorted(spent, key=lambda s: -s[2]) for spent in (started, operations))


@contextlib.contextmanager
def _no_profiler_chatter() -> Iterator[None]:
    """torch's profiler writes lines to standard error from C++, in the middle of whoever's terminal."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_memory(call: Call, device: torch.device | str = "cpu") -> int:
    """The most bytes of tensors that one call holds at a time, beyond those that were there before."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _no_profiler_chatter(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
        del kept
    held = most = 0
    for event in sorted((e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best: bytes a second that a copy reads and writes, FLOPs a second of a big matrix product."""

    copy: float
    gemm: float
    dtype: str


def ceilings(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, budget: float = 2.0) -> Ceilings:
    """Measures both ceilings, with torch's own copy and matrix product."""
    device = torch.device(device)
    big = device.type == "cuda"
    count, side = (1 << 28, 8192) if big else (1 << 24, 1024)
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    with torch.inference_mode():
        found = interleaved({"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}, device, budget=budget, least=5)
    moved = 2 * source.nbytes
    return Ceilings(moved / found["copy"].seconds, 2 * side**3 / found["gemm"].seconds, str(dtype).removeprefix("torch."))
