"""The one registry of cases: for every op the shapes that the models run it at, inputs, bytes and FLOPs.

Tests, benchmarks, doctor and report all read it. A new op is one file in ``deltakern/ops`` and its entries here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from deltakern import ops


@dataclass(frozen=True)
class Case:
    """One call of one op.

    Attributes:
        op: name in ``deltakern.ops``.
        name: unique within the op, e.g. ``"vitb-512"``.
        make: ``make(dtype, device, generator, scale)`` returns ``(args, kwargs)`` of the op; ``scale`` in (0, 1] shrinks the
            sizes that only repeat work (batch, tokens), never the widths.
        differentiable: positions in ``args`` that take a gradient.
        bytes_moved: the fewest bytes of the forward pass, every input read and every output written once, for a dtype.
        flops: multiply-adds counted twice, of the forward pass.
        tags: ``"tiny"`` runs in every test, ``"real"`` is a shape of the released models, ``"benchmark"`` is timed.
    """

    op: str
    name: str
    make: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]
    differentiable: tuple[int, ...] = ()
    bytes_moved: Callable[[torch.dtype], int] | None = None
    flops: int = 0
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(ops, self.op)


_CASES: list[Case] = []


def add(case: Case) -> Case:
    if any(c.op == case.op and c.name == case.name for c in _CASES):
        raise ValueError(f"case {case.op}/{case.name} is registered twice")
    _CASES.append(case)
    return case


def cases(op: str | None = None, tag: str | None = None) -> list[Case]:
    """All cases, of one op if named, with one tag if given, in the order of registration."""
    return [c for c in _CASES if (op is None or c.op == op) and (tag is None or tag in c.tags)]
