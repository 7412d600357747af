"""Training on several devices: ranks share the data, the blocks, or both. It uses torch.distributed (torchrun, gloo, nccl, DeviceMesh)."""

from fastff.parallel.ranks import Distributed, start, world_size
from fastff.parallel.watch import RankFailed

__all__ = ["Distributed", "RankFailed", "start", "world_size"]
