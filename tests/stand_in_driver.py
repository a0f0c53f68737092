"""Run by ``test_launch.py`` in a process of its own: what kernels are started with, by Triton itself and by plans.

Without Triton's interpreter, with its JIT and a driver that starts nothing and writes down what it was given. Nothing is compiled: what
stands in for a compiled kernel is one for each that Triton would compile. With ``STAND_IN_COMPILES=1`` Triton compiles for sm_90.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import triton
from kernel_checks import forward_backward, inputs, inputs_shrunk, random_cotangents, sliced, transposed
from triton import knobs
from triton.runtime import driver, jit

from benchmarks import stand_in
from deltakern import backend, launch, ops
from deltakern.cases import Case, cases
from deltakern.ops import _triton

TOLD = slice(6, 9)  # what a launcher is given for the hooks: metadata, and the hooks before and after
_local = threading.local()
numbers = itertools.count(1000)


def started() -> list[tuple[Any, ...]]:
    """What this thread started since it last looked."""
    found, _local.started = getattr(_local, "started", []), []
    return found


class Launcher:
    def __init__(self, *_: Any) -> None: ...

    def __call__(self, *args: Any) -> None:
        _local.started = [*getattr(_local, "started", ()), args]
        frame, _local.frames = sys._getframe(1), []
        while frame is not None:
            _local.frames.append(frame.f_code.co_name)
            frame = frame.f_back


class Utils(stand_in.Utils):
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, next(numbers), 32, 0, 1024


class Driver(stand_in.Driver):
    utils, launcher_cls, stream = Utils(), Launcher, 7

    def get_current_stream(self, _: int) -> int:
        return self.stream


class Compiled:
    """Stands in for what Triton compiles."""

    def __init__(self, src: Any) -> None:
        self.run, self.function, self.packed_metadata = Launcher(), next(numbers), ("packed", src.fn.__name__, next(numbers))

    def launch_metadata(self, *_: Any) -> None: ...


def install() -> None:
    driver.set_active(Driver())
    if os.environ.get("STAND_IN_COMPILES") == "1":
        return
    create = jit.JITFunction.create_binder

    def create_binder(self: Any) -> Any:
        made = create(self)
        self.compile = lambda src, **_: Compiled(src)
        return made

    jit.JITFunction.create_binder = create_binder


def described(launches: list[tuple[Any, ...]], known: dict[int, str]) -> list[Any]:
    """Launches with every tensor as a kernel sees it: its dtype, and where it begins, by the order in which new memory was first seen. With
    the size of that memory."""
    new: dict[int, str] = {}

    def each(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return type(value), value
        storage = value.untyped_storage()
        if storage.nbytes() == 0:
            return value.dtype, "empty"
        base = storage.data_ptr()
        name = known.get(base) or new.setdefault(base, f"new {len(new)}")
        return value.dtype, name, value.data_ptr() - base, storage.nbytes(), value.data_ptr() % 16

    return [tuple(map(each, call[: TOLD.start] + call[TOLD.stop :])) for call in launches]


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element further on: memory that is not aligned to 16 bytes."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.new_empty(tensor.numel() + 1)[1:].copy_(tensor.reshape(-1)).view(tensor.shape)


def as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class Calls:
    """A case's calls, with tensors laid out by ``lay``."""

    def __init__(self, case: Case, dtype: torch.dtype, lay: Callable[[torch.Tensor], torch.Tensor] = as_is) -> None:
        args, self.kwargs = (inputs if "tiny" in case.tags else inputs_shrunk)(case, dtype, torch.device("cpu"))
        self.case, self.args, self.lay = case, [lay(a) if isinstance(a, torch.Tensor) else a for a in args], lay
        self.known = {a.untyped_storage().data_ptr(): f"argument {i}" for i, a in enumerate(self.args) if isinstance(a, torch.Tensor)}
        self.gradients: dict[int, torch.Tensor] = {}
        self.random, self.what = random_cotangents(), f"{case.op}/{case.name} {dtype} {lay.__name__}"

    def gradient(self, output: torch.Tensor, index: int) -> torch.Tensor:
        if index not in self.gradients:
            made = self.gradients[index] = self.lay(self.random(output, index))
            self.known[made.untyped_storage().data_ptr()] = f"gradient {index}"
        return self.gradients[index]

    def launches(self, wanted: tuple[int, ...] = (), **changed: Any) -> list[tuple[Any, ...]]:
        """What one call starts."""
        started()
        forward_backward(self.case.function, self.args, {**self.kwargs, "impl": "triton", **changed}, wanted, self.gradient)
        return started()

    def faults(self, wanted: tuple[int, ...]) -> list[str]:
        """Of the first four calls: the third and the fourth are planned."""
        first, *others = (self.launches(wanted) for _ in range(4))
        found = [] if first else [f"{self.what}: nothing was started"]
        expected = described(first, self.known)
        for number, launches in enumerate(others, 2):
            if (ours := described(launches, self.known)) != expected:
                found.append(f"{self.what}: call {number} starts\n  {ours}\nand the first\n  {expected}")
            if number > 2 and any(call[TOLD] != (None, None, None) for call in launches):
                found.append(f"{self.what}: call {number} was not planned")
        return found


def every_call() -> list[str]:
    found, count = [], 0
    for case in cases():
        if "triton" not in case.function.op.kernels:
            continue
        tiny = "tiny" in case.tags
        laid = [(torch.bfloat16, lay) for lay in ((as_is, sliced, transposed, moved) if tiny else (as_is,))]
        for dtype, lay in [*laid, *([(torch.float32, as_is)] if tiny else [])]:
            launch.forget_plans()
            calls = Calls(case, dtype, lay)
            for wanted in {case.differentiable, ()}:
                found += calls.faults(wanted)
                count += 1
    print(f"triton {triton.__version__}: {count} calls compared")
    return found


def one_layout_after_another() -> list[str]:
    """Triton compiles another kernel for memory that is not aligned: a call starts the one for its own."""
    found = []
    for name in [name for name, op in backend.ops().items() if "triton" in op.kernels]:
        case = cases(name, "tiny")[0]
        for wanted in {case.differentiable, ()}:
            laid = [Calls(case, torch.bfloat16, lay) for lay in (as_is, moved, sliced, transposed)]
            expected = []
            for calls in laid:
                launch.forget_plans()
                expected.append(described(calls.launches(wanted), calls.known))
            for calls, launches in [*zip(laid, expected, strict=True)] * 4:
                if described(calls.launches(wanted), calls.known) != launches:
                    found.append(f"{calls.what}: another launch after other layouts")
    return found


def numbers_of_another_type() -> list[str]:
    """Triton compiles another kernel for an int than for a float: a plan passes what it was compiled for."""
    found = []
    calls = Calls(cases("layer_norm", "tiny")[0], torch.float32)
    place = TOLD.stop + _triton._kernels("residual_norm").residual_norm_forward_kernel.arg_names.index("eps")
    for order in itertools.permutations((1, 1.0, True)):
        launch.forget_plans()
        compiled_for: dict[Any, type] = {}
        for eps in (*order, *order, *order):
            (call,) = calls.launches(eps=eps)
            if call[place] != 1 or compiled_for.setdefault(call[4], type(call[place])) is not type(call[place]):
                found.append(f"eps {eps!r} of {order} is passed as {call[place]!r}")
    return found


def the_stream_of_now() -> list[str]:
    calls, driver.active.stream = Calls(cases("gelu", "tiny")[0], torch.float32), 7
    launch.forget_plans()
    streams = []
    for Driver.stream in (7, 7, 7, 8, 9, 7):
        driver.active.stream = Driver.stream
        streams += [call[3] for call in calls.launches((0,))]
    return [] if streams == [7] * 6 + [8, 8, 9, 9, 7, 7] else [f"streams {streams}"]


def hooks() -> list[str]:
    """Who is told of launches by Triton is told of those that plans would start."""
    found = []
    calls = Calls(cases("gelu", "tiny")[0], torch.float32)
    for of in ("launch_enter_hook", "launch_exit_hook"):
        launch.forget_plans()
        chain = getattr(knobs.runtime, of)

        def told(*_: Any) -> None: ...

        def planned() -> bool:
            return all(call[TOLD] == (None, None, None) for call in calls.launches((0,)))

        def check(expected: bool, when: str, of: str = of) -> None:
            if planned() is not expected:
                found.append(f"{of}: {when}, the plan {'does not run' if expected else 'runs'}")

        calls.launches((0,)), calls.launches((0,))
        check(True, "before")
        if hasattr(chain, "add"):
            chain.add(told)
            check(False, "with a hook")
            chain.remove(told)
            check(True, "without it")
        setattr(knobs.runtime, of, told)
        check(False, "with a hook in the place of the chain")
        setattr(knobs.runtime, of, chain)
        check(True, "with the chain again")
    return found


def counts() -> list[str]:
    calls, found = Calls(cases("residual_norm", "tiny")[0], torch.float32), []
    launch.forget_plans()
    for number in range(5):
        with _triton.count_launches() as counter:
            calls.launches(calls.case.differentiable)
        if counter != {"residual_norm_forward_kernel": 1, "residual_norm_backward_kernel": 1}:
            found.append(f"call {number + 1} counts {counter}")
    return found


def many_threads() -> list[str]:
    """The first calls at once, with gradients and without."""
    found: list[str] = []
    case, each = cases("residual_norm", "tiny")[0], 8
    expected = [described(Calls(case, torch.float32).launches(w), Calls(case, torch.float32).known) for w in ((), case.differentiable)]
    expected = [[(call[:4], call[4:6]) for call in calls] for calls in expected]
    for _ in range(10):
        launch.forget_plans()
        barrier = threading.Barrier(each)

        def run(number: int, barrier: threading.Barrier = barrier) -> None:
            try:
                calls = Calls(case, torch.float32)
                barrier.wait()
                for _ in range(4):
                    launches = calls.launches(case.differentiable if number % 2 else ())
                    if [(call[:4], call[4:6]) for call in described(launches, calls.known)] != expected[number % 2]:
                        found.append(f"a thread starts {launches}")
                    if any(type(a) is torch.Tensor and a.untyped_storage().data_ptr() == 0 for call in launches for a in call[9:12]):
                        found.append("a thread starts a kernel on nothing")
            except Exception as error:
                found.append(f"a thread raises {type(error).__name__}: {error}")

        threads = [threading.Thread(target=run, args=(number,)) for number in range(each)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found


def frames() -> list[str]:
    """Python's frames from a public op to the launch."""
    found = []
    for name in [name for name, op in backend.ops().items() if "triton" in op.kernels]:
        case = cases(name, "tiny")[0]
        calls = Calls(case, torch.float32)
        for wanted, most in (((), 2), (case.differentiable, 7)):  # torch itself has one of them, "apply"
            for _ in range(3):
                args = [a.detach().requires_grad_(i in wanted) if isinstance(a, torch.Tensor) else a for i, a in enumerate(calls.args)]
                getattr(ops, name)(*args, **calls.kwargs, impl="triton")
            depth = _local.frames.index(name) + 1
            if depth > most:
                found.append(f"{name}: {depth} frames to the launch{' with gradients' if wanted else ''}: {_local.frames[:depth]}")
    return found


def main() -> None:
    install()
    found = []
    for check in (every_call, one_layout_after_another, numbers_of_another_type, the_stream_of_now, hooks, counts, many_threads, frames):
        faults = check()
        print(f"{check.__name__}: {len(faults)} faults")
        found += faults
    print("\n".join(found[:20]))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
