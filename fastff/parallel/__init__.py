"""More than one device: ranks that share the data, the blocks, or both. Built on torch.distributed as it is (torchrun, gloo, nccl, DeviceMesh)."""

from fastff.parallel.ranks import Distributed, start, world_size
from fastff.parallel.watch import RankFailed

__all__ = ["Distributed", "RankFailed", "start", "world_size"]
