"""What every op with a Triton kernel is held to; ``test_triton_kernels.py`` applies all of it to every tiny case of ``deltakern.cases``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from compare import assert_as_accurate, to_double
from torch.utils._python_dispatch import TorchDispatchMode

from deltakern.cases import Case

Tensors = list[torch.Tensor]


def inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[list[Any], dict[str, Any]]:
    args, kwargs = case.make(dtype, device, torch.Generator().manual_seed(seed), 1.0)
    return list(args), dict(kwargs)


def inputs_shrunk(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[list[Any], dict[str, Any]]:
    """Inputs of the true widths with as few rows as the case allows."""
    args, kwargs = case.make(dtype, device, torch.Generator().manual_seed(0), 1e-6)
    return list(args), dict(kwargs)


def forward_backward(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    wanted: Sequence[int],
    cotangents: Callable[[torch.Tensor, int], torch.Tensor | None],
) -> tuple[Tensors, Tensors]:
    """Outputs, and gradients of ``args[i]`` for i in ``wanted``; strides and storage of the arguments are kept.

    ``cotangents(output, index)`` gives the incoming gradient of an output, or None for an output that nobody used. An argument
    that the outputs do not depend on has the gradient zero.
    """
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    for i in wanted:
        args[i] = args[i].requires_grad_(True)
    out = function(*args, **kwargs)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    pairs = [(o, c) for i, o in enumerate(outs) if o.requires_grad and (c := cotangents(o, i)) is not None]
    grads: Sequence[torch.Tensor | None] = ()
    if pairs and wanted:
        grads = torch.autograd.grad([o for o, _ in pairs], [args[i] for i in wanted], [c for _, c in pairs], allow_unused=True)
    return [o.detach() for o in outs], [torch.zeros_like(args[i]) if g is None else g for i, g in zip(wanted, grads, strict=True)]


def random_cotangents(seed: int = 1, only: int | None = None) -> Callable[[torch.Tensor, int], torch.Tensor | None]:
    """The same values for every dtype; with ``only`` the other outputs get none."""

    def make(output: torch.Tensor, index: int) -> torch.Tensor | None:
        if only is not None and index != only:
            return None
        generator = torch.Generator().manual_seed(seed + index)
        return torch.randn(output.shape, generator=generator).bfloat16().to(output.device, output.dtype)

    return make


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within the context fresh memory holds NaN, so that an element that no kernel writes is seen."""
    originals = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = original(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return make

    torch.empty, torch.empty_like, torch.Tensor.new_empty = map(poison, originals)
    try:
        yield
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = originals


def assert_case_accurate(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    wanted: Sequence[int] | None = None,
    only: int | None = None,
    lay: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
    impl: str = "triton",
) -> None:
    """Kernel against float64, no worse than plain torch by compare.py's rule: every output, every gradient.

    ``wanted`` restricts the gradients asked for, ``only`` the output that they come from; ``lay`` moves each argument and each
    incoming gradient of the kernel elsewhere in memory.
    """
    args, kwargs = inputs(case, dtype, device)
    wanted = case.differentiable if wanted is None else wanted
    reference = case.function.reference
    exact = {k: v for k, v in kwargs.items() if not isinstance(v, torch.dtype)}  # the oracle rounds nowhere
    cotangents = random_cotangents(only=only)
    truth = forward_backward(reference, to_double(args), exact, wanted, cotangents)
    plain = forward_backward(reference, args, kwargs, wanted, cotangents)
    laid = [lay(a) if isinstance(a, torch.Tensor) else a for a in args]

    def laid_cotangents(output: torch.Tensor, index: int) -> torch.Tensor | None:
        made = cotangents(output, index)
        return None if made is None else lay(made)

    with poisoned():
        kernel = forward_backward(case.function, laid, {**kwargs, "impl": impl}, wanted, laid_cotangents)
    for kind, ours, theirs, exactly in zip(("output", "gradient"), kernel, plain, truth, strict=True):
        for i, (k, p, t) in enumerate(zip(ours, theirs, exactly, strict=True)):
            assert k.dtype == p.dtype, f"{kind} {i}: {k.dtype}, the reference gives {p.dtype}"
            if not k.is_floating_point():  # which of several: the cases see to it that every dtype agrees
                assert torch.equal(k, t), f"{kind} {i}: another choice than float64's"
                continue
            assert_as_accurate(k, p, t, name=f"{kind} {i if kind == 'output' else 'of argument ' + str(wanted[i])}")


def sliced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as the middle of a bigger tensor that holds NaN elsewhere; the last dimension keeps its unit stride."""
    if tensor.ndim == 0 or not tensor.is_floating_point():
        return tensor
    big = torch.full([n + 3 for n in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device)
    middle = big[tuple(slice(1, n + 1) for n in tensor.shape)]
    return middle.copy_(tensor)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the last two dimensions stored the other way round."""
    return tensor.mT.contiguous().mT if tensor.ndim >= 2 else tensor


class _Memory:
    """One buffer of a little over 2^31 float32 for all that lies far apart: on a GPU there is no room for one each.

    On a CPU only the pages that are written take memory.
    """

    SPARE = 1 << 26

    def __init__(self, device: torch.device) -> None:
        self.storage = torch.UntypedStorage(4 * 2**31 + self.SPARE, device=device)  # not torch.empty, which may be poisoned
        self.used = 0

    def take(self, size: int) -> int:
        """The offset of ``size`` bytes that nobody else has; from the beginning again once the spare room has been given out."""
        size = -(-size // 256) * 256
        if self.used + size > self.SPARE:
            self.used = 0
        self.used += size
        return self.used - size


_memory = functools.cache(_Memory)


def far_apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the last index of the first dimension beyond element 2^31, until some tens of MB more lie far apart."""
    if tensor.ndim < 2 or tensor.shape[0] < 2 or not tensor.is_floating_point():
        return tensor
    stride = 2**31 // (tensor.shape[0] - 1) + 64
    inner = tensor[0].contiguous()
    memory = _memory(tensor.device)
    # Rows of tensors of other lengths can lie at about the same multiples: so far apart that they drift by less
    start = memory.take((inner.numel() + 65 * tensor.shape[0]) * tensor.itemsize) // tensor.itemsize
    return tensor.new_tensor(()).set_(memory.storage, start, tensor.shape, (stride, *inner.stride())).copy_(tensor)


def run_kernel(case: Case, args: Sequence[Any], kwargs: dict[str, Any], impl: str = "triton") -> tuple[Tensors, Tensors]:
    return forward_backward(case.function, args, {**kwargs, "impl": impl}, case.differentiable, random_cotangents())


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """The same bits, NaN included, in tensors of 32 or 16 bits."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(torch.int32 if tensor.itemsize == 4 else torch.int16)

    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


class LibraryCalls(TorchDispatchMode):
    """Collects the calls of the package's library ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "deltakern":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))
