"""``best_of_n``: the least loss among N candidates, and which candidate it is.

Formula, for every group, d = candidate - target in float32, the mean over the last ``reduce_dims`` dimensions R (M elements)::

    losses_n = mean_R(value(candidates_n - target))          index = argmin_n losses_n          loss = losses_index

    loss="smooth_l1"   value(d) = d^2 / (2 beta) where |d| < beta, else |d| - beta / 2
    loss="log_cosh"    value(d) = |d| + softplus(-2|d|) - log 2
    loss="mse"         value(d) = d^2
    loss="l1"          value(d) = |d|

Order: equal losses go to the lowest index; infinity is a loss like any other; a NaN loss never wins unless all N are NaN, and
then the index is 0 and the loss NaN. N = 1 is allowed, so are empty leading dimensions; N = 0 and an empty R raise.
Shapes: candidates (..., N, R...), target (..., R...) -> index (...), loss (...), losses (..., N).
Dtypes: float32, bfloat16, float16 (float64 in the reference), the two may differ; index int64, losses float32 (float64 for
float64). beta from 1e-6 to 1e6.
Memory: the kernels read candidates once, through any strides (expanded ones included), and write nothing of their size; offsets
are 64 bits wide. Of up to 4 dimensions R and up to 6 before N.
Gradient: of ``loss``, with respect to candidates and target; zero everywhere but at the winner. Only the winner's difference is
kept for it. ``losses`` carries none. A second derivative raises.
Accumulation and determinism: float32 in blocks, the blocks' sums in float64, in an order that depends on M (and, on a GPU, on the
size of an element) alone. The same inputs give the same bits on every run, for any number of threads, AVX2 or AVX-512, any
strides, and however N is cut into chunks (:class:`BestOfN`). The two devices' orders differ, so their last bits may; so may
those of a CPU without FMA, which rounds products before it adds them.
Source: ``_bom_queries`` (training) and the choice of the best sample (evaluation) of the released code; paper, section 3.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from deltakern import backend
from deltakern.ops import _extension, _triton, _validate
from deltakern.ops._once import once_differentiable

LOSSES = ("smooth_l1", "log_cosh", "mse", "l1")
_MOST_LEADING, _MOST_REDUCED = 6, 4  # csrc/best_of_n.h


def best_of_n_reference(
    candidates: torch.Tensor,
    target: torch.Tensor,
    *,
    loss: str = "smooth_l1",
    beta: float = 0.1,
    reduce_dims: int = 1,
    return_losses: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Plain PyTorch. See the module's docstring for the contract. Float64 where either input is."""
    wide = torch.float64 if torch.float64 in (candidates.dtype, target.dtype) else torch.float32
    axis = candidates.ndim - reduce_dims - 1

    def losses_of(difference: torch.Tensor) -> torch.Tensor:
        size = difference.abs()
        if loss == "smooth_l1":
            values = torch.where(size < beta, difference.square() / (2 * beta), size - beta / 2)
        elif loss == "log_cosh":
            values = size + F.softplus(-2.0 * size) - math.log(2.0)
        elif loss == "mse":
            values = difference.square()
        else:
            values = size
        return values.flatten(axis + 1).mean(-1)

    with torch.no_grad():
        losses = losses_of(candidates.to(wide) - target.to(wide).unsqueeze(axis))
        valid = ~losses.isnan()
        least = losses.masked_fill(~valid, math.inf).amin(-1, keepdim=True)
        # argmax of a mask: the first place that holds the least, and 0 where there is none
        index = ((losses == least) & valid).to(torch.uint8).argmax(-1)
        best = losses.gather(-1, index[..., None])[..., 0]
    if torch.is_grad_enabled() and (candidates.requires_grad or target.requires_grad):
        # The same sums again with every other candidate's difference set to 0, so that neither its NaN nor its infinity
        # reaches the gradient; the winner's loss keeps its bits.
        wins = torch.arange(losses.shape[-1], device=losses.device) == index[..., None]
        wins = wins.reshape(*wins.shape, *(1,) * reduce_dims)
        difference = torch.where(wins, candidates.to(wide) - target.to(wide).unsqueeze(axis), 0.0)
        best = losses_of(difference).gather(-1, index[..., None])[..., 0]
    return (index, best, losses) if return_losses else (index, best)


def _cuda_refuses(facts: backend.Facts) -> str | None:
    refused = _extension.refuses(facts, "cuda")
    if refused is not None:
        return refused
    extension = backend.extension().module
    built = extension.build_info()
    if not built["with_cuda"]:
        return "the compiled extension was built without CUDA (no nvcc at install, or DELTAKERN_CUDA_ARCHS=none)"
    problem = extension.cuda_problem()  # its CUDA runtime is its own, and may want a newer driver than torch's
    if problem:
        return f"the compiled extension was built with CUDA {built['cuda_version']}, which says: {problem}"
    capability = torch.cuda.get_device_capability()
    if not runs_on(built["cuda_archs"], capability):
        return f"the compiled extension has code for {', '.join(built['cuda_archs'])}, not for sm_{capability[0]}{capability[1]}"
    return None


def runs_on(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures`` ("90", "90a", "100f", "120+PTX") runs on a device of this compute capability."""
    device = 10 * capability[0] + capability[1]
    for text in architectures:
        number = int(text.removesuffix("+PTX").rstrip("af"))
        if text.endswith("a"):
            fits = device == number
        else:  # binary code runs on its own major version from its minor on, PTX on everything as new or newer
            fits = number <= device and (number // 10 == device // 10 or text.endswith("+PTX"))
        if fits:
            return True
    return False


def _facts(candidates, target, *, reduce_dims=1, **_) -> backend.Facts:
    fits = reduce_dims <= _MOST_REDUCED and candidates.ndim - reduce_dims - 1 <= _MOST_LEADING
    note = "" if fits else f"the kernel takes at most {_MOST_REDUCED} reduced and {_MOST_LEADING} leading dimensions"
    return backend.Facts(candidates.device.type, (candidates.dtype, target.dtype), note)


def _outputs(candidates, reduce_dims, return_losses):
    axis = candidates.ndim - reduce_dims - 1
    leading = candidates.shape[:axis]
    losses = candidates.shape[: axis + 1] if return_losses else (0,)
    return (
        candidates.new_empty(leading, dtype=torch.int64),
        candidates.new_empty(leading, dtype=torch.float32),
        candidates.new_empty(losses, dtype=torch.float32),
    )


def _described(candidates, target, loss, beta, reduce_dims, outputs, return_losses):
    """The extension's arguments that both devices share."""
    index, best, losses = outputs
    return (
        *(candidates.data_ptr(), _extension.DTYPES[candidates.dtype], candidates.shape, candidates.stride()),
        *(target.data_ptr(), _extension.DTYPES[target.dtype], target.shape, target.stride()),
        *(reduce_dims, LOSSES.index(loss), beta),
        *(index.data_ptr(), best.data_ptr(), losses.data_ptr() if return_losses else 0),
    )


def _run_cpu(candidates, target, loss, beta, reduce_dims, return_losses):
    outputs = _outputs(candidates, reduce_dims, return_losses)
    described = _described(candidates, target, loss, beta, reduce_dims, outputs, return_losses)
    _extension.module("best_of_n").best_of_n_cpu(*described, torch.get_num_threads())
    return outputs


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _run_cuda(candidates, target, loss, beta, reduce_dims, return_losses):
    extension, device = _extension.module("best_of_n"), candidates.device.index
    axis = candidates.ndim - reduce_dims - 1
    with torch.cuda.device(device):
        outputs = _outputs(candidates, reduce_dims, return_losses)
        sizes = (candidates.shape[:axis].numel(), candidates.shape[axis], candidates.shape[axis + 1 :].numel())
        needed = extension.best_of_n_cuda_workspace(*sizes, _multiprocessors(device))
        workspace = candidates.new_empty(needed, dtype=torch.uint8)
        described = _described(candidates, target, loss, beta, reduce_dims, outputs, return_losses)
        stream = torch.cuda.current_stream().cuda_stream
        extension.best_of_n_cuda(*described, workspace.data_ptr(), needed, device, _multiprocessors(device), stream)
    return outputs


def _fake(candidates, target, loss, beta, reduce_dims, return_losses):
    return _outputs(candidates, reduce_dims, return_losses)


_best_of_n = _triton.register(
    "best_of_n(Tensor candidates, Tensor target, str loss, float beta, int reduce_dims, bool return_losses) -> (Tensor, Tensor, Tensor)",
    {"CPU": _run_cpu, "CUDA": _run_cuda},
    fake=_fake,
)


def _slope(difference: torch.Tensor, loss: str, beta: float) -> torch.Tensor:
    """The derivative of ``value``."""
    if loss == "smooth_l1":
        return (difference / beta).clamp(-1.0, 1.0)
    if loss == "log_cosh":
        return difference.tanh()
    return 2.0 * difference if loss == "mse" else difference.sign()


class _BestOfN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, candidates, target, loss, beta, reduce_dims, return_losses):
        index, best, losses = _best_of_n(candidates, target, loss, beta, reduce_dims, return_losses)
        axis = candidates.ndim - reduce_dims - 1
        # (..., 1, R...), the winner's number everywhere; expanded, so it takes no memory
        place = index.reshape(*index.shape, *(1,) * (reduce_dims + 1)).expand(*index.shape, 1, *candidates.shape[axis + 1 :])
        winner = candidates.gather(axis, place).squeeze(axis)
        ctx.save_for_backward(winner.float() - target.float(), index)
        ctx.settings = (loss, beta, reduce_dims, candidates.shape, candidates.dtype, target.dtype)
        ctx.mark_non_differentiable(index, losses)
        return index, best, losses

    @staticmethod
    @once_differentiable("best_of_n")
    def backward(ctx, _index, d_best, _losses):
        difference, index = ctx.saved_tensors
        loss, beta, reduce_dims, shape, candidates_dtype, target_dtype = ctx.settings
        axis = len(shape) - reduce_dims - 1
        d_best = (d_best / shape[axis + 1 :].numel()).reshape(*d_best.shape, *(1,) * reduce_dims)
        d_winner = d_best * _slope(difference, loss, beta)
        d_candidates = d_target = None
        if ctx.needs_input_grad[0]:
            place = index.reshape(*index.shape, *(1,) * (reduce_dims + 1)).expand(*index.shape, 1, *shape[axis + 1 :])
            zeros = torch.zeros(shape, dtype=candidates_dtype, device=index.device)
            d_candidates = zeros.scatter(axis, place, d_winner.to(candidates_dtype).unsqueeze(axis))
        if ctx.needs_input_grad[1]:
            d_target = -d_winner.to(target_dtype)
        return d_candidates, d_target, None, None, None, None


def _check(candidates, target, *, loss, beta, reduce_dims, **_) -> None:
    op = "best_of_n"
    _validate.choice(op, "loss", loss, LOSSES)
    if loss == "smooth_l1" and not 1e-6 <= beta <= 1e6:
        raise ValueError(f"{op}: beta must be from 1e-6 to 1e6, got {beta}")
    _validate.floating(op, candidates=candidates, target=target)
    if not 1 <= reduce_dims < candidates.ndim:
        raise ValueError(
            f"{op}: reduce_dims must be from 1 to the candidates' rank less 1, got {reduce_dims} and {_validate.wanted_shape(candidates)}"
        )
    axis = candidates.ndim - reduce_dims - 1
    shape = candidates.shape
    _validate.shape(op, "target", target, (*shape[:axis], *shape[axis + 1 :]), "candidates' shape without dimension N")
    if shape[axis] == 0:
        raise ValueError(f"{op}: candidates must have at least one candidate in dimension {axis}, got {_validate.wanted_shape(candidates)}")
    if 0 in shape[axis + 1 :]:
        raise ValueError(f"{op}: the reduced dimensions of candidates must not be empty, got {_validate.wanted_shape(candidates)}")
    _validate.one_device(op, candidates=candidates, target=target)


def _run(_, candidates, target, *, loss, beta, reduce_dims, return_losses):
    run = _BestOfN.apply if _triton.needs_grad(candidates, target) else _best_of_n
    index, best, losses = run(candidates, target, loss, float(beta), reduce_dims, return_losses)
    return (index, best, losses) if return_losses else (index, best)


@backend.op(
    reference=best_of_n_reference,
    check=_check,
    facts=_facts,
    run=_run,
    kernels={"cpp": _extension.cpp_refuses, "cuda": _cuda_refuses},
)
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
    """The best of N candidates. The module's docstring is the contract.

    Args:
        candidates: (..., N, R...), N candidates a group.
        target: (..., R...), what each group's candidates are compared with.
        loss: "smooth_l1", "log_cosh", "mse" or "l1".
        beta: where smooth-L1 turns linear, from 1e-6 to 1e6; ignored otherwise.
        reduce_dims: how many last dimensions R the loss is averaged over.
        return_losses: also return all N losses.
        impl: see :mod:`deltakern.backend`.

    Returns:
        ``(index, loss)``, (...) each, int64 and float32; with ``return_losses`` ``(index, loss, losses)``, losses (..., N).

    Raises:
        ValueError: shapes, devices, loss, beta, reduce_dims, no candidate. TypeError: dtypes.
    """
    options = {"loss": loss, "beta": beta, "reduce_dims": reduce_dims, "return_losses": return_losses}
    return backend.call(best_of_n, impl, candidates, target, **options)


class BestOfN:
    """A running best, for more candidates than memory holds.

    However the candidates are cut into chunks, and in whatever order the chunks come, :meth:`result` equals
    :func:`best_of_n` of all of them, bit for bit where a kernel runs. Example::

        search = BestOfN(loss="smooth_l1", beta=0.1)
        for chunk in chunks:                    # (..., n, R...) each
            search.update(chunk, target)
        index, loss = search.result()           # index counts the candidates of all chunks

    :meth:`merge` takes results of :func:`deltakern.ops.best_of_n_head` in the same way.

    Args:
        loss, beta, reduce_dims, impl: as in :func:`best_of_n`.
    """

    def __init__(self, *, loss: str = "smooth_l1", beta: float = 0.1, reduce_dims: int = 1, impl: str = "auto") -> None:
        self._settings = {"loss": loss, "beta": beta, "reduce_dims": reduce_dims, "impl": impl}
        self._count = 0
        self._best: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, chunk: torch.Tensor, target: torch.Tensor, *, offset: int | None = None) -> torch.Tensor:
        """Takes further candidates of the same groups.

        Args:
            chunk: (..., n, R...) candidates.
            target: (..., R...), the same in every call.
            offset: number of the chunk's first candidate; by default the chunks are numbered in the order they come.

        Returns:
            (...) bool: the groups whose best candidate is now one of this chunk's.
        """
        index, loss = best_of_n(chunk, target, **self._settings)
        return self.merge(index, loss, chunk.shape[loss.ndim], offset=offset)

    def merge(self, index: torch.Tensor, loss: torch.Tensor, count: int, *, offset: int | None = None) -> torch.Tensor:
        """Takes what :func:`best_of_n` or :func:`best_of_n_head` found among ``count`` further candidates of the same groups.

        Args:
            index, loss: (...) each, the index within those candidates.
            count: how many they were.
            offset: as in :meth:`update`.

        Returns:
            As :meth:`update`.
        """
        if offset is None:
            offset = self._count
        self._count = max(self._count, offset + count)
        index = index + offset
        if self._best is None:
            self._best = index, loss
            return torch.ones_like(index, dtype=torch.bool)
        old_index, old_loss = self._best
        if loss.shape != old_loss.shape:
            raise ValueError(f"BestOfN: chunk must have leading dimensions {tuple(old_loss.shape)}, got {tuple(loss.shape)}")
        nan, old_nan = loss.isnan(), old_loss.isnan()
        equal = (loss == old_loss) | (nan & old_nan)
        better = (loss < old_loss) | (old_nan & ~nan) | (equal & (index < old_index))
        self._best = torch.where(better, index, old_index), torch.where(better, loss, old_loss)
        return better

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(index, loss)`` of the best candidate so far, (...) each.

        Raises:
            RuntimeError: before the first :meth:`update`.
        """
        if self._best is None:
            raise RuntimeError("BestOfN: no candidates yet; call update first")
        return self._best
