"""Layers that are anything but plain are called as modules: hooks fire, adapters act and learn, quantised and offloaded layers run."""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import pickle
import weakref
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
from deltakern.nn import product as products
from deltakern.nn.block import MLP, Rope, SelfAttention

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}:UserWarning")
    for text in ("the PyTorch reference runs instead of a kernel", "Full backward hook is firing", "There is a performance drop")
]

WIDTH, HEADS, HIDDEN, PATCHES = 32, 2, 48, 6
KINDS = (nn.Linear, nn.LayerNorm, LayerScale, nn.Embedding, nn.Conv2d)
STATES = ("live", "frozen")
ROWS = ("all", "first", "rest")
BLOCKS = [
    {"qk_norm": norm, "gated": gated, "swiglu": swiglu}
    for norm in (None, "pre_rope", "post_rope")
    for gated in (False, True)
    for swiglu in (False, True)
]
MODELS = [
    {"use_qk_norm": bool(norm), "qk_norm_order": norm or "pre_rope", "use_gated_attn": gated, "use_swiglu": swiglu}
    for norm, gated, swiglu in (block.values() for block in BLOCKS)
]
RELEASED = {"qk_norm": "pre_rope", "gated": True, "swiglu": True}

# Containers of the released names, whose parts are called and they are not.
NEVER_CALLED = (
    "tokenizer.backbone.backbone.model",
    "tokenizer.encoder_blocks",
    "tokenizer.decoder_blocks",
    "predictor.blocks",
    "tokenizer.backbone.backbone.model.layer",
    "backbone.backbone.model",
    "backbone.backbone.model.layer",
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models are so small that threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    q, k, v = (
        layer(t).unflatten(-1, (HEADS, -1))
        for layer, t in ((attention.q_proj, queries), (attention.k_proj, normed), (attention.v_proj, normed))
    )
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
    """The largest error is ``tolerance`` at most, of the largest value or of 1."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} and not {tuple(expected.shape)}"
    error, largest = (actual - expected).abs().max().item(), max(1.0, expected.abs().max().item())
    assert error <= tolerance * largest, f"{what}: error {error:.1e} in values of up to {largest:.1f}"


def _same_gradients(actual: list, expected: list, names: list[str], tolerance: float = 1e-5) -> None:
    for name, a, b in zip(names, actual, expected, strict=True):
        assert a is not None, f"no gradient for {name}"
        assert b.abs().max() > 0, f"the gradient of {name} is zero"
        assert relative_rmse(a, b) < tolerance, f"gradient of {name}: {relative_rmse(a, b):.1e}"


# ------------------------------------------------------------------------------------------------------------- models


def _world(seed: int = 0, tokenizer_options: dict | None = None, **kwargs) -> DeltaWorld:
    """Of weights that all matter."""
    world = small.world(seed, {"use_rope_aug": False, **(tokenizer_options or {})}, **kwargs)
    for name in _layers(world, nn.Linear, nn.Embedding):
        nn.init.normal_(world.get_submodule(name).weight, 0, 0.15)
    return world.eval()


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


def _stream(world: DeltaWorld) -> torch.Tensor:
    stream = world.stream(2)
    for frame, time in zip(FRAMES[0, :2], TIMES[0, :2], strict=True):
        stream.push(frame, time)
    return stream.sample(TIMES[0, 2:], **({"queries": NOISE[:1]} if world.use_bom else {}))


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
    _stream: (*ENCODER, "predictor"),
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
def test_global_hooks_see_blocks_and_their_parts(state):
    """Hooks of all modules in the process, such as a FLOP counter's, are no reason to call plain layers; they see all others."""
    world = _world()
    if state == "frozen":
        deltakern.freeze(world)
    hooked = world.predictor.blocks[0].mlp.up_proj
    handle = hooked.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        expected, seen, before = _evaluate(world), set(), set()
        handles = [
            handle,
            modules.register_module_forward_hook(lambda module, *_: seen.add(module)),
            modules.register_module_forward_pre_hook(lambda module, *_: before.add(module)),
        ]
        try:
            _close(_evaluate(world), expected)
        finally:
            for handle in handles:
                handle.remove()
    missing = {n for n, m in world.named_modules() if not isinstance(m, KINDS) and (m not in seen or m not in before)}
    assert missing <= {*NEVER_CALLED, "tokenizer"}, f"not seen: {sorted(missing)}"
    assert hooked in seen


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
            handle = layer.register_forward_hook(
                lambda m, _, out, conv=conv: out * _ramp(out.shape[1])[:, None, None] if conv else out * _ramp(out.shape[-1])
            )
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
            assert relative_rmse(expected, plain) > 5e-4, f"{name} does not matter"
            _close(actual, expected, 5e-5, name)
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
        handles = [m.register_full_backward_hook(lambda *_, n=n, to=fired: to.add(n)) for n, m in trained.items()]
        handles += [m.register_full_backward_pre_hook(lambda *_, n=n, to=fired_before: to.add(n)) for n, m in trained.items()]
        _same_gradients(gradients()[1], expected, names, 1e-4)
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


# ------------------------------------------------------------------------------------------------------------ adapters

ADAPTED = ["q_proj", "v_proj", "kv_proj", "up_proj"]


def _adapt(model: nn.Module, targets: list[str] | str = ADAPTED) -> nn.Module:
    """peft's LoRA, with adapters that act. Returns peft's model; ``model`` itself is adapted too."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, 0, 0.2)
    return adapted


def _merged_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """W + scaling * B A of every adapted layer, by the name that W has without an adapter."""
    return {
        f"{name}.weight": layer.base_layer.weight
        + layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }


def _assert_as_merged(model: nn.Module, plain: nn.Module, results: list[torch.Tensor], entries: list[Callable]) -> None:
    with torch.no_grad():
        merged = copy.deepcopy(plain)
        merged.load_state_dict(_merged_weights(model), strict=False)
        for entry, result in zip(entries, results, strict=True):
            assert relative_rmse(result, entry(plain)) > 0.01, f"{entry.__name__}: the adapters do not act"
            _close(result, entry(merged), 1e-4, entry.__name__)


@pytest.mark.parametrize("when", ["live", "frozen, then adapted", "called, then adapted", "adapted, then frozen"])
def test_lora_acts_as_its_merged_weights_do(when):
    world, plain, entries = _world(), _world(), [_tokenize, _sample, _evaluate]
    if when in ("frozen, then adapted", "called, then adapted"):
        deltakern.freeze(world)
    if when == "called, then adapted":
        _evaluate(world)
    _adapt(world)
    world.eval()
    if when == "adapted, then frozen":
        deltakern.freeze(world)
    with torch.no_grad():
        _assert_as_merged(world, plain, [entry(world) for entry in entries], entries)
    assert "q_proj is a peft" in str(explain(world.tokenizer.encoder_blocks[-1]))


class _Method(nn.Module):
    """A model whose forward is what ``run`` does with it."""

    def __init__(self, model: nn.Module, run: Callable) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self) -> torch.Tensor:
        return self.run(self.model)


def _loss(run: Callable, model: nn.Module, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """A scalar of a model's result, with some of its weights in the place of its own."""
    method = _Method(model, run)
    out = functional_call(method, {f"model.{n}": w for n, w in weights.items()}, ()) if weights else method()
    return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()


@pytest.mark.parametrize("recompute", ["none", "cheap"])
@pytest.mark.parametrize("kind", ["tokenizer", "predictor"])
def test_lora_learns_as_autograd_says(kind, recompute):
    """Gradients are those of W + scaling * B A by autograd, and a step of an optimizer changes the next result."""
    options = {"recompute": recompute}
    world, plain = _world(0, options).requires_grad_(False), _world(0, options).requires_grad_(False)
    targets = (
        r"tokenizer\.(encoder|decoder)_blocks.*(q_proj|v_proj|up_proj|o_proj)"
        if kind == "tokenizer"
        else r"predictor.*(q_proj|kv_proj|up_proj|head)"
    )
    _adapt(world, targets)

    def run(model: DeltaWorld) -> torch.Tensor:
        if kind == "tokenizer":
            model.tokenizer.train()
            return model.tokenizer(FRAMES)[0]
        model.train()
        return model.train_on_tokens(TOKENS, TIMES[:, :3], LOSS, queries=CANDIDATES)[0]

    names, adapters = zip(*((n, p) for n, p in world.named_parameters() if "lora_" in n), strict=True)
    assert all(p.requires_grad for p in adapters)
    loss = _loss(run, world)
    expected_loss = _loss(run, plain, _merged_weights(world))
    _close(loss, expected_loss, 1e-4)
    _same_gradients(torch.autograd.grad(loss, adapters), torch.autograd.grad(expected_loss, adapters), names)

    optimizer = torch.optim.SGD(adapters, lr=0.01)
    _loss(run, world).backward()
    optimizer.step()
    after = _loss(run, world)
    assert (after - loss).abs() > 1e-3
    _close(after, _loss(run, plain, _merged_weights(world)), 1e-4)


@pytest.mark.parametrize("state", STATES)
def test_lora_is_merged_and_unmerged(state):
    world, plain = _world(), _world()
    if state == "frozen":
        deltakern.freeze(world)
    adapted = _adapt(world)
    with torch.no_grad():
        expected = _evaluate(world)
        assert relative_rmse(expected, _evaluate(plain)) > 0.01
        adapted.merge_adapter()
        _right_or_refused(world, expected, state)
        adapted.unmerge_adapter()
        _right_or_refused(world, expected, state)
        whole = adapted.merge_and_unload()
        assert whole is world
        assert "called" not in str(explain(world.tokenizer.encoder_blocks[0]))
        _right_or_refused(world, expected, state)


def _right_or_refused(world: DeltaWorld, expected: torch.Tensor, state: str) -> None:
    """What a frozen model may do after its weights were written to; frozen anew it is right."""
    if state == "frozen":
        with contextlib.suppress(FrozenWeightsError):
            _close(_evaluate(world), expected, 1e-4)
        deltakern.freeze(deltakern.unfreeze(world))
    _close(_evaluate(world), expected, 1e-4)


def test_weights_that_a_frozen_model_derived_are_not_used_after_a_merge():
    """Called, adapted, merged and unloaded, without a call in between."""
    world, plain = _world(), _world()
    deltakern.freeze(world)
    _evaluate(world)
    adapted = _adapt(world)
    merged = copy.deepcopy(plain)
    merged.load_state_dict({n: w.detach() for n, w in _merged_weights(world).items()}, strict=False)
    adapted.merge_and_unload()
    with pytest.raises(FrozenWeightsError, match="was written to"):
        _evaluate(world)
    deltakern.freeze(deltakern.unfreeze(world))
    _close(_evaluate(world), _evaluate(merged), 1e-4)


class LoRALinear(nn.Module):
    """An adapter written by hand: no ``weight``, no ``in_features``."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features) * 0.2)
        self.up = nn.Parameter(torch.randn(base.out_features, 4) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.t() @ self.up.t()


def _replace(module: nn.Module, names: list[str], make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, make(module.get_submodule(name)))
    return module


def _linears(**options) -> list[list[str]]:
    names = _layers(_block(**options), nn.Linear)
    return [*([name] for name in names), names]


def _assert_is_dense(make: Callable[[str], Block], rows: str, what: str) -> None:
    """A block computes what its modules do, called one after the other: live, frozen, and with its gradients, recomputed or not."""
    expected = _dense(make("none"), rows).detach()
    _close(_infer(make("none").eval(), rows), expected, what=what)
    frozen = deltakern.freeze(make("none"))
    _infer(frozen, rows)
    _close(_infer(frozen, rows), expected, what=f"{what}, frozen")
    for recompute in ("none", "cheap"):
        block = make(recompute)
        names, parameters = zip(*((n, p) for n, p in block.named_parameters() if p.requires_grad), strict=True)
        weight = torch.linspace(-1, 1, expected.numel()).view_as(expected)
        actual = torch.autograd.grad((_run(block, rows) * weight).sum(), parameters)
        dense = torch.autograd.grad((_dense(block, rows) * weight).sum(), parameters)
        _same_gradients(actual, dense, names, 1e-4)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("options", [BLOCKS[0], RELEASED, BLOCKS[11]], ids=_name)
def test_an_adapter_in_the_place_of_every_linear(options, rows):
    """One at a time, and all at once."""
    for names in _linears(**options):

        def make(recompute: str, names=names) -> Block:
            return _replace(_block(**options, recompute=recompute), names, LoRALinear)

        _assert_is_dense(make, rows, str(names))
        said = str(explain(make("none")))
        assert any(f"because {name} is a test_layers.LoRALinear" in said for name in names)


@pytest.mark.parametrize("state", STATES)
def test_a_model_whose_every_linear_is_an_adapter(state):
    """Nothing asks a layer for a Linear's attributes: sampling, decoding, tokenizing and training run."""
    world, plain = _world(use_bom=True), _world(use_bom=True)
    names = _layers(world, nn.Linear)
    _replace(world, names, LoRALinear)
    merged = {n: world.get_submodule(n) for n in names}
    plain.load_state_dict({f"{n}.weight": (m.base.weight + m.up @ m.down).detach() for n, m in merged.items()}, strict=False)
    if state == "frozen":
        deltakern.freeze(world)
    with torch.no_grad():
        for entry in INFERENCE:
            _close(entry(world), entry(plain), 1e-4, entry.__name__)
    if state == "live":
        for entry in TRAINING:
            _close(entry(world), entry(plain), 1e-4, entry.__name__)


# --------------------------------------------------------------------------------------------- norms, scales, embeddings


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.gain, 1e-5)


class ShiftedNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * torch.linspace(0.5, 1.5, x.shape[-1])


class SquaredScale(LayerScale):
    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        return branch * self.lambda1.square()


class Doubled(nn.Module):
    """A layer in another one, with none of its attributes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)


def _other_norm(norm: nn.LayerNorm, kind: type[nn.Module]) -> nn.Module:
    width = norm.normalized_shape[0]
    if kind is RMSNorm:
        return RMSNorm(width)
    torch.manual_seed(4)
    return _stir(ShiftedNorm(width, bias=norm.bias is not None))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", [RMSNorm, ShiftedNorm])
@pytest.mark.parametrize("order", ["pre_rope", "post_rope"])
def test_another_norm_in_the_place_of_every_layer_norm(order, kind, rows):
    names = _layers(_block(qk_norm=order), nn.LayerNorm)
    for some in [*([name] for name in names), names]:

        def make(recompute: str, some=some) -> Block:
            return _replace(_block(qk_norm=order, recompute=recompute), some, lambda norm: _other_norm(norm, kind))

        _assert_is_dense(make, rows, str(some))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["a subclass", "wrapped", "hooked"])
def test_a_layer_scale_that_is_not_plain(kind, rows):
    def other(scale: LayerScale) -> nn.Module:
        if kind == "wrapped":
            return Doubled(scale)
        if kind == "hooked":
            scale.register_forward_hook(lambda m, _, out: out * 1.5)
            return scale
        torch.manual_seed(4)
        return _stir(SquaredScale(WIDTH, 0.5))

    for names in (["layer_scale1"], ["layer_scale2"], ["layer_scale1", "layer_scale2"]):
        _assert_is_dense(lambda recompute, names=names: _replace(_block(recompute=recompute), names, other), rows, str(names))


@pytest.mark.parametrize("rows", ROWS)
def test_plain_layers_of_another_form_than_the_blocks_own(rows):
    """A bias less or more, another eps, no weight: of the plain class, and not what the block's fast way takes them for."""
    head = WIDTH // HEADS
    forms: dict[str, Callable[[nn.Module], nn.Module]] = {
        name: lambda old: nn.Linear(old.in_features, old.out_features, bias=old.bias is None) for name in _layers(_block(), nn.Linear)
    }
    cases = [(name, form, "its bias") for name, form in forms.items()]
    for name in _layers(_block(), nn.LayerNorm):
        width, bias = (head, False) if "attention" in name else (WIDTH, True)
        cases += [
            (name, lambda _, w=width, b=bias: _stir(nn.LayerNorm(w, bias=not b)), "its bias"),
            (name, lambda _, w=width, b=bias: _stir(nn.LayerNorm(w, eps=0.3, bias=b)), "its eps"),
            (name, lambda _, w=width: nn.LayerNorm(w, elementwise_affine=False), "its weight"),
        ]
    problems = []
    for name, form, what in cases:

        def make(recompute: str, name=name, form=form) -> Block:
            torch.manual_seed(5)
            return _replace(_block(recompute=recompute), [name], form)

        try:
            _assert_is_dense(make, rows, name)
        except Exception as problem:
            problems.append(f"{name}, {what}: {type(problem).__name__}: {str(problem)[:100]}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "name", ["attention.q_proj", "attention.kv_proj", "attention.out_proj", "mlp.up_proj", "mlp.down_proj", "head", "norm"]
)
def test_a_predictors_layer_without_a_bias(name, state):
    """As one whose bias is zero; a norm without weight and bias as one of ones and zeros."""
    name = f"predictor.{name}" if name in ("head", "norm") else f"predictor.blocks.1.{name}"
    world, plain = _world(), _world()
    with torch.no_grad():
        layer = plain.get_submodule(name)
        layer.bias.zero_()
        if name == "predictor.norm":
            layer.weight.fill_(1)
            _replace(world, [name], lambda old: nn.LayerNorm(old.normalized_shape, elementwise_affine=False))
        else:
            _replace(world, [name], lambda old: nn.Linear(old.in_features, old.out_features, bias=False))
            world.get_submodule(name).weight.copy_(layer.weight)
        if state == "frozen":
            deltakern.freeze(world)
        for entry in (_sample, _evaluate):
            _close(entry(world), entry(plain), 1e-4, entry.__name__)
    if state == "live":
        _close(_train_on_tokens(world), _train_on_tokens(plain), 1e-4)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["tokenizer.backbone.backbone.norm", "tokenizer.norm", "predictor.norm"])
def test_another_final_norm(name, state):
    """As the model with a plain norm that computes the same."""
    world, plain = _world(), _world()
    norm = plain.get_submodule(name)
    _replace(world, [name], lambda old: Doubled(copy.deepcopy(old)))
    with torch.no_grad():
        norm.weight.mul_(2)
        norm.bias.mul_(2)
        if state == "frozen":
            deltakern.freeze(world)
        _close(_evaluate(world), _evaluate(plain), 1e-4)


@pytest.mark.parametrize("state", STATES)
def test_other_embeddings(state):
    """As the model whose rows are those that the layer makes."""
    world, plain = _world(use_bom=False), _world(use_bom=False)
    names = _layers(world, nn.Embedding)
    _replace(world, names, Doubled)
    with torch.no_grad():
        for name in names:
            plain.get_submodule(name).weight.mul_(2)
    if state == "live":
        for entry, part in ((_train_tokenizer, "tokenizer."), (_train_on_tokens, "q_")):
            entry(world).square().sum().backward()
            entry(plain).square().sum().backward()
            for name in names:
                if name.startswith(part):
                    mine, theirs = world.get_submodule(name).layer.weight.grad, plain.get_submodule(name).weight.grad
                    _close(mine, 2 * theirs, 1e-4, name)
    else:
        deltakern.freeze(world)
    with torch.no_grad():
        _close(_evaluate(world), _evaluate(plain), 1e-4)


# -------------------------------------------------------------------------------------------------------- quantised layers


@pytest.mark.parametrize("state", STATES)
def test_torchao_quantised_weights(state):
    """Int8 weights of torchao's: as a model that holds the dequantised ones, and near the one that was quantised."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    world, plain = _world(), _world()
    for part in (world.tokenizer, world.predictor):
        quantize_(part, Int8WeightOnlyConfig(), filter_fn=lambda m, _: type(m) is nn.Linear)
    names = _layers(world, nn.Linear)
    assert all(type(world.get_submodule(n).weight) not in (nn.Parameter, torch.Tensor) for n in names)
    with torch.no_grad():
        first = {entry: entry(plain) for entry in INFERENCE}
        plain.load_state_dict({f"{n}.weight": world.get_submodule(n).weight.dequantize() for n in names}, strict=False)
        if state == "frozen":
            deltakern.freeze(world)
        for entry in INFERENCE:
            result = entry(world)
            _close(result, entry(plain), 1e-4, entry.__name__)
            assert 0 < relative_rmse(result, first[entry]) < 0.1
    assert "has a weight of type Int8Tensor" in str(explain(world.predictor.blocks[0]))


def _dynamic(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*", "ignore:.*quantize")
@pytest.mark.parametrize("state", STATES)
def test_dynamically_quantised_layers(state):
    plain = _world()
    world = _dynamic(plain)
    assert not _layers(world, nn.Linear)
    if state == "frozen":
        deltakern.freeze(world)
    with torch.no_grad():
        for entry in INFERENCE:
            assert 0 < relative_rmse(entry(world), entry(plain)) < 0.1, entry.__name__
    assert "q_proj is a torch.ao.nn.quantized.dynamic" in str(explain(world.tokenizer.encoder_blocks[0]))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*", "ignore:.*quantize")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("options", [BLOCKS[0], RELEASED], ids=_name)
def test_a_dynamically_quantised_block_is_its_modules_called(options, rows, state):
    block = _dynamic(_block(**options).eval())
    expected = _dense(block, rows)
    if state == "frozen":
        deltakern.freeze(block)
    assert relative_rmse(_infer(block, rows), expected) < 2e-3  # a rounding may fall the other way


# --------------------------------------------------------------------------------------------------------------- offloading


@pytest.mark.parametrize("entry", INFERENCE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("when", ["live", "frozen", "frozen and called", "offloaded, then frozen"])
def test_offloaded_weights(when, entry):
    """accelerate's: on the meta device but for the time of a layer's call."""
    accelerate = pytest.importorskip("accelerate")
    for bom in (True, False):
        world, plain = _world(use_bom=bom), _world(use_bom=bom)
        with torch.no_grad():
            if when.startswith("frozen"):
                deltakern.freeze(world)
            if when == "frozen and called":
                entry(world)
            accelerate.cpu_offload(world, torch.device("cpu"), offload_buffers=True)
            assert all(p.is_meta for p in world.parameters())
            if when == "offloaded, then frozen":
                deltakern.freeze(world)
            expected = entry(plain)
            _close(entry(world), expected)
            _close(entry(world), expected)
            accelerate.hooks.remove_hook_from_submodules(world)
            assert not any(p.is_meta for p in world.parameters())
            _close(entry(world), expected)


def test_aligned_devices():
    """accelerate's hook that moves nothing, on every module: it puts a forward of its own in the place of the module's."""
    hooks = pytest.importorskip("accelerate.hooks")
    world, plain = _world(), _world()
    for module in list(world.modules()):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert "has a forward of its own" in str(explain(world.predictor.blocks[0]))
    with torch.no_grad():
        for entry in INFERENCE:
            _close(entry(world), entry(plain), what=entry.__name__)


# ---------------------------------------------------------------------------------------------------------- parametrisations


def _old_weight_norm(layer: nn.Module) -> None:
    torch.nn.utils.weight_norm(layer)


def _prune(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.4)


class Tanh(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


def _tanh(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Tanh())


PARAMETRISATIONS = {
    "old weight_norm": (_old_weight_norm, "has hooks"),
    "old spectral_norm": (old_spectral_norm, "has hooks"),
    "prune": (_prune, "has hooks"),
    "weight_norm": (parametrizations.weight_norm, "Parametrized"),
    "spectral_norm": (parametrizations.spectral_norm, "Parametrized"),
    "own": (_tanh, "Parametrized"),
}


def _weights_made(block: Block, names: list[str]) -> dict[str, torch.Tensor]:
    """What parametrisations make; the old ones do in a call."""
    for name in names:
        layer = block.get_submodule(name)
        layer(torch.zeros(1, layer.in_features))
    return {f"{name}.weight": block.get_submodule(name).weight for name in names}


def _with_weights(block: Block, weights: dict[str, torch.Tensor], rows: str) -> torch.Tensor:
    """What a block of other weights returns."""
    return functional_call(_Method(block, lambda model: _run(model, rows)), {f"model.{n}": w for n, w in weights.items()}, ())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated.*")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", PARAMETRISATIONS)
def test_parametrised_linears(kind, rows):
    """As plain layers that hold the weights that the parametrisation makes; gradients reach what it makes them of."""
    register, why = PARAMETRISATIONS[kind]
    for options in (BLOCKS[0], RELEASED):
        block, plain = _block(**options).eval(), _block(**options).eval()
        names = _layers(block, nn.Linear)
        for name in names:
            register(block.get_submodule(name))
        for _ in range(10):  # steps of the old spectral norm, which begins anywhere
            _weights_made(block.train(), names)
        block.eval()

        expected = _with_weights(plain, _weights_made(block, names), rows)
        _close(_infer(block, rows), expected)
        originals = {
            n: p for n, p in block.named_parameters() if any(n.startswith(f"{name}.") for name in names) and not n.endswith("bias")
        }
        assert len(originals) >= len(names)
        weight = torch.linspace(-1, 1, expected.numel()).view_as(expected)
        theirs = torch.autograd.grad((expected * weight).sum(), list(originals.values()))
        mine = torch.autograd.grad((_run(block, rows) * weight).sum(), list(originals.values()))
        _same_gradients(mine, theirs, list(originals), 1e-4)
        assert why in str(explain(block))
        _close(_infer(deltakern.freeze(block), rows), expected.detach())


@pytest.mark.parametrize("state", STATES)
def test_parametrised_norms_scales_and_embeddings(state):
    world, plain = _world(use_bom=False), _world(use_bom=False)
    for name in _layers(world, nn.LayerNorm, LayerScale, nn.Embedding):
        tensor = "lambda1" if "layer_scale" in name else "weight"
        parametrize.register_parametrization(world.get_submodule(name), tensor, Tanh())
        with torch.no_grad():
            getattr(plain.get_submodule(name), tensor).copy_(getattr(world.get_submodule(name), tensor))
    if state == "frozen":
        deltakern.freeze(world)
    with torch.no_grad():
        for entry in INFERENCE:
            _close(entry(world), entry(plain), 1e-4, entry.__name__)
    if state == "live":
        _train_tokenizer(world).square().sum().backward()
        _train_on_tokens(world).square().sum().backward()
        made = {n: p for n, p in world.named_parameters() if n.endswith("original") and ".backbone." not in n}
        missing = [n for n, p in made.items() if p.grad is None or not p.grad.abs().max() > 0]
        assert not missing, f"no gradient for {missing}"


# --------------------------------------------------------------------------------------------------------- transforms, compile


def _functional(kind: str, rows: str = "all") -> tuple[Callable, dict[str, torch.Tensor], torch.Tensor]:
    """A scalar function of parameters and of one of three inputs."""
    generator = torch.Generator().manual_seed(7)
    if kind == "block":
        model = _block()
        inputs, rope = torch.randn(3, 1 + PATCHES, WIDTH, generator=generator), _input()[1]

        def run(model: Block, x: torch.Tensor) -> torch.Tensor:
            return model(Residual(x[None]), rope, num_prefix=1, rows=rows).add()
    elif kind == "tokenizer":
        model = _world().tokenizer
        model.requires_grad_(True).backbone.requires_grad_(False)
        inputs, rope = torch.randn(3, 2, PATCHES, SIZE, generator=generator), model._rope(FRAMES)

        def run(model: DeltaTok, x: torch.Tensor) -> torch.Tensor:
            return model.decode(model.encode(x[None, 0], x[None, 1], rope), x[None, 0], rope)
    else:
        model = _world()
        model.tokenizer.requires_grad_(False)
        inputs = torch.randn(3, 3, SIZE, generator=generator)

        def run(model: DeltaWorld, x: torch.Tensor) -> torch.Tensor:
            return model.predict(x[None, :2], TIMES[:1, :3], CANDIDATES[:1])

    parameters = {f"model.{n}": p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    class Applied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return run(self.model, x)

    applied = Applied()

    def scalar(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        out = functional_call(applied, parameters, (x,))
        return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()

    return scalar, parameters, inputs


@pytest.mark.parametrize(("kind", "rows"), [("block", "all"), ("block", "first"), ("block", "rest"), ("tokenizer", ""), ("predictor", "")])
def test_functional_transforms(kind, rows):
    """torch.func.grad is autograd's, and vmap of it is a loop."""
    scalar, parameters, inputs = _functional(kind, rows)
    leaves = {n: p.clone().requires_grad_() for n, p in parameters.items()}
    expected = []
    for x in inputs:
        grads = torch.autograd.grad(scalar(leaves, x), list(leaves.values()), allow_unused=True)
        expected.append({n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, grads, strict=True)})
    for x, wanted in zip(inputs, expected, strict=True):
        found = torch.func.grad(scalar)(parameters, x)
        for name in parameters:
            assert relative_rmse(found[name], wanted[name]) < 1e-5, name
    together = torch.func.vmap(torch.func.grad(scalar), in_dims=(None, 0))(parameters, inputs)
    for name in parameters:
        assert relative_rmse(together[name], torch.stack([wanted[name] for wanted in expected])) < 1e-5, name


@pytest.mark.parametrize("kind", ["hooked", "replaced"])
def test_a_block_with_odd_layers_compiles(kind):
    block = _block()
    if kind == "hooked":
        for name in _layers(block):
            block.get_submodule(name).register_forward_hook(lambda m, _, out: out * 1.25)
    else:
        _replace(block, _layers(block, nn.Linear), LoRALinear)
    names, parameters = zip(*block.named_parameters(), strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    mine, dense = _run(compiled), _dense(block)
    _close(mine, dense)
    _same_gradients(
        torch.autograd.grad(mine.square().sum(), parameters), torch.autograd.grad(dense.square().sum(), parameters), names, 1e-4
    )


# ------------------------------------------------------------------------------------------------------------------- explain


def test_explain_says_live_and_frozen():
    block = _block()
    parts = explain(block).parts
    assert list(parts) == [
        "norm1",
        "attention, q, k, v and gate",
        "attention, output",
        "attention, kernel",
        "layer_scale1",
        "norm2",
        "mlp, gate and up",
        "mlp, down",
        "layer_scale2",
    ]
    assert "called" not in str(explain(block))
    assert sum("live" in way for way in parts.values()) == 6
    deltakern.freeze(block)
    frozen = explain(block).parts
    assert sum("frozen" in way for way in frozen.values()) == 6
    deltakern.unfreeze(block)
    assert explain(block).parts == parts
    assert str(explain(block)).splitlines()[2] == f"attention, output: {parts['attention, output']}"


@pytest.mark.parametrize("state", STATES)
def test_explain_names_the_layer_and_the_reason(state):
    def hook(block: Block) -> None:
        block.attention.v_proj.register_forward_hook(lambda *_: None)

    def backward_hook(block: Block) -> None:
        block.mlp.down_proj.register_full_backward_hook(lambda *_: None)

    def own_forward(block: Block) -> None:
        block.norm2.forward = block.norm2.forward

    def adapter(block: Block) -> None:
        _replace(block, ["attention.o_proj"], LoRALinear)

    def parametrised(block: Block) -> None:
        parametrize.register_parametrization(block.layer_scale1, "lambda1", Tanh())

    def subclassed(block: Block) -> None:
        _replace(block, ["norm1"], lambda norm: ShiftedNorm(WIDTH))

    for act, part, why in (
        (hook, "attention, q, k, v and gate", "attention.v_proj has hooks"),
        (backward_hook, "mlp, down", "mlp.down_proj has hooks"),
        (own_forward, "norm2", "norm2 has a forward of its own"),
        (adapter, "attention, output", "attention.o_proj is a test_layers.LoRALinear"),
        (parametrised, "layer_scale1", "layer_scale1 is a torch.nn.utils.parametrize.ParametrizedLayerScale"),
        (subclassed, "norm1", "norm1 is a test_layers.ShiftedNorm"),
    ):
        block = _block()
        if state == "frozen":
            deltakern.freeze(block)
        before = explain(block).parts
        act(block)
        assert explain(block).parts == {**before, part: f"modules are called, because {why}"}


def test_explain_of_a_predictors_block_and_of_something_else():
    block = _world().predictor.blocks[0]
    assert "attention, keys and values" in explain(block).parts
    block.attention.kv_proj.register_forward_pre_hook(lambda *_: None)
    assert explain(block).parts["attention, keys and values"] == "modules are called, because attention.kv_proj has hooks"
    for other in (nn.Linear(2, 2), block.mlp, None):
        with pytest.raises(TypeError, match=r"explain: expected a deltakern\.nn\.Block or a predictor's block"):
            explain(other)


# --- What a block keeps of what it asked its layers ---------------------------------------------------------------------------


def _attribute(layer: nn.Module, name: str) -> None:
    """A tensor that is no parameter, as FSDP's flat parameters and inner loops set one for every forward."""
    like = getattr(layer, name).detach()
    if name in layer._parameters:
        delattr(layer, name)
    setattr(layer, name, torch.randn_like(like))


def _buffer(layer: nn.Module, name: str) -> None:
    value = torch.randn_like(getattr(layer, name))
    if name in layer._parameters:
        delattr(layer, name)
        layer.register_buffer(name, value)
    else:
        setattr(layer, name, value)


class _Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _hook(layer: nn.Module) -> None:
    if layer._forward_hooks:
        layer._forward_hooks.clear()
    else:
        layer.register_forward_hook(lambda layer, args, out: 2 * out)


def _forward(layer: nn.Module) -> None:
    if "forward" in layer.__dict__:
        del layer.forward
    else:
        layer.forward = lambda x: x.new_ones((*x.shape[:-1], layer.weight.shape[0]))


def _parametrised(layer: nn.Module) -> None:
    if nn.utils.parametrize.is_parametrized(layer):
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
    else:
        nn.utils.parametrizations.weight_norm(layer)
        layer.parametrizations.weight.original0.data.mul_(2)


KNOWN_CHANGES = {
    "parameter": lambda b: setattr(b.mlp.up_proj, "weight", nn.Parameter(torch.randn_like(b.mlp.up_proj.weight))),
    "values": lambda b: b.mlp.up_proj.weight.data.normal_(),
    "data": lambda b: setattr(b.mlp.up_proj.weight, "data", torch.randn_like(b.mlp.up_proj.weight)),
    "swapped": lambda b: torch.utils.swap_tensors(b.attention.q_proj.weight, nn.Parameter(torch.randn_like(b.attention.q_proj.weight))),
    "assigned": lambda b: b.load_state_dict({k: torch.randn_like(v) for k, v in b.state_dict().items()}, assign=True),
    "linear's attribute": lambda b: _attribute(b.mlp.up_proj, "weight"),
    "bias's attribute": lambda b: _attribute(b.attention.q_proj, "bias"),
    "norm's attribute": lambda b: _attribute(b.norm2, "weight"),
    "scale's attribute": lambda b: _attribute(b.layer_scale1, "lambda1"),
    "hiding attribute": lambda b: b.mlp.up_proj.__dict__.update(weight=torch.randn_like(b.mlp.up_proj.weight)),
    "buffer": lambda b: _buffer(b.attention.v_proj, "weight"),
    "no bias": lambda b: setattr(b.mlp.down_proj, "bias", None),
    "another's parameters": lambda b: setattr(b.mlp.up_proj, "_parameters", nn.Linear(32, 48)._parameters),
    "module": lambda b: setattr(b.mlp, "up_proj", nn.Linear(32, 48)),
    "norm": lambda b: setattr(b, "norm1", nn.Identity() if isinstance(b.norm1, nn.LayerNorm) else nn.LayerNorm(32)),
    "scale": lambda b: setattr(b, "layer_scale2", LayerScale(32, 0.3)),
    "part": lambda b: setattr(b, "mlp", MLP(32, 16)),
    "class": lambda b: setattr(b.mlp.up_proj, "__class__", _Doubled),
    "hook": lambda b: _hook(b.mlp.up_proj),
    "norm's hook": lambda b: _hook(b.attention.q_norm_prerope),
    "forward": lambda b: _forward(b.mlp.down_proj),
    "parametrised": lambda b: _parametrised(b.attention.v_proj),
    "eps": lambda b: setattr(b.norm1, "eps", 2 * b.norm1.eps + 0.1),
    "eps of q's norm": lambda b: setattr(b.attention.q_norm_prerope, "eps", 2 * b.attention.q_norm_prerope.eps + 0.1),
    "the attention's eps": lambda b: setattr(b.attention, "eps", 2 * b.attention.eps + 0.1),
    "no gate": lambda b: setattr(b.attention, "gated", not b.attention.gated),
    "no norm of q and k": lambda b: setattr(b.attention, "qk_norm", None if b.attention.qk_norm else "pre_rope"),
}


def _known_block() -> tuple[Block, Callable[[Block], torch.Tensor]]:
    x, rope = torch.randn(2, 5, 32), (torch.randn(4, 16), torch.randn(4, 16))
    return Block(32, 2, 48, qk_norm="pre_rope", gated=True), lambda block: block(Residual(x), rope, num_prefix=1).add()


def _asked_anew(block: Block, call: Callable[[Block], torch.Tensor]) -> torch.Tensor:
    """The call of a block that knows nothing of its layers; what it knew it knows again."""
    knew = [(m, m.__dict__.pop("_known", None)) for m in block.modules()]
    out = call(block)
    for module, known in knew:
        module.__dict__["_known"] = known
    return out


@pytest.mark.parametrize("gradients", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("change", KNOWN_CHANGES.values(), ids=KNOWN_CHANGES)
def test_a_block_that_was_called_follows_a_change(change: Callable[[Block], None], gradients: bool):
    block, call = _known_block()
    with torch.set_grad_enabled(gradients):
        for _ in range(2):
            before = call(block)
        for _ in range(3):
            change(block)
            out = call(block)
            assert torch.equal(out, _asked_anew(block, call))
        assert out.shape == before.shape


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "deepcopy", "pickle"])
def test_a_copy_of_a_block_that_was_called(copied: Callable[[nn.Module], nn.Module]):
    block, call = _known_block()
    call(block)
    block.attention = copied(block.attention)
    other = copied(block)
    assert torch.equal(call(other), call(block))
    other.attention.eps = 0.5
    assert torch.equal(call(other), _asked_anew(other, call))
    other.norm1 = nn.LayerNorm(32, eps=0.5)
    for each in (other, block):
        assert torch.equal(call(each), _asked_anew(each, call))


def test_another_calls_weights_are_not_kept():
    block, call = _known_block()
    call(block)
    before = call(block)
    for _ in range(2):
        weights = {name: (2 * p).requires_grad_() for name, p in block.named_parameters()}
        with nn.utils.stateless._reparametrize_module(block, weights):
            out = call(block)
            assert torch.equal(out, _asked_anew(block, call))
        assert torch.equal(call(block), before)
        with nn.utils.stateless._reparametrize_module(block, weights):
            call(block)
        alive = weakref.ref(weights["mlp.up_proj.weight"])
        del weights, out
        assert alive() is None


def test_a_block_that_was_called_frees_its_weights():
    """At once, not when Python looks for cycles: they may be most of a GPU."""
    block, call = _known_block()
    with torch.no_grad():
        for _ in range(2):
            call(block)
    alive = [weakref.ref(p) for p in block.parameters()]
    gc.disable()
    try:
        del block
        assert not any(p() is not None for p in alive)
    finally:
        gc.enable()


def test_a_plain_block_asks_its_layers_once(monkeypatch: pytest.MonkeyPatch):
    """Also one with hooks of its own, as FSDP's: what it asks does not depend on them."""
    block, call = _known_block()
    block.register_forward_hook(lambda *_: None)
    call(block)
    monkeypatch.setattr(Block, "ask", None)
    monkeypatch.setattr(MLP, "ask", None)
    monkeypatch.setattr(SelfAttention, "ask", None)
    call(block)


def test_a_block_is_compiled_after_it_was_called():
    block, call = _known_block()
    with torch.no_grad():
        for _ in range(2):
            eager = call(block)
        compiled = torch.compile(lambda: call(block), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), eager)
        for change in ("parameter", "eps", "bias's attribute", "bias's attribute"):  # Dynamo does not look for new hooks
            KNOWN_CHANGES[change](block)
            torch.testing.assert_close(compiled(), call(block))
    torch._dynamo.reset()


def test_a_frozen_block_of_several_dtypes(monkeypatch):
    """A product that oneDNN takes is made of weights cast as the other products' are."""
    monkeypatch.setattr(products, "takes", lambda *_: True)
    for dtype in (torch.bfloat16, torch.float64):
        block = _block().eval()
        block.mlp.to(dtype)
        expected = _infer(block, "all")
        _close(_infer(deltakern.freeze(block), "all"), expected, 1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("state", STATES)
def test_hooks_in_a_dict_that_was_put_in_the_place_of_the_layers(state):
    block = _block().eval()
    if state == "frozen":
        deltakern.freeze(block)
    before = _infer(block, "all")
    block.mlp.down_proj._forward_hooks = collections.OrderedDict()
    _close(_infer(block, "all"), before)
    block.mlp.down_proj.register_forward_hook(lambda module, args, out: out * 0)
    assert not torch.allclose(_infer(block, "all"), before, rtol=1e-3)


@pytest.mark.parametrize("state", STATES)
def test_norms_without_bias_everywhere(state):
    world = _world()
    frames = torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8)
    for blocks in (world.tokenizer.encoder_blocks, world.tokenizer.decoder_blocks, world.predictor.blocks):
        for block in blocks:
            block.norm1, block.norm2 = (
                nn.LayerNorm(norm.normalized_shape, eps=norm.eps, bias=False) for norm in (block.norm1, block.norm2)
            )
    zeros = _world()
    zeros.load_state_dict({**zeros.state_dict(), **world.state_dict()})
    for name, parameter in zeros.named_parameters():
        if name not in dict(world.named_parameters()):
            parameter.data.zero_()
    if state == "frozen":
        deltakern.freeze(world)
    times = torch.arange(4.0)[None]
    for call in (lambda w: w.tokenizer.tokenize(frames), lambda w: w.rollout(frames, times, 2, 3, seed=1).features):
        _close(call(world), call(zeros))
