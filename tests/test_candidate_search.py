"""The best-of-many search: the release's winner, whichever implementation looks for it, and nothing stored or skipped in silence."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path

import pytest
import small
import torch

import deltakern
from deltakern import backend, ops
from deltakern.ops import _triton

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is in the repository, not in the package
from benchmarks import release_structure as release

BATCH, FRAMES, COUNT, CHUNK = 2, 4, 40, 16
SMOOTH = torch.nn.SmoothL1Loss(reduction="none", beta=0.1)
NATIVE = "cuda" if torch.cuda.is_available() else "cpp"
needs_extension = pytest.mark.skipif(backend.extension().module is None, reason="no compiled extension")
every_impl = pytest.mark.parametrize("impl", ["reference", "triton", pytest.param(NATIVE, marks=needs_extension)])


class _Renamed(torch.nn.SmoothL1Loss):
    """A criterion that the ops have no name for."""


class Search:
    """A small world, the release's structure with the same weights, tokens, timestamps and noise."""

    def __init__(self, device: torch.device, *, spread: float = 1.0, seed: int = 0) -> None:
        self.world = small.world(seed, num_samples_train=COUNT, candidate_chunk=CHUNK).to(device).train()
        sizes = {"rope_axis_sizes": (28,), "predictor_hidden_size": 64, "predictor_num_hidden_layers": 2, "predictor_num_heads": 2}
        self.release = release.DeltaWorld(self.world.tokenizer, **sizes, mlp_ratio=2).to(device)
        self.release.predictor.load_state_dict(self.world.predictor.state_dict())
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randn(BATCH, FRAMES, 64, generator=generator).to(device)
        self.times = torch.rand(BATCH, FRAMES, generator=generator).cumsum(1).to(device) * 0.3
        self.noise = spread * torch.randn(BATCH, FRAMES - 1, COUNT, 64, generator=generator).to(device)

    def chosen(self, criterion: torch.nn.Module = SMOOTH) -> torch.Tensor:
        """Which candidate this package's search takes, (B,T-1)."""
        past, target = self.tokens[:, :-1], self.tokens[:, 1:]
        best = self.world._best_queries((self.noise,), lambda q: self.world._predict(past, self.times, q, head=False), target, criterion)
        same = (self.noise == best[:, :, None]).all(-1)
        assert (same.sum(-1) == 1).all()
        return same.to(torch.uint8).argmax(-1)

    def released(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Index (B,T-1) and losses (B,T-1,K) of the release's search."""
        with torch.no_grad():
            return self.release.train_on_tokens(self.tokens, self.times, release.smooth_l1, self.noise)[2:]


@every_impl
@pytest.mark.parametrize("spread", [1.0, 0.02])
def test_the_releases_winner(impl: str, spread: float, device: torch.device) -> None:
    search = Search(device, spread=spread)
    with deltakern.use_impl(impl):
        assert torch.equal(search.chosen(), search.released()[0])


@every_impl
@pytest.mark.parametrize("spread", [1.0, 0.02])
def test_in_bfloat16_the_gap_to_the_best_loss_is_bounded(impl: str, spread: float, device: torch.device) -> None:
    """Rounding may choose another candidate, but none worse, in float64, than twice the losses' error; that error is at most twice the
    release's in the same dtype, by the rule that every op is held to. Candidates 0.02 apart lie closer together than that."""
    search = Search(device, spread=spread)
    with torch.autocast(device.type, torch.bfloat16):
        with deltakern.use_impl(impl):
            chosen = search.chosen()
        rounded = search.released()[1]
    search.release.double()
    search.tokens, search.times, search.noise = search.tokens.double(), search.times.double(), search.noise.double()
    exact = search.released()[1]
    error = (rounded - exact).abs().max()
    assert error > 0
    gap = exact.gather(-1, chosen[..., None])[..., 0] - exact.amin(-1)
    assert (gap <= 2 * 2 * error).all(), f"a gap of {gap.max():.2e} where the release's losses err by {error:.2e}"


@every_impl
def test_a_criterion_without_a_name_finds_the_same(impl: str, device: torch.device) -> None:
    search = Search(device)
    with deltakern.use_impl(impl):
        expected = search.chosen()
        with _triton.count_launches() as counted:
            assert torch.equal(search.chosen(_Renamed(reduction="none", beta=0.1)), expected)
    assert "best_of_n_head_kernel" not in counted


def test_one_launch_a_chunk(device: torch.device) -> None:
    """And nothing else that reads or writes a candidate after the last block."""
    search = Search(device)
    chunks = math.ceil(COUNT / CHUNK)
    with deltakern.use_impl("triton"), _triton.count_launches() as counted:
        search.chosen()
    layers = 2
    assert counted == {
        "best_of_n_head_kernel": chunks,
        "best_of_n_head_pick_kernel": chunks,
        "context_attention_forward_kernel": layers * chunks,
        "gelu_forward_kernel": layers * chunks,
        "residual_norm_forward_kernel": 2 * layers * chunks,  # the first of them norms the noise, with nothing to add
    }


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nothing_falls_back_in_silence(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In strict mode, where a missed kernel raises, the whole training pass runs, and without a warning."""
    monkeypatch.setenv("DELTAKERN_STRICT", "1")
    asked: list[str] = []
    choose = backend.choose
    monkeypatch.setattr(backend, "choose", lambda f, *rest: asked.append(f"{f.op.name}: {choose(f, *rest)}") or choose(f, *rest))
    search = Search(device)
    with warnings.catch_warnings(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        warnings.simplefilter("error", backend.BackendWarning)
        prediction, target = search.world.train_on_tokens(search.tokens, search.times, SMOOTH, queries=search.noise)
    SMOOTH(prediction.float(), target).mean().backward()
    assert search.world.predictor.head.weight.grad.isfinite().all()
    # in float32 on a CPU the product is oneDNN's, with a weight that the predictor keeps, and the reduction an op of its own
    kernel = {"cuda": "best_of_n_head: triton", "cpu": "best_of_n: cpp"}[device.type]
    if device.type == "cpu" and dtype == torch.bfloat16:
        kernel = "best_of_n_head: cpp"
    searched = {a for a in asked if a.startswith("best_of_n")}
    assert kernel in searched
    assert searched <= {kernel, "best_of_n: cpp"}


@every_impl
def test_the_dense_worlds_winner(impl: str, device: torch.device) -> None:
    """Whose loss is a mean over patches too."""
    world = small.dense_world(use_bom=True, candidate_chunk=3).to(device).train()
    frames, times = (t.to(device) for t in small.clip(frames=3))
    queries = torch.randn(2, 2, 8, 64, generator=torch.Generator().manual_seed(0)).to(device)
    features = world._features(frames)
    past, target = features[:, :-1].flatten(1, 2), features[:, 1:]
    with torch.no_grad():
        candidates = world._predict(frames, past, times, queries)
    index = ops.best_of_n.reference(candidates, target, reduce_dims=2)[0]
    with deltakern.use_impl(impl), _triton.count_launches() as counted:
        best = world._best_queries((queries,), lambda q: world._predict(frames, past, times, q, head=False), target, SMOOTH)
    assert torch.equal(best, queries.gather(2, index[..., None, None].expand(-1, -1, 1, 64)).squeeze(2))
    assert counted["best_of_n_head_kernel"] == (3 if impl == "triton" else 0)


def test_the_predictor_stops_before_its_head(device: torch.device) -> None:
    search = Search(device)
    with torch.no_grad():
        entry = search.world._predict(search.tokens[:, :-1], search.times, search.noise, head=False)
        whole = search.world.predict(search.tokens[:, :-1], search.times, search.noise)
        predicted = search.world.predictor.predictions(entry)
        index, loss = search.world.predictor.best(entry, search.tokens[:, 1:], loss="smooth_l1", beta=0.1)
    assert entry.stream.shape == entry.branch.shape == search.noise.shape
    torch.testing.assert_close(predicted, whole, rtol=1e-6, atol=1e-6)
    expected = ops.best_of_n(whole, search.tokens[:, 1:])
    assert torch.equal(index, expected[0])
    torch.testing.assert_close(loss, expected[1])


def test_the_search_compiles_in_one_graph(device: torch.device) -> None:
    search = Search(device)

    def step(tokens: torch.Tensor, times: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return search.world.train_on_tokens(tokens, times, SMOOTH, queries=noise)[0]

    eager = step(search.tokens, search.times, search.noise)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(search.tokens, search.times, search.noise)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
