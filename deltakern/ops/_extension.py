"""What the ops with kernels in ``deltakern._C`` share: the rule that admits arguments, dtypes as it counts them, the module itself."""

from __future__ import annotations

from typing import Any

import torch

from deltakern import backend

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""DType of csrc/numbers.h."""


def refuses(facts: backend.Facts, device: str) -> str | None:
    """Why its kernels for ``device`` do not take such arguments, or None."""
    if facts.device != device:
        return f"the kernel runs on {device}, got {facts.device}"
    for dtype in facts.dtypes:
        if dtype not in DTYPES:
            return f"the kernel takes float32, bfloat16, float16, got {str(dtype).removeprefix('torch.')}"
    loaded = backend.extension()
    return None if loaded.module is not None else f"the compiled extension could not be imported: {loaded.error}"


def cpp_refuses(facts: backend.Facts) -> str | None:
    """The rule of ``impl="cpp"``."""
    return refuses(facts, "cpu")


def module(op: str) -> Any:
    """``deltakern._C``; raises BackendError where it is missing."""
    loaded = backend.extension()
    if loaded.module is None:
        raise backend.BackendError(f"{op}: the compiled extension could not be imported: {loaded.error}")
    return loaded.module
