"""Softmax attention over (B,L,H,d), by what is fastest and right, or by the backend that is named.

"auto" is PyTorch's own order (on GPUs before sm_90 flash-attn 2 where it is installed). From sm_90 on that order has cuDNN first, whose
attention backward has returned NaN on Hopper at head size 64 (pytorch issue 196678): at its first use for a device, dtype, head size and
length class it is held to :func:`self_check`, which waits for the GPU that once, and where it fails, flash runs instead. Its attention
of a single query is suspect too (cudnn-frontend issue 1072) and never taken. Under torch.compile nothing is checked.

No process-wide SDPA flag is set here, which other threads would see: a kernel that is chosen is called itself.
"""

from __future__ import annotations

import functools
import importlib
import threading
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_efficient_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend

from deltakern.backend import BackendWarning, traced_once
from deltakern.nn.recompute import sources
from deltakern.nn.self_check import self_check
from deltakern.nn.weights import compute_dtype
from deltakern.ops._once import once_differentiable

PACKAGES = {
    "flash-attn": ("flash_attn", "pip install flash-attn"),
    "flash-attn-3": ("flash_attn_interface", "built from the folder hopper of github.com/Dao-AILab/flash-attention"),
    "flash-attn-4": ("flash_attn.cute", "pip install flash-attn-4"),
}
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
BACKENDS = ("auto", *PACKAGES, "sdpa", *SDPA)
HALF = (torch.bfloat16, torch.float16)
_NAMES = {int(backend.value): name for name, backend in SDPA.items()}
_CAN = {"sdpa-flash": can_use_flash_attention, "sdpa-efficient": can_use_efficient_attention, "sdpa-cudnn": can_use_cudnn_attention}


@functools.cache
def _package(name: str):
    try:
        return importlib.import_module(PACKAGES[name][0]).flash_attn_func, None
    except Exception as problem:  # a build against another torch raises more than ImportError
        return None, f"{type(problem).__name__}: {problem}"


def check_backend(name: str) -> str:
    """Returns ``name``; raises ValueError where there is no such backend, RuntimeError where its package is missing."""
    if name not in BACKENDS:
        raise ValueError(f"attention must be one of {BACKENDS}, got {name!r}")
    if name in PACKAGES and _package(name)[0] is None:
        module, how = PACKAGES[name]
        problem = f"{module}.flash_attn_func cannot be imported ({_package(name)[1]})"
        raise RuntimeError(f"attention={name!r} cannot run: {problem}. Install it ({how}) or name another backend")
    return name


@traced_once
def _installed(name: str) -> bool:
    return _package(name)[0] is not None


@traced_once
def _arch(device: str, index: int | None) -> int:
    """90 for sm_90; 1 for a GPU that is not NVIDIA's; 0 for none."""
    return _capability(index) if device == "cuda" else 0


@functools.cache
def _capability(index: int | None) -> int:
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 1 if torch.version.hip else 10 * major + minor


class Choice(NamedTuple):
    """The backend that runs, and why; ``checked``: where PyTorch's own order takes cuDNN, that is to pass the self-check."""

    kernel: str
    why: str
    checked: bool = False


def choose(backend: str, arch: int, dtype: torch.dtype, head: int, queries: int, flash_attn: bool = False) -> Choice:
    """The rule, with gradient and without. ``arch`` is 90 for sm_90 and 0 for no GPU, ``flash_attn`` whether flash-attn 2 is installed."""
    if backend != "auto":
        return Choice(backend, "named")
    if 0 < arch < 90 and flash_attn and dtype in HALF:
        return Choice("flash-attn", "installed, on a GPU before sm_90")
    if arch < 90:
        return Choice("sdpa", "PyTorch's own order, which begins with cuDNN from sm_90 on alone")
    if dtype not in HALF or head % 8 or head > 256:
        return Choice("sdpa", "PyTorch's own order, of which cuDNN takes neither this dtype nor this head size")
    if queries == 1:
        return Choice("sdpa-flash", "cuDNN's attention of a single query is suspect")
    return Choice("sdpa", "PyTorch's own order, cuDNN first if it passes the self-check", checked=True)


def _chosen(backend: str, device: torch.device, dtype: torch.dtype, head: int, queries: int) -> Choice:
    arch = _arch(device.type, device.index)
    return choose(backend, arch, dtype, head, queries, 0 < arch < 90 and _installed("flash-attn"))


def decide(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, backend: str = "auto") -> Choice:
    """What :func:`attend` takes for (B,L,H,d), after the self-check where one is due; raises where the named kernel cannot run."""
    found = _chosen(backend, q.device, q.dtype, q.shape[-1], q.shape[1])
    if torch.compiler.is_compiling() or not (found.checked or backend in _CAN):
        return found
    if q.is_meta:
        return Choice("sdpa", "shapes alone")
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    plain = not torch._C._are_functorch_transforms_active() and all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in (q, k, v))
    if not found.checked:
        if q.is_cuda:  # PyTorch warns of the reason where it cannot
            runs = _CAN[backend](SDPAParams(*heads, None, 0.0, False, False), True)
        else:
            runs = backend == "sdpa-flash" and (not plain or _own(*heads, scale) == backend)
        if not runs:
            raise RuntimeError(f"attention={backend!r} cannot run for q {tuple(q.shape)}, {q.dtype} on {q.device}; name another backend")
        return found
    if not plain:
        return Choice("sdpa-flash", "under torch.func and in subclasses of Tensor cuDNN cannot be checked")
    if (own := _own(*heads, scale)) != "sdpa-cudnn":
        return Choice("sdpa", f"PyTorch's own order, which takes {own} here")
    if problem := _problem(q.device, q.dtype, q.shape[-1], q.shape[1], k.shape[1]):
        return Choice("sdpa-flash", problem)
    return Choice("sdpa-cudnn", "first in PyTorch's own order; passed the self-check")


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
    again: tuple[Callable[..., tuple[torch.Tensor, torch.Tensor]], tuple[torch.Tensor | None, ...]] | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T) v for every head, without a mask.

    Args:
        q: (B,Lq,H,d); k, v: (B,Lk,H,d); any strides with unit stride in d.
        scale: d ** -0.5 by default.
        backend: "auto" is as the module says; "sdpa" is PyTorch's own order without a check; the others are kernels.
        again: (make, sources), ``make(*sources)`` being q and k. With it they are not kept, and the backward makes them again, where
            SDPA takes its flash kernel or cuDNN. The other backends, flash-attn among them, keep them.

    Returns:
        (B,Lq,H,d).
    """
    dtype = compute_dtype(q.device.type, q.dtype)
    if dtype != q.dtype:  # under autocast SDPA casts by itself, its kernels do not
        q, k, v, again = q.to(dtype), k.to(dtype), v.to(dtype), None
    kernel = decide(q, k, v, scale=scale, backend=backend).kernel
    if kernel in PACKAGES:
        out = _package(kernel)[0](q, k, v, softmax_scale=scale)
        return out[0] if isinstance(out, tuple) else out  # some versions return the logarithms of the sums too
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if again is not None and (q.device.type == "cpu" or q.shape[-1] % 8 == 0):  # on a GPU SDPA pads channels to a multiple of 8
        own = _own(q, k, v, scale) if kernel == "sdpa" else kernel
        if own in ("sdpa-flash", "sdpa-cudnn"):
            return Again.apply(q, k, v, scale, own, again[0], *sources(again[1])).transpose(1, 2)
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    return _call(kernel, q, k, v, scale).transpose(1, 2)


def _own(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> str | None:
    """The kernel that PyTorch's own order takes for (B,H,L,d); None on devices that are not asked."""
    if q.device.type not in ("cpu", "cuda"):
        return None
    return _NAMES.get(torch._fused_sdp_choice(q, k, v, scale=scale))


def _call(kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """One of SDPA's kernels, (B,H,L,d), as SDPA calls it."""
    aten, width, device = torch.ops.aten, q.shape[-1], q.device.type
    if kernel == "sdpa-math":
        with torch.autocast(device, enabled=False):
            return aten._scaled_dot_product_attention_math(q, k, v, scale=scale)[0]
    if kernel == "sdpa-flash" and device == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)[0]
    if kernel == "sdpa-flash":
        q, k, v = (F.pad(t, (0, -width % 8)) if width % 8 else t for t in (q, k, v))
        return aten._scaled_dot_product_flash_attention(q, k, v, scale=width**-0.5 if scale is None else scale)[0][..., :width]
    op = aten._scaled_dot_product_cudnn_attention if kernel == "sdpa-cudnn" else aten._scaled_dot_product_efficient_attention
    return op(q, k, v, None, torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)), scale=scale)[0]


CHECKED: dict[tuple[torch.device, torch.dtype, int, int, int], str | None] = {}
"""What the self-check of cuDNN found wrong, None where nothing: by device, dtype, head size and, of queries and of keys, the power of two
that their number does not exceed."""
_said: set[str] = set()
_lock = threading.Lock()


def _say(text: str) -> None:
    with _lock:
        if text in _said:
            return
        _said.add(text)
    warnings.warn(f"deltakern.nn.attend: {text}", BackendWarning, stacklevel=5)


def _range(dtype: torch.dtype, head: int, queries: int, keys: int) -> str:
    return f"{str(dtype).removeprefix('torch.')}, head size {head}, up to {2**queries} queries and {2**keys} keys"


def _problem(device: torch.device, dtype: torch.dtype, head: int, queries: int, keys: int) -> str | None:
    """Why cuDNN is not to be taken. Checked at the first call, by all threads that come at once: no lock is held meanwhile, for a backward
    that the check waits for may itself get here."""
    key = device, dtype, head, (queries - 1).bit_length(), (keys - 1).bit_length()
    if key not in CHECKED:
        what = f"{_range(*key[1:])} on {device}"
        if torch.cuda.is_current_stream_capturing():
            problem = "cuDNN was not checked before this CUDA graph was captured"
            _say(f"flash attention runs for {what}: {problem}; run once before capturing")
            return problem
        found = self_check(functools.partial(_call, "sdpa-cudnn"), device, dtype, head, queries, keys)
        if CHECKED.setdefault(key, found and f"cuDNN failed the self-check: {found}"):
            _say(f"flash attention runs for {what}: {CHECKED[key]}")
    return CHECKED[key]


def describe(backend: str, device: torch.device, head: int) -> str:
    """A line on what :func:`attend` takes in half precision on a device, with what the self-check has found there so far."""
    found = _chosen(backend, device, torch.bfloat16, head, 2)
    if not found.checked:
        return f"{found.kernel}: {found.why}"
    checks = [f"{_range(*key)}: {problem or 'passed'}" for (on, *key), problem in CHECKED.items() if on == device and key[1] == head]
    return f"{found.kernel}: {found.why} ({'; '.join(checks) or 'nothing checked yet'})"


class Again(torch.autograd.Function):
    """SDPA's flash attention or cuDNN's, (B,H,L,d), which keeps neither q nor k: ``make(*made_of)`` is the two, (B,L,H,d)."""

    @staticmethod
    def forward(ctx, q, k, v, scale, kernel, make, *made_of):
        ctx.scale, ctx.kernel, ctx.make, ctx.count = scale, kernel, make, len(made_of)
        aten = torch.ops.aten
        if kernel == "sdpa-flash" and q.device.type == "cpu":
            kept = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
            ctx.between: tuple[int, ...] = ()
        else:
            if kernel == "sdpa-cudnn":
                found = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
            else:
                found = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
            out, logsumexp, starts_q, starts_k, *ctx.between, seed, offset, _ = found
            kept = out, logsumexp, starts_q, starts_k, seed, offset
        ctx.save_for_backward(*made_of, v, *kept)
        return kept[0]

    @staticmethod
    @once_differentiable("attend")
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # once: a checkpoint makes them at the first look, and refuses a second
        made_of, (v, out, logsumexp, *rest) = saved[: ctx.count], saved[ctx.count :]
        q, k = (t.transpose(1, 2) for t in ctx.make(*made_of))
        aten, kept = torch.ops.aten, (grad, q, k, v, out, logsumexp)
        if not rest:
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*kept, 0.0, False, scale=ctx.scale)
        else:
            starts_q, starts_k, *seed = rest
            starts = starts_q, starts_k, *ctx.between
            if ctx.kernel == "sdpa-cudnn":  # None: no bias
                grads = aten._scaled_dot_product_cudnn_attention_backward(*kept, *seed, None, *starts, 0.0, False, scale=ctx.scale)
            else:
                grads = aten._scaled_dot_product_flash_attention_backward(*kept, *starts, 0.0, False, *seed, scale=ctx.scale)
        return *grads, None, None, None, *(None,) * ctx.count
