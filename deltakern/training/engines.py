"""How a model is run: one process or several, activations kept or recomputed, parameters whole or sharded."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltakern.models.predictor import PredictorBlock
from deltakern.nn import Block


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
