"""``best_of_n_head``: the end of the predictor and the search among its candidates, without the predictions.

Formula, for every group of N candidates, in the order of the unfused ops::

    stream'_n     = stream_n + scale * branch_n                      rounded to the stream's dtype
    normed_n      = LayerNorm(stream'_n) * weight + bias             rounded to the head's dtype
    prediction_n  = head @ normed_n + head_bias
    index, loss   = best_of_n(prediction, target)                    losses, order of losses and NaN as there

that is ``ops.residual_norm``, a linear layer and ``ops.best_of_n``, whose ``loss``, ``beta`` and ``reduce_dims`` are these: equal
losses go to the lowest index, a NaN loss never wins unless all N are NaN (index 0, loss NaN). ``branch=None`` is the stream alone;
``scale``, ``bias`` and ``head_bias`` may be None. The reduced dimensions R are any between N and the channels, such as patches.
Shapes: stream, branch (..., N, R..., D); scale, weight, bias (D,); head (E, D), head_bias (E,); target (..., R..., E) -> index (...),
loss (...), losses (..., N). N = 1 and empty leading dimensions are allowed; N = 0 and an empty R, D or E raise.
Dtypes: float32, bfloat16, float16 (float64 in the reference), each tensor its own; index int64, losses float32 (float64 for
float64). Statistics, products and losses are accumulated in float32. The kernel compares the float32 products with the target; a
prediction that is a tensor has the head's dtype, so that reference, "cpp" and "cuda" round it once more.
Memory: in the kernel predictions never leave the processor, and normed rows go to a scratch of one tile a program, which does not
grow with N. "cpp" and "cuda" (norm, the library's product, the compiled reduction) hold one prediction a candidate: give
candidates in chunks and let :class:`deltakern.ops.BestOfN` merge the results.
Gradient: none, it is a search: a call that autograd would record raises. Run the winner again with gradients.
Determinism: the same inputs give the same bits. In the kernel sums run in an order that depends on D, E, R, the dtype and the
device alone, never on N, so neither does cutting N into chunks change a bit; the products of torch's library, in the other
implementations, promise that for the same N only. Orders differ between implementations, so the last bits may, and with
them the winner where two losses are that close.
Source: ``Predictor``'s norm and head with ``_bom_queries`` of the released code; paper, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deltakern import backend
from deltakern.ops import _triton, _validate
from deltakern.ops.best_of_n import LOSSES, best_of_n, best_of_n_reference
from deltakern.ops.residual_norm import residual_norm


def best_of_n_head_reference(
    stream: torch.Tensor,
    branch: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    head: torch.Tensor,
    head_bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    eps: float = 1e-5,
    loss: str = "smooth_l1",
    beta: float = 0.1,
    reduce_dims: int = 1,
    return_losses: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Plain PyTorch. See the module's docstring for the contract."""
    wide = torch.float64 if stream.dtype == torch.float64 else torch.float32
    with torch.autocast(stream.device.type, enabled=False):
        if branch is not None:
            added = branch.to(wide) if scale is None else branch.to(wide) * scale.to(wide)
            stream = (stream.to(wide) + added).to(stream.dtype)
        normed = F.layer_norm(stream.to(wide), stream.shape[-1:], weight.to(wide), None if bias is None else bias.to(wide), eps)
        predicted = F.linear(normed.to(head.dtype), head, None if head_bias is None else head_bias.to(head.dtype))
    return best_of_n_reference(predicted, target, loss=loss, beta=beta, reduce_dims=reduce_dims, return_losses=return_losses)


def _unfused(impl, stream, branch, scale, weight, bias, head, head_bias, target, *, eps, reduce_dims, **options):
    """The same by the ops that it is made of, the reduction in ``impl``."""
    with torch.autocast(stream.device.type, enabled=False):
        if branch is None:
            wide = torch.promote_types(stream.dtype, torch.float32)
            normed = F.layer_norm(stream.to(wide), stream.shape[-1:], weight.to(wide), None if bias is None else bias.to(wide), eps)
            normed = normed.to(head.dtype)
        else:
            normed = residual_norm(stream, branch, scale, weight, bias, eps=eps, out_dtype=head.dtype)[1]
        predicted = F.linear(normed, head, None if head_bias is None else head_bias.to(head.dtype))
    del normed
    # As three dimensions, which is as many as the compiled reduction takes of any shape: groups, candidates, what is averaged
    shape = predicted.shape[: predicted.ndim - reduce_dims]
    groups, elements = shape[:-1].numel(), predicted.shape[len(shape) :].numel()
    found = best_of_n(predicted.view(groups, shape[-1], elements), target.reshape(groups, elements), impl=impl, **options)
    return tuple(f.view(shape if i == 2 else shape[:-1]) for i, f in enumerate(found))


def _tensors(stream, branch, scale, weight, bias, head, head_bias, target) -> dict[str, torch.Tensor | None]:
    return {
        "stream": stream,
        "branch": branch,
        "scale": scale,
        "weight": weight,
        "bias": bias,
        "head": head,
        "head_bias": head_bias,
        "target": target,
    }


def _facts(stream, branch, scale, weight, bias, head, head_bias, target, **_) -> backend.Facts:
    given = _tensors(stream, branch, scale, weight, bias, head, head_bias, target).values()
    return backend.Facts(stream.device.type, tuple(t.dtype for t in given if t is not None))


def _check(*arguments, loss, beta, reduce_dims, **_) -> None:
    op, tensors = "best_of_n_head", _tensors(*arguments)
    stream, branch, head, target = (tensors[name] for name in ("stream", "branch", "head", "target"))
    _validate.choice(op, "loss", loss, LOSSES)
    if loss == "smooth_l1" and not 1e-6 <= beta <= 1e6:
        raise ValueError(f"{op}: beta must be from 1e-6 to 1e6, got {beta}")
    if not 1 <= reduce_dims < stream.ndim:
        raise ValueError(
            f"{op}: reduce_dims must be from 1 to the stream's rank less 1, got {reduce_dims} and {_validate.wanted_shape(stream)}"
        )
    _validate.rank(op, "head", head, "(E,D)")
    axis, shape, width, outputs = stream.ndim - reduce_dims - 1, stream.shape, stream.shape[-1], head.shape[0]
    if branch is not None:
        _validate.shape(op, "branch", branch, shape, "stream's shape (...,N,R...,D)")
    elif tensors["scale"] is not None:
        raise ValueError(f"{op}: scale without branch; branch must be stream's shape {tuple(shape)}, got None")
    for name in ("scale", "weight", "bias"):
        if tensors[name] is not None:
            _validate.shape(op, name, tensors[name], (width,), "(D,)")
    _validate.shape(op, "head", head, (outputs, width), "(E,D)")
    if tensors["head_bias"] is not None:
        _validate.shape(op, "head_bias", tensors["head_bias"], (outputs,), "(E,)")
    _validate.shape(op, "target", target, (*shape[:axis], *shape[axis + 1 : -1], outputs), "(...,R...,E)")
    if shape[axis] == 0:
        raise ValueError(f"{op}: stream must have at least one candidate in dimension {axis}, got {_validate.wanted_shape(stream)}")
    if 0 in (*shape[axis + 1 :], outputs):
        raise ValueError(
            f"{op}: the reduced dimensions of stream and the rows of head must not be empty, got {_validate.wanted_shape(stream)} "
            f"and {_validate.wanted_shape(head)}"
        )
    _validate.floating(op, **tensors)
    _validate.one_device(op, **tensors)
    if _triton.needs_grad(*arguments):
        raise RuntimeError("best_of_n_head: has no gradient; call it under torch.no_grad() and run the winner again with gradients")


def _fake(stream, branch, scale, weight, bias, head, head_bias, target, eps, loss, beta, reduce_dims, return_losses):
    axis = stream.ndim - reduce_dims - 1
    return (
        stream.new_empty(stream.shape[:axis], dtype=torch.int64),
        stream.new_empty(stream.shape[:axis], dtype=torch.float32),
        stream.new_empty(stream.shape[: axis + 1] if return_losses else (0,), dtype=torch.float32),
    )


_search = _triton.define(
    "best_of_n_head(Tensor stream, Tensor? branch, Tensor? scale, Tensor weight, Tensor? bias, Tensor head, Tensor? head_bias,"
    " Tensor target, float eps, str loss, float beta, int reduce_dims, bool return_losses) -> (Tensor, Tensor, Tensor)",
    module="best_of_n_head",
    fake=_fake,
)


def _run(impl, *arguments, eps, loss, beta, reduce_dims, return_losses):
    if impl == "triton":
        found = _search(*arguments, eps, loss, float(beta), reduce_dims, return_losses)
        return found if return_losses else found[:2]
    return _unfused(impl, *arguments, eps=eps, loss=loss, beta=beta, reduce_dims=reduce_dims, return_losses=return_losses)


@backend.op(
    reference=best_of_n_head_reference,
    check=_check,
    facts=_facts,
    run=_run,
    kernels={"triton": backend.triton_refuses, **best_of_n.op.kernels},
)
def best_of_n_head(
    stream: torch.Tensor,
    branch: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    head: torch.Tensor,
    head_bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    eps: float = 1e-5,
    loss: str = "smooth_l1",
    beta: float = 0.1,
    reduce_dims: int = 1,
    return_losses: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, ...]:
    """The best of N candidates, from the stream before the last norm. The module's docstring is the contract.

    Args:
        stream: (..., N, R..., D), N candidates a group.
        branch: of the same shape, not yet added; ``None`` for the stream alone.
        scale: (D,) LayerScale of the branch, or ``None`` for ones.
        weight, bias: (D,) of the LayerNorm; ``bias`` may be ``None``.
        head, head_bias: (E,D) and (E,) of the linear layer; ``head_bias`` may be ``None``.
        target: (..., R..., E), what each group's predictions are compared with.
        eps: of the LayerNorm.
        loss, beta: as in :func:`deltakern.ops.best_of_n`.
        reduce_dims: how many last dimensions the loss is averaged over, R and the channels.
        return_losses: also return all N losses.
        impl: see :mod:`deltakern.backend`.

    Returns:
        ``(index, loss)``, (...) each, int64 and float32; with ``return_losses`` ``(index, loss, losses)``, losses (..., N).

    Raises:
        ValueError: shapes, devices, loss, beta, reduce_dims, no candidate. TypeError: dtypes.
        RuntimeError: autograd would record the call.
    """
    options = {"eps": eps, "loss": loss, "beta": beta, "reduce_dims": reduce_dims, "return_losses": return_losses}
    return backend.call(best_of_n_head, impl, stream, branch, scale, weight, bias, head, head_bias, target, **options)
