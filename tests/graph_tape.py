"""CUDA graphs without CUDA: a capture writes down the operations that run, a replay runs them again on the same memory.

Stands in for the parts of ``torch.cuda`` that a capture uses, on CPU tensors. As on a GPU, what the host computes during the
capture is frozen into the tape, results appear where the capture left them, and an operation that makes the host wait for the
device, brings data from the host or draws random numbers ends the capture with an error.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_FORBIDDEN = ("_local_scalar_dense", "is_nonzero", "nonzero", "lift_fresh", "normal_", "uniform_", "randn", "masked_select", "equal")


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.events = 0

    def wait_event(self, event: Any) -> None:
        assert event == "event"

    def wait_stream(self, stream: Any) -> None:
        assert isinstance(stream, Stream)

    def record_event(self) -> str:
        self.events += 1
        return "event"


class CUDAGraph:
    """The tape."""

    captures = 0

    def __init__(self) -> None:
        self.tape: list[tuple[Any, tuple, dict, list[torch.Tensor]]] = []

    @torch.no_grad()
    def replay(self) -> None:
        opaque: dict[int, torch.Tensor] = {}  # oneDNN's reordered weights have no storage to copy into: taken in the captured one's place
        for op, args, kwargs, kept in self.tape:
            args, kwargs = tree_map(lambda t: opaque.get(id(t), t), (args, kwargs))
            made = [t for t in tree_leaves(op(*args, **kwargs)) if isinstance(t, torch.Tensor)]
            for old, new in zip(kept, made, strict=True):
                if old.is_mkldnn:
                    opaque[id(old)] = new
                elif old.data_ptr() != new.data_ptr():  # else a view, or written in place
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, tape: list) -> None:
        super().__init__()
        self.tape, self.before = tape, {}

    def _keep(self, op, args, kwargs) -> None:
        """What this operation writes to, as it was before the capture, which on a GPU runs nothing."""
        for i, argument in enumerate(op._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name)):
                    if isinstance(t, torch.Tensor) and not t.is_mkldnn:
                        self.before.setdefault(t.data_ptr(), (t, t.detach().clone()))

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket.__name__ in _FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {op}")
        self._keep(op, args, kwargs or {})
        made = op(*args, **(kwargs or {}))
        self.tape.append((op, args, kwargs or {}, [t for t in tree_leaves(made) if isinstance(t, torch.Tensor)]))
        return made


@contextlib.contextmanager
def graph(made: CUDAGraph, *, pool: Any, stream: Stream, capture_error_mode: str):
    assert pool is not None
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_cache_enabled() or not torch.is_autocast_enabled("cpu")
    assert isinstance(stream, Stream)
    assert capture_error_mode == "thread_local"
    CUDAGraph.captures += 1
    with _Recorder(made.tape) as recorder:
        yield
    with torch.no_grad():
        for tensor, value in recorder.before.values():
            tensor.copy_(value)


def install(monkeypatch: Any) -> type[CUDAGraph]:
    """Captures on the CPU until the test ends; returns the class, whose ``captures`` counts them."""
    from deltakern.nn import graphs

    current = Stream()
    monkeypatch.setattr(CUDAGraph, "captures", 0)
    for name, made in (
        ("CUDAGraph", CUDAGraph),
        ("graph", graph),
        ("Stream", Stream),
        ("current_stream", lambda device=None: current),
        ("graph_pool_handle", object),
        ("stream", lambda stream: contextlib.nullcontext()),
        ("device", lambda device: contextlib.nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, made)
    monkeypatch.setattr(graphs, "captures", lambda device: True)
    monkeypatch.setattr(graphs, "_shared", {})
    return CUDAGraph
