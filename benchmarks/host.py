"""``python -m benchmarks.host``: what the host takes for a call, without a GPU.

Every op without gradient, recorded, and forward and backward; a block each way; sampling and the search for the best candidate. It is
thread time on this CPU with a driver that does nothing (:mod:`benchmarks.stand_in`), beside native PyTorch operations in the same run.
Ratios carry to other machines, microseconds do not. And how many kernels each of them starts, which is the same everywhere.

``--check`` holds it to :data:`GOALS` and :data:`LAUNCHES`, by the exit status.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import stand_in  # first: it takes the place of Triton's driver
from benchmarks.stand_in import microseconds

import torch  # isort: skip
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import deltakern
from deltakern.cases import cases
from deltakern.launch import count_launches
from deltakern.models import DeltaTok, DeltaWorld, DINOv3, DINOv3Config
from deltakern.nn import Block, Residual
from deltakern.nn.weights import calling
from deltakern.report import rows

RESULTS = "benchmarks/results"
GOALS = {"residual_norm, no gradient": 2.5, "residual_norm, forward and backward": 3.0}
"""Most multiples of F.layer_norm of the same shape in the same mode."""
LAUNCHES = {"block, no gradient": 10, "predictor step": 98, "candidate search": 101}
"""Most kernels, PyTorch's among them."""
TOKENS = 9  # few: the time is the host's
_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "lift_fresh", "_unsafe_view", "unbind", "split", "chunk")


@dataclasses.dataclass(frozen=True)
class Time:
    """One measurement: microseconds, and as a multiple of F.layer_norm's in the same mode."""

    name: str
    microseconds: float
    multiple: float
    launches: int


class _Kernels(TorchDispatchMode):
    """Counts operations that start a kernel: those that are no views and no allocations. The package's own are counted where they are
    launched."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.__name__.partition(".")[0]
        if not func.is_view and name not in _FREE and func.namespace != "deltakern":
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


def kernels(call: Callable[[], Any]) -> Counter[str]:
    """How often a call starts each kernel, on a GPU."""
    call()
    with count_launches() as own, _Kernels() as mode:
        call()
    return mode.counted + own


def _grads(outputs: Any, inputs: list[torch.Tensor]) -> None:
    found = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, torch.Tensor) and o.requires_grad]
    torch.autograd.grad(found, inputs, [torch.ones_like(o) for o in found])


def ops(number: int) -> Iterator[Time]:
    """Every op with a Triton kernel at its first small case, and its like in PyTorch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, 768)
    w, b = torch.ones(768, requires_grad=True), torch.zeros(768, requires_grad=True)
    recorded = x.clone().requires_grad_()
    native = {
        "F.layer_norm": lambda x: F.layer_norm(x, (768,), w, b),
        "F.gelu": F.gelu,
    }
    unit: dict[str, float] = {}

    def times(name: str, call: Callable[[Any], Any], args: list[Any], inputs: list[torch.Tensor], recording: list[Any]) -> Iterator[Time]:
        def no_gradient() -> None:
            with torch.no_grad():
                call(*args)

        modes = {"no gradient": no_gradient}
        if inputs:
            modes |= {"recorded": lambda: call(*recording), "forward and backward": lambda: _grads(call(*recording), inputs)}
        with torch.no_grad():
            overhead = microseconds(lambda: None, number=number)
        for mode, run in modes.items():
            if mode == "no gradient":
                with torch.no_grad():
                    took = microseconds(lambda: call(*args), number=number) - overhead
            else:
                took = microseconds(run, number=number)
            unit.setdefault(mode, took)
            yield Time(f"{name}, {mode}", took, took / unit[mode], sum(kernels(run).values()))

    for name, call in native.items():
        yield from times(name, call, [x], [recorded, w, b] if name == "F.layer_norm" else [recorded], [recorded])
    ones = torch.ones(768, requires_grad=True)
    args = [x, x.clone(), ones, w, b]
    inputs = [recorded, x.clone().requires_grad_(), ones, w, b]
    yield from times("residual_norm", lambda *a: deltakern.ops.residual_norm(*a, impl="triton"), args, inputs, inputs)
    for op in deltakern.backend.ops():
        case = next(iter(cases(op, "tiny")))
        if op == "residual_norm" or "triton" not in case.function.op.kernels:
            continue
        args, kwargs = case.make(torch.float32, "cpu", generator, 1.0)
        recording = [a.clone().requires_grad_() if i in case.differentiable else a for i, a in enumerate(args)]
        inputs = [recording[i] for i in case.differentiable]
        yield from times(op, lambda *a, f=case.function, k=kwargs: f(*a, **k, impl="triton"), list(args), inputs, recording)


class _Prepared:
    """Matrix products and attention that return what they returned the first time for such shapes: what they take is left out."""

    def __enter__(self) -> None:
        self.kept: dict[Any, torch.Tensor] = {}
        self.real = F.linear, F.scaled_dot_product_attention

        def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            key = x.shape, weight.shape
            return self.kept[key] if key in self.kept else self.kept.setdefault(key, self.real[0](x, weight, bias))

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
            return self.kept[q.shape] if q.shape in self.kept else self.kept.setdefault(q.shape, self.real[1](q, k, v, **options))

        F.linear, F.scaled_dot_product_attention = linear, attention

    def __exit__(self, *_: Any) -> None:
        F.linear, F.scaled_dot_product_attention = self.real


def block(number: int, unit: float) -> Iterator[Time]:
    """DeltaTok's block at ViT-B's width, frozen: products and attention left out."""
    made = deltakern.freeze(Block(768, 12, 2048, swiglu=True, qk_norm="pre_rope", gated=True))
    stream, branch, scale = torch.randn(1, TOKENS, 768), torch.randn(1, TOKENS, 768), torch.ones(768)
    rope = torch.randn(TOKENS - 1, 64), torch.randn(TOKENS - 1, 64)

    def call() -> Residual:
        return made(Residual(stream, branch, scale), rope, num_prefix=1)

    with torch.no_grad(), calling():
        count = sum(kernels(call).values())
        with _Prepared():
            took = microseconds(call, number=number)
    yield Time("block, no gradient", took, took / unit, count)


def _world() -> DeltaWorld:
    backbone = DINOv3(config=DINOv3Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64))
    tokenizer = DeltaTok(backbone, num_hidden_layers=1, intermediate_size=64)
    return DeltaWorld(tokenizer, predictor_hidden_size=64, predictor_num_hidden_layers=12, predictor_num_heads=1, num_samples_train=16)


def world(number: int, unit: float) -> Iterator[Time]:
    """The predictor, 12 blocks, narrow: its products are small and stay in."""
    made = deltakern.freeze(_world())
    z, times = torch.randn(1, 4, 64), torch.arange(5.0)[None] / 5
    queries = torch.randn(1, 20, 1, 64)
    keys_values = made.predictor.keys_values(z)
    mix = made._mix(times[:, 4:], times[:, :4])

    def step() -> torch.Tensor:
        return made.predictor(queries[:, :, 0], keys_values, mix)

    def sample() -> torch.Tensor:
        return made.sample(z, times, 1, 20, queries=queries)

    tokens = torch.randn(2, 4, 64)
    past, target, stamps, noise = tokens[:, :-1], tokens[:, 1:], times[:, :4].expand(2, -1), torch.randn(2, 3, 16, 64)

    def search() -> tuple[torch.Tensor, ...]:
        """Without the winner's look-up, because its index is garbage here."""
        return made.predictor.best(made._predict(made.predictor.keys_values(past), stamps, noise, head=False), target, reduce_dims=1)

    with torch.no_grad(), calling():
        for name, call in (("predictor step", step), ("sample, 20 futures", sample), ("candidate search", search)):
            count = sum(kernels(call).values())
            took = microseconds(call, number=max(5, number // 20))
            yield Time(name, took, took / unit, count)


def measure(number: int) -> list[Time]:
    """All of it; ``number`` calls a loop."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = list(ops(number))
    unit = found[0].microseconds
    with deltakern.use_impl("triton"):
        return [*found, *block(number, unit), *world(number, unit)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object a measurement")
    parser.add_argument("--number", type=int, default=200, help="calls a loop")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a goal is missed")
    parser.add_argument("--save", action="store_true", help=f"append rows to {RESULTS}")
    options = parser.parse_args(argv)
    found = measure(options.number)
    for time in found:
        if options.json:
            print(json.dumps(dataclasses.asdict(time)))
        else:
            print(f"{time.name:44} {time.microseconds:9.1f} us {time.multiple:7.2f}x {time.launches:5} launches")
    if options.save:
        where = rows.environment()
        made = [
            rows.Row(
                "host",
                t.name,
                "",
                "deltakern",
                "float32",
                {},
                t.microseconds / 1e6,
                figures={"multiple": t.multiple, "launches": t.launches},
                where=where,
            )
            for t in found
        ]
        rows.append(f"{RESULTS}/host.jsonl", made)
    missed = [f"{t.name}: {t.multiple:.2f}x F.layer_norm, at most {GOALS[t.name]}x" for t in found if t.multiple > GOALS.get(t.name, 1e9)]
    missed += [f"{t.name}: {t.launches} launches, at most {LAUNCHES[t.name]}" for t in found if t.launches > LAUNCHES.get(t.name, 1e9)]
    print("\n".join(missed), file=sys.stderr, end="\n" if missed else "")
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    assert stand_in
    sys.exit(main())
