"""Kernels that do what the package's own never do: compute in bfloat16, let integers overflow."""

import triton
import triton.language as tl


@triton.jit
def add_kernel(x, out, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    value = tl.load(x + index)
    tl.store(out + index, value + value)


@triton.jit
def sum_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, BLOCK)), axis=0))


@triton.jit
def _plus(x, y):
    return x + y


@triton.jit
def integer_kernel(x_ptr, y_ptr, out_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    if OPERATION == "add":
        result = _plus(x, y)
    elif OPERATION == "sub":
        result = x - y
    else:
        result = x * y
    tl.store(out_ptr + offsets, result)
