"""Token-space sampling, decoding, noise by index, scoring, and the memory of the best-of-many search."""

from __future__ import annotations

import concurrent.futures
import copy
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import golden
import graph_tape
import pytest
import small
import torch
from compare import relative_rmse
from test_golden import make_world

import deltakern
from deltakern import backend
from deltakern.models import Savings, StaleCacheError, sampling, score, top
from deltakern.models.noise import IndexedNoise, _normal
from deltakern.nn import graphs
from deltakern.nn import product as products

CONTEXT, HORIZON = 2, 3


def released_steps(model, pixels, times, **noise):
    """Tokens (B,S,h,D) and features (B,S,h,N,D) of the rollout as the released trainer steps through it."""
    state, features = model.rollout_init(pixels, CONTEXT), []
    queries, generator = noise.get("queries"), noise.get("generator")
    for t in range(pixels.shape[1] - CONTEXT):
        step = None if queries is None else queries[:, :, t]
        prediction, _, state = model.rollout_step(state, CONTEXT + t, times, queries=step, generator=generator)
        features.append(prediction.unflatten(0, (pixels.shape[0], -1)))
    return state["own"], torch.stack(features, 2)


@pytest.fixture(scope="module")
def example():
    """A float64 world, a clip with its times, noise, and what the released-style steps make of them."""
    pixels, times = small.clip(frames=CONTEXT + HORIZON)
    model = small.world().double().eval()
    queries = torch.randn(2, 3, HORIZON, 64, dtype=torch.float64)
    with torch.no_grad():
        tokens, features = released_steps(model, pixels, times, queries=queries)
        z = model.tokenizer.tokenize(pixels[:, :CONTEXT])
    return model, pixels, times, queries, z, tokens, features


@pytest.mark.parametrize("budget", [1, 20_000, 1 << 30])
def test_tokens_are_those_of_the_released_steps_for_any_portions(example, budget):
    model, _, times, queries, z, tokens, _ = example
    sampled = model.sample(z, times, HORIZON, 3, queries=queries, memory_budget=budget)
    assert relative_rmse(sampled, tokens) < 1e-12


@pytest.mark.parametrize("budget", [1, 40_000, 1 << 30])
def test_decoding_is_that_of_the_released_steps_for_any_portions(example, budget):
    model, pixels, times, queries, _, tokens, features = example
    futures = model.rollout(pixels[:, :CONTEXT], times, HORIZON, 3, queries=queries, memory_budget=budget)
    assert relative_rmse(futures.tokens, tokens) < 1e-12
    assert relative_rmse(futures.features, features) < 1e-12
    assert torch.equal(futures.indices, torch.tensor([[0, 1, 2]] * 2))
    assert torch.equal(futures.timestamps, times[:, CONTEXT:])


def test_budgets_cut_the_work():
    """What the two tests above rely on: their budgets give other portions than one."""
    assert len(list(sampling.portions(2, 3, 0))) == len(list(sampling.portions(2, 3, 1))) == 6
    assert [(list(c), list(s)) for c, s in sampling.portions(2, 3, 2)] == [([0], [0, 1]), ([0], [2]), ([1], [0, 1]), ([1], [2])]
    assert [(list(c), list(s)) for c, s in sampling.portions(5, 3, 7)] == [([0, 1], [0, 1, 2]), ([2, 3], [0, 1, 2]), ([4], [0, 1, 2])]
    for batch, samples, at_once in ((1, 1, 1), (3, 4, 5), (4, 7, 100)):
        cells = [(c, s) for clips, part in sampling.portions(batch, samples, at_once) for c in clips for s in part]
        assert sorted(cells) == [(c, s) for c in range(batch) for s in range(samples)]
    model = small.world().double()
    a_sample = sampling._sample_bytes(model, torch.zeros(2, CONTEXT, 64), HORIZON)
    a_frame = sampling._decode_bytes(model.tokenizer, torch.zeros(2, 6, 64, dtype=torch.float64))
    assert 20_000 < 2 * 3 * a_sample < 1 << 30
    assert 40_000 < 2 * 3 * a_frame < 1 << 30


@pytest.mark.parametrize(
    ("which", "place"),
    [
        ("last", (slice(None), slice(None), slice(-1, None))),
        (1, (slice(None), [1])),
        ([2, 0], (slice(None), [2, 0])),
        (torch.tensor([[1], [2]]), ([[0], [1]], [[1], [2]])),
        (lambda tokens: torch.tensor([2, 2]), (slice(None), [2, 2])),
    ],
)
def test_decoding_what_is_asked(example, which, place):
    model, pixels, times, queries, _, _, features = example
    futures = model.rollout(pixels[:, :CONTEXT], times, HORIZON, 3, which, queries=queries)
    assert relative_rmse(futures.features, features[place]) < 1e-12
    nothing = model.rollout(pixels[:, :CONTEXT], times, HORIZON, 3, "none", queries=queries)
    assert nothing.features is None
    assert nothing.indices is None
    later = model.decode(nothing.tokens, nothing.last, which, size=nothing.size)
    assert torch.equal(later, futures.features)


def test_nothing_is_decoded_and_no_frame_seen_that_was_not_asked_for(example):
    model, pixels, times, queries, _, _, _ = example
    calls = []
    hooks = [
        model.tokenizer.decoder_blocks[1].register_forward_hook(lambda m, a, out: calls.append(out.stream.shape[0])),
        model.backbone.register_forward_hook(lambda m, a, out: calls.append(("frames", *out.shape[:2]))),
    ]
    try:
        model.rollout(pixels[:, :CONTEXT], times, HORIZON, 3, "none", queries=queries)
        seen = [("frames", 2, CONTEXT), ("frames", 1, 1)]  # the context, and one black frame
        assert calls == seen
        calls.clear()
        model.rollout(pixels[:, :CONTEXT], times, HORIZON, 3, [1], queries=queries)
        assert calls == [*seen, *[2] * HORIZON]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_delta": False},
        {"qk_norm_order": "post_rope", "use_swiglu": False},
        {"use_qk_norm": False, "use_gated_attn": False, "num_hidden_layers": 1},
        {"savings": Savings.none()},
    ],
)
def test_sharing_the_first_block_is_exact(options):
    """Decoding all samples from the same features equals decoding each by itself, to rounding in float64."""
    tok = small.tokenizer(**options).double().eval()
    z, x = torch.randn(2, 4, 64, dtype=torch.float64), torch.randn(2, 6, 64, dtype=torch.float64)
    rope = tok._rope(torch.empty(32, 48))
    with torch.no_grad():
        alone = tok.decode(z.flatten(0, 1)[:, None], x.repeat_interleave(4, 0), rope).unflatten(0, (2, 4))
        assert relative_rmse(tok.decode_samples(z, x, rope), alone) < 1e-12


@pytest.mark.parametrize("onednn", [False, True], ids=["as tuned", "oneDNN"])
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("variant", golden.VARIANTS)
def test_golden_rollouts_through_every_path(variant, frozen, onednn, monkeypatch):
    """Released-style steps, cached, sampled and decoded in portions, streamed, captured: the released code's features.

    Also with every product that may go to oneDNN there, as on AMD's processors with AVX-512.
    """
    if onednn:
        monkeypatch.setattr(products, "takes", lambda *_: True)
        monkeypatch.setattr(products, "ROWS_ONE_CALL", 1)
    tensors, known = golden.load("deltaworld", variant), golden.meta("deltaworld_rollout")
    context, horizon = known["ctx_len"], known["horizon"]
    queries = torch.cat([tensors[f"rollout.query{t}"] for t in range(horizon)], 2)
    frames, times, truth = tensors["frames"], tensors["timestamps"], tensors["rollout.preds"]
    paths = {}
    for name, savings in (("released", Savings.none()), ("cached", Savings())):
        world = make_world(variant, savings)
        if frozen:
            deltakern.freeze(world)
        paths[name] = world(frames, times, ctx_len=context, queries=queries)[0]
    for budget in (1, 3_000_000, 1 << 30):
        futures = world.rollout(frames[:, :context], times, horizon, truth.shape[1], queries=queries, memory_budget=budget)
        paths[f"budget {budget}"] = futures.features
    streamed = []
    for clip in range(len(frames)):
        stream = world.stream(context)
        for t in range(context):
            stream.push(frames[clip, t], times[clip, t])
        streamed.append(stream.rollout(times[clip, context:], truth.shape[1], queries=queries[clip : clip + 1]).features)
    paths["streamed"] = torch.cat(streamed)
    tapes = graph_tape.install(monkeypatch)
    for _ in range(2):  # captured, replayed
        paths["captured"] = world.rollout(frames[:, :context], times, horizon, truth.shape[1], queries=queries).features
    assert tapes.captures == (5 if frozen else 1)  # backbone, tokens of the context, samples, two decodes; live, samples alone
    for name, features in paths.items():
        assert relative_rmse(features, truth) < 1e-5, name
        assert (features - truth).abs().max() <= 1e-5 * truth.abs().max(), name


def test_generator_draws_what_the_released_steps_draw(example):
    model, pixels, times, _, z, _, _ = example
    with torch.no_grad():
        tokens, _ = released_steps(model, pixels, times, generator=torch.Generator().manual_seed(5))
    sampled = model.sample(z, times, HORIZON, 3, generator=torch.Generator().manual_seed(5), memory_budget=1)
    assert relative_rmse(sampled, tokens) < 1e-12
    torch.manual_seed(5)
    assert torch.equal(model.sample(z, times, HORIZON, 3), model.sample(z, times, HORIZON, 3, generator=torch.manual_seed(5)))


@pytest.mark.parametrize("noise", ["normal", "antithetic", "sobol"])
def test_a_seed_gives_every_sample_its_own_future(example, noise):
    model, _, times, _, z, _, _ = example
    many = model.sample(z, times, HORIZON, 33, seed=9, noise=noise)
    few = model.sample(z, times, HORIZON, 8, seed=9, noise=noise, memory_budget=1)
    assert relative_rmse(few, many[:, :8]) < 1e-12
    assert relative_rmse(model.sample(z[:1], times[:1], HORIZON, 8, seed=9, noise=noise), many[:1, :8]) < 1e-12
    assert not torch.allclose(many, model.sample(z, times, HORIZON, 33, seed=10, noise=noise))
    if noise != "sobol":  # its points are over all steps
        assert relative_rmse(model.sample(z, times[:, :-1], HORIZON - 1, 8, seed=9, noise=noise), many[:, :8, :-1]) < 1e-12


def test_learned_query_gives_one_future():
    pixels, times = small.clip(frames=4)
    model = small.world(use_bom=False).eval()
    rollout = model(pixels, times, ctx_len=2)[0]
    futures = model.rollout(pixels[:, :2], times, 2)
    torch.testing.assert_close(futures.features, rollout, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    pixels, times = small.clip(frames=4)
    futures = small.world().to(dtype).eval().rollout(pixels[:, :2], times, 2, 3, seed=1)
    assert futures.tokens.dtype == futures.features.dtype == dtype
    assert futures.features.isfinite().all()


def test_autocast_keeps_the_tokens_dtype(example):
    _, _, times, _, z, _, _ = example
    model = small.world().eval()
    plain = model.sample(z.float(), times, HORIZON, 3, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.sample(z.float(), times, HORIZON, 3, seed=1)
    assert half.dtype == torch.float32
    assert 0 < relative_rmse(half, plain) < 0.05


def test_samples_follow_the_weights_and_copies_stay_apart():
    pixels, times = small.clip(frames=3)
    model = small.world().eval()
    z = model.tokenizer.tokenize(pixels[:, :2])
    before = model.sample(z, times, 1, 3, seed=1)
    weight = model.predictor.blocks[1].attention.kv_proj.weight
    with torch.no_grad():
        weight.mul_(3)
    changed = model.sample(z, times, 1, 3, seed=1)
    assert not torch.allclose(changed, before)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.sample(z, times, 1, 3, seed=1), changed)
    assert not [k for k in model.state_dict() if "packed" in k or "graph" in k]


def test_graphs_are_captured_once_for_each_shape_until_weights_change(monkeypatch):
    tapes, model = graph_tape.install(monkeypatch), small.world().eval()
    z, times = torch.ones(1, 2, 64), torch.arange(4.0)[None]

    def run(samples, horizon=1, seed=1):
        times_now = times[:, : 2 + horizon]
        found = model.sample(z, times_now, horizon, samples, seed=seed)
        torch.testing.assert_close(found, model.sample(z, times_now, horizon, samples, seed=seed, cuda_graph=False), rtol=1e-5, atol=1e-6)
        return found

    first = run(3)
    assert torch.equal(run(3), first)
    assert not torch.allclose(run(3, seed=2), first)
    assert torch.equal(run(3), first)
    assert tapes.captures == 1
    run(4)
    run(3, horizon=2)
    run(3)
    assert tapes.captures == 3
    kept = graphs.graphs_of(model.predictor)._kept
    for samples in range(10, 10 + graphs.GRAPHS_KEPT):
        run(samples)
    assert len(kept) == graphs.GRAPHS_KEPT
    captured = tapes.captures
    run(3)  # the oldest was dropped
    assert tapes.captures == captured + 1


def test_graphs_of_live_weights_follow_them(monkeypatch):
    """What is written to a parameter is in the next replay; one that is another or lies elsewhere makes another graph."""
    tapes, model = graph_tape.install(monkeypatch), small.world().eval()
    z, times = torch.ones(1, 2, 64), torch.arange(4.0)[None]
    predictor, known = model.predictor, []

    def run(captures):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = model.sample(z, times[:, :3], 1, 3, seed=1)
            fresh = copy.deepcopy(model).sample(z, times[:, :3], 1, 3, seed=1, cuda_graph=False)
        torch.testing.assert_close(found, fresh, rtol=1e-2 if half else 1e-5, atol=1e-3 if half else 1e-6)
        assert not any(torch.allclose(found, k, rtol=1e-4) for k in known), "nothing changed, so nothing was compared"
        known.append(found)
        assert tapes.captures == captures

    for half in (False, True):  # noqa: B007 - run reads it
        start = tapes.captures
        known.clear()
        run(start + 1)
        with torch.no_grad():
            predictor.head.bias.add_(1)
        run(start + 1)
        predictor.blocks[0].mlp.up_proj.weight.data.mul_(2)
        run(start + 1)
        predictor.head.weight.detach().numpy()[:] *= 1.5
        run(start + 1)
        predictor.head.bias = torch.nn.Parameter(predictor.head.bias.detach() - 1)
        run(start + 2)
        predictor.head.weight.data = predictor.head.weight.data.clone() * 1.5
        run(start + 3)
        predictor.blocks[1].mlp = copy.deepcopy(predictor.blocks[1].mlp)
        predictor.blocks[1].mlp.down_proj.weight.data.mul_(3)
        run(start + 4)


def test_graphs_of_frozen_weights_end_with_them(monkeypatch):
    tapes, model = graph_tape.install(monkeypatch), small.world().eval()
    z, times = torch.ones(1, 2, 64), torch.arange(3.0)[None]
    live = model.sample(z, times, 1, 3, seed=1)
    deltakern.freeze(model)
    for _ in range(2):
        torch.testing.assert_close(model.sample(z, times, 1, 3, seed=1), live, rtol=1e-5, atol=1e-6)
        assert tapes.captures == 2
    other = small.world(seed=1)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.sample(z, times, 1, 3, seed=1), other.eval().sample(z, times, 1, 3, seed=1, cuda_graph=False))
    assert tapes.captures == 3
    model.predictor.head.bias.data.add_(1)  # nothing was derived from it in float32: read where it is used
    torch.testing.assert_close(
        model.sample(z, times, 1, 3, seed=1), copy.deepcopy(model).sample(z, times, 1, 3, seed=1, cuda_graph=False), rtol=1e-5, atol=1e-6
    )
    model.predictor.blocks[0].attention.kv_proj.weight.data.add_(1)
    with pytest.raises(deltakern.FrozenWeightsError, match=r"blocks\.0\.attention\.kv_proj\.weight"):
        model.sample(z, times, 1, 3, seed=1)
    assert tapes.captures == 3


def test_hooks_run_in_place_of_graphs(monkeypatch):
    tapes, model = graph_tape.install(monkeypatch), small.world().eval()
    z, times, seen = torch.ones(1, 2, 64), torch.arange(3.0)[None], []
    model.sample(z, times, 1, 3, seed=1)
    with model.predictor.blocks[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1)):
        model.sample(z, times, 1, 3, seed=1)
        assert len(seen) == 1
    model.sample(z, times, 1, 3, seed=1)
    assert tapes.captures == 2


def test_graphs_do_not_mix_modes(monkeypatch):
    """Captured in inference mode and used outside of it, and the other way round; under autocast another graph."""
    tapes, model = graph_tape.install(monkeypatch), small.world().eval()
    z, times = torch.ones(1, 2, 64), torch.arange(4.0)[None]
    for first, second in ((torch.inference_mode, torch.no_grad), (torch.enable_grad, torch.inference_mode)):
        model.predictor.__dict__.pop("_graphs", None)
        with first():
            one = model.sample(z, times, 2, 3, seed=1)
        with second():
            other = model.sample(z, times, 2, 3, seed=1)
            plain = model.sample(z, times, 2, 3, seed=1, cuda_graph=False)
        assert torch.equal(one, other)
        torch.testing.assert_close(one, plain, rtol=1e-5, atol=1e-6)
        assert not one.requires_grad
    assert tapes.captures == 2
    with torch.autocast("cpu", torch.bfloat16):
        half = model.sample(z, times, 2, 3, seed=1)
        assert torch.is_autocast_cache_enabled()
        assert relative_rmse(half, model.sample(z, times, 2, 3, seed=1, cuda_graph=False)) < 0.01
    assert 0 < relative_rmse(half, one) < 0.05
    assert tapes.captures == 3
    assert torch.equal(model.sample(z, times, 2, 3, seed=1), one)


def test_threads_that_sample_at_once_do_not_mix(monkeypatch):
    graph_tape.install(monkeypatch)
    model = small.world().eval()
    z, times = torch.randn(8, 1, 2, 64), torch.arange(4.0)[None]
    expected = [model.sample(z[i], times, 2, 3, seed=i, cuda_graph=False) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: model.sample(z[i % 8], times, 2, 3, seed=i % 8), range(32)))
    for i, tokens in enumerate(found):
        torch.testing.assert_close(tokens, expected[i % 8], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_captured_says_why_once_and_runs(monkeypatch):
    tapes = graph_tape.install(monkeypatch)
    model = small.world().eval()
    steps, z, times = sampling._steps, torch.ones(1, 2, 64), torch.arange(3.0)[None]
    expected = model.sample(z, times, 1, 3, seed=1, cuda_graph=False)

    def waits(*args):
        tokens = steps(*args)
        return tokens * (1 + 0 * tokens.sum().item())

    monkeypatch.setattr(sampling, "_steps", waits)
    with pytest.warns(
        backend.BackendWarning, match="steps could not be captured as a CUDA graph and runs as it is called: .*_local_scalar"
    ):
        assert torch.equal(model.sample(z, times, 1, 3, seed=1), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.sample(z, times, 1, 3, seed=1), expected)
    assert tapes.captures == 1


def test_only_a_gpu_that_is_not_capturing_captures(monkeypatch):
    assert not graphs.captures(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert graphs.captures(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not graphs.captures(torch.device("cuda"))


@pytest.mark.gpu
def test_a_captured_graph_computes_what_the_launches_do():
    pixels, times = small.clip(frames=CONTEXT + HORIZON)
    model = small.world().eval().cuda()
    z, times = model.tokenizer.tokenize(pixels[:, :CONTEXT].cuda()), times.cuda()
    for scale in (1, 2):
        with torch.no_grad():
            model.predictor.head.weight.mul_(scale)
        plain = model.sample(z, times, HORIZON, 20, seed=1, cuda_graph=False)
        for _ in range(3):
            assert torch.equal(model.sample(z, times, HORIZON, 20, seed=1), plain)
    assert torch.equal(model.sample(z, times, HORIZON, 20, seed=2), model.sample(z, times, HORIZON, 20, seed=2, cuda_graph=False))
    with torch.inference_mode():
        assert torch.equal(model.sample(z, times, HORIZON, 20, seed=1), plain)
        other = model.sample(z, times, HORIZON, 21, seed=1)
    assert torch.equal(model.sample(z, times, HORIZON, 21, seed=1), other)
    with torch.autocast("cuda", torch.bfloat16):
        plain = model.sample(z, times, HORIZON, 20, seed=1, cuda_graph=False)
        assert torch.equal(model.sample(z, times, HORIZON, 20, seed=1), plain)
    assert torch.equal(model.sample(z, times, HORIZON, 20, seed=1), model.sample(z, times, HORIZON, 20, seed=1))
    ours = torch.cuda.Stream()
    ours.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(ours):
        apart = model.sample(z, times, HORIZON, 21, seed=1)
    torch.cuda.current_stream().wait_stream(ours)
    assert torch.equal(apart, other)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["normal", "antithetic", "sobol"])
def test_noise_has_the_same_bits_on_the_gpu(kind):
    noise = IndexedNoise(3, 768, 0.02, kind)
    assert torch.equal(noise.draw(range(2), range(3, 40), 2, device="cuda").cpu(), noise.draw(range(2), range(3, 40), 2))


def test_the_normal_quantile():
    bits = torch.cat((torch.arange(0, 1 << 32, 65_521), (1 << 32) - 1 - torch.arange(5000), torch.arange(5000)))
    exact = torch.special.ndtri((bits.double() + 0.5) / 2**32)
    assert (_normal(bits).double() - exact).abs().max() < 1e-5
    ordered = _normal(bits.sort().values)
    assert (ordered.diff() >= 0).all()
    assert torch.equal(_normal((1 << 32) - 1 - bits), -_normal(bits))


def test_noise_is_normal_and_independent():
    drawn = IndexedNoise(1, 65).draw(range(3), range(400), 4)
    assert drawn.shape == (3, 400, 4, 65)
    flat = drawn.double().flatten()
    n = flat.numel() ** 0.5
    for power, moment, spread in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs(flat.pow(power).mean() - moment) < 5 * spread / n
    # no row like another: neighbours in each of clip, sample, step, channel, and seed, are uncorrelated
    for axis in range(4):
        size = drawn.shape[axis] - 1
        a, b = drawn.narrow(axis, 0, size), drawn.narrow(axis, 1, size)
        assert abs((a * b).double().mean()) < 5 / a.numel() ** 0.5
    other = IndexedNoise(2, 65).draw(range(3), range(400), 4)
    assert abs((drawn * other).double().mean()) < 5 / n
    assert torch.equal(IndexedNoise(1 - (1 << 64), 65).draw(range(3), range(400), 4), drawn)  # 64 bits of the seed count


def test_noise_kinds():
    pairs = IndexedNoise(4, 8, 0.5, "antithetic").draw(range(2), range(6), 2)
    assert torch.equal(pairs[:, 1::2], -pairs[:, ::2])
    assert torch.equal(pairs[:, ::2], IndexedNoise(4, 8, 0.5).draw(range(2), range(3), 2))
    assert torch.equal(IndexedNoise(4, 8, 0.5, "antithetic").draw(range(1, 2), range(3, 6), 2), pairs[1:, 3:])
    sobol = IndexedNoise(4, 8, 0.5, "sobol")
    points = sobol.draw(range(2), range(64), 3)
    assert torch.equal(sobol.draw(range(1, 2), range(7, 20), 3), points[1:, 7:20])
    assert not torch.equal(points[0], points[1])
    # 64 points of a scrambled Sobol sequence fill every channel's 64 quantiles once
    cells = (torch.special.ndtr(points.double() / 0.5) * 64).long().sort(1).values
    assert torch.equal(cells, torch.arange(64)[None, :, None, None].expand_as(cells))


def test_score_and_top():
    tokens = torch.randn(2, 5, 3, 8)
    goal = tokens[:, 3, -1] + 0.01
    scores = score(tokens, goal)
    criterion = torch.nn.SmoothL1Loss(reduction="none", beta=0.1)
    torch.testing.assert_close(scores, criterion(tokens[:, :, -1], goal[:, None].expand(-1, 5, -1)).mean(-1))
    assert torch.equal(top(scores, 1), torch.tensor([[3], [3]]))
    whole = score(tokens, tokens[:, 2], loss="mse")
    torch.testing.assert_close(whole, (tokens - tokens[:, 2:3]).square().flatten(2).mean(-1))
    features = torch.randn(2, 5, 3, 6, 8)
    torch.testing.assert_close(
        score(features, features[:, 1, -1], loss="l1")[:, 0], (features[:, 0] - features[:, 1])[:, -1].abs().mean((1, 2))
    )
    assert torch.equal(top(score(features, features[:, 4]), 1), torch.tensor([[4], [4]]))
    assert torch.equal(top(torch.tensor([[2.0, float("nan"), 1.0, 1.0]]), 4), torch.tensor([[2, 3, 0, 1]]))


def test_the_best_k_are_decoded(example):
    model, pixels, times, queries, _, tokens, features = example
    goal = tokens[:, 1, -1]
    futures = model.rollout(pixels[:, :CONTEXT], times, HORIZON, 3, lambda t: top(score(t, goal), 1), queries=queries)
    assert torch.equal(futures.indices, torch.tensor([[1], [1]]))
    assert relative_rmse(futures.features, features[:, 1:2]) < 1e-12


def _bad(pattern, error=ValueError):
    return pytest.raises(error, match=pattern)


def test_bad_input():
    pixels, times = small.clip(frames=4)
    model = small.world().eval()
    z = model.tokenizer.tokenize(pixels[:, :2])
    with _bad(r"queries must be \(B,S,h,D\) = \(2, 3, 2, 64\), got a tensor of shape \(2, 3, 1, 64\)"):
        model.sample(z, times, 2, 3, queries=torch.zeros(2, 3, 1, 64))
    with _bad(r"queries must be a floating tensor \(B,S,h,D\), got torch.int64", TypeError):
        model.sample(z, times, 2, 3, queries=torch.zeros(2, 3, 2, 64, dtype=torch.long))
    with _bad(r"queries must be a floating tensor \(B,S,h,D\), got list", TypeError):
        model.sample(z, times, 2, 3, queries=[0.0])
    with _bad(r"timestamps must be \(B,C\+h\) = \(2, 4\), got a tensor of shape \(2, 3\)"):
        model.sample(z, times[:, :3], 2, 3)
    with _bad(r"must not go backwards, got 1 s after 2 s at index 2 of clip 0"):
        model.sample(z[:1], torch.tensor([[0.0, 2.0, 1.0, 3.0]]), 2, 3)
    with _bad("must not go backwards"):
        model.rollout(pixels[:, :2], times.flip(1), 2, 3)
    with _bad("timestamps must be finite seconds"):
        model.sample(z, times * float("nan"), 2, 3)
    with _bad("timestamps must be a floating tensor", TypeError):
        model.sample(z, times.long(), 2, 3)
    with _bad(r"z must be \(B,C,D\) delta tokens with C at least 1 and D=64, got \(2, 0, 64\)"):
        model.sample(z[:, :0], times, 4, 3)
    with _bad("horizon must be an integer of at least 1, got 0"):
        model.sample(z, times, 0, 3)
    with _bad("num_samples must be an integer of at least 1, got -1"):
        model.sample(z, times, 2, -1)
    with _bad("three ways to the noise, got generator and seed"):
        model.sample(z, times, 2, 3, seed=1, generator=torch.Generator())
    with _bad("noise='sobol' is drawn by seed and sample index and needs seed="):
        model.sample(z, times, 2, 3, noise="sobol")
    with _bad("noise must be one of"):
        model.sample(z, times, 2, 3, seed=1, noise="pink")
    with _bad("seed must be an integer, got float", TypeError):
        model.sample(z, times, 2, 3, seed=1.5)
    with _bad(r"takes at most 21201 dimensions, got horizon x D = 400 x 64"):
        model.sample(z, torch.arange(402.0).expand(2, -1), 400, 1, seed=1, noise="sobol")
    with _bad("seed is for best-of-many models"):
        small.world(use_bom=False).eval().sample(z, times, 2, 1, seed=1)
    tokens, features = torch.zeros(2, 3, 2, 64), torch.zeros(2, 6, 64)
    for which in (3, -1, [0, 5]):
        with _bad("indices of samples must lie in 0..2"):
            model.decode(tokens, features, which, size=(32, 48))
    for which in ([], torch.zeros(3, 1, dtype=torch.long), torch.zeros(1, 1, 1, dtype=torch.long), [0.5]):
        with _bad("indices of samples must be"):
            model.decode(tokens, features, which, size=(32, 48))
    with _bad("decode must be 'all', 'last', 'none' or indices of samples, got 'first'"):
        model.rollout(pixels[:, :2], times, 2, 3, "first")
    with _bad("which must name samples to decode, got 'none'"):
        model.decode(tokens, features, "none")
    with _bad("size must be given as .* because N=6 patches are no square"):
        model.decode(tokens, features)
    with _bad(r"size must be \(height, width\) in pixels of N=6 patches of 16, got \(32, 32\)"):
        model.decode(tokens, features, size=(32, 32))
    with _bad(r"goal must be \(2, 64\), of the last frame, or \(2, 2, 64\), of every frame, got a tensor of shape \(64,\)"):
        score(tokens, torch.zeros(64))
    with _bad("samples must be tokens"):
        score(tokens[0], torch.zeros(64))
    with _bad(r"S at least k=4, got a tensor of shape \(2, 3\)"):
        top(torch.zeros(2, 3), 4)


def test_a_rollouts_cache_is_refused_after_weights_changed():
    pixels, times = small.clip(frames=4)
    model = small.world().eval()
    with torch.no_grad():
        state = model.rollout_step(model.rollout_init(pixels, 2), 2, times)[2]
        model.rollout_step(state, 3, times)
        model.predictor.blocks[0].attention.kv_proj.bias.add_(1)
        with _bad("the predictor's weights changed since this rollout's first step; begin again with rollout_init", StaleCacheError):
            model.rollout_step(state, 3, times)
        uncached = small.world(savings=Savings.none()).eval()
        state = uncached.rollout_step(uncached.rollout_init(pixels, 2), 2, times)[2]
        uncached.predictor.head.bias.add_(1)
        uncached.rollout_step(state, 3, times)  # nothing was kept


def test_a_long_context_warns_once(monkeypatch):
    monkeypatch.setattr(sampling, "_warned_long", False)
    model, times = small.world().eval(), torch.arange(9.0)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sample(torch.zeros(1, 7, 64), times[:, :8], 1, 2)
    with pytest.warns(UserWarning, match=r"a context of 8 tokens is longer than trained on \(7 in the released models\)"):
        model.sample(torch.zeros(1, 8, 64), times, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sample(torch.zeros(1, 8, 64), times, 1, 2)


def test_candidates_noise_is_the_releases_draw():
    """Up to 256 candidates one draw of all; beyond, as many draws of 256."""
    like = torch.zeros(1)
    for count, draws in ((6, [6]), (256, [256]), (600, [256, 256, 88])):
        model = small.world(num_samples_train=count)
        ours = list(model._candidate_noise(2, 3, like, torch.Generator().manual_seed(1)))
        generator = torch.Generator().manual_seed(1)
        for noise, n in zip(ours, draws, strict=True):
            assert torch.equal(noise, torch.randn(2, 3, n, 64, generator=generator) * 0.02)


@pytest.mark.parametrize("chunk", [7, 100, 1000])
def test_the_best_of_many_draws_does_not_depend_on_chunks(chunk):
    pixels, times = small.clip(frames=3)
    model = small.world(num_samples_train=300, candidate_chunk=chunk).double().train()
    z = model.tokenizer.tokenize(pixels)
    criterion = torch.nn.SmoothL1Loss(reduction="none", beta=0.1)
    prediction, target = model.train_on_tokens(z, times, criterion, generator=torch.Generator().manual_seed(3))
    queries = torch.cat(list(model._candidate_noise(2, 2, z, torch.Generator().manual_seed(3))), 2)
    with torch.no_grad():
        candidates = model.predict(z[:, :-1], times, queries)
    index = criterion(candidates, target[:, :, None].expand_as(candidates)).mean(-1).argmin(-1)
    best = candidates.gather(2, index[..., None, None].expand(-1, -1, 1, 64)).squeeze(2)
    assert relative_rmse(prediction, best) < 1e-12


def _peak_growth(program: str) -> float:
    """MiB by which a fresh process's resident memory peaks, after the line ``start()``, above what it was there."""
    prelude = """
        import sys
        sys.path[:0] = [{here!r}, {root!r}]
        import torch, small
        torch.set_num_threads(1)
        def resident(name):
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
        def start():
            global before
            open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
            before = resident("VmRSS")
    """
    here = Path(__file__).parent
    prelude = textwrap.dedent(prelude).format(here=str(here), root=str(here.parent))
    text = prelude + textwrap.dedent(program) + '\nprint(resident("VmHWM") - before)'
    returned = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # what is freed leaves resident memory at once
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=600, env=returned)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")


@linux
def test_memory_does_not_grow_with_the_candidates():
    program = """
        model = small.world(num_samples_train={count}, predictor_num_hidden_layers=1).train()
        z, times = torch.randn(16, 8, 64), torch.arange(8.0).expand(16, -1) / 10
        criterion = torch.nn.SmoothL1Loss(reduction="none", beta=0.1)
        small_pass = lambda z, t: model.train_on_tokens(z, t, criterion)[0].sum().backward()
        start()
        small_pass(z, times)
    """
    few, many = (_peak_growth(program.format(count=count)) for count in (256, 4096))
    noise = 16 * 7 * 4096 * 64 * 4 / 2**20
    assert few > 10, "too small to say anything"
    assert noise > 0.5 * few, "the noise of all candidates would not be noticed"
    assert many < 1.3 * few, f"{many:.0f} MiB for 4096 candidates, {few:.0f} for 256"


@linux
def test_65536_samples_in_bounded_memory():
    program = """
        model = small.world(predictor_num_hidden_layers=1).eval()
        z, times = torch.randn(1, 4, 64), torch.arange(6.0)[None] / 10
        model.sample(z, times, 2, 64, seed=1)
        start()
        tokens = model.sample(z, times, 2, 65536, seed=1, memory_budget=8 << 20)
        assert torch.allclose(tokens[:, :8], model.sample(z, times, 2, 8, seed=1), rtol=1e-4, atol=1e-6)
    """
    result = 65536 * 2 * 64 * 4 / 2**20
    growth = _peak_growth(program)
    assert growth < result + 3 * 8, f"{growth:.0f} MiB, {result:.0f} of them the result, for a budget of 8"
