"""Live and frozen weights: whatever changes a weight, every public call gives what a fresh model of the same weights gives, or raises.

The matrix: :data:`WAYS` of changing weights, the entry points of three models, live and frozen states. A way is a generator; at each
``yield`` every entry point is run and compared with a model that never ran before.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import graph_tape
import pytest
import small
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.utils import parametrizations, parametrize, prune

import deltakern
from deltakern.models import StaleCacheError
from deltakern.nn import Block, Residual, explain, weights
from deltakern.nn import product as products
from deltakern.nn.block import TransformerBlock

FROZEN_ERRORS = (deltakern.FrozenWeightsError, StaleCacheError)
CRITERION = nn.SmoothL1Loss(reduction="none", beta=0.1)
PIXELS, TIMES = small.clip(frames=4)
_draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
TOKENS, QUERIES, BEFORE, AFTER = _draw(2, 4, 64), _draw(2, 3, 6, 64), _draw(2, 6, 64), _draw(2, 6, 64)

Tensors = tuple[torch.Tensor, ...]
Entry = Callable[[], Tensors]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ----------------------------------------------------------------------------------------------------------- models and entry points


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _like(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """To the dtype that the model has at the time."""
    return lambda t: t.to(_dtype(model))


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """In training mode; a frozen model stays in evaluation."""
    if not deltakern.is_frozen(model):
        model.train()
    try:
        yield
    finally:
        model.eval()


def _gradients(model: nn.Module, out: torch.Tensor) -> Tensors:
    """A prediction, and its gradients for all that trains as one vector."""
    trained = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    loss = (out.double() * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum()
    found = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    return out.detach(), torch.cat([g.flatten() for g in found])


def tok_entries(tok: deltakern.DeltaTok) -> dict[str, Entry]:
    rope, like = tok._rope(PIXELS), _like(tok)

    def training() -> Tensors:
        with _training(tok), torch.enable_grad():
            return _gradients(tok, tok(PIXELS)[0])

    entries = {
        "backbone": lambda: (tok.backbone(PIXELS[:, :2]),),
        "encode": lambda: (tok.encode(like(BEFORE), like(AFTER), rope),),
        "decode": lambda: (tok.decode(like(TOKENS[:, :1]), like(BEFORE), rope),),
        "decode_samples": lambda: (tok.decode_samples(like(TOKENS[:, :3]), like(BEFORE), rope),),
        "tokenize": lambda: (tok.tokenize(PIXELS[:, :2]),),
        "reconstruct": lambda: tok(PIXELS[:, :2], horizon=1),
    }
    return entries if deltakern.is_frozen(tok) else {**entries, "training": training}


class _Streamed:
    """Frames of one stream, one more at every call, and futures behind them. What went stale begins again at the next call."""

    def __init__(self, world: deltakern.DeltaWorld) -> None:
        self.stream, self.goal = world.stream(2, cuda_graph=False), 1

    def __call__(self) -> Tensors:
        try:
            made = [self.stream.push(PIXELS[0, i % 4], 0.1 * i) for i in range(len(self.stream), self.goal)]
            found = made[-1], self.stream.sample([0.1 * self.goal, 0.1 * self.goal + 0.1], 3, seed=1)
        except FROZEN_ERRORS:
            self.stream.reset()
            self.goal = 1
            raise
        self.goal += 1
        return found


def world_entries(world: deltakern.DeltaWorld) -> dict[str, Entry]:
    like = _like(world)

    def sample(**options: Any) -> Tensors:
        return (world.sample(like(TOKENS[:, :2]), TIMES, 2, 3, seed=1, **options),)

    def training() -> Tensors:
        with _training(world), torch.enable_grad():
            return _gradients(world, world.train_on_tokens(like(TOKENS), TIMES, CRITERION, queries=like(QUERIES))[0])

    def search() -> Tensors:
        with _training(world):
            return (world.train_on_tokens(like(TOKENS), TIMES, CRITERION, queries=like(QUERIES))[0],)

    def rollout() -> Tensors:
        found = world.rollout(PIXELS[:, :2], TIMES[:, :3], 1, 2, seed=1, cuda_graph=False)
        return found.tokens, found.features

    entries = {
        "sample": lambda: sample(cuda_graph=False),
        "captured sample": sample,
        "search": search,
        "rollout": rollout,
        "decode": lambda: (world.decode(like(TOKENS)[:, :, None].expand(-1, -1, 2, -1), like(BEFORE), [0, 2], size=(32, 48)),),
        "forward": lambda: world(PIXELS[:, :3], TIMES[:, :3], ctx_len=2, queries=like(QUERIES[:, :, :1])),
        "stream": _Streamed(world),
    }
    return entries if deltakern.is_frozen(world) else {**entries, "training": training}


def dense_entries(dense: deltakern.DINOWorld) -> dict[str, Entry]:
    like = _like(dense)

    def training() -> Tensors:
        with _training(dense), torch.enable_grad():
            return _gradients(dense, dense(PIXELS, TIMES, CRITERION, queries=like(QUERIES))[0])

    entries = {"forward": lambda: dense(PIXELS, TIMES, ctx_len=2, queries=like(QUERIES[:, :, :2]))}
    return entries if deltakern.is_frozen(dense) else {**entries, "training": training}


class Kind(NamedTuple):
    build: Callable[[], nn.Module]
    entries: Callable[[Any], dict[str, Entry]]


KINDS = {
    "tok": Kind(lambda: small.tokenizer(use_rope_aug=False).eval(), tok_entries),
    "world": Kind(lambda: small.world(tokenizer_options={"use_rope_aug": False}).eval(), world_entries),
    "dense": Kind(lambda: small.dense_world(use_bom=True).eval(), dense_entries),
}


# ------------------------------------------------------------------------------------------------------------------- ways to change


SAME = "same"
"""Given by a way where weights are other tensors of the same values: nothing needs to differ."""

Steps = Iterator[str | None]
Way = Callable[[nn.Module, Path], Steps]


def _floats(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.is_floating_point()]


def _linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Every plain linear layer of every block: (its parent, its name there, itself)."""
    blocks = [m for m in model.modules() if isinstance(m, TransformerBlock)]
    parts = [part for block in blocks for part in (block.attention, block.mlp)]
    return [(part, name, layer) for part in parts for name, layer in part.named_children() if isinstance(layer, nn.Linear)]


def _noise(p: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(p.numel())
    return torch.randn(p.shape, generator=generator).to(p.dtype)


def _changed(p: torch.Tensor) -> torch.Tensor:
    """Clearly other values."""
    return (p.detach() * 1.3 + 0.05 * _noise(p)).to(p.dtype)


def _written(model: nn.Module, write: Callable[[nn.Parameter], Any]) -> Steps:
    for p in _floats(model):
        write(p)
    yield


def _way(write: Callable[[nn.Parameter], Any]) -> Way:
    return lambda model, tmp: _written(model, write)


def _steps_of(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Way:
    """One step of an optimizer on everything."""

    def way(model: nn.Module, tmp: Path) -> Steps:
        wanted = [(p, p.requires_grad) for p in _floats(model)]
        for p, _ in wanted:
            p.requires_grad_(True).grad = _noise(p)
        make([p for p, _ in wanted]).step()
        for p, before in wanted:
            p.requires_grad_(before).grad = None
        yield

    return way


def _optimizers() -> dict[str, Way]:
    kinds = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD, "Adagrad": torch.optim.Adagrad}
    options = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    return {f"{k} {o}": _steps_of(functools.partial(kinds[k], lr=0.05, **options[o])) for k in kinds for o in options}


def _write_numpy(p: nn.Parameter) -> None:
    values = p.detach().numpy()
    values[...] = _changed(p).numpy()


def _set_data(p: nn.Parameter) -> None:
    p.data = _changed(p)


def _set_storage(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.set_(_changed(p))


def _swap_tensors(p: nn.Parameter) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(_changed(p), requires_grad=p.requires_grad))


def _lerp(p: nn.Parameter) -> None:
    with torch.inference_mode():
        p.detach().lerp_(_changed(p), 0.5)


def _from_vector(model: nn.Module, tmp: Path) -> Steps:
    parameters = _floats(model)
    nn.utils.vector_to_parameters(torch.cat([_changed(p).flatten() for p in parameters]), parameters)
    yield


def _other_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: _changed(t) if t.is_floating_point() else t.clone() for n, t in model.state_dict().items()}


def _load(model: nn.Module, tmp: Path, **options: Any) -> Steps:
    model.load_state_dict(_other_state(model), **options)
    yield


def _other_parameters(model: nn.Module, tmp: Path) -> Steps:
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                setattr(module, name, nn.Parameter(_changed(p), requires_grad=p.requires_grad))
    yield


def _other(module: nn.Module) -> nn.Module:
    made = copy.deepcopy(module)
    for p in made.parameters():
        p.data.copy_(_changed(p))
    return made


def _other_linears(model: nn.Module, tmp: Path) -> Steps:
    for parent, name, layer in _linears(model):
        made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).requires_grad_(layer.weight.requires_grad)
        made.weight.data.copy_(_changed(layer.weight))
        setattr(parent, name, made)
    yield


def _other_mlps(model: nn.Module, tmp: Path) -> Steps:
    for module in [m for m in model.modules() if isinstance(m, TransformerBlock)]:
        module.mlp = _other(module.mlp)
    yield


def _other_blocks(model: nn.Module, tmp: Path) -> Steps:
    for module in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for i, block in enumerate(module):
            module[i] = _other(block)
    yield


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def _write(model: nn.Module) -> None:
    for p in _floats(model):
        p.data.copy_(_changed(p))


def _parametrize(model: nn.Module, tmp: Path) -> Steps:
    layers = [layer for _, _, layer in _linears(model)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _Doubled())
    yield
    _write(model)
    yield
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight")
    yield SAME
    _write(model)
    yield


def _normed(norm: Callable[[nn.Module], Any], remove: Callable[[nn.Module], Any], same: bool = True) -> Way:
    """A norm of the weight, put in and, after a write, taken away."""

    def way(model: nn.Module, tmp: Path) -> Steps:
        layers = [(layer, layer.weight.requires_grad) for _, _, layer in _linears(model)]
        with torch.no_grad():
            for layer, _ in layers:
                norm(layer)
        yield SAME if same else None
        _write(model)
        yield
        for layer, trained in layers:
            remove(layer)
            layer.weight.requires_grad_(trained)
        yield SAME

    return way


def _prune(model: nn.Module, tmp: Path) -> Steps:
    layers = [layer for _, _, layer in _linears(model)]
    for layer in layers:
        prune.l1_unstructured(layer, "weight", amount=0.5)
    yield
    _write(model)
    yield
    for layer in layers:
        prune.remove(layer, "weight")
    yield SAME


def _averaged_in_and_out(model: nn.Module, tmp: Path, swap: Callable[[nn.Parameter, torch.Tensor], Any]) -> Steps:
    own = [(p, p.detach().clone()) for p in _floats(model)]
    average = [_changed(p) for p, _ in own]
    for (p, _), mean in zip(own, average, strict=True):
        swap(p, mean)
    yield
    for p, kept in own:
        swap(p, kept)
    yield


def _write_elsewhere(parameters: list[nn.Parameter]) -> None:
    """In another process. NumPy, because torch's threads do not live on in a forked one."""
    for p in parameters:
        values = p.detach().numpy()
        values *= 1.3


def _shared(model: nn.Module, tmp: Path) -> Steps:
    model.share_memory()
    yield SAME
    child = mp.get_context("fork").Process(target=_write_elsewhere, args=(_floats(model),))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    yield


def _zero(model: nn.Module, tmp: Path) -> Steps:
    dist.init_process_group("gloo", init_method=f"file://{tmp}.store", rank=0, world_size=1)
    try:
        yield from _steps_of(lambda p: ZeroRedundancyOptimizer(p, torch.optim.AdamW, lr=0.05, parameters_as_bucket_view=True))(model, tmp)
    finally:
        dist.destroy_process_group()


def _wide_and_back(model: nn.Module, tmp: Path) -> Steps:
    model.to(torch.float64)
    yield SAME
    _write(model)
    yield
    model.to(torch.float32)
    yield SAME


def _narrow(model: nn.Module, tmp: Path, dtype: torch.dtype) -> Steps:
    model.to(dtype)
    yield SAME
    _write(model)
    yield


def _offloaded(model: nn.Module, tmp: Path) -> Steps:
    """Weights that come and go, as others, in a place that was used before."""
    kept = [(p, p.detach().clone()) for p in _floats(model)]
    for factor in (1.2, 1.4):
        for p, _ in kept:
            p.data = torch.empty(0)
        for p, values in kept:
            p.data = values * factor
        yield


WAYS: dict[str, Way] = {
    **_optimizers(),
    "data.mul_": _way(lambda p: p.data.mul_(1.3).add_(0.05)),
    "numpy": _way(_write_numpy),
    "data =": _way(_set_data),
    "set_": _way(_set_storage),
    "swap_tensors": _way(_swap_tensors),
    "lerp_ in inference mode": _way(_lerp),
    "vector_to_parameters": _from_vector,
    "load_state_dict": _load,
    "load_state_dict, assigned": functools.partial(_load, assign=True),
    "other parameters": _other_parameters,
    "other linears": _other_linears,
    "other MLPs": _other_mlps,
    "other blocks": _other_blocks,
    "parametrization": _parametrize,
    "old weight_norm": _normed(nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "old spectral_norm": _normed(nn.utils.spectral_norm, nn.utils.remove_spectral_norm, same=False),
    "weight_norm": _normed(parametrizations.weight_norm, lambda layer: parametrize.remove_parametrizations(layer, "weight")),
    "prune": _prune,
    "average copied in and out": functools.partial(_averaged_in_and_out, swap=lambda p, values: p.data.copy_(values)),
    "average put in and out": functools.partial(_averaged_in_and_out, swap=lambda p, values: setattr(p, "data", values)),
    "another process": _shared,
    "ZeroRedundancyOptimizer": _zero,
    "float64 and back": _wide_and_back,
    "half": functools.partial(_narrow, dtype=torch.float16),
    "bfloat16": functools.partial(_narrow, dtype=torch.bfloat16),
    "offloaded": _offloaded,
}

FOLLOWED = {
    *("load_state_dict", "load_state_dict, assigned", "other parameters", "other linears", "other MLPs", "other blocks"),
}
"""What a frozen model follows: it must not raise, except where streams hold what the old weights made."""
CONVERTED = {"float64 and back", "half", "bfloat16"}
MODULES_CALLED = {"parametrization", "old weight_norm", "old spectral_norm", "weight_norm", "prune"}
"""Layers are called as modules: in training PyTorch's autocast keeps casts of their parameters until the end of its region."""
SEVERAL = {"AdamW fused", "load_state_dict", "other linears"}
"""Ways that are taken in every state; the others live and frozen."""
ONE_WRITE_OR_ANOTHER = {f"{kind} {option}" for kind in ("Adam", "SGD", "Adagrad") for option in ("plain", "foreach", "fused")}
"""Optimizers that are taken live alone, for to a frozen model a write is a write, and without the dense model."""


# ------------------------------------------------------------------------------------------------------------------------- the cells


def distance(found: Tensors, expected: Tensors) -> float:
    """The greatest difference over the greatest value, of the tensor where that is most."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b.numel()]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)) for a, b in pairs)


class State(NamedTuple):
    """How the models are used.

    Attributes:
        frozen: by ``deltakern.freeze``.
        autocast: to bfloat16, all calls of a cell in one region, for that is how long PyTorch's own casts of weights live.
        onednn: every product that may go to oneDNN does.
    """

    frozen: bool = False
    autocast: bool = False
    onednn: bool = False

    def __str__(self) -> str:
        return " ".join(("frozen" if self.frozen else "live", *(n for n in ("autocast", "onednn") if getattr(self, n))))


STATES = [State(f, **option) for f in (False, True) for option in ({}, {"autocast": True}, {"onednn": True})]


@functools.cache
def _as_built(name: str) -> nn.Module:
    return KINDS[name].build()


def fresh_copy(name: str, model: nn.Module) -> nn.Module:
    """A live model of the same weights that never ran: a new one; a copy where the names are not those of a new one."""
    made = _as_built(name)
    if made.state_dict().keys() == model.state_dict().keys():
        made = copy.deepcopy(made).to(_dtype(model))
        made.load_state_dict(model.state_dict())
        return made
    for module in model.modules():  # hooks put weights with a graph there, which cannot be copied, and do so anew at every call
        for key, value in module.__dict__.items():
            if isinstance(value, torch.Tensor):
                module.__dict__[key] = value.detach()
    made = deltakern.unfreeze(copy.deepcopy(model))
    with torch.no_grad():
        for module in made.modules():  # as they would before the module is called
            for hook in module._forward_pre_hooks.values():
                hook(module, ())
    return made


class Cell:
    """One model, all its entry points, and what a fresh model gave at the last look."""

    def __init__(self, name: str, state: State) -> None:
        self.name, self.kind, self.state = name, KINDS[name], state
        self.model = copy.deepcopy(_as_built(name))
        if state.frozen:
            deltakern.freeze(self.model)
        self.entries, self.raised = self.kind.entries(self.model), set()
        self.last: dict[str, Tensors] = {}
        self.run()

    @torch.no_grad()
    def run(self) -> None:
        """So that whatever is kept is kept."""
        self.last = {name: entry() for name, entry in self.entries.items()}

    @torch.no_grad()
    def look(self, what: str | None = None) -> None:
        """Every entry point gives what a fresh model gives, and something else than before, or raises; then it is frozen anew."""
        self.raised.clear()
        narrow = self.state.autocast or _dtype(self.model).itemsize < 4
        tol = 1e-3 if narrow else 1e-5
        fresh = self._fresh(narrow)
        for name, entry in self.entries.items():
            if self._iterates():
                fresh = self._fresh(narrow)
            run = fresh["sample" if name == "captured sample" else name]
            if isinstance(run, _Streamed):
                run.goal = entry.goal
            expected, last = run(), self.last[name]
            try:
                found = entry()
            except FROZEN_ERRORS as problem:
                if not self.state.frozen and name != "stream":
                    raise AssertionError(f"{name} of a live model: {problem}") from problem
                self.raised.add(name)
            else:
                assert (off := distance(found, expected)) <= tol, f"{name} is off by {off:.1e}"
            self.last[name] = expected
            if what is not SAME:
                assert distance(expected, last) > 10 * tol, f"{name}: nothing changed, so nothing was compared"
        if self.raised - {"stream"}:
            deltakern.freeze(deltakern.unfreeze(self.model))
            self.run()

    def _fresh(self, narrow: bool) -> dict[str, Entry]:
        """The entry points of a model that never ran. What rounds coarsely rounds elsewhere when frozen, and is compared frozen."""
        model = fresh_copy(self.name, self.model)
        alike = narrow or self._iterates()
        return self.kind.entries(deltakern.freeze(model) if self.state.frozen and alike else model)

    def _iterates(self) -> bool:
        """Whether a pass in training mode changes the model."""
        return any(name.endswith("weight_u") for name, _ in self.model.named_buffers())


CELLS = [
    (way, state)
    for way in WAYS
    for state in STATES
    if way in SEVERAL or state == State() or (state == State(frozen=True) and way not in ONE_WRITE_OR_ANOTHER)
]


@pytest.mark.parametrize(("way", "state"), CELLS, ids=str)
def test_every_entry_point_follows_its_weights(way: str, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if way != "swap_tensors":  # the emulated graphs hold parameters, which cannot be swapped then
        graph_tape.install(monkeypatch)
    if state.onednn:
        monkeypatch.setattr(products, "takes", lambda *_: True)
        monkeypatch.setattr(products, "ROWS_ONE_CALL", 1)
    seldom = way in ONE_WRITE_OR_ANOTHER or state.autocast or state.onednn
    for name in ("tok", "world") if seldom else KINDS:
        with torch.autocast("cpu", torch.bfloat16, enabled=state.autocast, cache_enabled=way not in MODULES_CALLED):
            cell = Cell(name, state)
            with contextlib.closing(WAYS[way](cell.model, tmp_path / name)) as steps:
                for number, what in enumerate(steps):
                    try:
                        cell.look(what)
                    except AssertionError as problem:
                        raise AssertionError(f"{way}, step {number} of {name}, {state}: {problem}") from problem
                    if way in FOLLOWED or (way in CONVERTED and what is SAME):
                        assert cell.raised <= {"stream"}, f"{way}, step {number} of {name}: {cell.raised} raised"


@pytest.mark.parametrize("name", ["tok", "world"])
def test_every_single_parameter_is_looked_at(name: str):
    """One parameter of a frozen model is written to, or lies elsewhere: what a live twin gives, or an error."""
    model, twin, reached = deltakern.freeze(copy.deepcopy(_as_built(name))), copy.deepcopy(_as_built(name)), set()
    names = ("decode", "tokenize") if name == "tok" else ("sample", "search")
    mine, theirs = ({n: KINDS[name].entries(m)[n] for n in names} for m in (model, twin))
    with torch.no_grad():
        for number, ((parameter, p), q) in enumerate(zip(model.named_parameters(), twin.parameters(), strict=True)):
            if name == "world" and not parameter.startswith("predictor."):
                continue
            before, own = {entry: run() for entry, run in mine.items()}, p.detach().clone()
            other = 2 * p + 3 * _noise(p)
            if number % 2:
                p.data = other
            else:
                p.data.copy_(other)
            q.data.copy_(p)
            for entry in names:
                expected = theirs[entry]()
                if distance(expected, before[entry]) > 1e-4:
                    reached.add(parameter)
                with contextlib.suppress(deltakern.FrozenWeightsError):
                    assert distance(mine[entry](), expected) < 1e-5, f"{entry} after a write to {parameter}"
            p.data.copy_(own)
            q.data.copy_(own)
            deltakern.freeze(deltakern.unfreeze(model))
    unused = {n for n, _ in model.named_parameters() if "mask_token" in n or (name == "world" and not n.startswith("predictor."))}
    assert sorted({n for n, _ in model.named_parameters()} - reached - unused) == []


class _Sampler(nn.Module):
    """``forward`` is what ``functional_call`` calls."""

    def __init__(self, model: nn.Module, entry: str) -> None:
        super().__init__()
        self.model = model
        self.entry = KINDS["world" if isinstance(model, deltakern.DeltaWorld) else "tok"].entries(model)[entry]

    @torch.no_grad()
    def forward(self) -> Tensors:
        return self.entry()


@pytest.mark.parametrize("entry", ["tokenize", "sample", "captured sample"])
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_functional_call_uses_the_parameters_of_the_call(entry: str, frozen: bool, monkeypatch: pytest.MonkeyPatch):
    """Every iteration's parameters are freed before the next ones are made, so that addresses are used again."""
    graph_tape.install(monkeypatch)
    monkeypatch.setattr(products, "takes", lambda *_: True)
    name = "tok" if entry == "tokenize" else "world"
    model, twin = copy.deepcopy(_as_built(name)), copy.deepcopy(_as_built(name))
    caller = _Sampler(deltakern.freeze(model) if frozen else model, entry)
    reference = _Sampler(twin, "sample" if name == "world" else entry)
    own, addresses, last = {n: p.detach().clone() for n, p in caller.named_parameters()}, [], caller()
    for i in range(30 if entry != "captured sample" else 6):
        parameters = {n: p * (1 + 0.1 * ((i % 3) + 1)) + 0.002 * (i + 1) for n, p in own.items()}
        addresses += [p.data_ptr() for p in parameters.values()]
        found = torch.func.functional_call(caller, parameters, ())
        for n, p in reference.named_parameters():
            p.data.copy_(parameters[n])
        assert distance(found, reference()) < 5e-5, f"iteration {i}"
        assert distance(found, last) > 1e-3
        last = found
        del parameters, found
    assert len(set(addresses)) < len(addresses)
    for n, p in reference.named_parameters():
        p.data.copy_(own[n])
    assert distance(caller(), reference()) < 1e-5


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_a_compiled_block_follows_its_weights(frozen: bool, tmp_path: Path):
    made = copy.deepcopy(_as_built("tok"))
    block, rope = made.encoder_blocks[0], made._rope(PIXELS)
    if frozen:
        deltakern.freeze(block)
    compiled, last = torch.compile(block, backend="aot_eager", fullgraph=True), torch.zeros(2, 7, 64)

    @torch.no_grad()
    def look() -> None:
        nonlocal last
        entry = Residual(torch.cat((TOKENS[:, :1], BEFORE), 1))
        found = compiled(entry, rope, num_prefix=1).add()
        fresh = deltakern.unfreeze(copy.deepcopy(block))
        assert distance((found,), (fresh(entry, rope, num_prefix=1).add(),)) < 1e-5
        assert distance((found,), (last,)) > 1e-4
        last = found

    look()
    for way in ("data.mul_", "AdamW fused", "numpy", "data =", "load_state_dict", "other parameters"):
        for _ in WAYS[way](block, tmp_path):
            look()


# ------------------------------------------------------------------------------------------------------------ at the sizes people use


def _wide_world() -> deltakern.DeltaWorld:
    sizes = {"predictor_hidden_size": 768, "predictor_num_heads": 12, "rope_axis_sizes": (60,), "mlp_ratio": 4}
    return small.world(num_samples_train=256, layer_scale_init=1.0, **sizes)


@pytest.mark.parametrize(("how", "steps", "candidates"), [("onednn", 10, 256), ("as here", 2, 256), ("autocast", 3, 32)])
def test_a_wide_predictor_finds_the_winners_of_its_weights(how: str, steps: int, candidates: int, monkeypatch: pytest.MonkeyPatch):
    """At every step of fused AdamW, in a search so big that live weights are reordered for it."""
    if how == "onednn":
        monkeypatch.setattr(products, "takes", lambda *_: True)
    reordered, reorder, best, found = [], products.reorder, deltakern.DeltaWorld._best_queries, []
    monkeypatch.setattr(products, "reorder", lambda w: (reordered.append(1), reorder(w))[1])
    monkeypatch.setattr(deltakern.DeltaWorld, "_best_queries", lambda *args: (found.append(best(*args)), found[-1])[1])
    sizes = {"predictor_hidden_size": 768, "predictor_num_heads": 12, "rope_axis_sizes": (60,)}
    built = small.world(num_samples_train=candidates, layer_scale_init=1.0, **sizes).train()
    world = copy.deepcopy(built)
    optimizer = torch.optim.AdamW(world.predictor.parameters(), lr=1e-3, fused=True)
    tokens, times, queries = torch.randn(8, 2, 64), TIMES[:1, :2].expand(8, -1), torch.randn(8, 1, candidates, 768)
    for step in range(steps):
        fresh, made = copy.deepcopy(built), []
        fresh.load_state_dict(world.state_dict())
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            for model in (world, fresh):
                prediction, target = model.train_on_tokens(tokens, times, CRITERION, queries=queries)
                made.append(prediction)
        mine, theirs = found[-2:]
        assert torch.equal(mine, theirs), f"step {step}: other winners than a fresh model's"
        assert distance(made[:1], made[1:]) < (1e-3 if how == "autocast" else 1e-5)
        optimizer.zero_grad()
        CRITERION(made[0], target).mean().backward()
        optimizer.step()
    assert not all(torch.equal(found[0], other) for other in found)
    if how != "as here":
        assert bool(reordered) is (how == "onednn")


# ------------------------------------------------------------------------------------------------------------------ freezing, unfreezing


def _block() -> Block:
    return copy.deepcopy(_as_built("tok").encoder_blocks[0])


MODELS = {
    **{name: functools.partial(lambda name: copy.deepcopy(_as_built(name)), name) for name in KINDS},
    "block": _block,
    "backbone": small.backbone,
}


def _call(model: nn.Module) -> Tensors:
    """Something that most of a model's weights go into."""
    if isinstance(model, Block):
        rope = _as_built("tok")._rope(PIXELS)
        return (model(Residual(torch.cat((TOKENS[:, :1], BEFORE), 1)), rope, num_prefix=1).add(),)
    if isinstance(model, deltakern.DINOv3):
        return (model(PIXELS[:, :2]),)
    name = next(n for n in KINDS if type(_as_built(n)) is type(model))
    entries = KINDS[name].entries(model)
    return entries[{"tok": "reconstruct", "world": "rollout", "dense": "forward"}[name]]()


def _wants(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad]


def _modes(model: nn.Module) -> list[bool]:
    return [m.training for m in model.modules()]


@pytest.mark.parametrize("name", MODELS)
def test_freezing_and_unfreezing(name: str):
    model = MODELS[name]()
    trained = next(p for p in model.parameters()) if name == "block" else None
    if trained is not None:
        trained.requires_grad_(False)  # stays so
    wanted, keys = _wants(model), list(model.state_dict())
    model.train()
    with torch.no_grad():
        live = _call(model.eval())
    model.train()
    assert deltakern.freeze(model) is model
    assert deltakern.is_frozen(model)
    assert not any(_modes(model))
    assert not _wants(model)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert distance(_call(model), live) < 1e-5
    assert deltakern.unfreeze(model) is model
    assert not deltakern.is_frozen(model)
    assert not any(_modes(model))
    assert _wants(model) == wanted
    with torch.no_grad():
        assert distance(_call(model), live) < 1e-5
    model.train()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("part", ["", "predictor", "tokenizer", "tokenizer.backbone", "predictor.blocks.1"])
def test_the_context_restores_everything(part: str, fails: bool):
    world = MODELS["world"]().train()
    world.predictor.head.requires_grad_(False)
    if part:
        deltakern.freeze(world.get_submodule(part))
    wanted, modes, stores = _wants(world), _modes(world), [m.__dict__.get("_frozen") for m in world.modules()]
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext(), deltakern.frozen(world) as inside:
        assert inside is world
        assert deltakern.is_frozen(world)
        assert not _wants(world)
        with torch.no_grad():
            found = _call(world)
        with deltakern.frozen(world):
            pass
        assert deltakern.is_frozen(world)
        if fails:
            raise ZeroDivisionError
    assert (_wants(world), _modes(world)) == (wanted, modes)
    assert all(now is before for now, before in zip((m.__dict__.get("_frozen") for m in world.modules()), stores, strict=True))
    with torch.no_grad():
        world.predictor.blocks[0].mlp.down_proj.weight.mul_(3)
        assert distance(_call(world), found) > 1e-3


@pytest.mark.parametrize("name", ["tok", "world", "dense"])
def test_a_frozen_model_does_not_train(name: str):
    model = deltakern.freeze(MODELS[name]())
    with pytest.raises(deltakern.FrozenWeightsError, match="does not train"):
        model.train()
    assert not any(_modes(model))
    model.requires_grad_(True)
    arguments = {} if name == "tok" else {"timestamps": TIMES, "ctx_len": 2, "queries": QUERIES[:, : model.num_samples, :2]}
    with pytest.raises(deltakern.FrozenWeightsError, match="does not train"):
        model(PIXELS, **arguments)
    with torch.no_grad():
        assert distance(_call(model), _call(MODELS[name]())) < 1e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_frozen_and_go_their_own_way(name: str, how: str):
    model = MODELS[name]()
    wanted = _wants(model)
    deltakern.freeze(model)
    with torch.no_grad():
        before = _call(model)
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert deltakern.is_frozen(twin)
        _write(twin)
        after = _call(twin)  # what it derives it derives now
        assert distance(after, before) > 1e-3
        assert distance(_call(model), before) < 1e-6
        deltakern.unfreeze(twin)
        assert _wants(twin) == wanted
        assert distance(_call(twin), after) < 1e-5
        assert deltakern.is_frozen(model)
        assert not _wants(model)


def test_a_frozen_backbone_in_a_model_that_trains():
    tok, twin = MODELS["tok"]().train(), MODELS["tok"]().train()
    deltakern.freeze(tok.backbone)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (tok, twin)]
    for _ in range(3):
        losses = []
        for model, optimizer in zip((tok, twin), optimizers, strict=True):
            prediction, target = model.train()(PIXELS)
            optimizer.zero_grad()
            (prediction - target).square().mean().backward()
            optimizer.step()
            losses.append(prediction.detach())
        assert distance(losses[:1], losses[1:]) < 1e-5
    assert deltakern.is_frozen(tok.backbone)
    assert not deltakern.is_frozen(tok)


@pytest.mark.parametrize("foreign", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), torch.zeros(2), "model"], ids=str)
def test_what_is_foreign_is_not_frozen(foreign: Any):
    with pytest.raises(TypeError, match="of deltakern's"):
        deltakern.freeze(foreign)


def test_gradients_flow_to_the_inputs_of_a_frozen_model():
    world, twin = deltakern.freeze(MODELS["world"]()), MODELS["world"]()
    rope = world.tokenizer._rope(PIXELS)

    def through(model: nn.Module) -> Tensors:
        z, x, tokens, queries = (t.clone().requires_grad_() for t in (TOKENS[:, :1], BEFORE, TOKENS[:, :3], QUERIES))
        features = model.tokenizer.decode(z, x, rope)
        token = model.tokenizer.encode(x, features, rope)
        predicted = model.predict(tokens, TIMES, queries)
        loss = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in (features, token, predicted))
        return torch.autograd.grad(loss, (z, x, tokens, queries))

    for _ in range(2):
        assert distance(through(world), through(twin)) < 1e-5
    world.predictor.blocks[0].attention.out_proj.requires_grad_(True)
    with pytest.raises(deltakern.FrozenWeightsError):
        through(world)


def test_explain_says_what_becomes_of_the_weights():
    tok = MODELS["tok"]()
    block, predictor_block = tok.encoder_blocks[0], MODELS["world"]().predictor.blocks[0]
    for made in (block, predictor_block):
        assert "live" in str(explain(made))
        assert "frozen" not in str(explain(made))
        deltakern.freeze(made)
        said = explain(made).parts
        assert said["mlp, down"] == "frozen: derived once"
        assert said["layer_scale1"].startswith("frozen: folded into the projection")
        assert said["norm1"] == "weights are read at every use"
        deltakern.unfreeze(made)
        assert explain(made).parts["mlp, down"].startswith("live")
    block.mlp.gate_proj.register_forward_hook(lambda *_: None)
    parametrize.register_parametrization(block.attention.o_proj, "weight", _Doubled())
    said = explain(block).parts
    assert said["mlp, gate and up"] == "modules are called, because mlp.gate_proj has hooks"
    assert said["attention, output"].startswith("modules are called, because attention.o_proj is a ")
    assert said["mlp, down"].startswith("live")
    with pytest.raises(TypeError, match="explain: expected"):
        explain(tok)


@pytest.mark.parametrize("warm", [False, True])
def test_threads_that_share_a_frozen_model(warm: bool):
    world, clips = deltakern.freeze(MODELS["world"]()), _draw(8, 2, 2, 64)
    with torch.no_grad():
        expected = [MODELS["world"]().sample(clips[i], TIMES, 2, 3, seed=i) for i in range(8)]
    if warm:
        world.sample(clips[0], TIMES, 2, 3, seed=0)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: world.sample(clips[i % 8], TIMES, 2, 3, seed=i % 8), range(32)))
    assert all(distance((tokens,), (expected[i % 8],)) < 1e-5 for i, tokens in enumerate(found))
    world.predictor.blocks[1].attention.out_proj.weight.data.add_(1)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(world.sample, clips[i], TIMES, 2, 3, seed=i) for i in range(8)]
    assert all(isinstance(call.exception(), deltakern.FrozenWeightsError) for call in calls)


@pytest.mark.parametrize("name", MODELS)
def test_what_was_derived_in_inference_mode_serves_outside(name: str):
    model = deltakern.freeze(MODELS[name]())
    with torch.no_grad():
        live = _call(MODELS[name]())
    for context in (torch.inference_mode, torch.no_grad, contextlib.nullcontext, torch.inference_mode):
        with context():
            assert distance(tuple(t.detach() for t in _call(model)), live) < 1e-5
    if name != "backbone":
        x = BEFORE.clone().requires_grad_()
        tok = getattr(model, "tokenizer", model)
        if name in ("tok", "world"):
            tok.decode(TOKENS[:, :1], x, tok._rope(PIXELS)).sum().backward()
            assert x.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------ what was silent or broke once


@pytest.mark.parametrize("part", ["", "predictor"])
def test_freezing_twice_and_unfreezing(part: str):
    world = MODELS["world"]()
    wanted = _wants(world)
    deltakern.freeze(world.get_submodule(part))
    deltakern.freeze(world)
    assert _wants(deltakern.unfreeze(world)) == wanted


def test_a_frozen_block_does_not_train():
    block = deltakern.freeze(_block())
    with pytest.raises(deltakern.FrozenWeightsError):
        block.train()
    assert not any(_modes(block))


def test_storage_that_moves_after_one_call_is_caught():
    tok = deltakern.freeze(MODELS["tok"]())
    with torch.no_grad():
        _call(tok)
        weight = tok.decoder_blocks[0].mlp.down_proj.weight
        other = weight.detach().clone()
        other[3] += 5
        weight.data = other
        with pytest.raises(deltakern.FrozenWeightsError):
            _call(tok)


def test_what_is_derived_while_another_thread_looks_is_guarded(monkeypatch: pytest.MonkeyPatch):
    world, keep = deltakern.freeze(MODELS["world"]()), weights.Frozen._keep

    def interrupted(self: weights.Frozen, at: Any, parameters: Any, make: Callable[[], Any]) -> Any:
        def made() -> Any:
            value = make()
            self.check()  # of another thread's call
            return value

        return keep(self, at, parameters, made)

    with monkeypatch.context() as patch:
        patch.setattr(weights.Frozen, "_keep", interrupted)
        world.sample(TOKENS[:, :2], TIMES, 2, 3, seed=1)
    names = [
        n for n, _ in world.predictor.named_parameters() if "kv_proj" in n or "down_proj" in n or "lambda1" in n
    ]  # what float32 derives of
    for p in map(world.predictor.get_parameter, names):
        own = p.detach().clone()
        p.data.copy_(_changed(p))
        with pytest.raises(deltakern.FrozenWeightsError):
            world.sample(TOKENS[:, :2], TIMES, 2, 3, seed=1)
        p.data.copy_(own)
        world.sample(TOKENS[:, :2], TIMES, 2, 3, seed=1)


class _Adapter(nn.Module):
    """A layer with a switch that is no weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.on = layer, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (3 if self.on else 1)


def test_an_adapter_in_the_backbone_of_a_frozen_model_is_switched_off():
    tok = MODELS["tok"]()
    mlp = tok.backbone.backbone.model.layer[0].mlp
    mlp.up_proj = _Adapter(mlp.up_proj)
    deltakern.freeze(tok)
    with torch.no_grad():
        before = tok.tokenize(PIXELS[:, :1])
        mlp.up_proj.on = False
        found = tok.tokenize(PIXELS[:, :1])
        assert distance((found,), (before,)) > 1e-3
        assert distance((found,), (copy.deepcopy(tok).tokenize(PIXELS[:, :1]),)) < 1e-5


def _other_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: 3 * nn.functional.linear(x, layer.weight, layer.bias)


def _other_class(layer: nn.Linear) -> None:
    layer.__class__ = type("Tripled", (nn.Linear,), {"forward": lambda self, x: 3 * nn.functional.linear(x, self.weight, self.bias)})


@pytest.mark.parametrize("change", [_other_forward, _other_class])
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_a_captured_sample_follows_another_forward(change: Callable[[nn.Linear], None], frozen: bool, monkeypatch: pytest.MonkeyPatch):
    graph_tape.install(monkeypatch)
    world = MODELS["world"]()
    if frozen:
        deltakern.freeze(world)
    before = world.sample(TOKENS[:, :2], TIMES, 2, 3, seed=1)
    change(world.predictor.blocks[0].mlp.up_proj)
    expected = world.sample(TOKENS[:, :2], TIMES, 2, 3, seed=1, cuda_graph=False)
    assert distance((expected,), (before,)) > 1e-3
    assert distance((world.sample(TOKENS[:, :2], TIMES, 2, 3, seed=1),), (expected,)) < 1e-5


def _second_hook(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda module, args, out: 3 * out)


@pytest.mark.parametrize("change", [_other_forward, _other_class, _second_hook])
def test_a_stream_notices_another_forward(change: Callable[[nn.Linear], None]):
    world = MODELS["world"]()
    world.tokenizer.encoder_blocks[1].mlp.register_forward_hook(lambda *_: None)
    stream = world.stream()
    stream.push(PIXELS[0, 0], 0.0)
    change(world.tokenizer.encoder_blocks[0].mlp.up_proj)
    with pytest.raises(StaleCacheError):
        stream.sample([0.1], 3, seed=1)


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("name", ["attention.q_proj", "attention.v_proj", "attention.o_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_a_layer_without_bias_in_the_place_of_one_with(name: str, frozen: bool):
    tok = MODELS["tok"]()
    block = tok.decoder_blocks[0]
    layer = block.get_submodule(name)
    part, _, attribute = name.partition(".")
    setattr(block.get_submodule(part), attribute, nn.Linear(layer.in_features, layer.out_features, bias=False))
    with torch.no_grad():
        rope = tok._rope(PIXELS)
        expected = tok.decode(TOKENS[:, :1], BEFORE, rope)
    if frozen:
        deltakern.freeze(tok)
    assert distance((tok.decode(TOKENS[:, :1], BEFORE, rope).detach(),), (expected,)) < 1e-5


def test_a_layer_without_out_features_can_be_sampled_with():
    world = MODELS["world"]()
    expected = world.sample(TOKENS[:, :2], TIMES, 2, 3, seed=1)
    mlp = world.predictor.blocks[0].mlp
    mlp.up_proj = nn.Sequential(mlp.up_proj)
    assert distance((world.sample(TOKENS[:, :2], TIMES, 2, 3, seed=1),), (expected,)) < 1e-5


def test_a_captured_sample_follows_eps(monkeypatch: pytest.MonkeyPatch):
    graph_tape.install(monkeypatch)
    world = MODELS["world"]()
    before = world.sample(TOKENS[:, :2], TIMES, 2, 3, seed=1)
    world.predictor.norm.eps = 10.0
    expected = world.sample(TOKENS[:, :2], TIMES, 2, 3, seed=1, cuda_graph=False)
    assert distance((expected,), (before,)) > 1e-3
    assert distance((world.sample(TOKENS[:, :2], TIMES, 2, 3, seed=1),), (expected,)) < 1e-5


def test_a_frozen_tokenizer_follows_its_backbones_weights():
    tok, other = deltakern.freeze(MODELS["tok"]()), small.backbone(seed=7)
    with torch.no_grad():
        before = tok.tokenize(PIXELS)
        tok.backbone.load_state_dict(other.state_dict())
        found = tok.tokenize(PIXELS)
        assert distance((found,), (before,)) > 1e-3
        assert distance((found,), (deltakern.unfreeze(copy.deepcopy(tok)).tokenize(PIXELS),)) < 1e-5


def test_a_copied_rollout_goes_on():
    world = MODELS["world"]().eval()
    with torch.no_grad():
        state = world.rollout_step(world.rollout_init(PIXELS, 1), 1, TIMES)[2]
        queries = torch.randn(len(PIXELS), world.num_samples, world.predictor_hidden_size)
        made = [world.rollout_step(s, 2, TIMES, queries=queries)[0] for s in (state, copy.deepcopy(state))]
    assert torch.equal(*made)


def test_a_sparse_weight_in_a_frozen_model():
    tok = MODELS["tok"]().eval()
    layer = tok.encoder_blocks[0].mlp.down_proj
    with torch.no_grad():
        expected = tok.tokenize(PIXELS)
        layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)
        assert distance((tok.tokenize(PIXELS),), (expected,)) < 1e-5
        assert distance((deltakern.freeze(tok).tokenize(PIXELS),), (expected,)) < 1e-5
        assert "sparse_csr" in str(explain(tok.encoder_blocks[0]))


def test_what_is_derived_in_a_part_goes_when_the_part_is_unfrozen_or_loaded_within():
    """A whole model's frozen parts, and a frozen part in a whole that is frozen for a while, never keep each other's weights."""
    world = MODELS["world"]().eval()
    deltakern.freeze(world.tokenizer)
    state = {k: v.clone() for k, v in world.state_dict().items()}
    for name, value in state.items():
        if "o_proj.weight" in name:
            value[-3:] += 0.5
    with torch.no_grad():
        world.tokenizer.tokenize(PIXELS)
        with deltakern.frozen(world):
            world.load_state_dict(state)
        found = world.tokenizer.tokenize(PIXELS)
        assert distance((found,), (deltakern.unfreeze(copy.deepcopy(world)).tokenizer.tokenize(PIXELS),)) < 1e-5
        deltakern.freeze(world)
        before = world.sample(TOKENS[:, :2], TIMES, 2, 3, seed=1)
        for block in world.predictor.blocks:
            deltakern.unfreeze(block)
            block.attention.kv_proj.weight[-20:] += 0.5
        found = world.sample(TOKENS[:, :2], TIMES, 2, 3, seed=1)
        assert distance((found,), (before,)) > 1e-3
        assert distance((found,), (deltakern.unfreeze(copy.deepcopy(world)).sample(TOKENS[:, :2], TIMES, 2, 3, seed=1),)) < 1e-5


def test_a_users_code_within_a_call_may_write_weights():
    """The choice of samples is the user's code: what follows it has the weights that it leaves, or says so."""
    for state in ("live", "frozen", "stream"):
        world = MODELS["world"]().eval()

        def writes(tokens: torch.Tensor, world: Any = world) -> int:
            for parameter in world.tokenizer.decoder_blocks.parameters():
                parameter.data.mul_(1.1)
            return 0

        if state == "frozen":
            deltakern.freeze(world)
        arguments = (PIXELS[:, :2], TIMES[:, :3], 1, 3)
        world.rollout(*arguments, [0], seed=1)
        if state == "live":
            found = world.rollout(*arguments, writes, seed=1).features
            expected = copy.deepcopy(world).rollout(*arguments, [0], seed=1).features
            assert distance((found,), (expected,)) < 1e-5
        elif state == "frozen":
            with pytest.raises(deltakern.FrozenWeightsError):
                world.rollout(*arguments, writes, seed=1)
        else:
            stream = world.stream()
            stream.push(PIXELS[0, 0], 0.0)
            stream.rollout([0.1], 3, [0], seed=1)
            with pytest.raises(StaleCacheError):
                stream.rollout([0.1], 3, writes, seed=1)


def test_another_model_within_a_streams_call_is_not_kept():
    world, critic, seen = MODELS["world"]().eval(), small.tokenizer(5).eval(), []
    world.predictor.register_forward_hook(lambda *_: seen.append(critic.tokenize(PIXELS)))
    stream = world.stream()
    stream.push(PIXELS[0, 0], 0.0)
    with torch.no_grad():
        stream.sample([0.1], 3, seed=1)
        for parameter in critic.parameters():
            parameter.mul_(1.2)
        stream.sample([0.1], 3, seed=1)
        assert distance((seen[-1],), (copy.deepcopy(critic).tokenize(PIXELS),)) < 1e-5
        assert distance((seen[-1],), (seen[0],)) > 1e-3


def test_a_task_that_outlives_the_call_it_began_in_has_calls_of_its_own():
    world, contexts = MODELS["world"]().eval(), []

    def which(tokens: torch.Tensor) -> int:
        return 0

    world.predictor.register_forward_hook(lambda *_: contexts.append(contextvars.copy_context()))
    world.sample(TOKENS[:, :2], TIMES, 2, 3, seed=1)
    world.predictor._forward_hooks.clear()

    def later() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return world.sample(TOKENS[:, :2], TIMES, 2, 3, seed=1)

    for _ in range(2):
        found = contexts[0].run(later)
        assert distance((found,), (contextvars.Context().run(lambda: copy.deepcopy(world) and later()),)) < 1e-3
        for parameter in world.predictor.parameters():
            parameter.data.mul_(1.2)


def test_a_failed_push_changes_no_stream():
    world = MODELS["world"]().eval()
    streams = [world.stream(first="previous") for _ in range(2)]
    for stream in streams:
        stream.push(PIXELS[0, 0], 0.0)

    def full(*_: Any) -> None:
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(world.predictor), "project", full)
        with pytest.raises(MemoryError):
            streams[0].push(PIXELS[0, 1], 0.1)
    found = [stream.push(PIXELS[0, 1], 0.1) for stream in streams]
    assert torch.equal(*found)
    assert torch.equal(streams[0].tokens, streams[1].tokens)


def test_a_refused_train_sets_no_mode_above_the_frozen_part():
    tok = MODELS["tok"]().eval()
    deltakern.freeze(tok.decoder_blocks)
    with pytest.raises(deltakern.FrozenWeightsError):
        tok.train()
    assert not any(_modes(tok))


@pytest.mark.filterwarnings("ignore:.*trace", "ignore:Converting a tensor")
def test_a_trace_of_a_frozen_model_reads_its_parameters():
    tok, rope = deltakern.freeze(MODELS["tok"]()), MODELS["tok"]()._rope(PIXELS)
    x, y = torch.randn(2, 1, 6, 64).unbind()
    with torch.no_grad():
        tok.encode(x, y, rope)
        traced = torch.jit.trace(lambda a, b: tok.encode(a, b, rope), (x, y), check_trace=False)
        assert distance((traced(x, y),), (tok.encode(x, y, rope),)) < 1e-5


def test_fake_tensors_leave_nothing_in_a_frozen_model():
    from torch._subclasses.fake_tensor import FakeTensorMode

    tok = deltakern.freeze(MODELS["tok"]())
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            tok.tokenize(PIXELS)
        found = tok.tokenize(PIXELS)
        assert distance((found,), (deltakern.unfreeze(copy.deepcopy(tok)).tokenize(PIXELS),)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (768,), (64,), (3,), (1,)])
def test_samples_reach_from_end_to_end(shape: tuple[int, ...], dtype: torch.dtype):
    """A write to the first or the last sixth of a parameter is seen, and one as another view of the same memory."""
    some = max(1, shape[0] // 6)
    for part in (slice(None, some), slice(-some, None)):
        tensor = torch.randn(shape, dtype=dtype)
        guard = weights.Guard([tensor])
        assert guard.changed() is None
        tensor[part] += 1
        assert guard.changed() is tensor
    parameter = nn.Parameter(torch.randn(shape, dtype=dtype))
    guard = weights.Guard([parameter])
    parameter.data = parameter.data.flatten()[: max(1, parameter.numel() // 2)] if parameter.numel() > 1 else parameter.data[None]
    assert guard.changed() is parameter
