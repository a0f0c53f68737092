"""The check of ``races.py`` on kernels of every kind that it tells apart. ``test_aot.py`` holds the package's own kernels to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import aot
import pytest

MISSING, THERE = True, False
"""Of a barrier between the loads and the stores of an argument."""

EXPECTED = {
    "query in place": {"products": MISSING},
    "query, barrier after the load": {"products": MISSING},  # of the next turn, whose loads meet this one's stores
    "query, barrier after the store": {"products": MISSING},
    "query, both barriers": {"products": THERE},
    "query, another buffer": {},
    "query, one tensor for both": {"products=others": MISSING},
    "query, halves of one tensor": {"products=others": MISSING},  # to be named, with the reason, where it is safe
    "query, one tensor, both barriers": {"products=others": THERE},
    "one pointer": {"x": MISSING},
    "carried": {},
    "carried, one tensor": {"x=out": MISSING},
    "carried, once and again": {"x": MISSING},
    "swapped": {"x": MISSING, "out": MISSING},
    "chosen": {"x": MISSING},  # the barrier stands in one branch
    "atomic": {"x": MISSING},
    "atomics": {},
}


@pytest.fixture(scope="module")
def found() -> dict:
    samples = Path(__file__).resolve().with_name("race_samples.py")
    done = subprocess.run([sys.executable, str(samples)], env=aot.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("sample", EXPECTED)
def test_found_where_a_barrier_is_missing(found: dict, sample: str) -> None:
    assert found[sample] == EXPECTED[sample]


def test_what_is_not_known_is_not_passed_over(found: dict) -> None:
    assert set(found) - set(EXPECTED) == {"early return", "loaded pointer"}
    assert "not known to this check" in found["early return"]
    assert "which argument does this point into" in found["loaded pointer"]
