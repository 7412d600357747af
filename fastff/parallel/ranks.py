"""Which rank does what. Ranks form a mesh: `data` x `block`.

    data    replicas; each takes its share of every minibatch, and a block's gradients are summed over them (reduce.py)
    block   the ranks that share the blocks of one replica; activations go from one to the next (link.py)

Rank d * block_ranks + b has the b-th run of blocks of replica d, so neighbours in the network are neighbours in the machine.
"""

import dataclasses
import datetime
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastff.parallel.watch import Watch

BATCH_NORMS = ("local", "synchronized")


@dataclasses.dataclass(frozen=True)
class Distributed:
    """How a Trainer spreads over the processes of torch.distributed: Trainer(sff, distributed=Distributed(...)).

    Args:
        block_ranks: ranks that share the blocks of one replica; the number of ranks is a multiple of it. 1: data-parallel alone.
        placement: how many successive blocks each of them has, [block_ranks] numbers; None balances them by their measured times.
        batch_norm: "local" normalises over a rank's share of the minibatch, "synchronized" over the whole minibatch.
        shard_optimizer: each data-parallel rank keeps the optimiser state of its part of the parameters only.
        timeout: seconds that a rank waits for another before it gives up (where this starts torch.distributed; else as it was started).
        mesh: a torch DeviceMesh with dimensions named "data" and/or "block", instead of block_ranks.
    """

    block_ranks: int = 1
    placement: Sequence[int] | None = None
    batch_norm: str = "local"
    shard_optimizer: bool = False
    timeout: float = 300.0
    mesh: DeviceMesh | None = None

    def __post_init__(self):
        if isinstance(self.block_ranks, bool) or not isinstance(self.block_ranks, int) or self.block_ranks < 1:
            raise ValueError(f"block_ranks: expected a whole number of at least 1, got {self.block_ranks!r}")
        if self.batch_norm not in BATCH_NORMS:
            raise ValueError(f"batch_norm: expected one of {', '.join(BATCH_NORMS)}, got {self.batch_norm!r}")
        if not self.timeout > 0:
            raise ValueError(f"timeout: expected seconds above 0, got {self.timeout!r}")
        if self.mesh is not None and not set(self.mesh.mesh_dim_names or ()) & {"data", "block"}:
            raise ValueError(
                f"mesh: expected dimensions named 'data' and 'block' or one of them, got {self.mesh.mesh_dim_names}"
            )

    @classmethod
    def of(cls, value):
        """From what Trainer takes: None, "data", "block" (all ranks share the blocks), a DeviceMesh, or a Distributed."""
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
    """How many processes there are: of torch.distributed where it runs, else as torchrun says; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def start(device, timeout):
    """Start torch.distributed as torchrun's environment says, unless it runs already."""
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
    # torchrun may keep its store over a restart, with the addresses of processes that are gone.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)


def leader_first(function):
    """function() on rank 0, then on the others: for downloads, which these then find. Without torch.distributed just function()."""
    if not dist.is_initialized():
        return function()
    failed = [None]
    if dist.get_rank() == 0:
        try:
            result = function()
        except Exception as error:
            failed = [error]
    dist.broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]
    return result if dist.get_rank() == 0 else function()


class Ranks:
    """This process among the others; Ranks() is a process by itself, for which everything below costs nothing.

    Attributes: rank, size (of the world), data_rank, data_size, block_rank, block_size, leads (whether this one prints and writes),
    feeds (whether it reads the minibatches), watch.
    """

    def __init__(self, distributed=None, device=None):
        self.distributed = distributed or Distributed()
        self.rank, self.size, self.watch = 0, 1, Watch()
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
        names = mesh.mesh_dim_names
        group = lambda name: mesh.get_group(name) if name in names else None  # noqa: E731
        self.data_group, self.block_group = group("data"), group("block")
        if self.data_group is not None:
            self.data_rank, self.data_size = dist.get_rank(self.data_group), dist.get_world_size(self.data_group)
        if self.block_group is not None:
            self.block_rank, self.block_size = dist.get_rank(self.block_group), dist.get_world_size(self.block_group)
        limit = datetime.timedelta(seconds=distributed.timeout)
        self.control = dist.new_group(backend="gloo", timeout=limit)  # objects and headers, beside what a GPU does
        # Its own, as a message that an earlier trainer still expects would be taken by that one.
        self.messages = dist.new_group(timeout=limit) if self.block_size > 1 else None
        self.watch = Watch(self.rank, self.size)

    def global_rank(self, group, rank):
        """The rank in the world of `rank` in `group`."""
        return dist.get_global_rank(group, rank)

    def gather(self, value):
        """[value of each rank], on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self.watch.guard():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def collect(self, value):
        """[value of each rank] on rank 0, None elsewhere."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.leads else None
        with self.watch.guard():
            dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def sum(self, tensor):
        """The sum of a tensor of each rank, on every rank."""
        if self.size == 1:
            return tensor
        tensor = tensor.clone()
        with self.watch.guard():
            dist.all_reduce(tensor)
        return tensor

    def from_leader(self, value):
        """Rank 0's value."""
        if self.size == 1:
            return value
        box = [value]
        with self.watch.guard():
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    @torch.no_grad()
    def mean_(self, tensors):
        """Replace floating-point tensors by their mean over the data-parallel ranks."""
        for flat, views, own in flattened([t for t in tensors if t.is_floating_point()]):
            with self.watch.guard():
                dist.all_reduce(flat, group=self.data_group)
            flat.div_(self.data_size)
            torch._foreach_copy_(own, views)

    @torch.no_grad()
    def broadcast_(self, tensors, source, group=None):
        """Replace tensors by those of `source` (its rank in the group; None: the world)."""
        for flat, views, own in flattened(tensors):
            with self.watch.guard():
                dist.broadcast(flat, source if group is None else self.global_rank(group, source), group=group)
            if dist.get_rank(group) != source:
                torch._foreach_copy_(own, views)


def laid_out(flat, tensors):
    """Views of the vector `flat`, one after the other, with the shapes and (where dense) strides of these tensors."""
    views, start = [], 0
    for t in tensors:
        views.append(flat[start : start + t.numel()].as_strided(t.shape, dense_strides(t)))
        start += t.numel()
    return views


def dense_strides(t):
    """The strides of a copy of t that leaves no gaps: its own where it has none, else contiguous."""
    dense = t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))
    return t.stride() if dense else torch.empty(t.shape, device="meta").stride()


def flattened(tensors, value=lambda t: t, spare=0):
    """(flat copy of what `value` gives of each, with `spare` more elements; views of it laid out as the tensors; the tensors) for each dtype."""
    found = []
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        own = [t for t in tensors if t.dtype == dtype]
        flat = own[0].new_empty(sum(t.numel() for t in own) + spare)
        views = laid_out(flat, own)
        torch._foreach_copy_(views, [value(t) for t in own])
        found.append((flat, views, own))
    return found
