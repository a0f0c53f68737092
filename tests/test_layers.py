"""Layers that are anything but plain are called as modules: hooks fire, adapters act and learn, quantised and offloaded layers run."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import small
import torch
import torch.nn.functional as F
from compare import relative_rmse
from torch import nn
from torch.func import functional_call
from torch.nn.modules import module as modules
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm

import deltakern
from deltakern import DeltaTok, DeltaWorld, FrozenWeightsError, Savings
from deltakern.nn import Block, LayerScale, Residual, explain
from deltakern.nn.block import Rope
from deltakern.nn.weights import Freezable

pytestmark = pytest.mark.filterwarnings("ignore:.*the PyTorch reference runs instead of a kernel:UserWarning")

WIDTH, HEADS, HIDDEN, PATCHES = 32, 2, 48, 6
KINDS = (nn.Linear, nn.LayerNorm, LayerScale, nn.Embedding, nn.Conv2d)
STATES = ("live", "frozen")
ROWS = ("all", "first", "rest")
MODELS = [dict(zip(("use_qk_norm", "qk_norm_order"), norm)) | dict(use_gated_attn=gated, use_swiglu=swiglu)
          for norm in ((False, "pre_rope"), (True, "pre_rope"), (True, "post_rope")) for gated in (False, True) for swiglu in (False, True)]
BLOCKS = [dict(qk_norm=norm, gated=gated, swiglu=swiglu)
          for norm in (None, "pre_rope", "post_rope") for gated in (False, True) for swiglu in (False, True)]
RELEASED = {"qk_norm": "pre_rope", "gated": True, "swiglu": True}

# Containers of the released names, whose parts are called and they are not.
NEVER_CALLED = ("tokenizer.backbone.backbone.model", "tokenizer.encoder_blocks", "tokenizer.decoder_blocks", "predictor.blocks",
                "tokenizer.backbone.backbone.model.layer", "backbone.backbone.model", "backbone.backbone.model.layer")


def _name(options: dict) -> str:
    return ",".join(str(v) for v in options.values())


# ------------------------------------------------------------------------------------------------------------- blocks


def _stir(module: nn.Module) -> nn.Module:
    """Weights that all matter."""
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
        if "layer_scale" in name:
            nn.init.uniform_(parameter, 0.3, 0.9)
    return module


def _block(**options) -> Block:
    torch.manual_seed(0)
    return _stir(Block(WIDTH, HEADS, HIDDEN, **{**RELEASED, **options}))


def _input() -> tuple[torch.Tensor, Rope]:
    """Rows (2,1+N,D), and tables of N patches."""
    generator = torch.Generator().manual_seed(1)
    angles = torch.randn(PATCHES, WIDTH // HEADS // 2, generator=generator).repeat(1, 2)
    return torch.randn(2, 1 + PATCHES, WIDTH, generator=generator), (angles.cos(), angles.sin())


def _run(block: Block, rows: str = "all", x: torch.Tensor | None = None) -> torch.Tensor:
    given, rope = _input()
    return block(Residual(given if x is None else x), rope, num_prefix=1, rows=rows).add()


def _infer(block: Block, rows: str = "all") -> torch.Tensor:
    with torch.no_grad():
        return _run(block, rows)


def _dense(block: Block, rows: str = "all") -> torch.Tensor:
    """What a block is by definition: every module called, one after the other."""
    x, rope = _input()
    attention, mlp = block.attention, block.mlp
    kept = {"all": slice(None), "first": slice(1), "rest": slice(1, None)}[rows]
    cos, sin = (F.pad(t, (0, 0, 1, 0), value=v)[:, None] for t, v in zip(rope, (1.0, 0.0), strict=True))

    def turn(t: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        if norm is not None and attention.qk_norm == "pre_rope":
            t = norm(t)
        first, second = t.chunk(2, -1)
        t = t * cos[: t.shape[1]] + torch.cat((-second, first), -1) * sin[: t.shape[1]]
        return norm(t) if norm is not None and attention.qk_norm == "post_rope" else t

    normed = block.norm1(x)
    queries = normed[:, :1] if rows == "first" else normed
    q_norm, k_norm = attention.norms() or (None, None)
    q, k, v = (layer(t).unflatten(-1, (HEADS, -1)) for layer, t in
               ((attention.q_proj, queries), (attention.k_proj, normed), (attention.v_proj, normed)))
    q, k = turn(q, q_norm), turn(k, k_norm)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    if attention.gated:
        mixed = mixed * attention.attn_gate(queries).sigmoid()[..., None]
    mixed = mixed if rows == "first" else mixed[:, kept]
    x = x[:, kept] + block.layer_scale1(attention.o_proj(mixed.flatten(2)))
    normed = block.norm2(x)
    hidden = F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed) if hasattr(mlp, "gate_proj") else F.gelu(mlp.up_proj(normed))
    return x + block.layer_scale2(mlp.down_proj(hidden))


def _layers(module: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, kinds or KINDS)]


def _close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5, what: str = "") -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, msg=lambda m: f"{what}: {m}" if what else m)


def _same_gradients(actual: list, expected: list, names: list[str], tolerance: float = 1e-5) -> None:
    for name, a, b in zip(names, actual, expected, strict=True):
        assert a is not None, f"no gradient for {name}"
        assert b.abs().max() > 0, f"the gradient of {name} is zero"
        assert relative_rmse(a, b) < tolerance, f"gradient of {name}: {relative_rmse(a, b):.1e}"


# ------------------------------------------------------------------------------------------------------------- models


def _world(seed: int = 0, tokenizer_options: dict | None = None, **kwargs) -> DeltaWorld:
    return small.world(seed, {"use_rope_aug": False, **(tokenizer_options or {})}, **kwargs).eval()


FRAMES, TIMES = small.clip(frames=4)
SIZE = 64
_DRAW = torch.Generator().manual_seed(2)
TOKENS = torch.randn(2, 3, SIZE, generator=_DRAW)
FEATURES = torch.randn(2, PATCHES, SIZE, generator=_DRAW)
NOISE = torch.randn(2, 3, 2, SIZE, generator=_DRAW)  # of 3 samples and 2 steps
CANDIDATES = torch.randn(2, 2, 6, SIZE, generator=_DRAW)
LOSS = nn.SmoothL1Loss(reduction="none")


def _queries(world: deltakern.DeltaWorld | deltakern.DINOWorld) -> dict[str, torch.Tensor]:
    return {"queries": NOISE} if world.use_bom else {}


def _features(world: DeltaWorld) -> torch.Tensor:
    return world.tokenizer.features(FRAMES)


def _tokenize(world: DeltaWorld) -> torch.Tensor:
    return world.tokenizer.tokenize(FRAMES)


def _decode(world: DeltaWorld) -> torch.Tensor:
    return world.tokenizer.decode(TOKENS[:, :1], FEATURES, world.tokenizer._rope(FRAMES))


def _reconstruct(world: DeltaWorld) -> torch.Tensor:
    return world.tokenizer(FRAMES)[0]


def _sample(world: DeltaWorld) -> torch.Tensor:
    return world.sample(TOKENS[:, :2], TIMES, 2, **_queries(world))


def _rollout(world: DeltaWorld) -> torch.Tensor:
    return world.rollout(FRAMES[:, :2], TIMES, 2, **_queries(world)).features


def _evaluate(world: deltakern.DeltaWorld | deltakern.DINOWorld) -> torch.Tensor:
    return world(FRAMES, TIMES, None, 2, **_queries(world))[0]


def _train_tokenizer(world: DeltaWorld) -> torch.Tensor:
    world.tokenizer.requires_grad_(True).train()
    world.tokenizer.backbone.requires_grad_(False)
    out = world.tokenizer(FRAMES)[0]
    world.tokenizer.eval()
    return out


def _train_on_tokens(world: DeltaWorld) -> torch.Tensor:
    world.train()
    out = world.train_on_tokens(TOKENS, TIMES[:, :3], LOSS, **({"queries": CANDIDATES} if world.use_bom else {}))[0]
    world.eval()
    return out


# What an entry point calls, by the beginning of its name, and what of that it does not: itself where it is not its forward.
ENCODER = ("tokenizer.backbone", "tokenizer.encoder_blocks", "tokenizer.z_embed", "tokenizer.xy_embed", "tokenizer.norm")
DECODER = ("tokenizer.decoder_blocks",)
INFERENCE = {
    _features: ("tokenizer.backbone",),
    _tokenize: ENCODER,
    _decode: DECODER,
    _reconstruct: ("tokenizer",),
    _sample: ("predictor",),
    _rollout: (*ENCODER, *DECODER, "predictor"),
    _evaluate: ("", *ENCODER, *DECODER, "predictor"),
}
TRAINING = {_train_tokenizer: ("tokenizer",), _train_on_tokens: ("predictor",)}


def _beneath(names: Iterator[str], beginnings: tuple[str, ...]) -> set[str]:
    return {n for n in names if n not in NEVER_CALLED and any(n == b or (b and n.startswith(b + ".")) for b in beginnings)}


class Record:
    """Hooks on every module that write down its name."""

    def __init__(self, model: nn.Module) -> None:
        self.before: set[str] = set()
        self.after: set[str] = set()
        self._handles = []
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(lambda *_, n=name: self.before.add(n)))
            self._handles.append(module.register_forward_hook(lambda *_, n=name: self.after.add(n)))

    def assert_fired(self, expected: set[str], what: str) -> None:
        for kind, fired in (("pre-hooks", self.before), ("hooks", self.after)):
            assert expected <= fired, f"{what}: {kind} that did not fire: {sorted(expected - fired)}"

    def clear(self) -> None:
        self.before.clear()
        self.after.clear()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _assert_hooks_fire(world: nn.Module, entries: dict[Callable, tuple[str, ...]], hooked: Callable[[], Record]) -> set[str]:
    """Every entry point's hooks fire and its result is what it was before. Returns all names that fired."""
    grad = any(entry in TRAINING for entry in entries)
    fired = set()
    with torch.set_grad_enabled(grad):
        expected = {entry: entry(world).detach() for entry in entries}
        record = hooked()
        for entry, beginnings in entries.items():
            record.clear()
            _close(entry(world).detach(), expected[entry], what=entry.__name__)
            record.assert_fired(_beneath((n for n, _ in world.named_modules()), beginnings), entry.__name__)
            fired |= record.after
    record.remove()
    return fired


@pytest.mark.parametrize("options", MODELS, ids=_name)
def test_every_hook_fires_in_every_entry_point(options):
    world = _world(0, options, use_bom=options["use_swiglu"])
    fired = _assert_hooks_fire(world, INFERENCE, lambda: Record(world)) | _assert_hooks_fire(world, TRAINING, lambda: Record(world))
    assert {n for n, _ in world.named_modules()} - fired <= set(NEVER_CALLED)


def test_every_hook_fires_without_savings():
    world = _world(0, {"savings": Savings.none()}, savings=Savings.none())
    _assert_hooks_fire(world, INFERENCE, lambda: Record(world))


@pytest.mark.parametrize("options", [MODELS[0], MODELS[7], MODELS[11]], ids=_name)
@pytest.mark.parametrize("when", ["before freezing", "after freezing", "after a frozen call"])
def test_every_hook_fires_in_a_frozen_model(when, options):
    world = _world(0, options)

    def hooked() -> Record:
        if when == "before freezing":
            record = Record(world)
            deltakern.freeze(world)
            return record
        deltakern.freeze(world)
        if when == "after a frozen call":
            _rollout(world)
        return Record(world)

    fired = _assert_hooks_fire(world, INFERENCE, hooked)
    assert {n for n, _ in world.named_modules()} - fired <= set(NEVER_CALLED)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("bom", [True, False])
def test_every_hook_fires_in_dino_world(bom, state):
    world = small.dense_world(use_bom=bom).eval()
    if state == "frozen":
        deltakern.freeze(world)
    with torch.no_grad():
        expected = _evaluate(world)
        record = Record(world)
        _close(_evaluate(world), expected)
    record.assert_fired({n for n, _ in world.named_modules()} - set(NEVER_CALLED), "evaluation")
    if state == "live":
        record.clear()
        world.train()
        world(FRAMES, TIMES, LOSS)[0].sum().backward()
        record.assert_fired({n for n, _ in world.named_modules()} - set(NEVER_CALLED), "training")


@pytest.mark.parametrize("state", STATES)
def test_global_hooks_see_every_module(state):
    world = _world()
    if state == "frozen":
        deltakern.freeze(world)
    with torch.no_grad():
        expected, seen, before = _evaluate(world), set(), set()
        handles = [
            modules.register_module_forward_hook(lambda module, *_: seen.add(module)),
            modules.register_module_forward_pre_hook(lambda module, *_: before.add(module)),
        ]
        try:
            _close(_evaluate(world), expected)
            assert "global" in str(explain(world.tokenizer.encoder_blocks[0]))
        finally:
            for handle in handles:
                handle.remove()
    missing = {n for n, m in world.named_modules() if m not in seen or m not in before}
    assert missing <= {*NEVER_CALLED, "tokenizer"}, f"not seen: {sorted(missing)}"
    assert "called" not in str(explain(world.tokenizer.encoder_blocks[0]))


def _ramp(size: int) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, size)


@pytest.mark.parametrize("state", STATES)
def test_a_hook_that_changes_what_a_layer_returns_is_a_change_of_its_weights(state):
    """One layer after the other, hooked before or after freezing; the hook multiplies channels."""
    world = _world(use_bom=False)
    with torch.no_grad():
        plain = _evaluate(world)
        for i, name in enumerate(_layers(world)):
            layer = world.get_submodule(name)
            conv = isinstance(layer, nn.Conv2d)
            handle = layer.register_forward_hook(lambda m, _, out, conv=conv: out * _ramp(out.shape[1])[:, None, None] if conv else out * _ramp(out.shape[-1]))
            with deltakern.frozen(world) if state == "frozen" else contextlib.nullcontext():
                if i % 2:
                    _evaluate(world)
                actual = _evaluate(world)
            handle.remove()
            before = {n: p.clone() for n, p in layer.named_parameters()}
            for parameter in layer.parameters():
                ramp = _ramp(parameter.shape[-1 if isinstance(layer, nn.Embedding) else 0])
                parameter.mul_(ramp if isinstance(layer, nn.Embedding) else ramp.view(-1, *(1,) * (parameter.ndim - 1)))
            expected = _evaluate(world)
            for n, p in layer.named_parameters():
                p.copy_(before[n])
            assert not torch.allclose(expected, plain, atol=1e-4), f"{name} does not matter"
            _close(actual, expected, 1e-4, name)
        _close(_evaluate(world), plain)


@pytest.mark.parametrize("frozen_first", [False, True])
def test_a_hook_on_a_frozen_model_that_was_called_acts_and_stops(frozen_first):
    """Nothing derived before a hook came, or while it was there, is used at the wrong time."""
    world = _world()
    if frozen_first:
        deltakern.freeze(world)
    plain = _rollout(world)
    handles = [world.get_submodule(n).register_forward_hook(lambda m, _, out: out * 1.5) for n in _layers(world, nn.Linear, LayerScale)]
    hooked = _rollout(world)
    assert relative_rmse(hooked, plain) > 0.01
    if not frozen_first:
        deltakern.freeze(world)
        _close(_rollout(world), hooked, 1e-4)
    for handle in handles:
        handle.remove()
    _close(_rollout(world), plain)


@pytest.mark.parametrize("recompute", ["none", "cheap"])
@pytest.mark.parametrize("options", [MODELS[0], MODELS[5], MODELS[7], MODELS[11]], ids=_name)
def test_backward_hooks_fire_in_training(options, recompute):
    world = _world(0, {**options, "recompute": recompute}, use_bom=options["use_swiglu"])
    for entry, part in ((_train_tokenizer, world.tokenizer), (_train_on_tokens, world.predictor)):
        trained = {n: m for n, m in part.named_modules() if not n.startswith("backbone") and not isinstance(m, nn.ModuleList)}

        def gradients(entry=entry, part=part) -> tuple[list[str], list[torch.Tensor | None]]:
            part.zero_grad()
            entry(world).square().sum().backward()
            named = [(n, p) for n, p in part.named_parameters() if not n.startswith("backbone")]
            return [n for n, _ in named], [p.grad for _, p in named]

        names, expected = gradients()
        fired, fired_before = set(), set()
        handles = [m.register_full_backward_hook(lambda *_, n=n: fired.add(n)) for n, m in trained.items()]
        handles += [m.register_full_backward_pre_hook(lambda *_, n=n: fired_before.add(n)) for n, m in trained.items()]
        _same_gradients(gradients()[1], expected, names)
        assert not trained.keys() - fired, f"{entry.__name__}: did not fire: {sorted(trained.keys() - fired)}"
        assert not trained.keys() - fired_before, f"{entry.__name__}: did not fire: {sorted(trained.keys() - fired_before)}"
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("options", BLOCKS, ids=_name)
def test_a_hooked_block_computes_what_it_is(options, rows, state):
    """Every layer hooked at once, which is the way that replaced and quantised layers go."""
    block = _block(**options).eval()
    expected = _dense(block, rows).detach()
    if state == "frozen":
        deltakern.freeze(block)
    _close(_infer(block, rows), expected)
    handles = [block.get_submodule(n).register_forward_hook(lambda *_: None) for n in _layers(block)]
    _close(_infer(block, rows), expected)
    for handle in handles:
        handle.remove()
    _close(_infer(block, rows), expected)
