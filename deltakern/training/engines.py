"""How a model is run: one process or several, activations kept or recomputed, parameters whole or sharded."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltakern.models.predictor import PredictorBlock
from deltakern.models.validate import check_positive
from deltakern.nn import Block, graphs


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that train together.

    Attributes:
        device: that it computes on.
        rank, size: its number, and how many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, values: list[float]) -> list[float]:
        """The mean over all processes of each value."""
        if self.size == 1:
            return values
        both = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(both)
        return (both / self.size).tolist()

    def wait(self) -> None:
        """For all processes."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def placed(device: str | None = None) -> Iterator[Place]:
    """Joins the processes that torchrun started, if it did, or the process group that there is.

    Args:
        device: "cpu", "cuda", "cuda:1"...; None takes a GPU where there is one. Under torchrun "cuda" is the process's own.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not (dist.is_initialized() or dist.is_torchelastic_launched()):
        yield Place(kind)
        return
    joined_before = dist.is_initialized()
    if not joined_before:
        dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    try:
        if kind.type == "cuda" and kind.index is None:
            kind = torch.device("cuda", dist.get_node_local_rank())
            torch.cuda.set_device(kind)
        yield Place(kind, dist.get_rank(), dist.get_world_size())
    finally:
        if not joined_before:
            dist.destroy_process_group()


def blocks(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model, in order."""
    return [module for module in network.modules() if isinstance(module, Block | PredictorBlock)]


def checkpoint_activations(network: nn.Module) -> nn.Module:
    """Makes every trained block keep its input alone and recompute the rest in the backward pass. Returns the network.

    Before :func:`shard` and torch.compile, if they are used too.
    """
    for block in blocks(network):
        if any(p.requires_grad for p in block.parameters()):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return network


_PUBLIC = ("train_on_tokens", "predict", "sample", "decode", "rollout", "encode", "tokenize")
"""Methods besides ``forward`` for which a sharded model gathers its weights."""


def shard(network: nn.Module, mesh: Any = None, *, compute_dtype: torch.dtype | None = torch.bfloat16) -> nn.Module:
    """FSDP2: ``fully_shard`` of every block and of the rest, parameters and their optimizer in float32. Returns the network.

    Args:
        network: DeltaTok, DeltaWorld or DINOWorld, on the device of the mesh.
        mesh: a ``DeviceMesh``; None for all processes.
        compute_dtype: what parameters are cast to for the computation; gradients are reduced in float32. None leaves them.

    RoPE tables and timestamps stay in float32: inputs are not cast.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks(network):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)
    for module, names in ((network, _PUBLIC), *((block, ("project",)) for block in blocks(network))):
        for name in names:
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)
    return network


class CapturedStep:
    """A whole training step (forward, backward, clipping, optimizer) as one CUDA graph, for batches of one shape. Calling it takes a step.

    The first ``warm_up`` calls are steps like any other, launched as they are; the next is captured, and from then on every call copies its
    batch, replays and hands out the loss. Elsewhere than on a GPU all calls are such as the first. What the graph holds is what ran while
    it was captured: parameters must stay where they lie, hooks do not run, and the learning rate is a tensor, to be written to by
    ``rate.fill_(value)``. Random numbers are drawn anew at every replay.

    Args:
        loss: called with the batch's tensors, returns a scalar. It must not wait for the GPU.
        optimizer: with ``capturable=True`` in every group, such as ``torch.optim.AdamW(groups, fused=True, capturable=True)``.
        clip: the most norm of all gradients together; None for any.
        warm_up: steps before the capture; at least 3 for kernels to be compiled and libraries to be set up.

    Raises:
        ValueError: an optimizer that cannot be captured, a batch of other shapes after the capture, parameters that lie elsewhere.
    """

    def __init__(
        self, loss: Callable[..., torch.Tensor], optimizer: torch.optim.Optimizer, *, clip: float | None = None, warm_up: int = 3
    ) -> None:
        check_positive(warm_up=warm_up)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for group in optimizer.param_groups:
            if not group.get("capturable"):
                raise ValueError(f"optimizer must have capturable=True in every group to be captured, got {type(optimizer).__name__}")
        self.device = self.parameters[0].device
        self.rate = torch.as_tensor(optimizer.param_groups[0]["lr"], dtype=torch.float32, device=self.device).clone()
        for group in optimizer.param_groups:
            group["lr"] = self.rate
        self.loss, self.optimizer, self.clip, self.warm_up = loss, optimizer, clip, warm_up
        self._stream = torch.cuda.Stream(self.device) if graphs.captures(self.device) else None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *batch: torch.Tensor) -> torch.Tensor:
        """One step: the loss, a scalar without gradient."""
        if self._stream is None:
            return self._step(batch)
        if self.warm_up:
            self.warm_up -= 1
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):  # where it will be captured: gradients remember their stream
                found = self._step(batch)
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            return found
        if self._graph is None:
            self._capture(batch)
        if self._places() != self._lay:
            raise ValueError("a parameter of the captured step lies elsewhere or is another one; make a new CapturedStep")
        if [(t.shape, t.dtype) for t in batch] != [(t.shape, t.dtype) for t in self._batch]:
            shapes = [[tuple(t.shape) for t in tensors] for tensors in (self._batch, batch)]
            raise ValueError(f"batch must have the captured shapes and dtypes, {shapes[0]}, got {shapes[1]}")
        for buffer, given in zip(self._batch, batch, strict=True):
            buffer.copy_(given)
        self._graph.replay()
        return self._loss.clone()

    def _places(self) -> list[int]:
        return [p.data_ptr() for group in self.optimizer.param_groups for p in group["params"]]

    def _step(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(*batch)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        return loss.detach()

    def _capture(self, batch: Sequence[torch.Tensor]) -> None:
        self.optimizer.zero_grad(set_to_none=True)  # so that gradients lie in the graph's memory
        self._batch, self._lay, graph = [t.clone() for t in batch], self._places(), torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            self._loss = self._step(self._batch)
        self._graph = graph


captured_step = CapturedStep
