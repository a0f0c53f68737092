"""``best_of_n``: the least loss among N candidates, and which candidate it is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from deltakern import backend
from deltakern.ops import _validate

LOSSES = ("smooth_l1", "log_cosh", "mse", "l1")


def best_of_n_reference(
    candidates: torch.Tensor,
    target: torch.Tensor,
    *,
    loss: str = "smooth_l1",
    beta: float = 0.1,
    reduce_dims: int = 1,
    return_losses: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Plain PyTorch. See the module's docstring for the contract."""
    wide = torch.float64 if candidates.dtype == torch.float64 else torch.float32
    axis = candidates.ndim - reduce_dims - 1
    difference = candidates.to(wide) - target.to(wide).unsqueeze(axis)
    size = difference.abs()
    if loss == "smooth_l1":
        values = torch.where(size < beta, difference.square() / (2 * beta), size - beta / 2)
    elif loss == "log_cosh":
        values = size + F.softplus(-2.0 * size) - math.log(2.0)
    elif loss == "mse":
        values = difference.square()
    else:
        values = size
    losses = values.flatten(axis + 1).mean(-1)
    ordered = torch.where(losses.isnan(), float("inf"), losses)
    # argmin may return any of several equal minima: the lowest index is the first that equals the minimum
    index = (ordered == ordered.amin(-1, keepdim=True)).to(torch.uint8).argmax(-1)
    all_infinite = ordered.isinf().all(-1) & ~losses.isnan().all(-1)
    index = torch.where(all_infinite, (~losses.isnan()).to(torch.uint8).argmax(-1), index)
    best = losses.gather(-1, index[..., None])[..., 0]
    return (index, best, losses) if return_losses else (index, best)


def _facts(candidates, target, **_) -> backend.Facts:
    return backend.Facts(candidates.device.type, (candidates.dtype, target.dtype))


@backend.op(reference=best_of_n_reference, facts=_facts)
def best_of_n(
    candidates: torch.Tensor,
    target: torch.Tensor,
    *,
    loss: str = "smooth_l1",
    beta: float = 0.1,
    reduce_dims: int = 1,
    return_losses: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, ...]:
    """``(index, loss)`` of the best of N candidates, ``(index, loss, losses)`` with ``return_losses``."""
    _validate.choice("best_of_n", "loss", loss, LOSSES)
    _validate.floating("best_of_n", candidates=candidates, target=target)
    _validate.one_device("best_of_n", candidates=candidates, target=target)
    backend.choose(best_of_n, impl, _facts(candidates, target))
    return best_of_n_reference(candidates, target, loss=loss, beta=beta, reduce_dims=reduce_dims, return_losses=return_losses)
