"""What the host takes for a call, held to its goals with a driver that does nothing; and how many kernels stages start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_host_meets_its_goals():
    """``benchmarks.host --check``: ratios to PyTorch's own operations in the same process, and numbers of launches."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.host", "--number", "40", "--json", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert found["F.layer_norm, no gradient"]["multiple"] == 1
    assert {"residual_norm, forward and backward", "block, no gradient", "predictor step", "sample, 20 futures", "candidate search"} <= set(
        found
    )
    assert all(row["microseconds"] > 0 and row["launches"] > 0 for row in found.values())
