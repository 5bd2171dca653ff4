"""How a training run is spread over processes: rows over one axis of a device mesh, features over the other.

B rows, K candidates per row, D site width.

Data parallel: every process has the whole crosscoder and its share of each batch; gradients are added up. Feature parallel:
every process has F / n features of every group, encodes and decodes those, and the partial reconstructions are added up,
so activations travel instead of weights. One process is the case without a mesh, in which every method is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import Parameter

from replacement.crosscoder.sites import Site

DATA, FEATURES = "data", "features"
TIMEOUT = timedelta(days=1)
"""How long a process waits for the others. Torch gives up after minutes, but one process may work alone for hours, on an
activation cache or an evaluation; a process that dies is noticed by `torchrun`, not by waiting."""


@dataclass(frozen=True)
class Parallel:
    """Place of this process in a run; `SINGLE` is a run of one process."""

    mesh: DeviceMesh | None = None
    """Device mesh with the axes `data` and `features`; None in a run of one process."""

    @property
    def n_data(self) -> int:
        """Processes that share the rows."""
        return 1 if self.mesh is None else self.mesh[DATA].size()

    @property
    def data_rank(self) -> int:
        """Which of them this is."""
        return 0 if self.mesh is None else self.mesh[DATA].get_local_rank()

    @property
    def n_feature_shards(self) -> int:
        """Processes that share the features."""
        return 1 if self.mesh is None else self.mesh[FEATURES].size()

    @property
    def feature_rank(self) -> int:
        """Which of them this is."""
        return 0 if self.mesh is None else self.mesh[FEATURES].get_local_rank()

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.data_rank == 0 and self.feature_rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.mesh is not None:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.mesh is None:
            return flag
        raised = torch.tensor(int(flag), device=self.mesh.device_type)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised)

    def from_first(self, text: str) -> str:
        """The text that the first process gives, in every process."""
        texts = [text]
        if self.mesh is not None:
            dist.broadcast_object_list(texts, src=0)
        return texts[0]

    def sum_over_data(self, x: Tensor) -> Tensor:
        """Sum over processes with other rows; no gradient."""
        return self._reduce(x, DATA)

    def sum_over_features(self, x: Tensor) -> Tensor:
        """Sum over processes with other features; no gradient."""
        return self._reduce(x, FEATURES)

    def least_over_data(self, x: Tensor) -> Tensor:
        """Smallest value over processes with other rows; no gradient."""
        return self._reduce(x, DATA, dist.ReduceOp.MIN)

    def _reduce(self, x: Tensor, axis: str, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        if self.mesh is None or self.mesh[axis].size() == 1:
            return x
        total = x.detach().clone()
        dist.all_reduce(total, op=operation, group=self.mesh[axis].get_group())
        return total

    def counts_over_data(self, n: int) -> list[int]:
        """A number of each process that shares the rows, in order."""
        if self.n_data == 1 or self.mesh is None:
            return [n]
        counts: list[int] = self.gather(torch.tensor(n, device=self.mesh.device_type), DATA).tolist()
        return counts

    def sum_partial(self, partial: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """Add up what the features of every process write, in tensors of their own; the gradient of each share is that of
        the sum."""
        if self.n_feature_shards == 1 or self.mesh is None:
            return dict(partial)
        mesh, sites = self.mesh[FEATURES], list(partial)
        # One message for all sites. Partial -> Replicate is a sum forwards and the identity backwards.
        joined_BX = torch.cat([partial[site] for site in sites], dim=1)
        whole = DTensor.from_local(joined_BX, mesh, [Partial()], run_check=False).redistribute(mesh, [Replicate()])
        parts = whole.to_local().split([partial[site].shape[1] for site in sites], dim=1)
        return {site: part.clone() for site, part in zip(sites, parts, strict=True)}

    def largest(self, value_BK: Float[Tensor, "B K"], k: int) -> Bool[Tensor, "B K"]:
        """Which of this process's candidates are among the k largest of each row over all features."""
        if self.n_feature_shards == 1 or self.mesh is None:
            return torch.ones_like(value_BK, dtype=torch.bool)
        every_BN = self.gather(value_BK, FEATURES).transpose(0, 1).flatten(1)
        if every_BN.shape[1] <= k:
            return torch.ones_like(value_BK, dtype=torch.bool)
        return value_BK >= every_BN.topk(k, dim=1).values[:, -1:]

    def gather(self, x: Tensor, axis: str) -> Tensor:
        """The tensors of all processes along an axis of the mesh, stacked; all must have one shape."""
        assert self.mesh is not None
        group = self.mesh[axis].get_group()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    def join_in_first(self, x: Tensor, axis: str, *, dim: int) -> Tensor | None:
        """The tensors of all processes along an axis of the mesh, joined at a dimension, in the first of them; None in the
        others. All must have one shape."""
        assert self.mesh is not None
        group = self.mesh[axis].get_group()
        is_first = dist.get_rank(group) == 0
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group) if is_first else 0)]
        dist.gather(x.contiguous(), parts if is_first else None, group=group, group_dst=0)
        return torch.cat(parts, dim=dim) if is_first else None

    def sum_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Add up gradients over processes with other rows, in place."""
        if self.n_data == 1 or self.mesh is None:
            return
        group = self.mesh[DATA].get_group()
        pending = [dist.all_reduce(p.grad, group=group, async_op=True) for p in parameters if p.grad is not None]
        for work in pending:
            work.wait()

    def clip_gradients(self, sharded: Iterable[Parameter], replicated: Iterable[Parameter], most: float) -> Tensor:
        """Scale all gradients so that their norm over all features is at most `most`; returns the norm before."""
        groups = [[p.grad for p in side if p.grad is not None] for side in (sharded, replicated)]
        squares = [
            torch.stack(torch._foreach_norm(side)).square().sum() if side else torch.zeros(()) for side in groups
        ]
        norm = (self.sum_over_features(squares[0]) + squares[1].to(squares[0].device)).sqrt()
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        if float(factor) < 1.0:
            torch._foreach_mul_([grad for side in groups for grad in side], float(factor))
        return norm

    def distributed(self, tensor: Tensor, *, feature_dim: int | None) -> Tensor:
        """A view for checkpoints: a DTensor split along `feature_dim`, or equal in every process if None."""
        if self.mesh is None:
            return tensor
        placement = Replicate() if feature_dim is None else Shard(feature_dim)
        return DTensor.from_local(tensor, self.mesh, [Replicate(), placement], run_check=False)


SINGLE = Parallel()
"""A run of one process."""


def restarted() -> bool:
    """Whether `torchrun --max-restarts` started this process again after a failure."""
    return _n_restarts() > 0


def _n_restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


def connect(*, feature_shards: int = 1, device: str = "cpu") -> Parallel:
    """Join the run that `torchrun` started, or be a run of one process.

    Args:
        feature_shards: processes that share the features; the others share the rows.

    Raises:
        ValueError: a number of shards that does not divide the number of processes.
    """
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if feature_shards < 1 or n_processes % feature_shards:
        raise ValueError(
            f"feature_shards={feature_shards} does not divide the {n_processes} process(es) of this run; start "
            "several with torchrun"
        )
    if n_processes == 1:
        return SINGLE
    if not dist.is_initialized():
        # Processes started again must not find the addresses of those before them in a store that outlived them.
        store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = dist.PrefixStore(f"start {_n_restarts()}", store)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    shape = (n_processes // feature_shards, feature_shards)
    return Parallel(init_device_mesh(device.split(":")[0], shape, mesh_dim_names=(DATA, FEATURES)))
