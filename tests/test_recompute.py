"""What a training pass keeps for its backward, and that making the rest again changes no bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from compare import assert_as_accurate, outputs_and_grads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import deltakern
from deltakern import ops
from deltakern.nn import Assembly, Block, attend
from deltakern.nn.attend import Again
from deltakern.nn.recompute import Fleeting, apply, recomputed_linear

IMPLS = ("reference", "triton")
Tensors = list[torch.Tensor]


def _rope(patches: int, head: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(patches, head // 2, generator=torch.Generator().manual_seed(3)).repeat(1, 2).to(device)
    return angles.cos(), angles.sin()


def _gradients(
    block: Block, run: Callable[..., object], *, impl: str, autocast: bool, device: torch.device, rows: str = "all", width: int = 32
) -> Tensors:
    """Outputs and every gradient of a block whose entry is an Assembly."""
    generator = torch.Generator().manual_seed(1)
    prev, curr, token, role = (torch.randn(s, width, generator=generator) for s in (8, 8, 1, 2))
    entry = [prev.view(2, 4, width), curr.view(2, 4, width), token, role]
    entry = [t.to(device, next(block.parameters()).dtype).requires_grad_() for t in entry]
    block.zero_grad()
    with deltakern.use_impl(impl), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        rope = tuple(t.to(entry[0].dtype) for t in _rope(4, width // 2, device))
        out = run(Assembly(*entry, "pair"), rope, num_prefix=1, rows=rows)
    outs = [out.stream, out.branch]
    cotangents = [torch.randn(o.shape, generator=generator).to(device, o.dtype) for o in outs]
    torch.autograd.backward(outs, cotangents)  # outside use_impl: what is made again is made by what made it first
    return [*(o.detach() for o in outs), *(t.grad.clone() for t in (*entry, *block.parameters()) if t.grad is not None)]


def _block(device: torch.device, *, width: int = 32, seed: int = 0, scale: float = 0.5, **options) -> Block:
    torch.manual_seed(seed)
    options = {"swiglu": True, "qk_norm": "pre_rope", "gated": True, **options}
    block = Block(width, 2, 2 * width + 16, **options).to(device)
    for name, parameter in block.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
        if "layer_scale" in name:
            torch.nn.init.uniform_(parameter, 0.4 * scale, 1.8 * scale)
    return block


OPTIONS = {
    "released": {},
    "post-rope": {"qk_norm": "post_rope"},
    "plain": {"swiglu": False, "qk_norm": None, "gated": False},
    "no-flash": {"attention": "sdpa-math"},
}


@pytest.mark.parametrize("rows", ["all", "first", "rest"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("impl", "autocast"), list(itertools.product(IMPLS, (False, True))))
def test_making_again_changes_no_bit(impl, autocast, options, rows, device):
    if impl == "triton" and rows != "all" and options:
        pytest.skip("the reference has been through all of them")
    found = []
    for recompute in ("none", "cheap"):
        block = _block(device, **options, recompute=recompute)
        found.append(_gradients(block, block, impl=impl, autocast=autocast, device=device, rows=rows))
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_checkpointing_over_it_changes_no_bit(impl, device):
    block = _block(device, recompute="cheap")
    plain = _gradients(block, block, impl=impl, autocast=True, device=device)

    def run(entry, rope, **kwargs):
        return checkpoint(lambda *tensors: block(Assembly(*tensors, "pair"), rope, **kwargs), *entry[:4], use_reentrant=False)

    # the recomputation happens in the backward, outside use_impl there
    with deltakern.use_impl(impl):
        again = _gradients(block, run, impl=impl, autocast=True, device=device)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_accumulated_gradients_are_the_sum(impl, device):
    block = _block(device, recompute="cheap")
    once = _gradients(block, block, impl=impl, autocast=False, device=device)
    block.zero_grad = lambda: None
    twice = _gradients(block, block, impl=impl, autocast=False, device=device)
    count = len(list(block.parameters()))
    for a, b in zip(once[-count:], twice[-count:], strict=True):
        assert torch.equal(b, a + a)


@pytest.mark.parametrize("init", [0.3, 1e-5])
def test_folding_layer_scale_is_as_accurate_as_scaling_the_branch(init, device):
    """bfloat16 autocast against float64, beside the same block with the LayerScale applied to the branch as the release does."""

    class Unfolded(Block):
        def _scale(self, scale, part, dtype):
            return None, scale.lambda1, None

    errors = []
    for seed in range(3):
        block = _block(device, width=128, seed=seed, scale=init)
        unfolded = _block(device, width=128, seed=seed, scale=init)
        unfolded.__class__ = Unfolded
        exact = _block(device, width=128, seed=seed, scale=init).double()

        def total(module, impl, autocast):
            """With the branch added, so that the outputs are the same ones."""

            def run(*args, **kwargs):
                out = module(*args, **kwargs)
                return out._replace(branch=out.add() - out.stream, scale=None)

            return _gradients(module, run, impl=impl, autocast=autocast, device=device, width=128)

        errors.append([total(block, "triton", True), total(unfolded, "reference", True), total(exact, "reference", False)])
    for i, name in enumerate(["stream", "branch", "prev", "curr", "token", "role", *(n for n, _ in block.named_parameters())]):
        ours, theirs, truth = (torch.stack([made[which][i].double() for made in errors]) for which in range(3))
        assert_as_accurate(ours.float(), theirs.float(), truth, name=name)


def test_float16_scales_the_branch(device):
    """1e-5 times a weight of 0.02 is below float16's normal numbers."""
    block = _block(device, scale=1e-5).half()
    entry = Assembly(
        *(torch.randn(2, 4, 32, device=device).half() for _ in range(2)), *torch.randn(3, 32, device=device).half().split((1, 2)), "pair"
    )
    out = block(entry, _rope(4, 16, device), num_prefix=1)
    assert torch.equal(out.scale, block.layer_scale2.lambda1)


def test_a_product_keeps_what_its_input_is_made_of(device):
    x = torch.randn(3, 5, 8, device=device, requires_grad=True)
    weight, bias = torch.randn(4, 4, device=device, requires_grad=True), torch.randn(4, device=device, requires_grad=True)
    kept: Tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        hidden = apply(ops.swiglu, x, recompute=True)
        assert isinstance(hidden, Fleeting)
        out = recomputed_linear(hidden, weight, bias)
    assert all(t.data_ptr() != hidden.value.data_ptr() for t in kept)
    grads = torch.autograd.grad(out.square().sum(), [x, weight, bias])
    plain = torch.nn.functional.linear(ops.swiglu(x), weight, bias)
    for a, b in zip(grads, torch.autograd.grad(plain.square().sum(), [x, weight, bias]), strict=True):
        assert torch.equal(a, b)


def test_what_goes_in_must_not_change_before_the_backward(device):
    """A source that was written into is an error, as any saved tensor is."""
    x, weight = torch.randn(3, 8, device=device), torch.randn(4, 4, device=device, requires_grad=True)
    out = recomputed_linear(apply(ops.swiglu, x, recompute=True), weight, None)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)])
def test_gradients_that_nobody_wants_are_not_made(wanted, device):
    args = [torch.randn(s, device=device) for s in ((3, 8), (4, 4), (4,))]
    for i in wanted:
        args[i].requires_grad_()
    made = []

    def make(x):
        made.append(x)
        return ops.swiglu(x)

    recomputed_linear(Fleeting(ops.swiglu(args[0]), make, (args[0],)), *args[1:]).sum().backward()
    assert [a.grad is not None for a in args] == [i in wanted for i in range(3)]
    assert len(made) == (1 in wanted)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_double_backward_raises(impl, checkpointed, device):
    block = _block(device, recompute="cheap")
    entry = Assembly(*(torch.randn(2, 4, 32, device=device) for _ in range(2)), *torch.randn(3, 32, device=device).split((1, 2)), "pair")
    with deltakern.use_impl(impl):
        arguments = entry, _rope(4, 16, device)
        out = checkpoint(block, *arguments, num_prefix=1, use_reentrant=False) if checkpointed else block(*arguments, num_prefix=1)
        (gradient,) = torch.autograd.grad(out.branch.sum(), block.mlp.down_proj.weight, create_graph=True)
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError, match="a second derivative is not supported"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_makes_q_and_k_again(dtype, device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 3, 16, device=device, dtype=dtype) for length in (5, 7, 7))
    cotangent = [torch.randn(2, 5, 3, 16, device=device, dtype=dtype)]
    kept: Tensors = []

    def plain(q, k, v):
        return attend(q, k, v, scale=0.3)

    def again(q, k, v):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            return attend(q * 1.0, k * 1.0, v, scale=0.3, again=(lambda q, k: (q * 1.0, k * 1.0), (q, k)))

    for a, b in zip(*(outputs_and_grads(f, [q, k, v], (0, 1, 2), cotangent) for f in (plain, again)), strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("kernel", ["sdpa-flash", "sdpa-cudnn"])
def test_attention_that_makes_q_and_k_again_calls_the_gpus_kernels_as_they_are(kernel):
    """On tensors that are not there: autograd itself needs a GPU, the shapes and the signatures do not."""
    context = SimpleNamespace()
    context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.empty(2, 3, length, 16, device="cuda", dtype=torch.bfloat16) for length in (5, 7, 7))
        made_of = q.transpose(1, 2), k.transpose(1, 2)
        out = Again.forward(context, q, k, v, 0.3, kernel, lambda q, k: (q, k), *made_of)
        assert out.shape == q.shape
        grads = Again.backward.__wrapped__(context, torch.empty_like(out))
        assert [g.shape for g in grads[:3]] == [q.shape, k.shape, v.shape]
        assert grads[3:] == (None,) * 5


def test_modes_are_named():
    with pytest.raises(ValueError, match="recompute must be one of"):
        Block(8, 2, 8, recompute="all")
