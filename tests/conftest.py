"""Without a CUDA device every Triton kernel runs in Triton's interpreter, on the CPU; with one the same tests run on it."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if HAS_CUDA and WORKERS > 1:
    torch.cuda.set_per_process_memory_fraction(0.9 / WORKERS)  # so that none takes what another needs
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, which importing torch does not do
    import interpreter_fix

    interpreter_fix.install()
    torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // WORKERS)))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """What a test draws without a seed of its own is the same on every run, whatever ran before it."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


def _skipping() -> Iterator[None]:
    """A test that needs a package of one of the extras is skipped without it."""
    try:
        return (yield)
    except ImportError as problem:
        if type(problem).__name__ != "MissingExtraError":  # of deltakern._extras, which is not to be imported here
            raise
        pytest.skip(str(problem))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    return (yield from _skipping())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    return (yield from _skipping())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
