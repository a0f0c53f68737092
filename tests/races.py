"""Finds, in the IR of a compiled kernel, memory that a program loads and stores with no barrier between.

A load may be replicated over warps, and nothing but a barrier holds them together: a warp that comes late reads what another has
stored already. The interpreter, which runs a program in one thread, cannot see it. That the load and the store have one layout, or
that the store needs what was loaded, proves nothing.

Not looked at: other programs, which a barrier does not hold, and two stores to one place. What takes an address and is not known
here raises, so that no load and no store is overlooked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

ACCESSES = {"tt.load": "load", "ttg.async_copy_global_to_local": "load", "tt.store": "store"}
ACCESSES |= {"tt.atomic_rmw": "atomic", "tt.atomic_cas": "atomic"}
ADDRESSES = {"tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "tt.bitcast"}
ADDRESSES |= {"ttg.convert_layout", "arith.select"}
BARRIER = re.compile(r"gpu\.barrier\b|ttg\.barrier .*(all|global)")  # another ttg.barrier orders shared memory alone
VALUE = r"%[\w$.-]+(?:#\d+)?"


def in_place(ir: str, arguments: Iterable[str], aliases: Iterable[Iterable[str]] = ()) -> dict[str, bool]:
    """The pointer arguments that a kernel both loads and stores, or updates atomically; True where a barrier is missing between.

    Args:
        ir: of one kernel, "ttir" or "ttgir".
        arguments: names of the pointers, in order.
        aliases: groups of names that the launcher gave one memory; a group counts as one argument, "a=b".
    """
    names = {name: name for name in arguments}
    for group in aliases:
        names.update(dict.fromkeys(group, "=".join(group)))
    (kernel,) = _parse(re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", ir))
    pointers = re.findall(rf"({VALUE}): !tt\.ptr", kernel.text)
    walk = _Walk({pointer: {name} for pointer, name in zip(pointers, names.values(), strict=True)})
    walk.run(kernel.regions[0], frozenset())
    kinds: dict[str, set[str]] = {}
    for argument, kind in walk.seen:
        kinds.setdefault(argument, set()).add(kind)
    return {argument: argument in walk.races for argument in sorted(kinds) if len(kinds[argument]) > 1}


@dataclass
class _Op:
    name: str
    text: str
    results: list[str] = field(default_factory=list)
    operands: list[str] = field(default_factory=list)
    regions: list[list[_Op]] = field(default_factory=list)


def _parse(ir: str) -> list[_Op]:
    """The functions, with all that is in them. A region's label is an op whose results are the region's arguments."""
    outermost = _Op("", "", regions=[[]])
    around = [outermost]  # the ops whose last region is not closed yet
    for line in map(str.strip, ir.splitlines()):
        op = None
        if line == "} else {":
            op = around.pop()
        elif line.startswith("}"):
            around = around[:-1] or [outermost]  # the module's own brace closes nothing
        elif line.startswith("^bb0("):
            around[-1].regions[-1].append(_Op("label", line, re.findall(VALUE, line)))
        elif line and not line.startswith(("#", "module ")):
            results, _, rest = line.partition(" = ") if line.startswith("%") else ("", "", line)
            name = re.match(r'"?([a-z_]+\.[\w.]+)', rest)
            if not name:
                raise ValueError(f"not known to this check: {line}")
            named = re.findall(r"(%[\w$.-]+)(?::(\d+))?", results)
            results = [f"{r}#{i}" if count else r for r, count in named for i in range(int(count or 1))]
            op = _Op(name[1], line, results, re.findall(VALUE, rest))
            around[-1].regions[-1].append(op)
        if op and line.endswith("{"):
            op.regions.append([])
            around.append(op)
    return outermost.regions[0]


Accesses = frozenset[tuple[str, str]]
"""Argument and kind."""


class _Walk:
    """Goes through a kernel and notes which arguments each value may point into."""

    def __init__(self, points: dict[str, set[str]]) -> None:
        self.points = points
        self.seen: set[tuple[str, str]] = set()
        self.races: set[str] = set()

    def into(self, *values: str) -> set[str]:
        return set().union(*(self.points.get(v, ()) for v in values))

    def run(self, ops: list[_Op], pending: Accesses) -> Accesses:
        """``pending`` are the accesses before these ops that no barrier has followed yet; returns those after them."""
        for op in ops:
            if op.regions:
                pending = self.loop(op, pending) if op.name == "scf.for" else self.branches(op, pending)
                continue
            pointed = self.into(*op.operands)
            for result in op.results:
                self.points[result] = pointed if op.name in ADDRESSES else set()
            if kind := ACCESSES.get(op.name):
                into = self.into(op.operands[0])
                if not into:
                    raise ValueError(f"which argument does this point into? {op.text}")
                self.races |= {argument for argument, other in pending if argument in into and other != kind}
                pending |= {(argument, kind) for argument in into}
                self.seen |= pending
            elif BARRIER.match(op.text):
                pending = frozenset()
            elif pointed and op.name not in ADDRESSES | {"scf.yield"}:
                raise ValueError(f"takes an address and is not known to this check: {op.text}")
        return pending

    def branches(self, op: _Op, pending: Accesses) -> Accesses:
        """Any branch may be taken, and where there is one, none."""
        if op.name not in {"scf.if", "tt.reduce", "tt.scan"}:
            raise ValueError(f"not known to this check: {op.text}")
        self.points.update((result, set()) for result in op.results)  # a name may have stood for something else
        after = [self.run(region, pending) for region in op.regions]
        given = [region[-1].operands for region in op.regions if region and region[-1].name == "scf.yield"]
        self.points.update((result, self.into(*values)) for result, values in zip(op.results, zip(*given, strict=True), strict=False))
        return frozenset().union(*after, pending if len(after) == 1 else ())

    def loop(self, op: _Op, pending: Accesses) -> Accesses:
        """Turn after turn until nothing is new: a turn meets what the turns before it have left. There may be no turn at all."""
        pairs = re.findall(rf"({VALUE}) = ({VALUE})", op.text.partition("scf.for")[2])
        self.points.update((inner, self.into(outer)) for inner, outer in pairs)
        carried = [inner for inner, _ in pairs[1:]]  # the first is the counter
        met = None
        while met != (pending, [self.into(c) for c in carried]):
            met = (pending, [self.into(c) for c in carried])
            pending |= self.run(op.regions[0], pending)
            if carried:
                self.points.update((c, self.into(c, value)) for c, value in zip(carried, op.regions[0][-1].operands, strict=True))
        self.points.update((result, self.into(c)) for result, c in zip(op.results, carried, strict=True))
        return pending
