"""The processes of a distributed run and what each of them does. Ranks form a mesh with the dimensions `data` and `block`.

    data    replicas of the network; each takes its share of every minibatch, and a block's gradients are summed over the replicas (reduce.py)
    block   the ranks that share the blocks of one replica; activations are sent from one to the next (link.py)

Rank d * block_ranks + b has the b-th group of successive blocks of replica d, so ranks whose blocks are neighbours are neighbours in the machine.
"""

import dataclasses
import datetime
import math
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastff.arguments import check_member, number_between, whole_number
from fastff.parallel.watch import Watch, open_report

BATCH_NORMS = ("local", "synchronized")


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Settings of a Trainer that uses several processes of torch.distributed: Trainer(sff, distributed=Distributed(...)).

    Args:
        block_ranks: number of ranks that share the blocks of one replica. The number of all ranks must be a multiple of it. 1 means
            data parallelism alone.
        placement: number of successive blocks of each of these ranks, [block_ranks] numbers; None balances the blocks by their measured times.
        batch_norm: "local" uses the statistics of a rank's share of the minibatch, "synchronized" those of the whole minibatch.
            The hidden layer of a head uses those of the share in both cases.
        shard_optimizer: whether each data-parallel rank keeps the optimizer state of a part of the parameters only.
        timeout: seconds that a rank waits for another before it fails. It has no effect if torch.distributed was initialized before.
        mesh: a torch DeviceMesh with dimensions named "data" or "block" or both, instead of block_ranks.

    Raises ValueError: an argument is out of range."""

    block_ranks: int = 1
    placement: Sequence[int] | None = None
    batch_norm: str = "local"
    shard_optimizer: bool = False
    timeout: float = 300.0
    mesh: DeviceMesh | None = None

    def __post_init__(self):
        whole_number("block_ranks", self.block_ranks)
        check_member("batch_norm", self.batch_norm, BATCH_NORMS)
        number_between("timeout", self.timeout, 0, math.inf, low_allowed=False)
        if self.mesh is not None and not set(self.mesh.mesh_dim_names or ()) & {"data", "block"}:
            raise ValueError(
                f"mesh: expected dimensions named 'data' and 'block' or one of them, got {self.mesh.mesh_dim_names}"
            )

    @classmethod
    def of(cls, value):
        """Convert the argument `distributed` of Trainer: None, "data", "block" (all ranks share the blocks), a DeviceMesh or a Distributed.

        Raises ValueError for anything else."""
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, DeviceMesh):
            return cls(mesh=value)
        if value not in ("data", "block"):
            raise ValueError(
                f"distributed: expected 'data', 'block', a DeviceMesh or fastff.Distributed, got {value!r}"
            )
        return cls() if value == "data" else cls(block_ranks=world_size())


def world_size():
    """Number of processes, from torch.distributed if it is initialized, else from torchrun's environment; 1 without both."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def start(device, timeout):
    """Initialize torch.distributed from torchrun's environment, unless it is initialized already.

    Args:
        device: torch.device of this process; it selects gloo, or gloo and nccl.
        timeout: seconds that a collective waits for the other ranks.

    Raises ValueError: the process was not started by torchrun."""
    if dist.is_initialized():
        return
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        raise ValueError(
            "distributed: expected torch.distributed to run: start the script with torchrun --nproc-per-node N, or call "
            "torch.distributed.init_process_group first"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    limit = datetime.timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    # After a restart, torchrun's store may still hold the addresses of processes that have ended.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    open_report(store, rank, size)


def leader_first(function):
    """Call function() on rank 0, and after that on the other ranks, and return its result.

    For downloads: rank 0 fetches a file, the others find it. An exception on rank 0 is raised on all ranks."""
    if not dist.is_initialized():
        return function()
    leads, failed = dist.get_rank() == 0, [None]
    try:
        result = function() if leads else None
    except Exception as error:
        failed = [error]
    dist.broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]
    return result if leads else function()


class Ranks:
    """Position of this process among all processes, and the collectives over them. Ranks() is a single process; its collectives do nothing.

    Attributes:
        rank, size: rank of this process and number of all processes.
        data_rank, data_size: rank and size in the group of replicas that have the same blocks.
        block_rank, block_size: rank and size in the group that shares the blocks of one replica.
        leads: whether this process prints and writes files (rank 0).
        feeds: whether this process reads the minibatches (the first of its replica).
        watch: the Watch that explains failures of other ranks."""

    def __init__(self, distributed=None, device=None):
        self.distributed = distributed or Distributed()
        self.rank, self.size, self.watch, self.data_group, self.block_group = 0, 1, Watch(), None, None
        self.data_rank, self.data_size, self.block_rank, self.block_size = 0, 1, 0, 1
        if distributed is not None:
            self._join(distributed, device)
        self.leads, self.feeds = self.rank == 0, self.block_rank == 0

    def _join(self, distributed, device):
        start(device, distributed.timeout)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        mesh = distributed.mesh
        if mesh is None:
            if self.size % distributed.block_ranks:
                raise ValueError(
                    f"block_ranks: expected a divisor of the {self.size} ranks, got {distributed.block_ranks}"
                )
            shape = (self.size // distributed.block_ranks, distributed.block_ranks)
            mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "block"))
        if mesh.size() != self.size:
            raise ValueError(f"mesh: expected all {self.size} ranks in it, got {mesh.size()}")
        if "data" in mesh.mesh_dim_names:
            self.data_group = mesh.get_group("data")
            self.data_rank, self.data_size = dist.get_rank(self.data_group), dist.get_world_size(self.data_group)
        if "block" in mesh.mesh_dim_names:
            self.block_group = mesh.get_group("block")
            self.block_rank, self.block_size = dist.get_rank(self.block_group), dist.get_world_size(self.block_group)
        limit = datetime.timedelta(seconds=distributed.timeout)
        self.control = dist.new_group(backend="gloo", timeout=limit)  # for Python objects and headers, on the CPU
        # A group of its own: a receive call that an earlier trainer has posted would take a message sent in a shared group.
        self.messages = dist.new_group(timeout=limit) if self.block_size > 1 else None
        self.watch = Watch(self.rank, self.size)

    def gather(self, value, everywhere=True):
        """Return the list of every rank's `value`, a picklable object, on every rank, or on rank 0 alone and None on the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if everywhere or self.leads else None
        with self.watch.guard():
            if everywhere:
                dist.all_gather_object(values, value, group=self.control)
            else:
                dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def sum(self, tensor, group=None):
        """Return the sum of every rank's `tensor`, on every rank of `group` (None: of all processes). The shapes must agree."""
        if self.size == 1:
            return tensor
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        with self.watch.guard():
            dist.all_reduce(tensor, group=group)
        return tensor

    @torch.no_grad()
    def mean_(self, tensors):
        """Replace the floating-point tensors in the list by their means over the data-parallel ranks. Others stay."""
        for t in tensors:
            if t.is_floating_point():
                t.copy_(self.sum(t, self.data_group) / self.data_size)

    @torch.no_grad()
    def broadcast_(self, tensors, source, group=None):
        """Replace the tensors in the list by those of rank `source` in `group` (None: of all processes)."""
        for t in tensors:
            sent = t.clone(memory_format=torch.contiguous_format)
            with self.watch.guard():
                dist.broadcast(sent, group=group, group_src=source)
            t.copy_(sent)
