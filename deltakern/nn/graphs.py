"""Stages of frozen models as CUDA graphs, by shapes: inputs are copied, one replay starts all kernels, the result is copied out.

A clip's host takes ten times as long as its kernels; what is captured once asks nothing again. :func:`captured` decorates a stage that
is captured where its model is frozen (``freeze(model, cuda_graphs=False)`` is the way out), its inputs take no gradient and are not so
large that kernels outlast the host anyway. What a graph cannot hold (hooks, layers that are not plain) runs as it is called.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from deltakern import backend
from deltakern.nn.block import all_plain
from deltakern.nn.weights import Derived, Snapshot, calling, check_once, store_of

GRAPHS_KEPT = 8
"""Graphs of one model, the latest by use."""
MOST_ELEMENTS = 1 << 24
"""Elements of inputs up to which :func:`captured` captures: a dozen pairs of frames of 512 x 512 pixels in ViT-B's features."""

Result = torch.Tensor | tuple[torch.Tensor, ...]


def captures(device: torch.device) -> bool:
    """Whether something on this device can be captured here and now: on a GPU, outside of other captures and of torch.compile."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()


class _Shared:
    """What the graphs of all models on one device share: memory, for nothing of a replay outlives the call but its result, which is copied.
    So calls take turns: on the host by a lock, on the GPU by an event, whatever streams they come from."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.done: torch.cuda.Event | None = None
        self.graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()
        self.memory: tuple[Any, torch.cuda.Stream] | None = None

    def pool(self, device: torch.device) -> tuple[Any, torch.cuda.Stream]:
        """A pool ends with the last graph in it."""
        if not self.graphs or self.memory is None:
            self.memory = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        return self.memory


_shared: dict[torch.device, _Shared] = {}
_within = threading.local()


class _Graph:
    """A function of tensors for fixed shapes as one CUDA graph, with buffers of its own for inputs and result.

    What a replay relies on, and how it is seen to: kernels are compiled and libraries set up before the capture, by running the function;
    what is derived of live weights is derived in the graph, of frozen ones before it; nothing that is made then is an inference tensor,
    which could not be written to outside of inference mode, or comes from autocast's cache, which is emptied behind the graph's back; all
    happens on the inputs' device, whichever is current; other threads may go on using the GPU, though not capture.
    """

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [t.clone() for t in inputs]
        self.graph, self.result = torch.cuda.CUDAGraph(), None

    @contextlib.contextmanager
    def _as_captured(self, store: Derived | None) -> Iterator[None]:
        """Within the context all is as it is captured; ``store`` was looked at, by the caller."""
        device = self.inputs[0].device
        kind = device.type
        autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False)
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad(), autocast, calling(store) as call:
            call.checked.add(store)
            yield

    def warm_up(self, function: Callable[..., Result], store: Derived | None) -> None:
        """Calls the function, which raises what is wrong with the inputs."""
        with self._as_captured(store):
            function(*self.inputs)

    def capture(self, function: Callable[..., Result], store: Derived | None, shared: _Shared) -> None:
        """Captures the function; raises RuntimeError where it cannot be."""
        with self._as_captured(store):
            pool, stream = shared.pool(self.inputs[0].device)
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.result = function(*self.inputs)
        shared.graphs.add(self)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Result:
        for buffer, given in zip(self.inputs, inputs, strict=True):
            buffer.copy_(given)
        self.graph.replay()
        return self.result.clone() if isinstance(self.result, torch.Tensor) else tuple(t.clone() for t in self.result)


class Graphs:
    """The captured graphs of one module.

    A graph of live weights reads the parameters where they lie and derives anew, so it follows what is written to them; it is dropped when
    one of them, or a module, is put in the place of another or lies elsewhere. A graph of frozen weights ends with what was derived. Copies
    and pickles begin empty.
    """

    def __init__(self) -> None:
        self._of: tuple[Snapshot, bool] | None = None
        self._kept: OrderedDict[Any, _Graph | None] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def run(self, owner: nn.Module, what: Hashable, function: Callable[..., Result], inputs: Sequence[torch.Tensor]) -> Result:
        """``function(*inputs)``, which is ``what`` ``owner`` does: captured at the first call with such inputs, replayed from then on.

        It is called as it is where a layer of the owner is not plain, for a replay runs no hooks.
        """
        if getattr(_within, "graph", False):  # a part of what is captured
            return function(*inputs)
        device = inputs[0].device
        shared = _shared.setdefault(device, _Shared())
        with shared.lock:
            if self._of is None or self._of[0].of() is not owner or self._of[0].moved() is not None:
                self._of = Snapshot(owner), all_plain(owner)
                self._kept.clear()
            if self._of[1]:
                stream = torch.cuda.current_stream(device)
                if shared.done is not None:
                    stream.wait_event(shared.done)
                graph = self._graph(owner, what, function, inputs, shared)
                if graph is not None:
                    result = graph(inputs)
                    shared.done = stream.record_event()
                    return result
        return function(*inputs)

    def _graph(
        self, owner: nn.Module, what: Hashable, function: Callable[..., Result], inputs: Sequence[torch.Tensor], shared: _Shared
    ) -> _Graph | None:
        device, store = inputs[0].device, store_of(owner)
        store = store if store is not None and store.lasting else None
        check_once(store)  # before a replay, which asks nothing
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        settings = autocast, backend.preferred(), torch.get_float32_matmul_precision()
        key = what, None if store is None else store.token, settings, tuple((t.shape, t.dtype, t.device) for t in inputs)
        self._kept[key] = graph = self._kept.pop(key) if key in self._kept else _captured(what, function, inputs, store, shared)
        while len(self._kept) > GRAPHS_KEPT:
            self._kept.popitem(last=False)
        return graph


def _captured(
    what: Hashable, function: Callable[..., Result], inputs: Sequence[torch.Tensor], store: Derived | None, shared: _Shared
) -> _Graph | None:
    """The graph; None, with a warning, where something in it cannot be captured. What is wrong with the inputs is raised before."""
    _within.graph = True
    try:
        graph = _Graph(inputs)
        graph.warm_up(function, store)
        try:
            graph.capture(function, store, shared)
        except RuntimeError as problem:
            name = what if isinstance(what, str) else what[0]
            text = f"deltakern: {name} could not be captured as a CUDA graph and runs as it is called: {problem}"
            warnings.warn(text, backend.BackendWarning, stacklevel=2)
            return None
        return graph
    finally:
        _within.graph = False


def graphs_of(module: nn.Module) -> Graphs:
    """Its graphs, which are no part of its state."""
    return module.__dict__.setdefault("_graphs", Graphs())


def captured(method: Callable[..., Result]) -> Callable[..., Result]:
    """Decorates a stage: a method of a Freezable whose positional arguments are tensors and tuples of tensors, and whose result is new
    tensors, decided by their shapes alone."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Result:
        store = self._frozen
        if store is None or not store.captures or kwargs:
            return method(self, *args, **kwargs)
        tensors = [t for a in args for t in (a if isinstance(a, tuple) else (a,))]
        if not (
            all(type(t) is torch.Tensor for t in tensors)
            and captures(tensors[0].device)
            and sum(t.numel() for t in tensors) <= MOST_ELEMENTS
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        ):
            return method(self, *args)
        sizes = tuple(len(a) if isinstance(a, tuple) else 0 for a in args)

        def function(*flat: torch.Tensor) -> Result:
            rest = iter(flat)
            return method(self, *(tuple(next(rest) for _ in range(size)) if size else next(rest) for size in sizes))

        return graphs_of(self).run(self, (method.__qualname__, sizes, self.training), function, tensors)

    return run
