"""What every implementation of best_of_n is held to."""

from __future__ import annotations

from typing import Any

import torch
from compare import relative_rmse

from deltakern import ops


def identical(a, b) -> bool:
    """The same bits in every tensor; NaN equals NaN."""
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) if x.dtype == torch.float32 else torch.equal(x, y) for x, y in pairs)


def ordered_argmin(losses: torch.Tensor) -> torch.Tensor:
    """The rule in plain Python: least loss, then lowest index; NaN last."""
    rows = losses.reshape(-1, losses.shape[-1]).tolist()
    best = [min(range(len(r)), key=lambda i: (r[i] != r[i], r[i] if r[i] == r[i] else 0.0, i)) for r in rows]
    return torch.tensor(best, dtype=torch.int64).reshape(losses.shape[:-1])


def check_values(out: tuple[torch.Tensor, ...], candidates: torch.Tensor, target: torch.Tensor, **kwargs: Any) -> None:
    """``out`` is (index, loss, losses): the losses against float64, the other two against the losses."""
    index, best, losses = (o.cpu() for o in out)
    assert torch.equal(index, ordered_argmin(losses))
    assert identical((best,), (losses.gather(-1, index[..., None])[..., 0],))

    def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ops.best_of_n.reference(a, b, return_losses=True, **kwargs)[2]

    # What plain torch errs by in a handful of losses is luck, so the same problem a little larger and smaller counts as well.
    near = [(candidates * scale, target * scale) for scale in (1.0, 0.96, 0.98, 1.02, 1.04)]
    theirs = max(relative_rmse(reference(a, b), reference(a.double(), b.double())) for a, b in near)
    ours = relative_rmse(losses, reference(candidates.double(), target.double()))
    eps = torch.finfo(losses.dtype).eps
    assert ours <= 2 * theirs + eps, f"losses: relative RMSE {ours:.3e}, plain torch {theirs:.3e}, eps {eps:.1e}"
