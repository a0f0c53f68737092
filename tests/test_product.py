"""Products through oneDNN on the CPU: values, when they are taken, and whole models on them."""

from __future__ import annotations

import pytest
import small
import torch
import torch.nn.functional as F
from compare import assert_as_accurate
from torch.utils.flop_counter import FlopCounterMode

from deltakern import backend
from deltakern.nn import PackedModule, evaluation, forget_packed
from deltakern.nn import product as products
from deltakern.nn.product import product
from deltakern.report import flops

pytestmark = pytest.mark.skipif(not products.available(), reason="this torch has no oneDNN")


def _plain(x, weight, bias, then="none", other=None):
    out = F.linear(x, weight, bias)
    if other is not None:
        return out + other if then == "add" else out * other
    return {"none": lambda t: t, "gelu": F.gelu, "swish": F.silu}[then](out)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product that may go to oneDNN does, however small."""
    for module in (products, evaluation):
        monkeypatch.setattr(module, "takes", lambda *_: True)


@pytest.mark.parametrize("rows", [1, 2, 33, 130])
@pytest.mark.parametrize("then", ["none", "gelu", "swish", "add", "mul", "no bias"])
def test_values(rows: int, then: str):
    torch.manual_seed(0)
    x = torch.randn(2, rows + 1, 96)[:, 1:]  # a slice of a bigger tensor
    weight, bias = torch.randn(80, 96) / 10, None if then == "no bias" else torch.randn(80)
    other = torch.randn(2, rows + 2, 80)[:, 2:] if then in ("add", "mul") else None
    then = "none" if then == "no bias" else then
    tensors = [t for t in (x, weight, bias, other) if t is not None]
    kept = [t.clone() for t in tensors]
    with torch.no_grad():
        turned = products.reorder(weight)
        made, again = (products.pointwise(x, turned, bias, then, other) for _ in range(2))
    doubles = (None if t is None else t.double() for t in (x, weight, bias))
    truth = _plain(*doubles, then, None if other is None else other.double())
    assert_as_accurate(made, _plain(x, weight, bias, then, other), truth)
    assert torch.equal(made, again)
    assert made.is_contiguous()
    assert all(torch.equal(now, then) for now, then in zip(tensors, kept, strict=True))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_module_keeps_the_reordered_weight(activation: str):
    torch.manual_seed(0)
    module, x, weight, bias = PackedModule().eval(), torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
    with torch.no_grad():
        assert products.fuses(module, x, (weight, bias), torch.float32, activation)
        for _ in range(2):
            made = product(module, "p", (weight, bias), torch.float32, lambda *p: p, x, activation=activation)
            torch.testing.assert_close(made, _plain(x, weight, bias, activation))
            assert list(module._packed) == ["p, reordered"]
            weight.mul_(2)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_elsewhere_it_is_torch_with_gradients(activation: str):
    torch.manual_seed(0)
    module = PackedModule()
    x, weight, bias = torch.randn(3, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def run(x, weight, bias):
        return product(module, "p", (weight, bias), torch.float64, lambda *p: p, x, activation=activation)

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
    monkeypatch.setattr(products, "available", lambda: False)
    with torch.no_grad():
        assert not products.fuses(module, many, (weight,), torch.float32)


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
    for activation in ("none", "gelu"):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            product(module, "p", (weight, bias), torch.float32, lambda *p: p, x, activation=activation)
        assert counter.get_total_flops() == 2 * 15 * 16 * 32
    other = torch.randn(3, 5, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        products.pointwise(x, products.reorder(weight), bias, "add", other)
    assert counter.get_total_flops() == 2 * 15 * 16 * 32
