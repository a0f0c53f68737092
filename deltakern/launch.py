"""Plans: what a call does, found again by what it depends on instead of worked out anew.

A launcher in ``deltakern/ops/kernels`` works out strides and launch sizes, allocates and starts kernels. All that follows from the
shapes, strides, dtypes, devices and 16-byte alignment of its tensors, and from its other arguments: from its :func:`key`. The first call
with a key runs the launcher. The second is recorded, as tensor operations and launches, and from then on a function made of the record
does just these: it allocates and starts what Triton compiled, and asks nothing. Whoever else sees tensor operations (torch.compile,
export, dispatch modes, torch.func) gets the registered op instead, see :func:`eager`.

Imports no Triton.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

MOST_PLANS = 4096
"""Plans kept of one op; then it forgets them all. A plan is some kilobytes on the host, and the video that makes new shapes is rare."""

Key = tuple[Any, ...]
_aten = torch.ops.aten
_EMPTY = {_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default}
_SAME = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default}
_PLAIN = {_aten.sum.dim_IntList, _aten.clone.default, _aten._to_copy.default, _aten.copy_.default, _aten.zero_.default}
_PLAIN |= {_aten._unsafe_view.default, _aten._reshape_copy.default, _aten.mul.Tensor, _aten.sub.Tensor}
"""Operations that do the same under autocast: its sum is in float32, and here partial sums are."""
_tables: list[Plans] = []


class Plans(dict):
    """Plans by their key; :func:`forget_plans` empties every such table."""

    def __init__(self) -> None:
        super().__init__()
        _tables.append(self)

    def keep(self, at: Key, plan: Any) -> Any:
        if len(self) >= MOST_PLANS:
            self.clear()
        self[at] = plan
        return plan

    def first(self, at: Key, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Any:
        """Calls ``function``, which does nothing but operate on tensors and launch, for the first time with this key. The second call
        records itself; the others are what was recorded."""

        def second(*args: Any, **kwargs: Any) -> Any:
            tensors = [id(a) for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            if len(set(tensors)) < len(tensors):  # which of them is meant where is better seen of others
                return function(*args, **kwargs)
            result, plan = _record(function, args, kwargs)
            self.keep(at, plan)
            return result

        self.keep(at, second)
        return function(*args, **(kwargs or {}))


def forget_plans() -> None:
    """Has everything worked out anew: for tests that change what a choice depends on behind its back."""
    for table in _tables:
        table.clear()


def eager() -> bool:
    """Whether operations run as they are called, seen by nobody but autograd."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


def key_of(name: str) -> str:
    """Python for the part of a key that an argument of this name is. It raises where the argument is no ordinary tensor: one that hides
    its memory (sparse, quantised, fake), or whose memory holds other numbers than it stands for."""
    tensor = f"({name}.shape, {name}.stride(), {name}.dtype, {name}.device, {name}.requires_grad, {name}.data_ptr() & 15)"
    ordinary = f"(type({name}) is Tensor or type({name}) is Parameter) and not {name}.is_neg()"
    return f"{tensor} if {ordinary} else {name} if not isinstance({name}, Tensor) else odd({name})"


def _odd(argument: torch.Tensor) -> None:
    raise TypeError(f"{type(argument).__name__} is no key to anything")


def made(source: str, name: str, values: dict[str, Any]) -> Any:
    """The function ``name`` that ``source`` defines, which may use ``values`` and what :func:`key_of` needs: loops over a call's
    arguments, unrolled, because they take longer than what they do."""
    known = {"Tensor": torch.Tensor, "Parameter": nn.Parameter, "odd": _odd, **values}
    exec(source, known)  # of names and numbers that the callers make
    known[name].source = source
    return known[name]


_SCALARS = frozenset({float, int, bool, str, type(None), torch.dtype})
"""What a launcher takes beside tensors. The registered op converts the other numbers: those of NumPy, tensors of one element."""


@functools.cache
def _key(tensors: tuple[bool, ...]) -> Callable[..., Key]:
    """The key of arguments, each of which is a tensor, or not."""
    names = [f"a{i}" for i in range(len(tensors))]
    keys = [key_of(n) if tensor else f"{n} if type({n}) in scalars else odd({n})" for n, tensor in zip(names, tensors, strict=True)]
    return made(f"def key({', '.join(names)}):\n    return ({', '.join(keys)},)", "key", {"scalars": _SCALARS})


def needs_grad(*tensors: Any) -> bool:
    """Whether autograd would record a call on these tensors; what is none is passed over."""
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


class LibraryOp:
    """A low-level op: ``torch.ops.deltakern.<name>`` for those who look on, plans of its launcher for the others.

    Args:
        overload: the registered op.
        runs: the launcher for each dispatch key, "CPU" and "CUDA", on tensors that autograd does not record.
        plans: whether launchers' calls can be recorded: all that they do are tensor operations and launches.
    """

    def __init__(self, overload: Any, runs: dict[str, Callable[..., Any]], *, plans: bool) -> None:
        def by_device(*arguments: Any) -> Any:
            return runs[next(a for a in arguments if isinstance(a, torch.Tensor)).device.type.upper()](*arguments)

        self.overload, self.launcher = overload, next(iter(runs.values())) if len(set(runs.values())) == 1 else by_device
        self.plans = Plans() if plans else None
        self.key = _key(tuple("Tensor" in str(argument.type) for argument in overload._schema.arguments))

    def __call__(self, *arguments: Any) -> Any:
        if eager():
            try:
                at = self.key(*arguments)
                plan = self.launcher if self.plans is None else self.plans.get(at)
            except (RuntimeError, TypeError):
                return self.overload(*arguments)
            return plan(*arguments) if plan is not None else self.plans.first(at, self.launcher, arguments)
        elif self.plans is not None and getattr(_recording, "by", None) is not None:
            try:
                self.key(*arguments)
            except (RuntimeError, TypeError):
                return self.overload(*arguments)
            return self.launcher(*arguments)  # its launches are a part of what is recorded
        return self.overload(*arguments)


_counters: list[Counter[str]] = []
_recording = threading.local()


@contextlib.contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Counts the kernels started within the context, by name."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def launch(kernel: Any, grid: tuple[int, ...], tile: Any, *args: Any, **constexprs: Any) -> None:
    """Starts a kernel: every launch of the package goes through here, or through a plan made of such a call. An empty grid starts nothing.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: number of programs along each axis.
        tile: gives ``num_warps`` and ``num_stages``; its sizes are passed by the caller as the kernel's constants.
        args: the kernel's run-time arguments, positional, a tensor first.
        constexprs: its compile-time arguments.
    """
    if 0 in grid:
        return
    for counter in _counters:
        counter[kernel.__name__] += 1
    recorder = getattr(_recording, "by", None)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    with _elsewhere(args[0].device):
        if recorder is None:
            kernel[grid](*args, **constexprs, **options)
        else:
            with recorder.paused():
                made = kernel[grid](*args, **constexprs, **options)
            recorder.launch(kernel, grid, args, constexprs, options, made)


class _Here:
    """Nothing to enter: tensors on a CPU, or on the current device."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


_HERE = _Here()


def _elsewhere(device: torch.device) -> Any:
    """Triton launches on the current device, whatever the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" and device.index != torch.cuda.current_device() else _HERE


class _Recorder(TorchDispatchMode):
    """Writes down, as lines of Python, what a call does with its ``arguments``, by name.

    Attributes:
        whole: whether the lines do all that the call does, wherever they run: an operation that autocast may change does not.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.whole, self.arguments = True, arguments
        self.names = {id(a): name for name, a in arguments.items() if isinstance(a, torch.Tensor)}
        self.roots: dict[int, tuple[str, torch.Tensor]] = {}  # of a view, what it views
        self.pointers: dict[str, str] = {}  # a view that begins where another tensor does, and that tensor
        self.held: list[Any] = list(arguments.values())  # so that no id is given twice
        self.values: dict[str, Any] = {}  # what the lines refer to
        self.lines: list[tuple[str | None, str]] = []  # the name that a line makes, and its code
        self.kernels: list[str] = []
        self.device: torch.device | None = None
        self._paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the context nothing is written down: Triton's interpreter makes tensor operations of its own."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not, because that would import Dynamo for everybody; nothing is compiled where something is recorded."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._paused:
            return out
        self.held.append(out)
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if func in _SAME:
            self.names[id(out)] = self._code(first)
        elif func in _EMPTY and out.is_contiguous():
            self._line(out, self._allocation(out))
        elif func.is_view and (views := self._views(first, out)):
            for view, code in views:
                name = self._line(view, code)
                if view.data_ptr() == first.data_ptr():
                    self.pointers[name] = self._pointer(first)
        elif isinstance(out, torch.Tensor) or type(out) in (list, tuple):
            self.whole = self.whole and (func.is_view or func in _PLAIN)
            code = f"{self._value(func)}({', '.join([self._code(a) for a in args] + [f'{n}={self._code(a)}' for n, a in kwargs.items()])})"
            if out is first:  # written to in place
                self.lines.append((None, code))
            else:
                self._line(out, code)
        elif first is not None:  # a number that depends on what a tensor holds
            self.whole = False
        return out

    def _views(self, first: torch.Tensor, out: Any) -> list[tuple[torch.Tensor, str]]:
        """Views and their code, of what is viewed itself however many views stand between."""
        root, whole = self.roots.get(id(first), (self._code(first), first))
        found = []
        for view in (out,) if isinstance(out, torch.Tensor) else out:
            if view.dtype != whole.dtype:
                return []
            self.roots[id(view)] = root, whole
            offset = f"{root}.storage_offset() + {view.storage_offset() - whole.storage_offset()}"
            found.append((view, f"{root}.as_strided({tuple(view.shape)}, {tuple(view.stride())}, {offset})"))
        return found

    def _allocation(self, out: torch.Tensor) -> str:
        """Like an argument where there is such a one, which takes less to say."""
        wanted = out.shape, out.stride(), out.dtype, out.device
        for name, a in self.arguments.items():
            if type(a) is torch.Tensor and a.is_contiguous() and (a.shape, a.stride(), a.dtype, a.device) == wanted:
                return f"like({name})"
        return f"empty({tuple(out.shape)}, {tuple(out.stride())}, dtype={self._value(out.dtype)}, device={self._value(out.device)})"

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constexprs: Any, options: Any, made: Any) -> None:
        """A launch that was made. ``made`` is what Triton compiled for it; None under its interpreter."""
        self.kernels.append(kernel.__name__)
        self.device = args[0].device
        given = [self._pointer(a) if isinstance(a, torch.Tensor) else self._code(a) for a in args]
        if not hasattr(made, "packed_metadata"):
            rest = [f"{name}={self._code(v)}" for name, v in {**constexprs, **options}.items()]
            self.lines.append((None, f"{self._value(kernel)}[{grid}]({', '.join(given + rest)})"))
            return
        # As Triton's own run starts it, every parameter in its place, without working out again which kernel that is
        given += [self._code(constexprs[name]) for name in kernel.arg_names[len(given) :]]
        sizes = ", ".join(str(n) for n in (*grid, 1, 1)[:3])
        what = (
            f"{self._value(made.run)}({sizes}, stream, {self._value(made.function)}, {self._value(made.packed_metadata)}, None, None, None"
        )
        self.lines.append((None, f"{what}, {', '.join(given)})"))

    def _line(self, out: Any, code: str) -> str:
        name = f"t{len(self.lines)}"
        self.lines.append((name, code))
        for i, each in enumerate((out,) if isinstance(out, torch.Tensor) else out):
            self.names[id(each)] = name if each is out else f"{name}[{i}]"
        return name

    def _value(self, value: Any) -> str:
        name = f"v{len(self.values)}"
        self.values[name] = value
        return name

    def _pointer(self, tensor: torch.Tensor) -> str:
        """A tensor that a kernel is given, which reads nothing of it but where it begins and its dtype."""
        name = self._code(tensor)
        return self.pointers.get(name, name)

    def _code(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            # One that nobody here made is a constant that the launcher keeps
            return self.names[id(value)] if id(value) in self.names else self._value(value)
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return "[" + ", ".join(self._code(v) for v in value) + "]"
        if value is None or type(value) in (bool, int) or (type(value) is float and math.isfinite(value)):
            return repr(value)
        return self._value(value)


def _record(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
    """What a call returns, and a function that does the same with the same kind of arguments."""
    positional = {f"a{i}": a for i, a in enumerate(args)}
    outer, recorder = getattr(_recording, "by", None), _Recorder({**positional, **kwargs})
    _recording.by = recorder
    try:
        with recorder:
            result = function(*args, **kwargs)
    finally:
        _recording.by = outer
    several = type(result) is tuple
    if not recorder.whole or not all(r is None or id(r) in recorder.names for r in (result if several else (result,))):
        return result, function
    returned = "(" + "".join(f"{recorder._code(r)}, " for r in result) + ")" if several else recorder._code(result)
    lines, code = [], returned
    for name, line in reversed(recorder.lines):  # views that are read for their address alone are not made
        if name is None or re.search(rf"\b{name}\b", code):
            lines.append(line if name is None else f"{name} = {line}")
            code = f"{line}\n{code}"
    again = f"({', '.join([*positional, *(f'{name}={name}' for name in kwargs)])})"
    values, head = (
        {**recorder.values, "empty": torch.empty_strided, "like": torch.empty_like, "counters": _counters, "function": function},
        [],
    )
    if recorder.kernels:
        values |= {"count": _count, "names": tuple(recorder.kernels)}
        head.append("if counters: count(names)")
        if "stream" in code:
            from triton import knobs
            from triton.runtime import driver

            index = recorder.device.index or 0
            values |= {"runtime": knobs.runtime, "current": driver.active.get_current_stream}
            told = []  # whether somebody, a profiler, is told by Triton itself of every launch
            for hook in ("launch_enter_hook", "launch_exit_hook"):
                values |= {hook: getattr(knobs.runtime, hook), f"{hook}s": getattr(getattr(knobs.runtime, hook), "calls", ())}
                told.append(f"{hook}s or runtime.{hook} is not {hook}")
            head = [f"if {' or '.join(told)}: return function{again}", *head, f"stream = current({index})"]
            if recorder.device.type == "cuda":
                values |= {"on": torch.cuda.device, "here": torch.cuda.current_device}
                head.insert(0, f"if here() != {index}:\n        with on({index}): return plan{again}")
    parameters = ", ".join([*positional, *(["*", *kwargs] if kwargs else [])])
    plan = made("\n    ".join([f"def plan({parameters}):", *head, *reversed(lines), f"return {returned}"]), "plan", values)
    return result, plan


def _count(names: tuple[str, ...]) -> None:
    for counter in _counters:
        counter.update(names)
