"""Options of ``pytest benchmarks/``, and the rows that it may append to ``benchmarks/results``.

A benchmark first holds what it times to float64 (ops) or to the release's structure (models). What is wrong fails its test and
has no time: no speed is printed and no row is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deltakern.report import rows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deltakern")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    group.addoption("--dtype", default=None, choices=tuple(DTYPES), help="bfloat16 on a GPU, float32 on a CPU")
    group.addoption("--preset", default=None, choices=("tiny", "vitb-256", "vitb-512"), help="vitb-512 on a GPU, tiny on a CPU")
    group.addoption("--budget", type=float, default=2.0, help="seconds of timing a benchmark")
    group.addoption("--rows", default=None, metavar="FILE", help="append rows to this .jsonl file")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda, but torch.cuda.is_available() is False", returncode=4)
    return torch.device(name)


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    return DTYPES[request.config.getoption("--dtype") or ("bfloat16" if device.type == "cuda" else "float32")]


@pytest.fixture(scope="session")
def preset(request: pytest.FixtureRequest, device: torch.device) -> str:
    return request.config.getoption("--preset") or ("vitb-512" if device.type == "cuda" else "tiny")


@pytest.fixture(scope="session")
def where(device: torch.device) -> dict[str, Any]:
    return rows.environment(device)


@pytest.fixture(scope="session")
def checked() -> dict[Any, Any]:
    """Verdicts on tiny cases, shared by the benchmarks of an op."""
    return {}


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[list[rows.Row]], None]:
    """Appends rows to ``--rows`` and prints their ratios."""

    def take(made: list[rows.Row]) -> None:
        if path := request.config.getoption("--rows"):
            rows.append(path, made)
        _RATIOS.extend(made)

    return take


_RATIOS: list[rows.Row] = []


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The ratios, below pytest-benchmark's own tables."""
    if not _RATIOS:
        return
    from deltakern.report import render

    report = render.build(_RATIOS, preset="benchmarks", parts=("latency", "memory"))
    for title, header, lines, _ in render.tables(report):
        terminalreporter.write_sep("-", title)
        widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
        for line in (header, *lines):
            terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
