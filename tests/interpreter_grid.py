"""Runs the programs of a grid at the same time in Triton's interpreter, for kernels whose programs wait for one another.

The interpreter takes programs one after the other, so that the first to wait for another would wait for ever. Within
:func:`together` every program of a one-dimensional grid is a thread, of which one runs at a time; the baton passes where a
program does an atomic operation, and to whom is the schedule's choice. Memory is sequentially consistent here: schedules show
data that is read before it was written, or written before it was read; they cannot show a fence that is too weak.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import triton.language as tl  # noqa: F401 - the interpreter patches it in the globals of the function that it runs

Schedule = Callable[[Sequence[int], int], int]
"""``(programs, last) -> program``: who runs next, of those that may."""


def in_turn(able: Sequence[int], last: int) -> int:
    """The next by number."""
    return min(able, key=lambda p: (p <= last, p))


def first(able: Sequence[int], last: int) -> int:
    """The program of the least number runs as far as it can."""
    return min(able)


def final(able: Sequence[int], last: int) -> int:
    """The program of the greatest number runs as far as it can."""
    return max(able)


def at_random(seed: int) -> Schedule:
    drawn = random.Random(seed)
    return lambda able, last: drawn.choice(able)


class _Baton:
    def __init__(self, programs: int, schedule: Schedule) -> None:
        self.schedule, self.condition = schedule, threading.Condition()
        self.running = list(range(programs))
        self.polling: set[int] = set()
        self.holder = schedule(self.running, -1)
        self.error: BaseException | None = None

    def wait(self, program: int) -> None:
        with self.condition:
            self.condition.wait_for(lambda: self.holder == program or self.error)
            if self.error:
                raise RuntimeError("another program failed")

    def pass_on(self, program: int, polls: bool) -> None:
        """A poll changes nothing: those who polled have their next turn once somebody else did something, or everybody polled."""
        with self.condition:
            if polls:
                self.polling.add(program)
            if not polls or self.polling.issuperset(self.running):
                self.polling = {program} if polls and len(self.running) > 1 else set()
            self.holder = self.schedule([p for p in self.running if p not in self.polling], program)
            self.condition.notify_all()
        self.wait(program)

    def end(self, program: int, error: BaseException | None) -> None:
        with self.condition:
            self.running.remove(program)
            self.polling.clear()
            self.error = self.error or error
            if self.running:
                self.holder = self.schedule(self.running, program)
            self.condition.notify_all()


@contextlib.contextmanager
def together(schedule: Schedule) -> Iterator[list[int]]:
    """Within the context the programs of every launch run at the same time. Yields a list of how often the baton was passed, by launch."""
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    atomic, call = builder.create_atomic_rmw, executor.__call__
    current: list[tuple[_Baton, threading.local]] = []
    passed: list[int] = []

    def handing_over(op: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        result = atomic(op, pointer, value, *rest)
        if current:
            baton, mine = current[0]
            passed[-1] += 1
            baton.pass_on(mine.program, polls=not value.data.any())
            builder.set_grid_idx(mine.program, 0, 0)
        return result

    def concurrent(self: Any, *args: Any, **kwargs: Any) -> Any:
        function, (programs,) = self.fn, self.grid

        def everyone(**arguments: Any) -> None:
            baton, mine = _Baton(programs, schedule), threading.local()
            current.append((baton, mine))
            passed.append(0)

            def program(number: int) -> None:
                mine.program, error = number, None
                try:
                    baton.wait(number)
                    builder.set_grid_idx(number, 0, 0)
                    function(**arguments)
                except BaseException as problem:
                    error = problem
                baton.end(number, error)

            builder.set_grid_dim(programs, 1, 1)
            threads = [threading.Thread(target=program, args=(n,)) for n in range(programs)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            current.pop()
            if baton.error:
                raise baton.error

        everyone.__signature__ = inspect.signature(function)
        self.fn, self.grid = everyone, (1,)
        try:
            return call(self, *args, **kwargs)
        finally:
            self.fn, self.grid = function, (programs,)

    builder.create_atomic_rmw, executor.__call__ = handing_over, concurrent
    try:
        yield passed
    finally:
        del builder.create_atomic_rmw
        executor.__call__ = call
