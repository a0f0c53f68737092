"""The straight way through a block on a CPU: values against float64, when it is taken, and that it follows what it was derived from."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import small
import torch
from compare import assert_as_accurate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deltakern import backend
from deltakern.models import predictor
from deltakern.models.dinov3 import patch_rope
from deltakern.nn import Assembly, Block, PackedModule, Residual, evaluation, forget_packed
from deltakern.nn import product as products

WIDTH, HEADS = 48, 3
PATCHES = 6


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What every evaluation that ran was of."""
    ran: list[str] = []
    for kind in (evaluation.Evaluation, predictor._Evaluation):
        original = kind.__call__

        def call(self, *args, original=original, kind=kind):
            ran.append(kind.__module__.rpartition(".")[2])
            return original(self, *args)

        monkeypatch.setattr(kind, "__call__", call)
    return ran


@pytest.fixture(params=["MKL", "oneDNN", "oneDNN, activations apart"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose products: all of one library's, whatever their sizes."""
    if request.param != "MKL" and not products.available():
        pytest.skip("this torch has no oneDNN")
    answers = {"MKL": lambda *_: False, "oneDNN": lambda *_: True, "oneDNN, activations apart": lambda *given: given[3:] != (True,)}
    for module in (products, evaluation):
        monkeypatch.setattr(module, "takes", answers[request.param])
    return request.param


def _block(seed: int = 0, **options) -> Block:
    """With weights that are no starting point's: every branch, norm and gate matters."""
    torch.manual_seed(seed)
    block = Block(WIDTH, HEADS, 40, layer_scale_init=0.5, **{"qk_norm": "pre_rope", "gated": True, "swiglu": True, **options}).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return block


def _rope(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(t.to(dtype) for t in patch_rope(2, PATCHES // 2, WIDTH // HEADS, torch.device("cpu")))


def _tokens(length: int, seed: int = 1, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def _general(block: Block, entry, rope, **options) -> torch.Tensor:
    """The sum that the general way leaves; a global hook keeps the block on it."""
    with nn.modules.module.register_module_forward_pre_hook(lambda *_: None):
        return block(entry, rope, **options).add()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", ["all", "rest", "first"])
@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": "post_rope"},
        {"qk_norm": None},
        {"gated": False},
        {"swiglu": False},
        {"attention": "sdpa-math"},
        {"qk_norm": None, "gated": False, "swiglu": False},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "released",
)
def test_values(options: dict, impl: str, rows: str, taken: list[str]):
    if impl == "cpp" and backend.extension().module is None:
        pytest.skip("the extension was not built")
    block, rope = _block(**options), _rope()
    double = copy.deepcopy(block).double()
    for prefix, repeats, branch in ((1, 2, False), (5, 1, True), (0, 3, False)):
        if rows == "first" and prefix == 0:
            continue  # row 0 must not rotate
        whole = _tokens(prefix + repeats * PATCHES + 2)
        stream = whole[:, 2:]  # a slice of a bigger tensor
        left = (_tokens(stream.shape[1], seed=2), torch.rand(WIDTH)) if branch else (None, None)
        kept = [t.clone() for t in (whole, *rope)]
        with torch.no_grad(), backend.use_impl(impl):
            taken.clear()
            made = block(Residual(stream, *left), rope, num_prefix=prefix, rows=rows)
            assert taken == ["evaluation"]
            assert made.branch is None
            again = block(Residual(stream, *left), rope, num_prefix=prefix, rows=rows)
            plain = _general(block, Residual(stream, *left), rope, num_prefix=prefix, rows=rows)
            assert len(taken) == 2
        with torch.no_grad():
            wide = Residual(stream.double(), *(None if t is None else t.double() for t in left))
            truth = double(wide, _rope(torch.float64), num_prefix=prefix, rows=rows).add()
        assert_as_accurate(made.stream, plain, truth)
        assert torch.equal(made.stream, again.stream)
        assert all(torch.equal(a, b) for a, b in zip((whole, *rope), kept, strict=True))


@pytest.mark.parametrize("mode", ["pair", "current", "difference", "previous"])
def test_assembled(mode: str, taken: list[str]):
    block, rope = _block(), _rope()
    double = copy.deepcopy(block).double()
    prev, curr, token, role = _tokens(PATCHES), _tokens(PATCHES, 2), _tokens(1, 3)[0], torch.randn(2, WIDTH)
    given = (None if mode == "current" else prev, None if mode == "previous" else curr, token, None if mode == "previous" else role)
    with torch.no_grad():
        made = block(Assembly(*given, mode), rope, num_prefix=1).stream
        assert taken == ["evaluation"]
        plain = _general(block, Assembly(*given, mode), rope, num_prefix=1)
        wide = [None if t is None else t.double() for t in given]
        truth = double(Assembly(*wide, mode), _rope(torch.float64), num_prefix=1).add()
    assert_as_accurate(made, plain, truth)


@pytest.mark.filterwarnings("ignore:.*the PyTorch reference runs", "ignore:There is a performance drop", "ignore:.*trace")
def test_when_it_is_taken(taken: list[str]):
    block, rope, stream = _block(), _rope(), _tokens(1 + PATCHES)

    def takes(block: Block = block, stream: torch.Tensor = stream, rope=rope, **options) -> bool:
        taken.clear()
        block(Residual(stream), rope, **{"num_prefix": 1, **options})
        return bool(taken)

    assert not takes()  # gradients are on
    with torch.inference_mode():
        assert takes()
        assert takes(stream=stream.clone())
    with torch.no_grad():
        assert takes()
        for impl in ("reference", "cpp") if backend.extension().module is not None else ("reference",):
            with backend.use_impl(impl):
                assert takes()
        assert not takes(fold_value=False)
        assert not takes(stream=stream.bfloat16())
        assert not takes(copy.deepcopy(block).double(), stream.double(), _rope(torch.float64))
        assert not takes(rope=_rope(torch.float64))
        assert not takes(copy.deepcopy(block).train())
        assert not takes(copy.deepcopy(block).bfloat16(), stream.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not takes()
        with FlopCounterMode(display=False):  # a mode is to see every op
            assert not takes()
        for part in (block.attention, block.mlp):
            for register in (part.register_forward_hook, part.register_forward_pre_hook):
                seen = []
                with register(lambda *_, seen=seen: seen.append(1)):
                    assert not takes()
                assert seen
        assert takes()
        with nn.modules.module.register_module_forward_hook(lambda *_: None):
            assert not takes()
        other = copy.deepcopy(block)
        other.mlp = nn.Sequential(other.mlp)
        with pytest.raises(TypeError):  # which the general way calls as it calls a block's own
            takes(other)
        with pytest.raises(ValueError, match="cos must have N rows"):
            takes(num_prefix=2)
        with pytest.raises(ValueError, match="q_weight must be"):
            takes(rope=tuple(t[:, :8] for t in rope))
        whole = torch.func.vmap(lambda s: block(Residual(s), rope, num_prefix=1).add())
        taken.clear()
        with backend.use_impl("reference"):
            torch.testing.assert_close(whole(stream[None])[0], block(Residual(stream), rope, num_prefix=1).add(), rtol=1e-5, atol=1e-5)
        assert len(taken) == 1  # not under vmap
        frozen = copy.deepcopy(block).requires_grad_(False)
        traced = torch.jit.trace(lambda s: frozen(Residual(s), rope, num_prefix=1).add(), (stream,), check_trace=False)
        assert len(taken) == 1
        other = _tokens(1 + PATCHES, seed=2)
        torch.testing.assert_close(traced(other), block(Residual(other), rope, num_prefix=1).stream, rtol=1e-5, atol=1e-5)
    assert takes(copy.deepcopy(block).requires_grad_(False)) is False  # gradients may still flow to the stream


def _follows(block: Block, change, rope=None) -> None:
    """That the block's output is what a block that was never evaluated gives, before and after a change."""
    rope, stream = rope or _rope(), _tokens(1 + PATCHES)
    with torch.no_grad():
        before = block(Residual(stream), rope, num_prefix=1).stream
        change()
        after = block(Residual(stream), rope, num_prefix=1).add()
        fresh = copy.deepcopy(block)(Residual(stream), rope, num_prefix=1).add()
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh)


@pytest.mark.usefixtures("library", "taken")
def test_it_follows_the_parameters():
    names = [name for name, _ in _block().named_parameters()]
    assert len(names) == 23
    for name in names:
        block = _block()
        owner, _, leaf = name.rpartition(".")
        _follows(block, lambda block=block, name=name: block.get_parameter(name).mul_(1.5))
        replaced = nn.Parameter(block.get_parameter(name).detach() * 1.5)
        _follows(block, lambda block=block, owner=owner, leaf=leaf, r=replaced: setattr(block.get_submodule(owner), leaf, r))
    block, other = _block(), _block(seed=1)
    _follows(block, lambda: block.load_state_dict(other.state_dict()))
    _follows(block, lambda: setattr(block.attention, "q_proj", _block(seed=2).attention.q_proj))
    _follows(block, lambda: setattr(block, "mlp", _block(seed=3).mlp))
    _follows(block, lambda: setattr(block.mlp.up_proj, "weight", nn.Parameter(block.mlp.up_proj.weight.flip(0))))

    for module in (block.norm1, block.norm2, block.attention):
        _follows(block, lambda module=module: setattr(module, "eps", 0.5))

    def through_data():
        block.norm2.weight.data.mul_(2)
        forget_packed(block)

    _follows(block, through_data)
    rope = tuple(t.clone() for t in _rope())
    for impl in ("reference", "cpp") if backend.extension().module is not None else ("reference",):
        with backend.use_impl(impl):
            _follows(block, lambda: rope[0].mul_(1.1), rope)


def test_another_attention_backend_is_taken_at_once(monkeypatch: pytest.MonkeyPatch):
    block, rope, stream, asked = _block(), _rope(), _tokens(1 + PATCHES), []
    attend = evaluation.attend
    monkeypatch.setattr(evaluation, "attend", lambda *args, backend: (asked.append(backend), attend(*args, backend=backend))[1])
    with torch.no_grad():
        for name in ("auto", "sdpa-math", "sdpa"):
            block.attention.attention = name
            block(Residual(stream), rope, num_prefix=1)
    assert asked == ["auto", "sdpa-math", "sdpa"]


class _Racing(evaluation.Turn):
    """Another thread puts the tables of another size in the place of these behind every look at them."""

    others: tuple | None = None

    @property
    def _tables(self):
        found, self.kept = self.kept, self.others or self.kept
        return found

    @_tables.setter
    def _tables(self, tables) -> None:
        self.kept = tables


def test_another_threads_tables_are_never_taken():
    turn = _Racing((None,), HEADS, WIDTH // HEADS, "pre_rope", 1e-5)
    rope, other = _rope(), patch_rope(3, 4, WIDTH // HEADS, torch.device("cpu"))
    rows = _tokens(1 + PATCHES)
    with torch.no_grad():
        turn(_tokens(1 + 12), other, 1, False)
        others = turn.kept
        wanted = turn(rows, rope, 1, False)
        turn.others = others
        assert torch.equal(turn(rows, rope, 1, False), wanted)
        assert turn.kept is others


def test_it_is_no_part_of_copies_and_pickles():
    block, rope, stream = _block(), _rope(), _tokens(1 + PATCHES)
    with torch.no_grad():
        wanted = block(Residual(stream), rope, num_prefix=1).stream
        assert "evaluation" in block._packed
        buffer = io.BytesIO()
        torch.save(block, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(buffer, weights_only=False)):
            assert not twin._packed
            assert torch.equal(twin(Residual(stream), rope, num_prefix=1).stream, wanted)
    assert not [name for name in block.state_dict() if "evaluation" in name]


def test_odd_parameters_are_for_the_general_way(taken: list[str]):
    stream, rope = _tokens(1 + PATCHES), _rope()
    block = _block()
    with torch.no_grad():
        block.attention.q_norm_prerope.weight = nn.Parameter(torch.ones(1).expand(WIDTH // HEADS))  # of stride 0
        made = block(Residual(stream), rope, num_prefix=1).add()
        assert taken == ["evaluation"]
        torch.testing.assert_close(made, _general(block, Residual(stream), rope, num_prefix=1), rtol=1e-5, atol=1e-5)
        block.attention.k_norm_prerope.weight = nn.Parameter(torch.ones(WIDTH // HEADS - 1))
        with pytest.raises(ValueError, match="k_weight must be"):
            block(Residual(stream), rope, num_prefix=1)
    with torch.inference_mode():
        taken.clear()
        _block().requires_grad_(False)(Residual(stream), rope, num_prefix=1)
        assert taken == []  # made here, its parameters count no versions
    block = _block()
    nn.utils.parametrize.register_parametrization(block.mlp.up_proj, "weight", _Doubled())
    taken.clear()
    with torch.no_grad():
        made = block(Residual(stream), rope, num_prefix=1).add()
        torch.testing.assert_close(made, _general(block, Residual(stream), rope, num_prefix=1), rtol=1e-5, atol=1e-5)


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_of_keeps_what_it_made_until_something_changes():
    module = PackedModule().eval()
    module.weight = nn.Parameter(torch.ones(2))
    module.register_buffer("count", torch.zeros(1))
    made = []

    def make() -> int:
        made.append(0)
        return len(made)

    with torch.no_grad():
        assert [evaluation.of(module, make) for _ in range(3)] == [1, 1, 1]
        module.count.add_(1)
        assert evaluation.of(module, make) == 2
        module.weight = nn.Parameter(torch.zeros(2))
        assert evaluation.of(module, make) == 3
        module.register_module("child", nn.Linear(2, 2))
        module.weight.data = torch.ones(2)  # other storage, the same version
        assert evaluation.of(module, make) == 4
        module.train()
        assert evaluation.of(module, make) is None


def _models() -> list[torch.Tensor]:
    """Everything that runs without gradients: backbone, encode, decode, futures, a dense forecast."""
    pixels, times = small.clip(frames=4)
    made = []
    for options in ({}, {"use_swiglu": False, "use_gated_attn": False}, {"use_qk_norm": False}, {"qk_norm_order": "post_rope"}):
        tok = small.tokenizer(**options).eval()
        with torch.no_grad():
            features = tok.features(pixels)
            rope = tok._rope(pixels)
            z = tok.encode(features[:, 0], features[:, 1], rope)
            made += [features, z, tok.decode(z, features[:, 0], rope)]
    world = small.world().eval()
    futures = world.rollout(pixels[:, :3], times, 1, 3, decode="all", seed=0)
    with torch.no_grad():
        dense = small.dense_world(use_bom=False).eval()(pixels, times, ctx_len=3)[0]
    return [*made, futures.tokens, futures.features, dense]


@pytest.mark.usefixtures("library")
def test_whole_models(taken: list[str]):
    straight = _models()
    assert taken.count("evaluation") > 30
    assert taken.count("predictor") >= 4
    taken.clear()
    with nn.modules.module.register_module_forward_pre_hook(lambda *_: None):
        general = _models()
    assert not taken
    for a, b in zip(straight, general, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
