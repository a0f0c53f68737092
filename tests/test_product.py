"""Products through oneDNN on the CPU: values, when they are taken, and whole models on them."""

from __future__ import annotations

import pytest
import small
import torch
import torch.nn.functional as F
from compare import assert_as_accurate
from torch.utils.flop_counter import FlopCounterMode

from deltakern import backend
from deltakern.nn import PackedModule, forget_packed
from deltakern.nn import product as products
from deltakern.nn.product import product
from deltakern.report import flops

pytestmark = pytest.mark.skipif(not products._available(), reason="this torch has no oneDNN")


def _plain(module, name, parameters, dtype, build, x, *, activation="none", times=None, plus=None):
    weight, bias = build(*parameters)
    out = F.linear(x, weight, bias)
    out = {"none": lambda t: t, "gelu": F.gelu, "silu": F.silu}[activation](out)
    out = out if times is None else out * times
    return out if plus is None else out + plus


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product that may go to oneDNN does, however small."""
    monkeypatch.setattr(products, "WORTHWHILE", 0)
    monkeypatch.setattr(products, "WORTHWHILE_ACTIVATED", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What every question whether to fuse a product of any rows was answered."""
    asked = []
    original = products.fuses

    def fuses(module, x, *rest):
        answer = original(module, x, *rest)
        if x.numel():
            asked.append(answer)
        return answer

    monkeypatch.setattr(products, "fuses", fuses)
    return asked


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("rows", [1, 2, 33, 130])
@pytest.mark.parametrize("then", ["none", "gelu", "silu", "times", "plus", "no bias"])
def test_values(rows: int, then: str):
    torch.manual_seed(0)
    module = PackedModule().eval()
    x = torch.randn(2, rows + 1, 96)[:, 1:]  # a slice of a bigger tensor
    weight, bias = torch.randn(80, 96) / 10, torch.randn(80)
    other = torch.randn(2, rows + 2, 80)[:, 2:]
    kept = [t.clone() for t in (x, weight, bias, other)]
    options = {"activation": then} if then in ("gelu", "silu") else {then: other} if then in ("times", "plus") else {}
    build = (lambda w: (w, None)) if then == "no bias" else (lambda *p: p)
    parameters = (weight,) if then == "no bias" else (weight, bias)
    with torch.no_grad():
        assert products.fuses(module, x, parameters, torch.float32)
        made = product(module, "p", parameters, torch.float32, build, x, **options)
        again = product(module, "p", parameters, torch.float32, build, x, **options)
    plain = _plain(None, "p", parameters, torch.float32, build, x, **options)
    doubles = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    truth = _plain(None, "p", [p.double() for p in parameters], None, build, x.double(), **doubles)
    assert_as_accurate(made, plain, truth)
    assert torch.equal(made, again)
    assert made.is_contiguous()
    assert all(torch.equal(now, then) for now, then in zip((x, weight, bias, other), kept, strict=True))


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"activation": "silu"}, {"times": True}, {"plus": True}])
def test_elsewhere_it_is_torch_with_gradients(options: dict):
    torch.manual_seed(0)
    module = PackedModule()
    x, weight, bias = torch.randn(3, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    other = torch.randn(3, 4, dtype=torch.float64)
    options = {k: other if v is True else v for k, v in options.items()}

    def run(x, weight, bias):
        return product(module, "p", (weight, bias), torch.float64, lambda *p: p, x, **options)

    torch.testing.assert_close(run(x, weight, bias), _plain(None, "p", (weight, bias), None, lambda *p: p, x, **options))
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (x, weight, bias)])


def test_when_it_is_taken(monkeypatch: pytest.MonkeyPatch):
    module, weight = PackedModule().eval(), torch.randn(1024, 64)
    many, few = torch.randn(2048, 64), torch.randn(8, 64)
    assert not products.fuses(module, many, (weight,), torch.float32)  # gradients are on
    with torch.no_grad():
        assert products.fuses(module, many, (weight,), torch.float32)
        assert not products.fuses(module, few, (weight,), torch.float32)  # too small
        assert products.fuses(module, few, (weight,), torch.float32, "gelu")  # which would be another call
        assert not products.fuses(module, many.double(), (weight,), torch.float64)
        assert not products.fuses(module, many, (weight,), torch.bfloat16)  # autocast
        assert not products.fuses(module, many.to("meta"), (weight,), torch.float32)
        with backend.use_impl("reference"):
            assert products.fuses(module, many, (weight,), torch.float32)
        with backend.use_impl("triton"):  # whoever asks for kernels gets them
            assert not products.fuses(module, many, (weight,), torch.float32)
        module.train()
        assert products.fuses(module, many, (weight,), torch.float32)
        assert not products.fuses(module, many[:1023], (weight,), torch.float32)  # not worth reordering weights used once
    with torch.inference_mode():
        module.eval()
        assert products.fuses(module, many, (weight,), torch.float32)
        assert not products.fuses(module, many, (weight.clone(),), torch.float32)  # such a tensor counts no versions: nothing to keep by
    monkeypatch.setattr(products, "_available", lambda: False)
    with torch.no_grad():
        assert not products.fuses(module, many, (weight,), torch.float32)


def _results() -> list[torch.Tensor]:
    """Everything that runs without gradients: backbone, encode, decode, a sample of futures, a dense forecast."""
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


def test_models_are_the_same_on_it(monkeypatch: pytest.MonkeyPatch, calls: list[bool]):
    monkeypatch.setattr(products, "WORTHWHILE_ACTIVATED", products.WORTHWHILE)
    plain = _results()
    assert not any(calls)
    monkeypatch.setattr(products, "WORTHWHILE", 0)
    monkeypatch.setattr(products, "WORTHWHILE_ACTIVATED", 0)
    calls.clear()
    fused = _results()
    assert sum(calls) > 50
    assert all(calls)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("always")
def test_kept_weights_follow_the_parameters():
    tok = small.tokenizer().eval()
    pixels, _ = small.clip()
    with torch.no_grad():
        before = tok.tokenize(pixels)
        tok.decoder_blocks[0].mlp.gate_proj.weight.mul_(2)  # not read by tokenize
        assert torch.equal(tok.tokenize(pixels), before)
        for name in ("attention.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "attention.k_proj"):
            weight = tok.encoder_blocks[0].get_submodule(name).weight
            weight.mul_(1.5)
            changed = tok.tokenize(pixels)
            assert not torch.equal(changed, before)
            forget_packed(tok)
            assert torch.equal(tok.tokenize(pixels), changed)
            before = changed


@pytest.mark.usefixtures("always")
def test_flops_are_counted():
    flops.register()
    module, weight, bias = PackedModule().eval(), torch.randn(32, 16), torch.randn(32)
    x = torch.randn(3, 5, 16)
    for options in ({}, {"activation": "gelu"}, {"times": torch.randn(3, 5, 32)}):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            product(module, "p", (weight, bias), torch.float32, lambda *p: p, x, **options)
        assert counter.get_total_flops() == 2 * 15 * 16 * 32
