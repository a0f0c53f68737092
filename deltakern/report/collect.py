"""Takes the measurements of a report: correctness first, then time and memory, as rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter as clock
from typing import Any

import torch

from deltakern import backend
from deltakern.cases import Case, cases
from deltakern.report import accuracy, latency, rows, stages
from deltakern.report.latency import Ceilings, Timing
from deltakern.report.rows import Row

PARTS = ("flops", "latency", "memory", "accuracy")
NATIVE = {"cuda": ("reference", "triton", "cuda"), "cpu": ("reference", "cpp")}  # timed on each device; the interpreter never is
COMPILED = "reference (torch.compile)"
# An implementation of a whole model may differ from the release's structure by this, relative RMS: some hundred roundings of
# its dtype one after the other. What is beyond it is no rounding. Ops are held to float64, see accuracy.py.
MODEL_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


LONG = 30.0  # seconds: a stage's call is timed once, and not made again for its memory
WARM = 1.0  # seconds: after a first call of this length another one is no warmer


class RedError(RuntimeError):
    """A value is wrong, so there is no speed to tell."""


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def scale_for(case: Case, dtype: torch.dtype, most: int) -> float:
    """The scale at which a case's inputs hold about ``most`` bytes, at most 1: a scale may shrink several sizes at once."""
    moved = case.bytes_moved(dtype) if case.bytes_moved else 0
    scale = min(1.0, most / moved) if moved else 1.0
    for _ in range(4):
        if scale == 1.0:
            break
        args, kwargs = case.make(dtype, "cpu", torch.Generator().manual_seed(0), scale)
        held = _traffic(args, kwargs, ())
        if held > most / 4:
            break
        scale = min(1.0, scale * (most / (2 * held)) ** 0.5)
    return scale


def _traffic(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes of every tensor that a call reads and writes, each once."""
    outs = out if isinstance(out, tuple) else (out,)
    return sum(t.numel() * t.element_size() for t in (*args, *kwargs.values(), *outs) if isinstance(t, torch.Tensor))


Checked = dict[tuple[str, str, str, str], accuracy.Verdict]


def check_op(
    case: Case, impls: Sequence[str], dtype: torch.dtype, device: torch.device, *, scale: float = 1.0, checked: Checked | None = None
) -> dict[str, float]:
    """Holds implementations of a case's op to float64 on its tiny cases and on the case itself: impl to its greatest error.

    ``checked`` carries the verdicts on tiny cases from call to call within one run.

    Raises:
        RedError: a value or a gradient is wrong.
    """
    checked = {} if checked is None else checked
    worst: dict[str, float] = {}
    for other in {c.name: c for c in (*cases(case.op, "tiny"), case)}.values():
        size = scale if other is case else 1.0
        able = accuracy.runnable(other, dtype, device, scale=size)[0]
        for impl in set(impls) & set(able):
            key = (case.op, other.name, impl, str(dtype))
            if other is case or key not in checked:
                checked[key] = accuracy.check(other, impl, dtype, device, scale=size)
            verdict = checked[key]
            if not verdict.ok:
                raise RedError(f"{case.op} {impl} is wrong on {other.name} in {verdict.dtype}: {verdict.problem}")
            worst[impl] = max(worst.get(impl, 0.0), verdict.error)
    return worst


def forward_backward(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[int]) -> latency.Call:
    """A call that runs ``function`` and the gradients of ``args[i]`` for i in ``wanted``, under fixed incoming gradients."""
    leaves = [a.detach().requires_grad_(i in wanted) if isinstance(a, torch.Tensor) else a for i, a in enumerate(args)]
    inputs = [leaves[i] for i in wanted]

    def outputs() -> list[torch.Tensor]:
        made = function(*leaves, **kwargs)
        return [o for o in (made if isinstance(made, tuple) else (made,)) if o is not None and o.requires_grad]

    with torch.enable_grad():
        cotangents = [torch.randn_like(o) for o in outputs()]

    def run() -> Any:
        with torch.enable_grad():
            return torch.autograd.grad(outputs(), inputs, cotangents, allow_unused=True)

    return run


def op_rows(
    case: Case,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    most_bytes: int = 1 << 40,
    budget: float = 1.0,
    compiled: bool = False,
    backward: bool = False,
    checked: Checked | None = None,
    where: dict[str, Any] | None = None,
) -> list[Row]:
    """Rows of one case: the reference, the reference under torch.compile if asked for, and every kernel of the device.

    Args:
        case: of ``deltakern.cases``.
        device, dtype: of the inputs.
        most_bytes: shrinks the case to about so much traffic.
        budget: seconds of timing.
        compiled: also time ``torch.compile`` of the reference.
        backward: time forward and backward together.
        checked: see :func:`check_op`.
        where: of :func:`rows.environment`; taken now by default.

    Raises:
        RedError: an implementation is wrong; then none of them gets a row.
    """
    device = torch.device(device)
    scale = scale_for(case, dtype, most_bytes)
    some = min(scale, scale_for(case, dtype, 1 << 20 if device.type == "cpu" else 1 << 26))  # float64 takes several times the memory
    able = [i for i in accuracy.runnable(case, dtype, device, scale=some)[0] if i in NATIVE.get(device.type, ("reference",))]
    errors = check_op(case, able, dtype, device, scale=some, checked=checked)
    args, kwargs = case.make(dtype, device, torch.Generator().manual_seed(0), scale)
    functions: dict[str, Callable[..., Any]] = {"reference": case.function.reference}
    if compiled:
        functions[COMPILED] = torch.compile(case.function.reference)
    for impl in able[1:]:
        functions[impl] = lambda *a, impl=impl, **k: case.function(*a, impl=impl, **k)
    if backward and not case.differentiable:
        return []
    with torch.set_grad_enabled(backward):
        moved = _traffic(args, kwargs, case.function.reference(*args, **kwargs))
        if backward:
            calls = {n: forward_backward(f, args, kwargs, case.differentiable) for n, f in functions.items()}
        else:
            calls = {n: (lambda f=f: f(*args, **kwargs)) for n, f in functions.items()}
        found = latency.interleaved(calls, device, budget=budget)
        extras = {name: gpu_figures(call, device) for name, call in calls.items()} if device.type == "cuda" else {}
    whole = case.bytes_moved(dtype) if case.bytes_moved else 0
    arithmetic = case.flops * (min(1.0, moved / whole) if whole and scale < 1 else 1.0)
    where = rows.environment(device) if where is None else where
    figures = {} if backward else {"bytes": moved, "flops": round(arithmetic)}
    return [
        Row(
            kind="op",
            name=case.op,
            case=case.name,
            impl=impl,
            dtype=_dtype_name(dtype),
            shape={"scale": round(scale, 6), "pass": "forward+backward" if backward else "forward"},
            **_timing(timing),
            figures={**figures, **extras.get(impl, {}), **({"error": errors[impl]} if impl in errors else {})},
            where=where,
        )
        for impl, timing in found.items()
    ]


def _timing(timing: Timing) -> dict[str, Any]:
    return {"seconds": timing.seconds, "low": timing.low, "high": timing.high, "rounds": timing.rounds}


def gpu_figures(call: latency.Call, device: torch.device) -> dict[str, float]:
    """Launches and their own time, the CPU's share, and the time as a CUDA graph where the call can be captured."""
    kernels, _ = latency.profile(call, device)
    found: dict[str, float] = {"kernels": sum(count for _, count, _ in kernels), "kernel_seconds": sum(took for *_, took in kernels)}
    found["launch_seconds"] = latency.launch_overhead(call, device)
    try:
        replay = latency.graphed(call, device)
        found["graph_seconds"] = latency.interleaved({"graph": replay}, device, budget=0.3)["graph"].seconds
    except RuntimeError:  # what synchronizes or allocates pageable memory cannot be captured
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    return found


def ceiling_rows(device: torch.device | str, dtype: torch.dtype, *, budget: float = 2.0, where: dict[str, Any] | None = None) -> list[Row]:
    """The machine's copy bandwidth and matrix rate, as rows."""
    found: Ceilings = latency.ceilings(device, dtype, budget=budget)
    where = rows.environment(device) if where is None else where
    return [
        Row("ceiling", "copy", "", "torch", "float32", figures={"per_second": found.copy}, where=where),
        Row("ceiling", "gemm", "", "torch", found.dtype, figures={"per_second": found.gemm}, where=where),
    ]


def stage_rows(
    stage: stages.Stage,
    preset: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    budget: float = 3.0,
    time: bool = True,
    memory: bool = True,
    where: dict[str, Any] | None = None,
) -> list[Row]:
    """Rows of one stage, all implementations in turn. The first call of each is compared with the release's structure.

    Raises:
        RedError: an implementation differs from the release's structure by more than rounding.
    """
    device = torch.device(device)
    where = rows.environment(device) if where is None else where
    outputs, single, known = {}, {}, {}
    for impl, call in stage.calls.items():
        begin = clock()
        outputs[impl] = call()
        took = clock() - begin
        # What takes this long is timed by its first call alone; one that compiles first has to be called again
        if device.type == "cpu" and "torch.compile" not in impl:
            if took > LONG:
                single[impl] = Timing(took, took, took, 1)
            elif took > WARM:
                known[impl] = took
    baseline = next((impl for impl in (*stages.BASELINES, stages.OURS) if impl in outputs), None)
    errors = {}
    for impl, out in outputs.items():
        if baseline is None:
            continue
        whole = outputs[baseline].float()
        errors[impl] = accuracy.relative_error(out.float(), stage.part[impl](whole) if impl in stage.part else whole)
        if not errors[impl] <= MODEL_LIMIT[dtype]:
            allowed = f"relative RMS, {MODEL_LIMIT[dtype]:.0e} is allowed"
            raise RedError(f"{stage.name}: {impl} differs from {baseline} by {errors[impl]:.1e} ({allowed})")
    del outputs
    several = {impl: call for impl, call in stage.calls.items() if impl not in single}
    timings = single | (latency.interleaved(several, device, budget=budget, known=known) if time and several else {})
    made = []
    for impl, call in stage.calls.items():
        figures: dict[str, float] = {"flops": stage.flops[impl]}
        if impl in errors:
            figures["difference"] = errors[impl]
        if memory and (impl not in timings or timings[impl].seconds <= LONG):
            figures["peak_bytes"] = latency.peak_memory(call, device)
        if time and device.type == "cuda":
            figures |= gpu_figures(call, device)
        made.append(
            Row(
                kind="model",
                name=stage.name,
                case=preset,
                impl=impl,
                dtype=_dtype_name(dtype),
                shape=dict(stage.shape),
                **(_timing(timings[impl]) if time else {}),
                figures=figures,
                where=where,
            )
        )
    return made


def accuracy_rows(op: str, device: torch.device | str, *, where: dict[str, Any] | None = None) -> list[Row]:
    """For every implementation of an op and every dtype, the worst of its tiny cases against float64."""
    device = torch.device(device)
    where = rows.environment(device) if where is None else where
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        worst: dict[str, accuracy.Verdict] = {}
        for case in cases(op, "tiny"):
            for impl in accuracy.runnable(case, dtype, device)[0]:
                if impl not in NATIVE.get(device.type, ("reference",)):
                    continue
                verdict = accuracy.check(case, impl, dtype, device)
                if impl not in worst or not verdict.ok or (worst[impl].ok and verdict.error > worst[impl].error):
                    worst[impl] = verdict
        for impl, verdict in worst.items():
            figures = {"error": verdict.error, "plain": verdict.plain, "ok": float(verdict.ok)} if verdict.deviations else {"ok": 0.0}
            made.append(Row("accuracy", op, verdict.case, impl, verdict.dtype, figures=figures, where=where))
    return made


def model_accuracy_rows(device: torch.device | str, *, where: dict[str, Any] | None = None) -> list[Row]:
    """Encode, decode and the candidates of the tiny preset against the same in float64, in float32 and in bfloat16 autocast."""
    device = torch.device(device)
    where = rows.environment(device) if where is None else where
    models = stages.Models(stages.PRESETS["tiny"], device)
    exact = copy.deepcopy(models.ours).double()
    x, y, rope = models.features[:, 0], models.features[:, 1], models.rope

    def parts(world: Any, wide: bool) -> dict[str, torch.Tensor]:
        cast = (lambda t: t.double()) if wide else (lambda t: t)
        sizes = {"encode": (x, y), "decode": (models.token, x)}
        found = {name: getattr(world.tokenizer, name)(*map(cast, given), tuple(map(cast, rope))) for name, given in sizes.items()}
        if world is not models.release:
            found["candidates"] = world.predict(cast(models.tokens[:, :-1]), cast(models.times), cast(models.candidates[:, :, :8]))
        else:
            positions = ((models.times[:, 1:],), (models.times[:, :-1],))
            found["candidates"] = world.candidates(models.candidates[:, :, :8], models.tokens[:, :-1], *positions)[..., 0, :]
        return found

    made = []
    with torch.no_grad(), backend.use_impl("reference"):
        truth = parts(exact, True)
    for dtype in (torch.float32, torch.bfloat16):
        for impl, world in ((stages.RELEASE, models.release), (stages.OURS, models.ours)):
            if world is None:
                continue
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                found = parts(world, False)
            for name, value in found.items():
                error = accuracy.relative_error(value, truth[name])
                made.append(Row("accuracy", name, "tiny", impl, _dtype_name(dtype), figures={"error": error, "ok": 1.0}, where=where))
    return made


@dataclass(frozen=True)
class Task:
    """One step of a report: what it is, about how many seconds, and how to do it."""

    label: str
    weight: float
    run: Callable[[], list[Row]]


@dataclass
class Collection:
    """What a report measured: rows, and in words what could not be."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


SECONDS = {"backbone": 18, "rollout": 4, "streamed frame": 1, "DeltaTok training step": 20, "DeltaWorld training step": 24}
"""About how long a stage of the tiny preset takes on two CPU cores, most of it compiling the release's structure; others 7 s."""


def plan(
    preset: stages.Preset,
    device: torch.device,
    dtype: torch.dtype,
    parts: Sequence[str],
    implementations: tuple[str, ...],
) -> Iterator[Task]:
    """The steps of a report, most important first."""
    where = rows.environment(device)
    timed, memory = "latency" in parts, "memory" in parts
    if timed:
        yield Task("ceilings", 3, lambda: ceiling_rows(device, dtype, where=where))
    if timed or memory:
        models: list[stages.Models] = []
        slow = 1 if preset.name == "tiny" or device.type == "cuda" else 8

        def stage(name: str) -> list[Row]:
            if not models:
                models.append(stages.Models(preset, device, autocast=dtype if dtype != torch.float32 else None))
            found = []
            # a rollout calls every part in other shapes, and compiling them again would cost the smallest report its three minutes
            quick = name == "rollout" and preset.name == "tiny" and device.type == "cpu"
            wanted = tuple(i for i in implementations if not (quick and i == stages.RELEASE_COMPILED))
            for made in models[0].stages(wanted, (name,)):
                budget = 1.2 * slow
                found += stage_rows(made, preset.name, device, dtype, budget=budget, time=timed, memory=memory, where=where)
            return found

        for name in stages.STAGES:
            yield Task(name, SECONDS.get(name, 7) * slow, lambda name=name: stage(name))
    if timed:
        checked: Checked = {}
        kept = {"most_bytes": 1 << 26 if device.type == "cpu" else 1 << 40, "budget": 0.2, "checked": checked, "where": where}
        for case in cases(tag="benchmark"):
            yield Task(f"{case.op} {case.name}", 0.6 if device.type == "cpu" else 3, lambda case=case: op_rows(case, device, dtype, **kept))
    if "accuracy" in parts:
        for op in backend.ops():
            yield Task(f"accuracy of {op}", 0.1 if device.type == "cpu" else 3, lambda op=op: accuracy_rows(op, device, where=where))
        yield Task("accuracy of the models", 0.2 if device.type == "cpu" else 2, lambda: model_accuracy_rows(device, where=where))


def collect(tasks: Sequence[Task], done: Callable[[Task], None] = lambda task: None) -> Collection:
    """Runs the steps; one that fails becomes a note, and its rows are missing."""
    found = Collection()
    for task in tasks:
        try:
            found.rows += task.run()
        except RedError as problem:
            found.notes.append(f"{problem}; its speed is not shown.")
        except Exception as problem:  # a report must not lose an hour's rows to one step
            first = next(iter(str(problem).splitlines()), "")
            found.notes.append(f"{task.label}: not measured ({type(problem).__name__}: {first}).")
        done(task)
    return found
