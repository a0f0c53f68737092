"""Several parameters seen as one tensor: packed projections, LayerScale folded into a projection, the cast to the compute dtype.

Parameters keep their released names and stay ordinary; what is packed is derived. While gradients flow, or under
torch.compile, it is derived anew at every call, inside the graph. Without gradients it is derived once and kept until a
parameter changes: another version counter, storage, dtype or device, a load_state_dict, a move, or a switch between training
and evaluation. (A write through ``parameter.data`` in evaluation mode is invisible to version counters: call
:func:`forget_packed` after one.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def compute_dtype(device_type: str, parameter_dtype: torch.dtype) -> torch.dtype:
    """The dtype of matrix products here: autocast's where it is on (never for float64 parameters), else the parameters'."""
    if device_type != "meta" and parameter_dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return parameter_dtype


def _stamp(parameters: Sequence[torch.Tensor | None]) -> tuple[Any, ...] | None:
    """What changes when a parameter does; None where it cannot be known (inference tensors count no versions).

    Another dtype or device means other storage. Written for speed: it is taken for every product.
    """
    stamp: list[Any] = []
    for p in parameters:
        if p is None:
            stamp.append(None)
        elif p.is_inference():
            return None
        else:
            stamp += (p.data_ptr(), p._version)
    return tuple(stamp)


class Watch:
    """Remembers a module's parameters, buffers and submodules, and tells whether they are still the same.

    Seen are version counters, storages, and others put in the place of these; not seen are writes through ``parameter.data``.

    Raises:
        RuntimeError: one of them is an inference tensor, which counts no versions.
    """

    def __init__(self, module: nn.Module) -> None:
        self._groups = [group for m in module.modules() for group in (m._parameters, m._modules, m._buffers) if group]
        self._held = self._every()  # kept, so that no other object gets an address of theirs
        self._ids = list(map(id, self._held))
        self._tensors = [x for x in self._held if isinstance(x, torch.Tensor)]
        self._versions, self._pointers = [t._version for t in self._tensors], [t.data_ptr() for t in self._tensors]

    def _every(self) -> list[Any]:
        return [x for group in self._groups for x in group.values()]

    def unchanged(self) -> bool:
        tensors = self._tensors
        return (
            list(map(id, self._every())) == self._ids
            and [t._version for t in tensors] == self._versions
            and [t.data_ptr() for t in tensors] == self._pointers
        )


class PackedModule(nn.Module):
    """A module that keeps tensors derived from its parameters. They are no part of its state, its copies or its pickles."""

    def __init__(self) -> None:
        super().__init__()
        self._packed: dict[str, tuple[Any, torch.dtype, tuple[torch.Tensor | None, ...]]] = {}

    def packed(
        self,
        name: str,
        parameters: Sequence[torch.Tensor | None],
        dtype: torch.dtype,
        build: Callable[..., tuple[torch.Tensor | None, ...]],
    ) -> tuple[torch.Tensor | None, ...]:
        """``build(*parameters)`` cast to ``dtype``, from the cache where that is exact."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)):
            return _build(parameters, dtype, build)
        stamp = _stamp(parameters)
        if stamp is None:
            return _build(parameters, dtype, build)
        kept = self._packed.get(name)
        if kept is None or kept[0] != stamp or kept[1] != dtype:
            with torch.inference_mode(False), torch.no_grad():
                kept = (stamp, dtype, _build(parameters, dtype, build))
            self._packed[name] = kept
        return kept[2]

    def train(self, mode: bool = True) -> PackedModule:
        if mode != self.training:
            self._packed.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedModule:
        self._packed.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}}


def _build(parameters, dtype, build) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if t is None else t.to(dtype) for t in build(*parameters))


def forget_packed(module: nn.Module) -> None:
    """Drops every packed tensor below ``module``; needed only after writes through ``parameter.data`` in evaluation mode."""
    for child in module.modules():
        if isinstance(child, PackedModule):
            child._packed.clear()
