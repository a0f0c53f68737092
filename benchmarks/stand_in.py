"""A GPU's driver that does nothing: Triton compiles for sm_90 and launches, no kernel runs. For the time that the host takes.

Importing this before any kernel was launched puts it in the place of Triton's driver, for the whole process. Ops called with
``impl="triton"`` on CPU tensors then do all that they do on an H100 but the kernel; what they return is garbage. Two differences from a
GPU are known: allocations are the CPU's, and Triton's own launcher in C (about 2 us a launch) is a function that returns.
"""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported

warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from deltakern import backend  # noqa: E402
from deltakern.nn import product  # noqa: E402
from deltakern.ops import _triton  # noqa: E402

ARCHITECTURE, PROCESSORS = 90, 132


class Utils:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, _: Any) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": PROCESSORS}

    def unload_module(self, *_: Any) -> None: ...


class Launcher:
    """In the place of Triton's launcher in C."""

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, *args: Any) -> None: ...


class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURE, 32)

    def allocate_default_profile_scratch(self, *_: Any) -> None: ...


driver.set_active(Driver())
backend.triton_interprets = lambda: True  # a kernel takes CPU tensors
_triton.architecture = lambda device: ARCHITECTURE
_triton.programs = lambda device, tile, tiles: max(1, min(tile.per_processor * PROCESSORS, tiles))
product.evaluates = lambda x, dtype: False  # as of a tensor on a GPU, which no CPU's library multiplies


def microseconds(call: Callable[[], Any], *, number: int = 200, rounds: int = 15) -> float:
    """The least time of the calling thread for one call, of ``rounds`` loops of ``number``: other load on the machine hardly shows."""
    for _ in range(20):
        call()
    gc.collect()
    gc.disable()
    try:
        least = float("inf")
        for _ in range(rounds):
            begin = time.thread_time()
            for _ in range(number):
                call()
            least = min(least, (time.thread_time() - begin) / number * 1e6)
    finally:
        gc.enable()
    return least
