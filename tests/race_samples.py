"""Kernels with and without what ``races.py`` looks for. As a program: compiles them for sm_90 and prints what it finds, as JSON."""

from __future__ import annotations

import json
from typing import Any

import aot
import torch
import triton
import triton.language as tl

from deltakern.ops.kernels.tiles import Tile


@triton.jit
def _put(pointer, offsets, value, mask):
    tl.store(pointer + offsets, value, mask=mask)


@triton.jit
def query_kernel(
    products, others, sums, length, BLOCK: tl.constexpr, IN_PLACE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr
):  # fmt: skip
    """What delta_pool's gradient of the query did IN_PLACE, where on an H100 it took a number off twice. BEFORE, AFTER: barriers."""
    products += tl.program_id(0) * length
    others += tl.program_id(0) * length
    shift = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        excess = tl.load(products + token, mask=token < length, other=0.0) - 1.0
        if BEFORE:
            tl.debug_barrier()
        _put(products if IN_PLACE else others, token, excess, token < length)
        if AFTER:
            tl.debug_barrier()
        shift += excess
    tl.store(sums + tl.program_id(0), tl.sum(shift, axis=0))


@triton.jit
def same_pointer_kernel(x, BLOCK: tl.constexpr):
    place = x + tl.arange(0, BLOCK)
    tl.store(place, tl.load(place) + 1.0)


@triton.jit
def carried_kernel(x, out, count, BLOCK: tl.constexpr):
    """Both pointers move on through the loop."""
    source = x + tl.arange(0, BLOCK)
    to = out + tl.arange(0, BLOCK)
    for _ in range(count):
        tl.store(to, tl.load(source) + 1.0)
        source += BLOCK
        to += BLOCK


@triton.jit
def once_and_again_kernel(x, sums, count, BLOCK: tl.constexpr):
    """Pointers that the loop carries into one argument, a barrier in between but none from turn to turn."""
    source = x + tl.arange(0, BLOCK)
    to = x + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(count):
        total += tl.load(source)
        tl.debug_barrier()
        tl.store(to, total)
        source += 1
        to += BLOCK
    tl.store(sums + tl.arange(0, BLOCK), total)


@triton.jit
def swapped_kernel(x, out, count, BLOCK: tl.constexpr):
    """The pointers change places, so that each is loaded and each is stored."""
    source = x + tl.arange(0, BLOCK)
    to = out + tl.arange(0, BLOCK)
    for _ in range(count):
        tl.store(to, tl.load(source) + 1.0)
        source, to = to, source


@triton.jit
def chosen_kernel(x, out, flag, BLOCK: tl.constexpr):
    value = tl.load(x + tl.arange(0, BLOCK))
    if flag > 3:
        to = out + tl.arange(0, BLOCK)
    else:
        to = x + tl.arange(0, BLOCK)
        tl.debug_barrier()
    tl.store(to, value)


@triton.jit
def atomic_kernel(x, out, BLOCK: tl.constexpr):
    place = x + tl.arange(0, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), tl.load(place))
    tl.atomic_add(place, 1.0)


@triton.jit
def atomics_kernel(x, out, BLOCK: tl.constexpr):
    place = x + tl.arange(0, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), tl.atomic_add(place, 1.0))
    tl.atomic_add(place, 2.0)


@triton.jit
def early_kernel(x, out, flag, BLOCK: tl.constexpr):
    if flag > 3:
        return
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))


@triton.jit
def loaded_pointer_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.load(tl.load(x).to(tl.pointer_type(tl.float32)) + tl.arange(0, BLOCK)))


def samples() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Kernel, arguments, constants."""
    x, out, sums, halves = torch.zeros(4096), torch.zeros(4096), torch.zeros(4096), torch.zeros(2, 4096)
    here = {"IN_PLACE": True, "BEFORE": False, "AFTER": False}
    there = {**here, "IN_PLACE": False}
    return {
        "query in place": (query_kernel, (x, out, sums, 4096), here),
        "query, barrier after the load": (query_kernel, (x, out, sums, 4096), {**here, "BEFORE": True}),
        "query, barrier after the store": (query_kernel, (x, out, sums, 4096), {**here, "AFTER": True}),
        "query, both barriers": (query_kernel, (x, out, sums, 4096), {**here, "BEFORE": True, "AFTER": True}),
        "query, another buffer": (query_kernel, (x, out, sums, 4096), there),
        "query, one tensor for both": (query_kernel, (x, x, sums, 4096), there),
        "query, halves of one tensor": (query_kernel, (*halves, sums, 4096), there),
        "query, one tensor, both barriers": (query_kernel, (x, x, sums, 4096), {**there, "BEFORE": True, "AFTER": True}),
        "one pointer": (same_pointer_kernel, (x,), {}),
        "carried": (carried_kernel, (x, out, 7), {}),
        "carried, one tensor": (carried_kernel, (x, x, 7), {}),
        "carried, once and again": (once_and_again_kernel, (x, sums, 7), {}),
        "swapped": (swapped_kernel, (x, out, 7), {}),
        "chosen": (chosen_kernel, (x, out, 7), {}),
        "atomic": (atomic_kernel, (x, out), {}),
        "atomics": (atomics_kernel, (x, out), {}),
        "early return": (early_kernel, (x, out, 7), {}),
        "loaded pointer": (loaded_pointer_kernel, (x.view(torch.int64), out), {}),
    }


def main() -> None:
    found: dict[str, Any] = {}
    for name, (kernel, args, constants) in samples().items():
        constexprs = {"BLOCK": 1024, **constants}
        launch = {"kernel": kernel, "arch": 90, "tile": Tile(1, 1024, 4, 1, 1), "constexprs": constexprs}
        launch.update(aot.specialised(kernel, args, constexprs), sharing=[aot.sharing(kernel, args, constexprs)])
        try:
            found[name] = aot.in_place(launch, aot.compiled(launch))
        except ValueError as error:
            found[name] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
