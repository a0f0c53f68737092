"""Weights are live or frozen, by word. Nothing here guesses from version counters or addresses whether a weight changed.

*Live*, the default: a weight is read when it is used. What is derived from it (packed, cast, folded, reordered) lives no longer than
one public call (:func:`one_call`: one encode, one search, one rollout, one training step's forward), so nothing can be stale.

*Frozen*, by :func:`freeze`: derived once, for inference. A frozen model refuses ``.train()``; its ``.to()``, ``.half()``,
``load_state_dict`` and copies derive anew. Every public call first looks at the parameters that something was derived from:

* caught: a parameter whose storage moved (``.data =``, ``set_``, ``swap_tensors``, offloading), and a write that changes one of
  :data:`SAMPLED` elements spread over each parameter: an optimizer's step, an average, a merged adapter, another process's write into
  shared memory. :class:`FrozenWeightsError` says so; on a GPU, where nobody waits for the comparison, at a later call.
* right without being caught: a parameter, layer or block put in the place of another, a hook, an adapter, a parametrisation. These
  are looked up at every call in both states.
* not caught: a write that spares the elements sampled: one head, a few rows, a sparse or tiny step; a forward put into the class
  ``nn.Linear`` itself. Hooks must not write weights within a call: what was derived for it stays until its end.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from deltakern import backend

SAMPLED = 8
"""Elements of a parameter that are compared, spread evenly over it from the first to about the last."""

Parameters = Sequence[torch.Tensor | None]
Place = tuple[int, torch.Size, tuple[int, ...]]
Mark = tuple[Place, torch.Tensor | None]
Value = TypeVar("Value")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ORDINARY = (nn.Parameter, torch.Tensor, FakeTensor)
_WEIGHTS = ("weight", "bias", "lambda1")
"""What is read of layers."""
_HOOKS = operator.itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GROUPS = operator.itemgetter("_parameters", "_modules", "_buffers")
_FAKE = torch._C._TorchDispatchModeKey.FAKE


class FrozenWeightsError(RuntimeError):
    """A frozen model's weights were written to, or it was told to train."""


class StaleCacheError(RuntimeError):
    """Weights changed after a stream or a rollout cached what it computed with them."""


def compute_dtype(device_type: str, parameter_dtype: torch.dtype) -> torch.dtype:
    """The dtype of matrix products here: autocast's where it is on (never for float64 parameters), else the parameters'."""
    if device_type != "meta" and parameter_dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return parameter_dtype


def dtype_for(layer: nn.Module, x: torch.Tensor) -> torch.dtype:
    """:func:`compute_dtype` of x with the weights of ``layer``; those of a layer that hides them are taken to be like x."""
    weight = getattr(layer, "weight", None)
    known = isinstance(weight, torch.Tensor) and weight.is_floating_point()
    return compute_dtype(x.device.type, weight.dtype if known else x.dtype)


def odd(layer: nn.Module, kind: type[nn.Module]) -> str:
    """Why ``layer`` is to be called as a module; "" where it is a plain ``kind`` whose parameters may be used in its place."""
    if type(layer) is not kind:
        return f"is a {type(layer).__module__}.{type(layer).__qualname__}"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "has hooks"
    if "forward" in layer.__dict__:
        return "has a forward of its own"
    for name, parameter in layer._parameters.items():
        if parameter is not None and (type(parameter) not in _ORDINARY or parameter.layout is not torch.strided):
            return f"has a {name} of type {type(parameter).__name__}, {parameter.layout}"
    return ""


def plain(kind: type[nn.Module], *layers: nn.Module) -> bool:
    """Whether all are plain, see :func:`odd`. Hooks of all modules in the process, such as those of FLOP counters, do not count: they see
    the blocks and their parts, and the counted work is the work that is done."""
    for layer in layers:
        if (
            type(layer) is not kind
            or layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            or "forward" in layer.__dict__
        ):
            return False
        for parameter in layer._parameters.values():
            if parameter is not None and (type(parameter) not in _ORDINARY or parameter.layout is not torch.strided):
                return False
    return True


class Reading(NamedTuple):
    """The parameters of a plain layer, which are used in its place; ``eps`` of a LayerNorm."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float | None


def read(kind: type[nn.Module], layer: nn.Module) -> Reading | None:
    """What is used in the place of a plain ``kind``; None where the layer is to be called."""
    if not plain(kind, layer) or layer.weight is None:
        return None
    return Reading(layer.weight, layer.bias, getattr(layer, "eps", None))


class Structure:
    """The objects that a module is made of as they are now, and what is called where they are. Nothing here refers to the module itself,
    which would keep its weights until Python looks for cycles.

    Args:
        module: of which it is.
        whole: also of what is below modules that can be frozen by themselves.
        answers: what the module made of it, see :meth:`Freezable.known`.

    Attributes:
        settings: names of attributes, of the module and of those below, that decide what is done with its weights.
        lasts: whether answers can last: not where a weight is no parameter, but an attribute, a buffer or another call's tensor, which may
            be another one each time (FSDP's flat parameters, functional calls) and should not outlive the call.
    """

    settings: tuple[str, ...] = ("eps", "gated", "qk_norm")

    def __init__(self, module: nn.Module, whole: bool = True, answers: Any = None) -> None:
        below, left = [], [module]
        while left:
            part = left.pop()
            if part is not module:
                below.append(part)
            if whole or part is module or not isinstance(part, Freezable):
                left += [m for m in part._modules.values() if m is not None]
        self.of, self.answers, self._below = weakref.ref(module), answers, below
        self._groups = [module._parameters, module._modules, module._buffers]
        self._groups += [group for m in below for group in (m._parameters, m._modules, m._buffers) if group]
        self._own = [m.__dict__ for m in below]
        self._dicts = list(chain.from_iterable(map(_GROUPS, self._own)))
        hiding = [(m.__dict__, name) for m in below for name in ("forward", *m._parameters)]
        self._hiding = [d for d, _ in hiding], [name for _, name in hiding]  # an attribute comes before a parameter of its name
        self._settings = [(d, name) for d in self._own for name in self.settings if name in d]
        self._held, self._ways = self._objects(), self._how(module)
        self._types = list(map(type, (*below, *self._held)))
        ordinary = all(x is None or type(x) is nn.Parameter or isinstance(x, nn.Module) for x in self._held)
        self.lasts = ordinary and not any(name in d for d in self._own for name in _WEIGHTS)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()

    def _objects(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._groups)))

    def _how(self, module: nn.Module) -> tuple[Any, ...]:
        """Hooks, what hides forwards and parameters, and every setting."""
        hooks = list(chain.from_iterable(map(_HOOKS, (module.__dict__, *self._own))))
        hooks = [list(h) for h in hooks] if any(hooks) else None
        hides = [d.get(name) for d, name in zip(*self._hiding, strict=True)] if any(map(operator.contains, *self._hiding)) else None
        own = module.__dict__
        return hooks, hides, [d.get(name) for d, name in self._settings], type(module), own.get("forward"), *map(own.get, self.settings)

    def same(self) -> bool:
        """Whether all that is as it was."""
        module, held = self.of(), self._objects()
        return (
            module is not None
            and self._groups[0] is module._parameters
            and self._groups[1] is module._modules
            and len(held) == len(self._held)
            and all(map(operator.is_, held, self._held))
            and list(map(type, chain(self._below, held))) == self._types
            and all(map(operator.is_, chain.from_iterable(map(_GROUPS, self._own)), self._dicts))
            and self._how(module) == self._ways
        )


def _nothing() -> None:
    """What a copy knows of its structure."""


def _sample(tensor: torch.Tensor) -> torch.Tensor | None:
    """A view of some of a tensor's bits, spread over its storage; None of one that has none to look at."""
    if tensor.is_meta or tensor.numel() == 0:
        return None
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = min(SAMPLED, span)
    found = tensor.detach().as_strided((count,), (max(1, (span - 1) // max(1, count - 1)),))
    return found.view(_BITS[found.element_size()]) if found.element_size() in _BITS else None


def _mark(tensor: torch.Tensor | None) -> Mark | None:
    """Where a tensor lies, and a copy of its samples; None of one that lies nowhere (quantised, fake, sparse)."""
    if type(tensor) not in (nn.Parameter, torch.Tensor) or tensor.layout != torch.strided:
        return None
    view = _sample(tensor)
    return _place(tensor), None if view is None else view.clone()


def _place(tensor: torch.Tensor) -> Place:
    """Where a tensor lies, and how."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


class Guard:
    """Tensors as they are now. :meth:`changed` finds one that moved, or of whose samples one changed.

    On a CPU NumPy gathers the samples, at a quarter of what ``torch.cat`` takes for many small views: 0.1 ms for a predictor of 12 blocks.
    On a GPU the comparison is not waited for: what it found is told at the first look that finds it done.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], were: Sequence[Mark | None] | None = None) -> None:
        """``were``: address and samples of each at an earlier time, see :func:`_mark`."""
        marked = [(t, _mark(t)) for t in tensors] if were is None else zip(tensors, were, strict=True)
        self._marked = [(t, *mark) for t, mark in marked if mark is not None]
        self._tensors, self._places = [t for t, *_ in self._marked], [place for _, place, _ in self._marked]
        groups: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        if self.moved() is None:  # else, before there was a guard, there is nothing more to compare
            for tensor, _, value in self._marked:
                if value is not None:
                    groups.setdefault((value.device, value.dtype), []).append((_sample(tensor), value))
        self._on_cpu: list[tuple[list[np.ndarray], np.ndarray]] = []
        self._on_gpu: list[tuple[list[torch.Tensor], torch.Tensor]] = []
        self._pending: dict[int, tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]] = {}
        with torch.inference_mode(False):
            for (device, _), pairs in groups.items():
                now, before = zip(*pairs, strict=True)
                if device.type == "cpu":
                    self._on_cpu.append(([v.numpy() for v in now], np.concatenate([v.numpy() for v in before])))
                else:
                    self._on_gpu.append((list(now), torch.cat(before)))

    def moved(self) -> torch.Tensor | None:
        """A tensor that lies elsewhere than it did, or otherwise."""
        if list(map(_place, self._tensors)) == self._places:
            return None
        return next(t for t, place in zip(self._tensors, self._places, strict=True) if _place(t) != place)

    @torch.no_grad()
    def changed(self) -> torch.Tensor | None:
        """A tensor that is not as it was; None where none is known of."""
        if (tensor := self.moved()) is not None:
            return tensor
        differ = any((np.concatenate(views) != expected).any() for views, expected in self._on_cpu)
        if differ or any([self._ask(i, views, expected) for i, (views, expected) in enumerate(self._on_gpu)]):  # noqa: C419 - ask all
            return next((t for t, _, value in self._marked if value is not None and not torch.equal(_sample(t), value)), None)
        return None

    def _ask(self, number: int, views: list[torch.Tensor], expected: torch.Tensor) -> bool:
        """Starts a comparison on a GPU and returns what the last one found, if it is done."""
        if torch.cuda.is_current_stream_capturing():
            return False
        flag, told = (torch.cat(views) != expected).any(), False
        if number in self._pending:
            before, host, done = self._pending[number]
            if done.query():
                told = bool(host)
            else:
                flag = flag | before
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        self._pending[number] = flag, host, torch.cuda.current_stream(expected.device).record_event()
        return told


class _Entry(NamedTuple):
    """Something derived, what it was derived from, and how that was marked."""

    parameters: tuple[torch.Tensor | None, ...]
    value: Any
    marks: tuple[Mark | None, ...]


class Derived:
    """What is derived from weights: for as long as one public call, or, ``lasting``, as whoever made this sees fit.

    Args:
        lasting: it outlives the call.
        owners: whose weights alone may be derived into it; None for any.

    Attributes:
        token: another object whenever all that was derived is dropped; what was computed or captured with it is void then.
    """

    def __init__(self, lasting: bool = False, owners: nn.Module | None = None) -> None:
        self.lasting, self.token = lasting, object()
        self.owners = None if owners is None else frozenset(owners.modules())
        self._kept: dict[tuple[nn.Module, Any], _Entry] = {}

    def get(self, owner: nn.Module, key: Any, parameters: Parameters, make: Callable[[], Value]) -> Value:
        """What ``make`` derives of ``parameters``, unless that was derived of these very tensors."""
        entry = self._kept.get((owner, key))
        if entry is None or len(entry.parameters) != len(parameters) or not all(map(operator.is_, entry.parameters, parameters)):
            with torch.inference_mode(False), torch.no_grad():
                entry = self._keep((owner, key), tuple(parameters), make)
        return entry.value

    def _keep(self, at: tuple[nn.Module, Any], parameters: tuple[torch.Tensor | None, ...], make: Callable[[], Value]) -> _Entry:
        entry = self._kept[at] = _Entry(parameters, make(), ())
        return entry

    def renew(self) -> None:
        """Drops what was derived."""
        self._kept, self.token = {}, object()


class Frozen(Derived):
    """What is derived from weights until it is dropped, with a guard over those weights. ``captures``: whether stages are captured.

    Copies and pickles begin empty.
    """

    def __init__(self, captures: bool = True) -> None:
        super().__init__(lasting=True)
        self.captures = captures
        self._guard: Guard | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Frozen, (self.captures,)

    def _keep(self, at: tuple[nn.Module, Any], parameters: tuple[torch.Tensor | None, ...], make: Callable[[], Value]) -> _Entry:
        marks = tuple(map(_mark, parameters))
        entry = _Entry(parameters, make(), marks)
        with self._lock:
            self._kept[at], self._guard = entry, None
        return entry

    def renew(self) -> None:
        """Drops what was derived, because the weights are others by the model's own doing."""
        with self._lock:
            if self._kept:
                super().renew()
                self._guard = None

    def check(self) -> None:
        """Raises :class:`FrozenWeightsError` where the parameters are known not to be what they were."""
        with self._lock:
            if not self._kept:
                return
            if self._guard is None:
                found = {id(t): (t, m) for e in self._kept.values() for t, m in zip(e.parameters, e.marks, strict=True) if t is not None}
                self._guard = Guard([t for t, _ in found.values()], [m for _, m in found.values()])
            tensor = self._guard.changed()
        if tensor is not None:
            raise FrozenWeightsError(
                f"{self._name(tensor)} of a frozen model was written to: its results would be those of the weights of before. Call "
                "deltakern.unfreeze(model) before weights change and deltakern.freeze(model) after, or load_state_dict of the model"
            )

    def _name(self, tensor: torch.Tensor) -> str:
        for (owner, _), entry in list(self._kept.items()):
            if any(p is tensor for p in entry.parameters):
                name = next((n for n, p in owner.named_parameters() if p is tensor), None)
                return f"{type(owner).__name__}.{name}" if name else f"a parameter beside {type(owner).__name__}"
        return "a parameter"


class Snapshot(Structure):
    """A module as it is now: its structure, where its parameters and buffers lie, and samples of what they hold."""

    settings = (*Structure.settings, "attention", "use_delta", "residual_dtype", "savings", "processor", "config")

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._guard = Guard([x for x in self._held if isinstance(x, torch.Tensor)])

    def __deepcopy__(self, memo: Any) -> Snapshot:
        """Of the same module: a rollout's state may be copied, its model is not."""
        return self

    def _objects(self) -> list[Any]:
        """One that is offloaded is on the meta device between calls, another one each time."""
        return ["offloaded" if isinstance(x, torch.Tensor) and x.is_meta else x for x in super()._objects()]

    def moved(self) -> str | None:
        """What is another one or lies elsewhere; None where nothing does."""
        if not self.same():
            return "a parameter, module, hook, forward, class or eps is another one"
        return "a parameter lies elsewhere" if self._guard.moved() is not None else None

    def changed(self) -> str | None:
        """The same, or that a parameter was written to, see the module's docstring."""
        return self.moved() or ("a parameter was written to" if self._guard.changed() is not None else None)


class Call:
    """One public call, from its begin to its end.

    Attributes:
        store: where what is derived of live weights is kept.
        checked: stores of frozen models that were looked at.
        open: until its end; a task that was started within it and outlives it sees by this that it is over.
    """

    def __init__(self, store: Derived) -> None:
        self.store, self.checked, self.open = store, set(), True


_call: ContextVar[Call | None] = ContextVar("deltakern_call", default=None)


def current_call() -> Call | None:
    """The public call that this is a part of."""
    call = _call.get()
    return call if call is not None and call.open else None


@contextlib.contextmanager
def calling(store: Derived | None = None) -> Iterator[Call]:
    """Within the context, what is derived of live weights is kept in ``store``, one call's own by default."""
    call = Call(Derived() if store is None else store)
    token = _call.set(call)
    try:
        yield call
    finally:
        call.open = False
        _call.reset(token)


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Within the context, a user's code runs that may do as it likes, write to weights too: it is no part of the call, which afterwards
    derives anew what it had derived for itself, and looks at frozen weights again."""
    if torch.compiler.is_compiling():
        yield
        return
    call, token = current_call(), _call.set(None)
    try:
        yield
    finally:
        _call.reset(token)
        if call is not None:
            call.checked.clear()
            if not call.store.lasting:
                call.store.renew()


def one_call(method: Callable[..., Value]) -> Callable[..., Value]:
    """Decorates a public method: what is derived within it is derived once and dropped at its end. Calls within it join it."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Value:
        if torch.compiler.is_compiling() or current_call() is not None:
            return method(*args, **kwargs)
        with calling():
            return method(*args, **kwargs)

    return run


def _frozen_below(module: nn.Module) -> nn.Module | None:
    """A frozen module that ``module.train()`` would reach."""
    if getattr(module, "_frozen", None) is not None:
        return module
    kept = getattr(module, "stay_evaluating", ())
    below = (_frozen_below(child) for name, child in module.named_children() if name not in kept)
    return next((found for found in below if found is not None), None)


class Freezable(nn.Module):
    """A module that derives tensors from its parameters. They are no part of its state."""

    _frozen: Frozen | None = None
    stay_evaluating: tuple[str, ...] = ()
    """Children that :meth:`train` leaves in evaluation mode."""

    def ask(self) -> Any:
        """What this module needs to know of its layers at every call."""

    def known(self) -> Any:
        """:meth:`ask`, asked once for as long as the module is made of the same: asking takes ten times as long as looking for that."""
        if torch.compiler.is_compiling():
            return self.ask()
        known = self.__dict__.get("_known")
        if known is not None and known.of() is self and known.same():
            return known.answers
        known = Structure(self, False, self.ask())
        self.__dict__["_known"] = known if known.lasts else None
        return known.answers

    def train(self, mode: bool = True) -> Freezable:
        """Sets the mode.

        Raises:
            FrozenWeightsError: of a frozen module, for training.
        """
        if mode and (found := _frozen_below(self)) is not None:  # before any mode is set
            raise FrozenWeightsError(f"{type(found).__name__} is frozen and does not train: call deltakern.unfreeze(model) first")
        self.training = mode
        for name, child in self.named_children():
            child.train(mode and name not in self.stay_evaluating)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Freezable:
        if self._frozen is not None:
            self._frozen.renew()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._frozen is not None:
            self._frozen.renew()
        super()._load_from_state_dict(*args, **kwargs)


def store_of(owner: nn.Module) -> Derived | None:
    """Where what ``owner`` derives is kept now; None where it is used once: outside of calls, of a model that a stream called and that is
    not its own, and where a graph is made (torch.compile, torch.jit.trace) or nothing is computed (fake tensors)."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch._C._get_dispatch_mode(_FAKE) is not None:
        return None
    frozen = getattr(owner, "_frozen", None)
    if frozen is not None:
        return frozen
    call = current_call()
    if call is None or (call.store.owners is not None and owner not in call.store.owners):
        return None
    return call.store


def lasts(owner: nn.Module) -> bool:
    """Whether what ``owner`` derives outlives the call, so that it may cost something."""
    store = store_of(owner)
    return store is not None and store.lasting


def check_once(store: Derived | None) -> None:
    """:meth:`Frozen.check` of a frozen model's store, once a call."""
    call = current_call()
    if isinstance(store, Frozen) and (call is None or store not in call.checked):
        store.check()
        if call is not None:
            call.checked.add(store)


def derived(store: Derived | None, owner: nn.Module, key: Any, parameters: Parameters, make: Callable[[], Value]) -> Value:
    """``make()``, which is made of ``parameters``: kept for the call or, frozen, until further notice in ``store``, which is
    :func:`store_of` the owner's; where gradients flow to a parameter, anew."""
    if store is None:
        return make()
    check_once(store)
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters):
        if isinstance(store, Frozen):
            raise FrozenWeightsError(f"{type(owner).__name__} is frozen and does not train: call deltakern.unfreeze(model) first")
        return make()
    if torch._C._are_functorch_transforms_active():  # what is made belongs to the transform
        return make()
    return store.get(owner, key, parameters, make)


def table(layer: nn.Module, rows: int, device: torch.device) -> torch.Tensor:
    """The rows of an embedding: its weight, or what the layer makes of every index where it is not plain."""
    if plain(nn.Embedding, layer):
        return layer.weight
    return layer(torch.arange(rows, device=device))


def kernels_run(x: torch.Tensor) -> bool:
    """Whether ops on x take Triton's kernels, for which projections are packed; on a CPU only where they are asked for."""
    return x.is_cuda or backend.preferred() == "triton"


_TRAINED = "_required_grad"
"""Where a frozen module notes which of its parameters required a gradient."""


class Part:
    """A class whose instances are frozen as one: their weights are looked at together, once a call."""


def freeze(model: nn.Module, *, cuda_graphs: bool = True) -> nn.Module:
    """Freezes ``model`` for inference: evaluation mode, no gradient for any parameter, weights derived once. Returns it.

    What is derived (packed, cast to the dtype of the computation, LayerScale folded in, reordered for oneDNN on a CPU) is made at the
    first call that needs it and kept beside the parameters, which keep their names and values. See the module's docstring for what
    happens when they change. On a GPU its stages (backbone, encode, decode, tokenize, sample) are captured as CUDA graphs, by shape, see
    :mod:`deltakern.nn.graphs`; not with ``cuda_graphs=False``.

    Raises:
        TypeError: nothing in ``model`` is of this package.
    """
    if not is_freezable(model):
        raise TypeError(f"freeze: expected a model of deltakern's, or one that holds such a model, got {type(model).__name__}")
    model.eval()
    for module in model.modules():
        trained = {name for name, p in module._parameters.items() if p is not None and p.requires_grad}
        if trained or _TRAINED in module.__dict__:
            module.__dict__[_TRAINED] = tuple(trained.union(module.__dict__.get(_TRAINED, ())))
    model.requires_grad_(False)
    for part in model.modules():
        if part is model or isinstance(part, Part):
            store = Frozen(cuda_graphs)
            for owner in part.modules():
                if isinstance(owner, Freezable):
                    if owner._frozen is not None:
                        owner._frozen.renew()  # for those that keep it
                    owner.__dict__["_frozen"] = store
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """Makes ``model`` live again: derived weights are dropped, parameters that required a gradient before :func:`freeze` require one
    again. It stays in evaluation mode. Returns it."""
    for module in model.modules():
        store = module.__dict__.pop("_frozen", None)
        if store is not None:
            store.renew()  # for those that keep it
        for name in module.__dict__.pop(_TRAINED, ()):
            if module._parameters.get(name) is not None:
                module._parameters[name].requires_grad_(True)
    return model


def hold(model: nn.Module) -> nn.Module:
    """Puts a part that its owner never trains into evaluation mode, without gradients, live or frozen as it is. Returns it."""
    for module in model.modules():
        module.__dict__.pop(_TRAINED, None)
    return model.requires_grad_(False).eval()


@contextlib.contextmanager
def frozen(model: nn.Module, *, cuda_graphs: bool = True) -> Iterator[nn.Module]:
    """Within the context ``model`` is frozen; behind it, it is as it was: its mode, its gradients, what of it was frozen. Nothing is done
    where all of it was. A backward pass through activation checkpoints belongs within: it computes the forward pass again."""
    if is_frozen(model):
        yield model
        return
    modes = [(m, m.__dict__.get("_frozen"), m.__dict__.get(_TRAINED), m.training) for m in model.modules()]
    gradients = [(p, p.requires_grad) for p in model.parameters()]
    try:
        freeze(model, cuda_graphs=cuda_graphs)
        yield model
    finally:
        unfreeze(model)
        for module, store, trained, training in modes:
            module.training = training
            for name, value in (("_frozen", store), (_TRAINED, trained)):
                if value is not None:
                    module.__dict__[name] = value
        for parameter, wanted in gradients:
            parameter.requires_grad_(wanted)


def is_freezable(model: nn.Module) -> bool:
    """Whether there is anything in ``model`` that can be frozen."""
    return isinstance(model, nn.Module) and any(isinstance(m, Freezable) for m in model.modules())


def is_frozen(model: nn.Module) -> bool:
    """Whether every part of ``model`` that can be frozen is."""
    owners = [m for m in model.modules() if isinstance(m, Freezable)]
    return bool(owners) and all(m._frozen is not None for m in owners)
