"""best_of_n on the CPU at the training shape: against the release's chain, torch.compile of it, and the rate of a plain sum.

``pytest benchmarks/test_best_of_n.py`` prints the table. The contenders take turns, so that what else the machine does falls on
all of them. Nothing is timed before the values are right.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from deltakern import backend, ops

GROUPS, COUNT, WIDTH = 56, 256, 768
ROUNDS = 60

pytestmark = pytest.mark.skipif(backend.extension().module is None, reason="no compiled extension")


def chain(candidates: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The release's structure: expand the target, elementwise loss, mean, argmin."""
    losses = F.smooth_l1_loss(candidates, target.unsqueeze(1).expand_as(candidates), beta=0.1, reduction="none")
    return losses.mean(-1).argmin(-1)


def take_turns(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every run, the contenders one after another in each round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds + 3):
        for name, run in contenders.items():
            run()  # the one before left the caches full of its own data
            start = time.perf_counter()
            run()
            if round_number >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_training_shape(dtype, capsys):
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randn(GROUPS, COUNT, WIDTH, generator=generator).to(dtype)
    target = torch.randn(GROUPS, WIDTH, generator=generator).to(dtype)
    plain = torch.randn(candidates.numel() * dtype.itemsize // 4, generator=generator)  # as many bytes, in float32
    compiled = torch.compile(chain, fullgraph=True)

    truth = ops.best_of_n.reference(candidates.double(), target.double(), return_losses=True)
    index, loss, losses = ops.best_of_n(candidates, target, return_losses=True, impl="cpp")
    assert torch.equal(index, truth[0])
    torch.testing.assert_close(losses.double(), truth[2], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(loss.double(), truth[1], rtol=1e-6, atol=0.0)

    times = take_turns(
        {
            "best_of_n": lambda: ops.best_of_n(candidates, target, impl="cpp"),
            "eager chain": lambda: chain(candidates, target),
            "torch.compile": lambda: compiled(candidates, target),
            "float32 sum": lambda: plain.sum(),
        },
        ROUNDS,
    )
    middle = {name: statistics.median(values) for name, values in times.items()}
    least = {name: min(values) for name, values in times.items()}
    threads, isa = torch.get_num_threads(), backend.extension().module.build_info()["cpu_isa"]
    megabytes = candidates.numel() * dtype.itemsize / 1e6
    with capsys.disabled():
        print(f"\nbest_of_n, {GROUPS} groups x {COUNT} x {WIDTH} {str(dtype)[6:]} ({megabytes:.0f} MB), {threads} threads, {isa}")
        for name in times:
            print(f"  {name:14s} median {middle[name]:7.3f} ms  least {least[name]:7.3f} ms  {megabytes / middle[name]:6.1f} GB/s")
        for name in ("eager chain", "torch.compile", "float32 sum"):
            of_medians, of_least = middle[name] / middle["best_of_n"], least[name] / least["best_of_n"]
            print(f"  best_of_n is {of_medians:5.2f} times as fast as {name} (of the least times: {of_least:5.2f})")
