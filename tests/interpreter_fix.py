"""Repairs of Triton's CPU interpreter (3.6 to 3.9), for tests alone.

Unrepaired it truncates float32 to bfloat16 instead of rounding to nearest even, and computes on the raw bits of bfloat16
without a word. Here casts round as the hardware does, ``tl.dot`` takes bfloat16 operands exactly (products of two bfloat16
are exact in float32), and any other arithmetic on bfloat16 raises: kernels compute in float32 after the load. And it is faster.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits, as uint16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(values.shape)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def install() -> None:
    """Patches the interpreter in this process. Triton must be imported with TRITON_INTERPRET=1."""
    import triton.language as tl
    from triton.runtime import interpreter

    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder

    def is_bfloat16(value: Any) -> bool:
        return isinstance(value, handle) and value.dtype.scalar == tl.bfloat16

    convert = interpreter._convert_float

    def convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            return float32_to_bfloat16(data)
        if source == tl.bfloat16 and target == tl.float32:
            return bfloat16_to_float32(data).view(np.uint32)
        return convert(data, source, target, rounding)

    interpreter._convert_float = convert_float

    def refuse_bfloat16(name: str) -> None:
        original = getattr(builder, name)

        def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
            if any(map(is_bfloat16, args)):
                raise TypeError("arithmetic on bfloat16: the interpreter works on its raw bits; cast to float32 after the load")
            return original(self, *args, **kwargs)

        setattr(builder, name, checked)

    refuse_bfloat16("binary_op")
    refuse_bfloat16("unary_op")

    reduce = interpreter.ReduceOps.apply_impl

    def checked_reduce(self: Any, inputs: Any) -> Any:
        if any(is_bfloat16(t.handle) for t in inputs):
            raise TypeError("a reduction of bfloat16: the interpreter works on its raw bits; cast to float32 after the load")
        return reduce(self, inputs)

    interpreter.ReduceOps.apply_impl = checked_reduce

    def widened(value: Any) -> Any:
        return handle(bfloat16_to_float32(value.data), tl.float32) if is_bfloat16(value) else value

    dot = builder.create_dot
    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)

    # numpy >= 2.4 no longer turns an array of one element into an int, which 3.6 does for the bounds of a range
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)

        def index(self: Any) -> int:
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        if scope and hasattr(scope[0], "set_attr"):
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patch_lang_tensor

    _hasten(interpreter)


def _hasten(interpreter: Any) -> None:
    """Leaves out what the interpreter does again and again to no effect: half of its time or more with blocks as small as the tests'."""
    import triton.language as tl
    from triton.language import semantic

    # A launch looks through all of triton.language for what to patch. What there is does not change, so it is looked up once.
    kept: dict[Any, list[tuple[str, Any]]] = {}

    def patch_builtin(package: Any, builder: Any, *scope: Any) -> None:
        if package not in kept:
            kept[package] = [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        for name, member in kept[package]:
            if getattr(package, name) == member:  # not patched by a call further out
                interpreter._patch_attr(package, name, member, builder, *scope)

    interpreter._patch_builtin = patch_builtin

    # And so does every call of another kernel's function in it, which finds everything patched after the first.
    patch_lang = interpreter._patch_lang
    patched: set[Any] = set()  # while a launch runs

    def patch_lang_once(fn: Any) -> Any:
        outermost, seen = not patched, languages(fn.__globals__)
        if seen and seen <= patched:
            return None  # a call's scope is not looked at, only a launch's
        scope = patch_lang(fn)
        if hasattr(scope, "restore"):
            patched.update(seen)
            if outermost:
                restore = scope.restore

                def restore_all() -> None:
                    patched.clear()
                    restore()

                scope.restore = restore_all
        return scope

    known: dict[int, tuple[Any, set[Any]]] = {}

    def languages(names: dict[str, Any]) -> set[Any]:
        if id(names) not in known:  # with the names, whose address must stay theirs
            known[id(names)] = names, {value for value in names.values() if value is tl or value is tl.core}
        return known[id(names)][1]

    interpreter._patch_lang = patch_lang_once

    # The check of 32-bit arithmetic for overflow, a dozen of the interpreter's own operations, is as strict in NumPy.
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check_overflow(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        scalar = lhs.type.scalar
        if scalar.int_bitwidth < 64:
            result = exact[operation.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
            if result.max() > scalar.get_int_max_value() or result.min() < scalar.get_int_min_value():
                raise AssertionError(f"int{scalar.int_bitwidth} overflow detected for operation {operation.__name__}")

    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow

    # A table of all dtypes is built for every look into it.
    numpy_dtype = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: np.dtype(np.uint64) if dtype.scalar.is_ptr() else numpy_dtype(dtype.scalar)

    # Every value and every block type is described anew; what describes it depends on its type alone.
    tensor_init, block_init = tl.core.tensor.__init__, tl.core.block_type.__init__

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        kept = type.__dict__.get("_of_tensor")
        if kept is None:
            tensor_init(self, handle, type)
            type._of_tensor = {name: value for name, value in self.__dict__.items() if name != "handle"}
        else:
            self.handle = handle
            self.__dict__.update(kept)

    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        if type(element_ty) is not tl.core.dtype:
            return block_init(self, element_ty, shape)
        key = (element_ty, *(s.value if isinstance(s, tl.core.constexpr) else s for s in shape))
        if key not in blocks:
            block_init(self, element_ty, shape)
            blocks[key] = self.__dict__
        self.__dict__ = blocks[key]  # one for all that are equal

    tl.core.tensor.__init__, tl.core.block_type.__init__ = init_tensor, init_block
