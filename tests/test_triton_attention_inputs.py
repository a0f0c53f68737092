"""``rope_qk_norm``, ``head_gate`` and ``delta_pool``: what their kernels promise beyond the registry's cases."""

from __future__ import annotations

import pytest
import torch
from compare import assert_as_accurate
from kernel_checks import forward_backward, random_cotangents

import deltakern
from deltakern import ops
from deltakern.cases import cases
from deltakern.ops import _triton
from deltakern.ops.kernels import delta_pool as delta_pool_kernels


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tables(count: int, head: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    angles = 5 * drawn(count, head // 2, seed=9).repeat(1, 2).to(device)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("order", ["pre_rope", "post_rope"])
def test_table_of_a_frame_serves_both(order: str, device: torch.device) -> None:
    """The same bits as with the table written twice."""
    k, weight = drawn(2, 15, 2, 8).to(device), drawn(8, seed=1).to(device)
    cos, sin = tables(7, 8, device)
    _, once = ops.rope_qk_norm(None, k, cos, sin, None, weight, order=order, num_prefix=1, impl="triton")
    _, twice = ops.rope_qk_norm(None, k, cos.repeat(2, 1), sin.repeat(2, 1), None, weight, order=order, num_prefix=1, impl="triton")
    assert torch.equal(once, twice)


def test_prefix_is_normed_and_not_rotated(device: torch.device) -> None:
    q, k = drawn(1, 5, 2, 8).to(device), drawn(1, 5, 2, 8, seed=1).to(device)
    cos, sin = tables(2, 8, device)
    weight = torch.ones(8, device=device)
    q_out, k_out = ops.rope_qk_norm(q, k, cos, sin, weight, None, num_prefix=3, impl="triton")
    torch.testing.assert_close(q_out[:, :3], torch.nn.functional.layer_norm(q[:, :3], (8,)))
    assert torch.equal(k_out[:, :3], k[:, :3])
    assert not torch.equal(k_out[:, 3:], k[:, 3:])


def test_general_tables(device: torch.device) -> None:
    """The two halves of cos and sin are read apart: tables that are not an angle doubled are taken as the formula says."""
    q, k = drawn(2, 4, 1, 6).to(device), drawn(2, 4, 1, 6, seed=1).to(device)
    args = [q, k, drawn(4, 6, seed=2).to(device), drawn(4, 6, seed=3).to(device), None, None]
    truth = forward_backward(ops.rope_qk_norm.reference, [a if a is None else a.double() for a in args], {}, (0, 1), random_cotangents())
    plain = forward_backward(ops.rope_qk_norm.reference, args, {}, (0, 1), random_cotangents())
    kernel = forward_backward(ops.rope_qk_norm, args, {"impl": "triton"}, (0, 1), random_cotangents())
    for ours, theirs, exactly in zip(kernel, plain, truth, strict=True):
        for k_, p, t in zip(ours, theirs, exactly, strict=True):
            assert_as_accurate(k_, p, t)


def test_one_launch_for_q_and_k(device: torch.device) -> None:
    case = next(c for c in cases("rope_qk_norm", "tiny") if c.name == "pair")
    args, kwargs = case.make(torch.float32, device, torch.Generator().manual_seed(0), 1.0)
    with _triton.count_launches() as counted:
        forward_backward(ops.rope_qk_norm, args, {**kwargs, "impl": "triton"}, case.differentiable, random_cotangents())
    assert dict(counted) == {"rope_qk_norm_forward_kernel": 1, "rope_qk_norm_backward_kernel": 1}


def test_a_table_without_rows_is_refused(device: torch.device) -> None:
    empty = torch.empty(0, 8, device=device)
    with pytest.raises(ValueError, match="cos must have N rows"):
        ops.rope_qk_norm(None, drawn(1, 3, 1, 8).to(device), empty, empty, None, None)


@pytest.mark.parametrize("level", [-60.0, -20.0, 20.0, 60.0])
def test_gates_wide_open_and_shut(level: float, device: torch.device) -> None:
    """The logit's gradient keeps its digits where 1 - sigmoid is below float32's resolution."""
    attn, logits, grad = drawn(2, 3, 2, 4).to(device), level + drawn(2, 3, 2, seed=1).to(device), drawn(2, 3, 2, 4, seed=2).to(device)
    logits.requires_grad_()
    out = ops.head_gate(attn, logits, impl="triton")
    (slope,) = torch.autograd.grad(out, logits, grad)
    wide = logits.detach().double()
    truth = (attn.double() * grad.double()).sum(-1) * wide.sigmoid() * (-wide).sigmoid()
    torch.testing.assert_close(slope.double(), truth, rtol=1e-4, atol=1e-30)


def test_splits_cover_the_tokens() -> None:
    for length in (1, 63, 64, 512, 513, 1025, 2049, 100_000):
        splits, each = delta_pool_kernels._splits(length, 64)
        assert each % 64 == 0
        assert (splits - 1) * each < length <= splits * each, "every split has a token, and none is left over"
        assert each <= delta_pool_kernels.SPLIT + 64


def test_pooling_of_one_token_is_that_token(device: torch.device) -> None:
    normed = drawn(2, 1, 20).to(device, torch.bfloat16)
    q, k = (drawn(2, *shape, seed=i).to(device, torch.bfloat16) for i, shape in enumerate([(3, 8), (1, 3, 8)]))
    out = ops.delta_pool(normed, q, k, scale=1.0, impl="triton")
    assert torch.equal(out, normed.expand(2, 3, 20))


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (0, 1, 2)])
def test_gradient_of_normed_costs_a_kernel_only_where_wanted(wanted: tuple[int, ...], device: torch.device) -> None:
    args = [drawn(1, 5, 16).to(device), drawn(1, 2, 8, seed=1).to(device), drawn(1, 5, 2, 8, seed=2).to(device)]
    with _triton.count_launches() as counted:
        forward_backward(ops.delta_pool, args, {"scale": 0.3, "impl": "triton"}, wanted, random_cotangents())
    assert counted["delta_pool_spread_kernel"] == (0 in wanted)
    assert counted["delta_pool_split_kernel"] == counted["delta_pool_query_kernel"] == 1


def test_scores_far_apart_do_not_overflow(device: torch.device) -> None:
    normed, q, k = drawn(1, 9, 5).to(device), drawn(1, 1, 4, seed=1).to(device) * 1e3, drawn(1, 9, 1, 4, seed=2).to(device)
    out = ops.delta_pool(normed, q, k, scale=1.0, impl="triton")
    truth = ops.delta_pool.reference(normed.double(), q.double(), k.double(), scale=1.0)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)


def test_what_registers_do_not_hold_is_refused_with_the_reason(device: torch.device) -> None:
    normed, q, k = drawn(1, 3, 65).to(device), drawn(1, 65, 1).to(device), drawn(1, 3, 65, 1).to(device)
    with pytest.raises(deltakern.BackendError, match="at most 64 heads"):
        ops.delta_pool(normed, q, k, scale=1.0, impl="triton")
    times = torch.zeros(1, 17, device=device)
    for dtype, refused in ((torch.float32, True), (torch.bfloat16, False)):
        q, k = drawn(1, 2, 1, 72).to(device, dtype), drawn(1, 17, 1, 72).to(device, dtype)
        if refused:
            with pytest.raises(deltakern.BackendError, match="at most 16 context tokens of more than 64 channels"):
                ops.context_attention(q, k, k, times[:, :1], times, impl="triton")
        else:
            assert ops.context_attention(q, k, k, times[:, :1], times, impl="triton").isfinite().all()


def test_many_heads(device: torch.device) -> None:
    """More than 32 take smaller tiles."""
    args = [drawn(2, 70, 66).to(device), drawn(2, 33, 2, seed=1).to(device), drawn(2, 70, 33, 2, seed=2).to(device)]
    truth = forward_backward(ops.delta_pool.reference, [a.double() for a in args], {"scale": 0.7}, (0, 1, 2), random_cotangents())
    plain = forward_backward(ops.delta_pool.reference, args, {"scale": 0.7}, (0, 1, 2), random_cotangents())
    ours = forward_backward(ops.delta_pool, args, {"scale": 0.7, "impl": "triton"}, (0, 1, 2), random_cotangents())
    for k, p, t in zip((*ours[0], *ours[1]), (*plain[0], *plain[1]), (*truth[0], *truth[1]), strict=True):
        assert_as_accurate(k, p, t)
