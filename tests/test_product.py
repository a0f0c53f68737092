"""Products through oneDNN on the CPU: values, when they are taken, and whole models on them."""

from __future__ import annotations

import pytest
import small
import torch
import torch.nn.functional as F
from compare import assert_as_accurate
from torch.utils.flop_counter import FlopCounterMode

from deltakern import backend
from deltakern.nn import product as products
from deltakern.nn.product import product
from deltakern.nn.weights import Derived, Freezable, calling, freeze, store_of, unfreeze
from deltakern.report import flops

pytestmark = pytest.mark.skipif(not products.available(), reason="this torch has no oneDNN")


def _plain(x, weight, bias, then="none"):
    out = F.linear(x, weight, bias)
    return F.gelu(out) if then == "gelu" else out


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product that may go to oneDNN does, however small."""
    monkeypatch.setattr(products, "takes", lambda *_: True)


@pytest.mark.parametrize("rows", [1, 2, 33, 130])
@pytest.mark.parametrize("then", ["none", "gelu", "no bias"])
def test_values(rows: int, then: str):
    torch.manual_seed(0)
    x = torch.randn(2, rows + 1, 96)[:, 1:]  # a slice of a bigger tensor
    weight, bias = torch.randn(80, 96) / 10, None if then == "no bias" else torch.randn(80)
    then = "none" if then == "no bias" else then
    tensors = [t for t in (x, weight, bias) if t is not None]
    kept = [t.clone() for t in tensors]
    with torch.no_grad():
        turned = products.reorder(weight)
        made, again = (products.pointwise(x, turned, bias, then) for _ in range(2))
    doubles = (None if t is None else t.double() for t in (x, weight, bias))
    assert_as_accurate(made, _plain(x, weight, bias, then), _plain(*doubles, then))
    assert torch.equal(made, again)
    assert made.is_contiguous()
    assert all(torch.equal(now, then) for now, then in zip(tensors, kept, strict=True))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_lasting_store_keeps_the_reordered_weight(activation: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    owner, x, weight, bias = Freezable(), torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
    reordered, reorder = [], products.reorder
    monkeypatch.setattr(products, "reorder", lambda w: (reordered.append(1), reorder(w))[1])
    with torch.no_grad():
        for store, times in ((Derived(lasting=True), 1), (Derived(), 0)):
            reordered.clear()
            with calling(store):
                for _ in range(2):
                    made = product(owner, "p", (weight, bias), torch.float32, products.as_they_are, x, activation=activation)
                    torch.testing.assert_close(made, _plain(x, weight, bias, activation))
            assert len(reordered) == times


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_elsewhere_it_is_torch_with_gradients(activation: str):
    torch.manual_seed(0)
    owner = Freezable()
    x, weight, bias = torch.randn(3, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def run(x, weight, bias):
        return product(owner, "p", (weight, bias), torch.float64, products.as_they_are, x, activation=activation)

    torch.testing.assert_close(run(x, weight, bias), _plain(x, weight, bias, activation))
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (x, weight, bias)])


@pytest.mark.parametrize(("avx512", "amd"), [(True, True), (True, False), (False, True), (False, False)])
def test_which_library_is_the_faster_one(avx512: bool, amd: bool, monkeypatch: pytest.MonkeyPatch):
    """Where MKL leaves AVX-512 unused, from a number of multiply-adds on; elsewhere, where the weight is in no cache. Activations with it
    where there is AVX-512."""
    monkeypatch.setattr(products, "processor", lambda: products.Processor(avx512, amd))
    both = avx512 and amd
    assert products.takes(257, 768, 3072 * 768)
    assert products.takes(257, 3072, 3072 * 768) is both
    assert products.takes(257, 768, 768 * 768) is both
    assert products.takes(20, 768, 768 * 768)
    assert products.takes(1, 3072, 3072 * 768)
    assert products.takes(1, 3072, 3072 * 768, True) is avx512
    assert products.takes(257, 128, 128 * 128) is both
    assert products.takes(40, 128, 128 * 128, True) is both
    assert not products.takes(40, 128, 128 * 128)
    assert not products.takes(0, 768, 3072 * 768)


def test_processors(monkeypatch: pytest.MonkeyPatch):
    found = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    for name, avx512, amd in (("AMD EPYC", True, True), ("AMD EPYC", False, True), ("Intel(R) Xeon(R)", True, False), (None, True, False)):
        found.update(cpu_name=name, avx512_f=avx512)
        assert products.processor.__wrapped__() == (avx512, amd)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
    assert products.processor.__wrapped__() == (False, False)


def test_when_it_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "processor", lambda: products.Processor(avx512=True, amd=True))
    owner, weight = freeze(Freezable()), torch.randn(1024, 64)
    many, few = torch.randn(2048, 64), torch.randn(8, 64)

    def taken(x=many, dtype=torch.float32, activation="none") -> bool:
        return products.reorders(store_of(owner), x, (weight,), dtype, activation) == activation

    assert not taken()  # gradients are on
    with torch.no_grad():
        assert taken()
        assert not taken(few)  # too small
        assert taken(few, activation="gelu")  # which would be another call
        assert not taken(many.double(), torch.float64)
        assert not taken(dtype=torch.bfloat16)  # autocast
        assert not taken(many.to("meta"))
        with backend.use_impl("reference"):
            assert taken()
        with backend.use_impl("triton"):  # whoever asks for kernels gets them
            assert not taken()
        torch.func.vmap(lambda x: (assert_not(taken(x)), x)[1])(many[None])
        unfreeze(owner)
        assert not taken()  # used once: outside of a call
        with calling():
            assert taken()
            assert not taken(many[:1023])  # not worth reordering for one call
    monkeypatch.setattr(products, "available", lambda: False)
    with torch.no_grad():
        assert not products.reorders(store_of(freeze(owner)), many, (weight,), torch.float32)


def assert_not(value: bool) -> None:
    assert not value


@pytest.mark.usefixtures("always")
def test_flops_are_counted():
    flops.register()
    owner, weight, bias = freeze(Freezable()), torch.randn(32, 16), torch.randn(32)
    x = torch.randn(3, 5, 16)
    for activation in ("none", "gelu"):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            product(owner, "p", (weight, bias), torch.float32, products.as_they_are, x, activation=activation)
        assert counter.get_total_flops() == 2 * 15 * 16 * 32


@pytest.mark.usefixtures("always")
def test_whole_models_on_it():
    pixels, times = small.clip(frames=4)
    for options in ({}, {"use_swiglu": False, "use_gated_attn": False}, {"use_qk_norm": False}, {"qk_norm_order": "post_rope"}):
        world = small.world(tokenizer_options=options).eval()
        made = [w.rollout(pixels[:, :3], times, 1, 3, decode="all", seed=0) for w in (world, freeze(world))]
        torch.testing.assert_close(made[0].tokens, made[1].tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made[0].features, made[1].features, rtol=1e-5, atol=1e-5)
