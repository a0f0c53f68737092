"""Which implementation of an op runs, and why.

Every op has a plain PyTorch ``reference`` and, for some devices, kernels. This module alone decides between them:

* ``impl="auto"`` takes the best one present. Where a kernel exists for the device but cannot be used, it falls back to
  the reference and warns once with the reason; with ``DELTAKERN_STRICT=1`` it raises instead. float64 asks for the
  reference by its very dtype, so that no kernel is missed where an op's first tensor has it.
* An explicit ``impl="triton"`` (or any other name) runs that implementation or raises.
* :func:`explain` says, for given arguments, what would run and why the others would not.

Arguments are checked and an implementation is chosen once for each :func:`deltakern.launch.key` of a call, of which what the choice depends
on is a part; then :func:`call` finds the plan and asks nothing.

Nothing here imports Triton or the compiled extension until an op asks for it; a failed import is remembered with its
error, and the error is shown wherever the kernel is missed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from deltakern import launch

__all__ = [
    "ENVIRONMENT",
    "BackendError",
    "Explanation",
    "Facts",
    "Op",
    "explain",
    "extension",
    "op",
    "ops",
    "triton",
    "use_impl",
]

ENVIRONMENT: dict[str, str] = {
    "DELTAKERN_STRICT": "1: an op that would fall back to its reference raises instead of warning.",
    "DELTAKERN_IMPL": "reference, triton, cpp or cuda: what impl='auto' takes in every op that has it; raises if it cannot.",
    "DELTAKERN_REQUIRE_EXT": "At install: 1 makes a failed build of the compiled extension an error.",
    "DELTAKERN_CUDA_ARCHS": "At install: architectures to compile, such as '90;100'; 'none' builds for CPU only.",
}
"""Every environment variable the package reads, and what it does. There are no others."""

IMPLEMENTATIONS = ("reference", "triton", "cpp", "cuda")


class BackendError(RuntimeError):
    """An implementation was asked for that cannot run here."""


class BackendWarning(UserWarning):
    """A kernel exists for this device but the reference runs instead, or another attention than cuDNN's."""


class Facts(NamedTuple):
    """What the choice of an implementation may depend on; plain constants, so that it is made once under torch.compile.

    Attributes:
        device: ``tensor.device.type`` of the op's first tensor.
        dtypes: dtypes of the op's tensors, in argument order.
        note: a reason found by the op itself why no kernel takes these arguments (see :func:`too_wide`), or "".
        triton_note: the same, why its Triton kernel alone does not.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    note: str = ""
    triton_note: str = ""


@dataclass
class Op:
    """One op: its public function, its reference, and its kernels with the rule that admits arguments to each. See :func:`op`."""

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    check: Callable[..., None]
    facts: Callable[..., Facts]
    run: Callable[..., Any]
    kernels: dict[str, Callable[[Facts], str | None]] = field(default_factory=dict)
    plans: launch.Plans = field(default_factory=launch.Plans)

    @property
    def implementations(self) -> tuple[str, ...]:
        return ("reference", *self.kernels)


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. ``refused`` maps every other implementation to the reason why it would not run."""

    op: str
    chosen: str
    why: str
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen} ({self.why})"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


# os.environ encodes a name at every look, which takes longer than all else that a call asks: what is behind it knows whether it is set
_VARIABLES = os.environ._data
_IMPL, _STRICT = map(os.environ.encodekey, ("DELTAKERN_IMPL", "DELTAKERN_STRICT"))

_OPS: dict[str, Op] = {}
_forced: list[str] = []
_warned: set[tuple[str, str]] = set()


def ops() -> dict[str, Op]:
    """The registry: every op by name."""
    return dict(_OPS)


def op(
    *,
    reference: Callable[..., Any],
    check: Callable[..., None],
    facts: Callable[..., Facts],
    run: Callable[..., Any],
    kernels: dict[str, Callable[[Facts], str | None]] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a public op, whose body is a :func:`call`.

    Args:
        reference: the plain PyTorch implementation, with the signature of the op less ``impl``.
        check: takes the same arguments, raises where they are not what the contract says, by what is in their :func:`launch.key` alone.
        facts: takes the same arguments and returns :class:`Facts`.
        run: takes the name of a kernel and the same arguments, and calls it.
        kernels: name of an implementation to a rule that returns ``None`` when it takes such arguments here, else the reason
            why not. Order is preference.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        entry = Op(function.__name__, function, reference, check, facts, run, dict(kernels or {}))
        unknown = set(entry.kernels) - set(IMPLEMENTATIONS)
        if unknown:
            raise ValueError(f"op {entry.name}: implementation names are {IMPLEMENTATIONS}, got {sorted(unknown)}")
        _OPS[entry.name] = entry
        function.reference = reference
        function.op = entry
        return _planned(entry)

    return register


def strict() -> bool:
    return os.environ.get("DELTAKERN_STRICT", "0") not in ("", "0")


def preferred() -> str | None:
    """The implementation that ``impl="auto"`` is told to take, by :func:`use_impl` or by ``DELTAKERN_IMPL``."""
    if _forced:
        name = _forced[-1]
    elif _IMPL in _VARIABLES:
        name = os.environ.get("DELTAKERN_IMPL") or None
    else:
        return None
    if name is not None and name not in IMPLEMENTATIONS:
        raise BackendError(f"DELTAKERN_IMPL: expected one of {IMPLEMENTATIONS}, got {name!r}")
    return name


@contextlib.contextmanager
def use_impl(name: str) -> Iterator[None]:
    """Within the context ``impl="auto"`` means ``name`` in every op that has it; other ops choose as usual.

    A function that torch.compile has already traced keeps the choice made when it was traced.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"use_impl: expected one of {IMPLEMENTATIONS}, got {name!r}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


# What a device's kernels are. A kernel that is not listed for a device is never missed there, so nothing is warned about.
_NATIVE = {"cuda": ("triton", "cuda"), "cpu": ("cpp",)}
_MISSED = "no kernel could be used"


def _decide(entry: Op, impl: str, facts: Facts, *, explains: bool = True) -> Explanation:
    """The one rule. Raises :class:`BackendError` where an explicit choice cannot run. Unless it ``explains``, only kernels that may run are
    asked about: so a call on a CPU does not import Triton."""
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"{entry.name}: impl is 'auto' or one of {IMPLEMENTATIONS}, got {impl!r}")
    asked, by = (impl, "asked for by impl=") if impl != "auto" else (None, "")
    if asked is None and (want := preferred()) in entry.implementations:
        asked, by = want, "asked for by use_impl or DELTAKERN_IMPL"
    native = _NATIVE.get(facts.device, ())
    may = entry.kernels if explains else native if asked is None else (asked,)
    refused = {name: facts.note or rule(facts) for name, rule in entry.kernels.items() if name in may}
    if asked is not None:
        if asked not in entry.implementations:
            raise BackendError(f"{entry.name}: has no implementation {asked!r}; it has {entry.implementations}")
        if refused.get(asked):
            raise BackendError(f"{entry.name}: impl={asked!r} cannot run: {refused[asked]}")
        others = {n: r or f"{asked} was {by}" for n, r in refused.items() if n != asked}
        if asked != "reference":
            others["reference"] = f"{asked} was {by}"
        return Explanation(entry.name, asked, by, others)
    for name in entry.kernels:
        if name in native and refused[name] is None:
            others = {n: r or f"{name} comes first" for n, r in refused.items() if n != name}
            return Explanation(entry.name, name, f"the kernel for {facts.device}", {**others, "reference": "a kernel is present"})
    others = {n: r or f"not used on {facts.device} unless asked for" for n, r in refused.items()}
    if facts.dtypes[:1] == (torch.float64,):
        why = "float64 is the reference's"
    else:
        why = _MISSED if any(n in native for n in entry.kernels) else f"no kernel is meant for {facts.device}"
    return Explanation(entry.name, "reference", why, others)


def _choose_once(name: str, impl: str, facts: Facts) -> tuple[str, str]:
    """The implementation, and where the reference runs for want of a usable kernel, the reason; else ""."""
    found = _decide(_OPS[name], impl, facts, explains=False)
    if found.chosen != "reference" or found.why != _MISSED:
        return found.chosen, ""
    return found.chosen, "; ".join(f"{n}: {found.refused[n]}" for n in _OPS[name].kernels if n in _NATIVE[facts.device])


def _report_missed(name: str, device: str, reason: str) -> None:
    if strict():
        raise BackendError(f"{name}: DELTAKERN_STRICT=1 and no kernel can run on {device} ({reason})")
    if (name, reason) not in _warned:
        _warned.add((name, reason))
        warnings.warn(f"deltakern.{name}: the PyTorch reference runs instead of a kernel ({reason})", BackendWarning, stacklevel=5)


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function of plain constants that torch.compile calls while tracing, taking its result for a constant.

    It sets what ``torch.compiler.assume_constant_result`` sets; calling that would import Dynamo, and with it Triton, for everybody.
    """
    function._dynamo_marked_constant = True
    return function


@traced_once
def _choose(name: str, impl: str, device: str, dtypes: tuple[torch.dtype, ...], note: str, triton_note: str) -> str:
    # Plain arguments: under torch.compile this runs once, at trace time, and a NamedTuple does not survive the passage.
    chosen, missed = _choose_once(name, impl, Facts(device, dtypes, note, triton_note))
    if missed:
        _report_missed(name, device, missed)
    return chosen


def _here(facts: Facts) -> Facts:
    """With a note under torch.func's transforms and forward-mode gradients, for which kernels have no rules; torch.compile traces through
    the transforms by itself."""
    if facts.note or torch.compiler.is_compiling():
        return facts
    if torch._C._are_functorch_transforms_active():
        return facts._replace(note="kernels have no rules for the transforms of torch.func")
    return facts._replace(note="kernels have no forward-mode gradients") if forward_ad._current_level >= 0 else facts


def choose(function: Callable[..., Any], impl: str, facts: Facts) -> str:
    """The name of the implementation that a call with these facts takes. Warns, or raises, as the module says."""
    if torch.compiler.is_compiling():
        return _choose(function.op.name, impl, *facts)
    chosen, missed = _choose_once(function.op.name, impl, _here(facts))
    if missed:
        _report_missed(function.op.name, facts.device, missed)
    return chosen


def call(function: Callable[..., Any], impl: str, *args: Any, **kwargs: Any) -> Any:
    """What a public op does with its arguments: those of its signature, ``impl`` aside, in its order, keyword ones by name."""
    return _ready(function.op, impl, args, kwargs)[1](*args, **kwargs)


def _ready(entry: Op, impl: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Callable[..., Any]]:
    """The implementation that is to run, and its function, for arguments that are checked."""
    entry.check(*args, **kwargs)
    chosen = choose(entry.function, impl, entry.facts(*args, **kwargs))
    return chosen, entry.reference if chosen == "reference" else functools.partial(entry.run, chosen)


def _first(entry: Op, at: launch.Key, impl: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """:func:`call`, where there is no plan yet."""
    chosen, run = _ready(entry, impl, args, kwargs)
    if any(isinstance(k, torch.Tensor) for k in at):
        return run(*args, **kwargs)
    if chosen == "triton" and not launch.needs_grad(*args, *kwargs.values()):
        return entry.plans.first(at, run, args, kwargs)
    return entry.plans.keep(at, run)(*args, **kwargs)


def _planned(entry: Op) -> Callable[..., Any]:
    """The function that users call: with the plan of such a call where there is one."""
    parameters = inspect.signature(entry.function).parameters
    names = [name for name in parameters if name != "impl"]
    given = [name if parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD else f"{name}={name}" for name in names]
    positional, by_name = [n for n in given if "=" not in n], [n for n in given if "=" in n]
    defaults = {n: n if p.default is inspect.Parameter.empty else f"{n}=default_{n}" for n, p in parameters.items()}
    signature = ", ".join([defaults[n] for n in positional] + ["*"] + [defaults[n] for n in parameters if n not in positional])
    keys = [launch.key_of(n) if "Tensor" in str(parameters[n].annotation) else n for n in names]
    source = f"""
def {entry.name}({signature}):
    if is_compiling() or modes() or transforms() or tracing() or forward_ad._current_level >= 0:
        return function({", ".join(given)}, impl=impl)
    try:
        at = (impl, forced[-1] if forced else environ.get(IMPL), environ.get(STRICT), recording(), {", ".join(keys)})
        plan = plans.get(at)
    except (RuntimeError, TypeError):
        return function({", ".join(given)}, impl=impl)
    if plan is None:
        return first(entry, at, impl, ({", ".join(positional)},), dict({", ".join(by_name)}))
    return plan({", ".join(given)})
"""
    values = {f"default_{n}": p.default for n, p in parameters.items()}
    values |= {"is_compiling": torch.compiler.is_compiling, "modes": torch._C._len_torch_dispatch_stack}
    values |= {"transforms": torch._C._are_functorch_transforms_active, "tracing": torch._C._get_tracing_state}
    values |= {"forced": _forced, "environ": _VARIABLES, "IMPL": _IMPL, "STRICT": _STRICT, "recording": torch.is_grad_enabled}
    values |= {"forward_ad": forward_ad, "function": entry.function, "entry": entry, "plans": entry.plans, "first": _first}
    return functools.wraps(entry.function)(launch.made(source, entry.name, values))


def direct(function: Callable[..., Any], x: torch.Tensor) -> Callable[..., Any]:
    """An op, or its reference where that is what runs: on a CPU, of an op with no kernel for it, whose checks and choice take as long as
    a small norm. For callers whose arguments are known to fit."""
    if x.is_cpu and "cpp" not in function.op.kernels and not torch.compiler.is_compiling() and preferred() != "triton":
        return function.reference
    return function


def chosen(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The implementation that ``function(*args, **kwargs)`` takes, to be named in a later call that must take the same."""
    return choose(function, "auto", function.op.facts(*args, **kwargs))


def explain(function: Callable[..., Any], *args: Any, impl: str = "auto", **kwargs: Any) -> Explanation:
    """Says which implementation ``function(*args, **kwargs)`` would take and why, without running it.

    Raises:
        TypeError: ``function`` is not an op of this package.
        BackendError: ``impl`` names an implementation that cannot run with these arguments.
    """
    entry = getattr(function, "op", None)
    if not isinstance(entry, Op):
        raise TypeError(f"explain: expected one of deltakern.ops, got {function!r}")
    return _decide(entry, impl, _here(entry.facts(*args, **kwargs)))


def too_wide(width: int, limit: int = 8192) -> str:
    """A note for :class:`Facts`: why a row of this width does not fit one program of a kernel, or "".

    A comparison rather than a size in the facts: under torch.compile a size may be symbolic, its comparison is a guard.
    """
    return "" if width <= limit else f"the kernel takes at most {limit} channels"


class Loaded(NamedTuple):
    """A module that may be missing: ``module`` or the ``error`` that its import raised."""

    module: Any
    error: str | None


def _load(name: str) -> Loaded:
    try:
        return Loaded(importlib.import_module(name), None)
    except Exception as problem:  # a broken Triton raises more than ImportError, and must not take the package down
        return Loaded(None, f"{type(problem).__name__}: {problem}")


@functools.cache
def triton() -> Loaded:
    """Triton, imported at the first call."""
    return _load("triton")


@functools.cache
def extension() -> Loaded:
    """``deltakern._C``, the compiled extension, imported at the first call."""
    return _load("deltakern._C")


def triton_interprets() -> bool:
    """True where Triton runs its kernels on the CPU (``TRITON_INTERPRET=1``, set before Triton was imported)."""
    return triton().module is not None and bool(triton().module.knobs.runtime.interpret)


def triton_refuses(facts: Facts, *, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)) -> str | None:
    """The rule that most Triton kernels share: a GPU (or the interpreter) and the dtypes. None when all is well."""
    if facts.triton_note:
        return facts.triton_note
    if facts.device not in ("cuda", "cpu"):
        return f"Triton kernels run on cuda, got {facts.device}"
    for dtype in facts.dtypes:
        if dtype not in dtypes:
            return f"the kernel takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {str(dtype).removeprefix('torch.')}"
    loaded = triton()
    if loaded.module is None:
        return f"Triton could not be imported: {loaded.error}"
    if facts.device == "cpu" and not triton_interprets():
        return "a CPU tensor, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
    return None
