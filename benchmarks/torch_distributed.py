"""The parts of fastff/parallel beside the classes of torch.distributed that do the most similar thing, on two CPU processes over gloo.

    python -m benchmarks.torch_distributed [--csv benchmarks/results/torch-distributed.csv]

All train the same small network of five blocks by local losses in plain PyTorch, so that they differ only in what is sent, and when. Their weights
are compared after three steps, then processor time and bytes are counted in turn.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks import tables
from benchmarks.scale_processes import Run, tcp_bytes_sent
from benchmarks.timing import print_environment, write_csv
from fastff import Distributed, parallel
from fastff.bench import quantile
from fastff.parallel.batch_norm import synchronize
from fastff.parallel.link import Link, Part
from fastff.parallel.ranks import Ranks
from fastff.parallel.reduce import Reduction, ShardedReduction

CHANNELS, CLASSES, IMAGES = (3, 32, 64, 128, 256, 512), 10, 32  # images of a process
DDP = {"forward_sync_buffers": False, "gradient_as_bucket_view": True}


class Block(nn.Module):
    """A convolution, batch norm and ReLU, with a classifier whose loss trains them."""

    def __init__(self, before, after):
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride=2 if after > 32 else 1, padding=1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(after), nn.Linear(after, CLASSES)

    def forward(self, x, target):
        x = F.relu(self.norm(self.conv(x)))
        return x.detach(), F.cross_entropy(self.head(x.mean((2, 3))), target)


class Whole(nn.Module):
    """All blocks, whose losses are added up for one backward pass."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x, target):
        total = 0
        for block in self.blocks:
            x, loss = block(x, target)
            total = total + loss
        return total


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def updated(optimizer):
    optimizer.step()
    optimizer.zero_grad()


def run(blocks, x, target, before=lambda index: None, after=None, settle=lambda: None, modules=None):
    """The Run that trains one block after the other: before(index), its forward and backward pass, after(index)."""
    parameters = [p for block in blocks for p in block.parameters()]

    def step():
        flowing = x
        for index, block in enumerate(modules or blocks):
            before(index)
            flowing, loss = block(flowing, target)
            loss.backward()
            after(index)
        if after_step := getattr(after, "step", None):
            after_step()

    return Run(step, settle, lambda: [getattr(p, "full_tensor", p.detach)() for p in parameters])


def without(blocks, *data):
    optimizers = [sgd(block) for block in blocks]
    return run(blocks, *data, after=lambda index: updated(optimizers[index]))


def reduction(blocks, *data, sharded=False, batch_norm=False):
    ranks, optimizers = Ranks(Distributed(), torch.device("cpu")), [sgd(block) for block in blocks]
    parameters = [list(block.parameters()) for block in blocks]
    made = [ShardedReduction, parameters] if sharded else [Reduction]
    sums = made[0](ranks, optimizers, lambda index: updated(optimizers[index]), *made[1:])
    if batch_norm:
        synchronize(blocks, ranks)

    def after(index):
        sums.start(index, parameters[index], 1.0)

    after.step = sums.send
    return run(blocks, *data, before=sums.settle, after=after, settle=sums.settle)


def ddp_whole(blocks, x, target):
    module, optimizer = nn.parallel.DistributedDataParallel(Whole(blocks), **DDP), sgd(blocks)

    def step():
        module(x, target).backward()
        updated(optimizer)

    return Run(step, lambda: None, lambda: list(blocks.parameters()))


def ddp_blocks(blocks, *data, batch_norm=False, zero=False):
    if batch_norm:
        blocks = nn.SyncBatchNorm.convert_sync_batchnorm(blocks)
    modules = [nn.parallel.DistributedDataParallel(block, **DDP) for block in blocks]
    optimizers = [sgd(block) for block in blocks]
    if zero:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizers = [
            ZeroRedundancyOptimizer(block.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9) for block in blocks
        ]
    return run(blocks, *data, after=lambda index: updated(optimizers[index]), modules=modules)


def ddp_hooks(blocks, *data):
    """Communication hooks that do not wait: DDP takes the local gradients for the result, and their sums arrive in the same memory."""
    modules = [nn.parallel.DistributedDataParallel(block, **DDP) for block in blocks]
    optimizers, works = [sgd(block) for block in blocks], [[] for _ in blocks]

    def hook(index, bucket):
        works[index].append((bucket.buffer(), dist.all_reduce(bucket.buffer(), async_op=True)))
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def settle(index):
        for buffer, work in works[index]:
            work.wait()
            buffer.div_(dist.get_world_size())
        if works[index]:
            updated(optimizers[index])
            works[index].clear()

    for index, module in enumerate(modules):
        module.register_comm_hook(index, hook)
    every = lambda: [settle(index) for index in range(len(blocks))]  # noqa: E731
    return run(blocks, *data, before=settle, after=lambda index: None, settle=every, modules=modules)


def fsdp(blocks, *data):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    optimizers = [sgd(block) for block in blocks]
    return run(blocks, *data, after=lambda index: updated(optimizers[index]))


def halves(blocks):
    """The blocks of this rank, the first or the last ones, and a function that trains them."""
    middle = len(blocks) // 2
    own = blocks[:middle] if dist.get_rank() == 0 else blocks[middle:]
    optimizers = [sgd(block) for block in own]

    def train(x, target, send=lambda x: None):
        for block, optimizer in zip(own, optimizers, strict=True):
            x, loss = block(x, target)
            if block is own[-1]:
                send(x)
            loss.backward()
            updated(optimizer)
        return x

    return own, train


def gathered(own):
    def weights():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, [p.detach() for p in own.parameters()])
        return [p for part in parts for p in part]

    return weights


def link(blocks, x, target):
    own, train = halves(blocks)
    to_next = Link(Ranks(Distributed(block_ranks=2), torch.device("cpu")), torch.device("cpu"))

    def step():
        if dist.get_rank() == 0:
            train(x, target, lambda x: to_next.send(Part((x,), target, 1.0, len(x)), 1))
        else:
            for part, _ in to_next.minibatch():
                train(*part.alive, part.target)

    return Run(step, lambda: None, gathered(own))


def stages(blocks, x, target):
    """Stages of torch.distributed.pipelining that train within their forward pass, in a schedule without backward pass."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    own, train = halves(blocks)

    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = own

        def forward(self, x):
            with torch.enable_grad():
                return train(x, target)

    first, middle, last = x, torch.empty(IMAGES, CHANNELS[2], 16, 16), torch.empty(IMAGES, CHANNELS[-1], 2, 2)
    ends = (
        {"input_args": first, "output_args": middle}
        if dist.get_rank() == 0
        else {"input_args": middle, "output_args": last}
    )
    # Without the shapes it would run the forward pass to find them, and train a step more.
    schedule = ScheduleGPipe(PipelineStage(Stage(), dist.get_rank(), 2, torch.device("cpu"), **ends), 1)
    given = (x,) if dist.get_rank() == 0 else ()
    return Run(lambda: schedule.step(*given), lambda: None, gathered(own))


# {name: (function that makes the Run, name of what its weights have to equal)}
CONTENDERS = {
    "alone": (without, None),
    "Reduction": (reduction, None),
    "DistributedDataParallel, one": (ddp_whole, "Reduction"),
    "DistributedDataParallel, one a block": (ddp_blocks, "Reduction"),
    "DistributedDataParallel, hooks": (ddp_hooks, "Reduction"),
    "ShardedReduction": (lambda *given: reduction(*given, sharded=True), "Reduction"),
    "ZeroRedundancyOptimizer": (lambda *given: ddp_blocks(*given, zero=True), "Reduction"),
    "fully_shard": (fsdp, "Reduction"),
    "synchronize": (lambda *given: reduction(*given, batch_norm=True), None),
    "SyncBatchNorm": (lambda *given: ddp_blocks(*given, batch_norm=True), "synchronize"),
    "Link": (link, "alone"),
    "PipelineStage": (stages, "alone"),
}


# (part of fastff/parallel, contender of torch.distributed, what came out of trying it in its place)
COMPARED = (
    ("Reduction", "DistributedDataParallel, one",
     "one backward pass of all losses together: all activations are kept until then, which is backpropagation's memory"),
    ("Reduction", "DistributedDataParallel, one a block",
     "waits for the sums of a block before the next block starts; needs the hooks of autograd, and our kernels write gradients themselves"),
    ("Reduction", "DistributedDataParallel, hooks",
     "with communication hooks that do not wait it overlaps as ours does; a message for each block, equal shares, and autograd's hooks as before"),
    ("ShardedReduction", "ZeroRedundancyOptimizer",
     "every rank gets the sums of all gradients first, of which it needs a part; waits after each block"),
    ("ShardedReduction", "fully_shard",
     "shards the parameters too, and gathers them for each pass; they are DTensors, which our kernels do not take"),
    ("synchronize", "SyncBatchNorm", "the same statistics, on GPUs alone"),
    ("Link", "PipelineStage",
     "stages that train in their forward pass; sizes are fixed: a smaller minibatch has old rows at its end; all ranks need the labels"),
)  # fmt: skip


def table():
    """Return the table of docs/distributed.md."""
    found = {row["contender"]: row for row in tables.read("torch-distributed")}
    if not found:
        return tables.missing("python -m benchmarks.torch_distributed --csv benchmarks/results/torch-distributed.csv")

    def cell(ours, theirs, column, digits):
        values = (found[name][column] and f"{float(found[name][column]):.{digits}f}" for name in (ours, theirs))
        return ", ".join(value or "refused" for value in values)

    rows = [
        (f"`{ours}`", f"`{theirs.split(',')[0]}`{theirs.removeprefix(theirs.split(',')[0])}",
         cell(ours, theirs, "ms", 0), cell(ours, theirs, "mbytes", 1), text)
        for ours, theirs, text in COMPARED
    ]  # fmt: skip
    header = ("ours", "torch.distributed's", "processor ms a step", "MB sent a step", "what came out")
    return tables.table(header, rows) + tables.measured_on(found["Reduction"])


def measured(runs, rounds, steps=4):
    """Return {name: [(processor seconds, bytes sent) of a step, means over the ranks, of each round]}. Runs take turns; round 0 does not count."""
    found = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            dist.barrier()
            sent, before = tcp_bytes_sent(), os.times()
            for _ in range(steps):
                run.step()
            run.settle()
            dist.barrier()
            after = os.times()
            seconds = after.user + after.system - before.user - before.system
            own = torch.tensor([seconds, tcp_bytes_sent() - sent], dtype=torch.float64) / steps / dist.get_world_size()
            dist.all_reduce(own)
            if number:
                found[name].append(own.tolist())
    return found


def worker(path, rounds):
    torch.set_num_threads(1)
    parallel.start(torch.device("cpu"), 60)
    torch.manual_seed(0)
    first = nn.ModuleList(Block(*pair) for pair in zip(CHANNELS, CHANNELS[1:], strict=False))
    torch.manual_seed(1)
    shares = torch.randn(2, IMAGES, 3, 32, 32), torch.randint(CLASSES, (2, IMAGES))
    runs, refused, reached = {}, {}, {}
    for name, (make, equal) in CONTENDERS.items():
        own = 0 if "alone" in (name, equal) else dist.get_rank()
        try:
            made = make(copy.deepcopy(first), *(share[own] for share in shares))
            for _ in range(3):
                made.step()
            made.settle()
        except Exception as error:
            if equal is None:
                raise
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        runs[name] = made
        reached[name] = torch.cat([w.detach().flatten().clone() for w in made.weights()])
        if equal is not None and not torch.allclose(reached[name], reached[equal], rtol=1e-3, atol=1e-5):
            off = (reached[name] - reached[equal]).abs().max()
            raise SystemExit(f"wrong result: after three steps the weights of {name} are off by {off:.1e}")
    found = measured(runs, rounds)
    if dist.get_rank() == 0:
        rows = []
        for name in CONTENDERS:
            row = {"contender": name, "refused": refused.get(name, "")}
            seconds, sent = zip(*found[name], strict=True) if name in found else ((), ())
            for column, q in (("ms", 0.5), ("ms_20", 0.2), ("ms_80", 0.8)):
                row[column] = 1e3 * quantile(seconds, q) if seconds else ""
            row["mbytes"] = quantile(sent, 0.5) / 1e6 if sent else ""
            rows.append(row)
            print(*row.values())
        write_csv(path, rows)
    dist.barrier()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    a = parser.parse_args()
    if "RANK" in os.environ:
        return worker(a.csv, a.rounds)
    print_environment()
    with tempfile.TemporaryDirectory() as folder:
        path = a.csv or Path(folder) / "found.csv"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            __spec__.name,
        ]
        command += ["--csv", str(path.resolve()), "--rounds", str(a.rounds)]
        return sys.exit(subprocess.run(command, cwd=tables.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode)


if __name__ == "__main__":
    main()
