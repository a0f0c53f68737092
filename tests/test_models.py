"""The models beyond the golden vectors: dtypes, sizes, torch.compile, exact savings, frozen parts, caches, bad input."""

from __future__ import annotations

import copy

import pytest
import small
import torch
from compare import relative_rmse

import deltakern
from deltakern import ops
from deltakern.models import DINOv3Config, Savings

SMOOTH = torch.nn.SmoothL1Loss(reduction="none", beta=0.1)


@pytest.mark.parametrize("frames", [1, 2, 7, 32])
def test_tokenize_takes_any_number_of_frames_of_any_shape(frames):
    tok = small.tokenizer().eval()
    pixels, _ = small.clip(batch=1, frames=frames, height=16, width=80)
    z = tok.tokenize(pixels)
    assert z.shape == (1, frames, 64)
    assert z.isfinite().all()
    # every token is that of its own pair alone
    features = tok.features(pixels)
    previous = tok.black_features(pixels) if frames == 1 else features[:, -2]
    torch.testing.assert_close(z[:, -1:], tok.encode(previous, features[:, -1], tok._rope(pixels)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_delta": False}, {"use_swiglu": False, "use_qk_norm": False, "use_gated_attn": False}])
@pytest.mark.parametrize("grad", [True, False])
def test_every_exact_saving_is_exact(options, grad):
    """In float64 each saving, alone and together, changes nothing but rounding."""
    pixels, _ = small.clip()
    plain = small.tokenizer(savings=Savings.none(), **options).double().eval()
    with torch.set_grad_enabled(grad):
        features = plain.features(pixels)
        rope = plain._rope(pixels)
        z = plain.encode(features[:, 0], features[:, 1], rope)
        decoded = plain.decode(z, features[:, 0], rope)
        for name in ("last_row", "fold_value", "drop_row", "all"):
            plain.savings = Savings() if name == "all" else Savings(**{f: f == name or f == "last_row" for f in vars(Savings())})
            assert relative_rmse(plain.encode(features[:, 0], features[:, 1], rope), z) < 1e-12, name
            assert relative_rmse(plain.decode(z, features[:, 0], rope), decoded) < 1e-12, name


def test_context_cache_is_exact():
    pixels, times = small.clip(frames=5)
    model = small.world().double().eval()
    queries = torch.randn(2, 3, 3, 64, dtype=torch.float64)
    cached, _, _ = model(pixels, times, ctx_len=2, queries=queries)
    model.savings = Savings(context_cache=False)
    recomputed, _, _ = model(pixels, times, ctx_len=2, queries=queries)
    assert relative_rmse(cached, recomputed) < 1e-12


def test_dense_context_cache_is_exact():
    pixels, times = small.clip(frames=5)
    model = small.dense_world(use_bom=True).double().eval()
    queries = torch.randn(2, 3, 3, 64, dtype=torch.float64)
    cached, _, _ = model(pixels, times, ctx_len=2, queries=queries)
    model.savings = Savings(context_cache=False)
    assert relative_rmse(cached, model(pixels, times, ctx_len=2, queries=queries)[0]) < 1e-12


def test_the_searchs_portions_fit_a_cpu():
    """At released sizes: parts of one size, of enough rows for oneDNN and of few enough for the allocator; a GPU's are as asked."""
    model = small.world().train()
    model.predictor.blocks[0].mlp.hidden = 3072
    rows = {clips: model._together(256, torch.zeros(clips, 7, 64)) for clips in (1, 4, 32, 130, 200, 1024)}
    assert rows == {1: 256, 4: 64, 32: 9, 130: 2, 200: 1, 1024: 1}
    assert model._together(256, torch.zeros(4, 7, 64, device="meta")) == 256
    model.candidate_chunk = 100
    assert model._together(256, torch.zeros(4, 7, 64, device="meta")) == 86


@pytest.mark.parametrize("chunk", [1, 4, 6, 100])
def test_candidate_chunks_find_the_same_best(chunk):
    pixels, times = small.clip(frames=4)
    model = small.world(candidate_chunk=chunk).train()
    queries = torch.randn(2, 3, 6, 64)
    prediction, target = model(pixels, times, SMOOTH, queries=queries)
    candidates = model.predict(target.new_tensor(model.tokenizer.tokenize(pixels)[:, :-1].tolist()), times, queries)
    index, _ = ops.best_of_n(candidates, target)
    best = candidates.gather(2, index[..., None, None].expand(-1, -1, 1, 64)).squeeze(2)
    torch.testing.assert_close(prediction, best, rtol=1e-4, atol=1e-5)


class _Cauchy(torch.nn.Module):
    def forward(self, prediction, target):
        return torch.log1p((prediction - target).square())


def test_any_elementwise_criterion_picks_the_best():
    pixels, times = small.clip(frames=4)
    model = small.world(candidate_chunk=4).train()
    queries = torch.randn(2, 3, 6, 64)
    prediction, target = model(pixels, times, _Cauchy(), queries=queries)
    with torch.no_grad():
        candidates = model.predict(model.tokenizer.tokenize(pixels)[:, :-1], times, queries)
        losses = _Cauchy()(candidates, target[:, :, None].expand_as(candidates)).mean(-1)
    torch.testing.assert_close(_Cauchy()(prediction, target).mean(-1), losses.amin(-1), rtol=1e-4, atol=1e-6)


def test_generator_repeats_the_noise():
    pixels, times = small.clip(frames=4)
    model = small.world().eval()
    runs = [model(pixels, times, ctx_len=2, generator=torch.Generator().manual_seed(3))[0] for _ in range(2)]
    assert torch.equal(*runs)
    other = model(pixels, times, ctx_len=2, generator=torch.Generator().manual_seed(4))[0]
    assert not torch.equal(runs[0], other)
    assert not torch.equal(runs[0][:, 0], runs[0][:, 1]), "two samples are the same future"


def _run_everything(model, pixels, times):
    model.train()
    prediction, target = model(pixels, times, SMOOTH)
    SMOOTH(prediction.float(), target.float()).mean().backward()
    model.tokenizer.train()
    y_hat, _ = model.tokenizer(pixels)
    model.eval()
    rollout = model(pixels, times, ctx_len=2)[0]
    return prediction, y_hat, rollout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    pixels, times = small.clip()
    outputs = _run_everything(small.world().to(dtype), pixels, times)
    for out in outputs:
        assert out.dtype == dtype
        assert out.isfinite().all()


def test_bf16_autocast_is_as_accurate_as_plain_torch():
    """Encode and decode under autocast err from float64 no more than twice as much as the unfused structure does."""
    pixels, _ = small.clip()
    tok = small.tokenizer().eval()
    exact = copy.deepcopy(tok).double()
    rope = tok._rope(pixels)
    features = tok.features(pixels)
    truth = exact.encode(features[:, 0].double(), features[:, 1].double(), rope)
    with torch.autocast("cpu", torch.bfloat16):
        fast = tok.encode(features[:, 0], features[:, 1], rope)
        tok.savings = Savings.none()
        plain = tok.encode(features[:, 0], features[:, 1], rope)
    assert fast.dtype == torch.float32  # the residual stream, and so the final norm, stay in the parameters' dtype
    assert relative_rmse(fast, truth) <= 2 * relative_rmse(plain, truth) + torch.finfo(torch.bfloat16).eps


def test_bf16_residual_stream_is_an_option():
    pixels, _ = small.clip()
    tok = small.tokenizer(residual_dtype=torch.bfloat16).eval()
    features = tok.features(pixels)
    rope = tok._rope(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        z = tok.encode(features[:, 0], features[:, 1], rope)
        assert z.dtype == torch.bfloat16
        assert tok.decode(z, features[:, 0], rope).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["encode", "decode", "predict", "backbone", "tokenize", "train", "rollout"])
def test_compiles_fullgraph(name):
    pixels, times = small.clip()
    model = small.world()
    tok = model.tokenizer
    rope, features = tok._rope(pixels), tok.features(pixels)
    queries = torch.randn(2, 2, 4, 64)
    functions = {
        "encode": lambda: tok.encode(features[:, 0], features[:, 1], rope),
        "decode": lambda: tok.decode(features[:, 0, :1], features[:, 1], rope),
        "predict": lambda: model.predict(features[:, :2, 0], times, queries),
        "backbone": lambda: tok.backbone(pixels),
        "tokenize": lambda: tok.tokenize(pixels),
        "train": lambda: model(pixels, times, SMOOTH, queries=queries)[0],
        "rollout": lambda: model(pixels, times, ctx_len=2, queries=torch.ones(2, 3, 1, 64))[0],
    }
    model.train(name == "train")
    function = functions[name]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(), function(), rtol=1e-4, atol=1e-5)


def test_frozen_parts_stay_in_evaluation_mode():
    model = small.world().train()
    assert model.training
    assert model.predictor.training
    assert not model.tokenizer.training
    assert not any(m.training for m in model.backbone.modules())
    tok = small.tokenizer().train()
    assert tok.encoder_blocks.training
    assert not any(m.training for m in tok.backbone.modules())
    assert not any(p.requires_grad for p in tok.backbone.parameters())


def test_rope_augmentation_only_while_training():
    pixels, _ = small.clip()
    tok = small.tokenizer()
    plain = tok.eval()._rope(pixels)[0]
    assert torch.equal(plain, tok._rope(pixels)[0])
    drawn = [tok.train()._rope(pixels)[0] for _ in range(3)]
    assert not any(torch.equal(plain, d) for d in drawn)
    assert torch.equal(small.tokenizer(use_rope_aug=False).train()._rope(pixels)[0], plain)


def test_the_black_frame_is_encoded_once_a_call_or_once_a_size_when_frozen():
    tok = small.tokenizer().eval()
    calls, forward = [], deltakern.DINOv3.forward
    pixels, _ = small.clip()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deltakern.DINOv3, "forward", lambda self, frames: (calls.append(tuple(frames.shape)), forward(self, frames))[1])
        first = tok.black_features(pixels)
        assert torch.equal(tok.black_features(pixels), first)
        assert calls == [(1, 1, 3, 32, 48)] * 2, "one frame for the whole batch, at every call"
        assert first.shape == (2, 6, 64)
        deltakern.freeze(tok)
        calls.clear()
        for _ in range(2):
            torch.testing.assert_close(tok.black_features(pixels), first)
            assert tok.black_features(small.clip(height=16)[0]).shape == (2, 3, 64)
        assert len(calls) == 2
        with tok.backbone.backbone.norm.register_forward_hook(lambda *_: calls.append("hook")):
            tok.black_features(pixels)
            assert calls[-1] == "hook"
    with torch.no_grad():
        tok.backbone.backbone.norm.bias.add_(1.0)
    with pytest.raises(deltakern.FrozenWeightsError, match=r"backbone\.norm\.bias"):
        tok.black_features(pixels)
    torch.testing.assert_close(deltakern.unfreeze(tok).black_features(pixels), first + 1.0)


def test_inference_mode_and_no_grad_agree():
    pixels, times = small.clip()
    model = small.world().eval()
    queries = torch.randn(2, 3, 1, 64)
    with torch.no_grad():
        expected = model(pixels, times, ctx_len=2, queries=queries)[0]
    with torch.inference_mode():
        torch.testing.assert_close(model(pixels, times, ctx_len=2, queries=queries)[0], expected)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels, times, ctx_len=2, queries=queries)[0], expected)


@pytest.mark.parametrize("horizon", [None, 1, 3])
def test_reconstruction_in_evaluation(horizon):
    pixels, _ = small.clip(frames=3)
    tok = small.tokenizer().eval()
    prediction, target, context = tok(pixels, horizon=horizon)
    h = horizon or 3
    assert prediction.shape == target.shape == (2, h, 6, 64)
    assert context.shape == (2, 3 - h, 6, 64)
    assert torch.equal(torch.cat((context, target), 1), tok.features(pixels))


def test_a_backbone_of_ones_own():
    class Mean(torch.nn.Module):
        hidden_size, num_heads, patch_size, initializer_range = 8, 1, 16, 0.02

        def forward(self, frames):
            patches = torch.nn.functional.avg_pool2d(frames.flatten(0, 1).float(), 16)
            return patches.flatten(2).transpose(1, 2).repeat(1, 1, 3)[..., :8].unflatten(0, frames.shape[:2])

    tok = deltakern.DeltaTok(Mean(), num_hidden_layers=1, intermediate_size=16)
    assert tok.tokenize(small.clip()[0]).shape == (2, 3, 8)


def _bad(pattern, error=ValueError):
    return pytest.raises(error, match=pattern)


def test_bad_frames():
    tok = small.tokenizer()
    pixels, _ = small.clip()
    with _bad(r"frames must be \(B,T,3,H,W\), got a tensor of shape \(2, 3, 32, 48\)"):
        tok(pixels[:, :, 0])
    with _bad(r"multiples of the patch size 16, got 30 x 48"):
        tok(pixels[..., :30, :])
    with _bad(r"at least 2 frames a clip, got T=1"):
        tok.train()(pixels[:, :1])
    with _bad(r"uint8 pixels in 0..255, got torch.float32 in \[0, 1\]; multiply by 255", TypeError):
        tok(pixels / 255)
    with _bad(r"got torch.float32 holding NaN", TypeError):
        tok(pixels.float().fill_(float("nan")))
    with _bad("got torch.int64", TypeError):
        tok(pixels.long())
    with _bad(r"frames must be a uint8 tensor \(B,T,3,H,W\), got list", TypeError):
        tok([1, 2])


def test_bad_horizons_and_contexts():
    pixels, times = small.clip()
    tok, model = small.tokenizer().eval(), small.world().eval()
    with _bad("horizon must be at most the number of frames T=3, got 4"):
        tok(pixels, horizon=4)
    with _bad("horizon must be an integer of at least 1, got 0"):
        tok(pixels, horizon=0)
    for ctx_len in (None, 0, 3, 2.0):
        with _bad("ctx_len must be between 1 and T-1=2"):
            model(pixels, times, ctx_len=ctx_len)


def test_bad_timestamps_queries_and_criteria():
    pixels, times = small.clip()
    model = small.world()
    with _bad(r"timestamps must be \(B,T\) = \(2, 3\) as the frames, got a tensor of shape \(2, 2\)"):
        model(pixels, times[:, :2], SMOOTH)
    with _bad("timestamps must be a floating tensor", TypeError):
        model(pixels, times.long(), SMOOTH)
    with _bad("criterion must be an elementwise loss for best-of-many training, got None"):
        model.train()(pixels, times)
    with _bad("criterion must not reduce"):
        model.train()(pixels, times, torch.nn.MSELoss())
    with _bad(r"queries must be \(B,T-1,K,D\) = \(2, 2, 5, 64\), got a tensor of shape \(2, 3, 5, 64\)"):
        model.train()(pixels, times, SMOOTH, queries=torch.zeros(2, 3, 5, 64))
    with _bad(r"queries must be \(B,S,h,D\) = \(2, 3, 1, 64\)"):
        model.eval()(pixels, times, ctx_len=2, queries=torch.zeros(2, 3, 2, 64))


def test_bad_constructions():
    with _bad("num_samples_eval must be an integer of at least 1, got 0"):
        small.world(num_samples_eval=0)
    with _bad("num_samples_train must be an integer of at least 1, got 0"):
        small.world(num_samples_train=0)
    with _bad("rope_axis_sizes must be even and add up"):
        small.world(rope_axis_sizes=(30,))
    with _bad("qk_norm_order must be one of"):
        small.tokenizer(qk_norm_order="before")
    with _bad("attention must be one of"):
        small.tokenizer(attention="fastest")
    with _bad("backbone must have the attribute 'hidden_size'", TypeError):
        deltakern.DeltaTok(torch.nn.Linear(2, 2))
    with _bad("key_bias must be False, got True"):
        DINOv3Config.from_dict({"key_bias": True})
    with _bad("model_type must be 'dinov3_vit', got 'vit'"):
        DINOv3Config.from_dict({"model_type": "vit"})


def test_rollout_steps_come_in_order():
    pixels, times = small.clip(frames=4)
    model = small.world().eval()
    state = model.rollout_init(pixels, 2)
    with _bad("tgt_frame_idx must be 2, the next frame of this state, got 3"):
        model.rollout_step(state, 3, times)
