"""Wheels for a machine without a network: downloaded here for that machine's Python, installed there beside what it has.

What is installed there goes into a folder of its own in ``build/``, ahead of the machine's packages on the path of the suite's
parts; nothing of the machine is changed. Only what is missing there, or older than pyproject.toml asks for, is installed.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (
    "setuptools",
    "pybind11",
    "ninja",
    "numpy",
    "safetensors",
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "hypothesis",
    "psutil",
    "fvcore",
    "rich",
    "typer",
    "matplotlib",
)
"""What a GPU suite uses on a machine that has Python and torch alone. Its tests skip what needs more."""

PURE = {"fvcore": ("iopath", "yacs", "pyyaml", "tqdm", "termcolor", "pillow", "tabulate", "portalocker"), "iopath": ()}
"""Published as source alone, so their wheels are built here: they are pure Python. To each what it needs; of torch they need none."""

PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux_2_12", "manylinux1")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def named(wheel: Path) -> tuple[str, str]:
    """A wheel's distribution and version, from its file name."""
    name, version = wheel.name.split("-")[:2]
    return canonical(name), version


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def least_versions(text: str) -> dict[str, str]:
    """Least versions that a pyproject.toml names anywhere: "setuptools>=77" gives {"setuptools": "77"}."""
    return {canonical(m[1]): m[2] for m in re.finditer(r'"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*>=\s*([0-9][0-9.]*)', text)}


def downloads(folder: Path, python: str, packages: Sequence[str]) -> list[list[str]]:
    """The pip commands that bring the wheels of ``packages``, and of what these need, for CPython ``python`` on x86-64 Linux."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    pure, wanted = [], []
    queue = list(packages)
    for name in queue:
        if canonical(name) in PURE:
            pure.append(name)
            queue += [n for n in PURE[canonical(name)] if n not in queue]
        else:
            wanted.append(name)
    made = [[*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *pure]] if pure else []
    if wanted:
        where = [word for platform in PLATFORMS for word in ("--platform", f"{platform}_x86_64")]
        fixed = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *where]
        made.append([*pip, "download", "--quiet", *fixed, "--dest", str(folder), *wanted])
    return made


def fetch(folder: Path, python: str, packages: Sequence[str] = NEEDED) -> list[Path]:
    """Downloads into ``folder``; what is there already is kept.

    Raises:
        subprocess.CalledProcessError: pip failed. RuntimeError: a package drags torch in, which the other machine has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for command in downloads(folder, python, packages):
        subprocess.run(command, check=True)
    found = sorted(folder.glob("*.whl"))
    if torch := [wheel.name for wheel in found if named(wheel)[0] in ("torch", "triton")]:
        raise RuntimeError(f"{', '.join(torch)}: a package needs it; name the packages without that one")
    return found


def missing(folder: Path, least: dict[str, str]) -> list[Path]:
    """The wheels of ``folder`` that this Python lacks, or has older than ``least`` says.

    Raises:
        FileNotFoundError: no wheels there. ValueError: two wheels of one distribution.
    """
    found = sorted(folder.glob("*.whl"))
    if not found:
        raise FileNotFoundError(f"--wheels: no wheels in {folder}")
    chosen, seen = [], set()
    for wheel in found:
        name, version = named(wheel)
        if name in seen:
            raise ValueError(f"--wheels: {folder} holds two versions of {name}; keep one")
        seen.add(name)
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            here = ""
        if not here or _numbers(here) < _numbers(least.get(name, "0")) <= _numbers(version):
            chosen.append(wheel)
    return chosen


def install(folder: Path) -> Path:
    """Installs what is missing into a folder of its own, without a network; returns that folder.

    Raises:
        FileNotFoundError, ValueError: see :func:`missing`. subprocess.CalledProcessError: pip failed.
    """
    site = ROOT / "build" / f"site-{sys.implementation.cache_tag}"
    site.mkdir(parents=True, exist_ok=True)
    chosen = missing(folder, least_versions((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    if chosen:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
        quiet = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
        subprocess.run([*pip, "install", *quiet, *map(str, chosen)], check=True)
    return site
