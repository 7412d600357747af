"""What several ranks compute against one process: run by test_distributed.py through torchrun, prints one JSON object on rank 0.

    torchrun --nproc-per-node N tests/distributed_driver.py FOLDER

Each case trains a network over all ranks and, on rank 0, the same in one process.
"""

import copy
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import fastff
from benchmarks.scale_processes import tcp_bytes_sent
from fastff import SFF, Distributed, Trainer
from fastff.parallel.link import ALIGN, HEADER
from fastff.plan import Segment
from fastff.training import optim
from fastff.training.loader import Augment, Loader

CLASSES = 10
SGD = lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9)  # noqa: E731
PAPER = {"grid": 2, "hidden": 0, "window": 1}


def network(name, dtype=torch.float32, channels_last=False, **options):
    torch.manual_seed(0)
    net = {
        "resnet18": lambda: fastff.models.resnet18(CLASSES, stem="cifar", width=16),
        "resnet18-8": lambda: fastff.models.resnet18(CLASSES, stem="cifar", width=8),
        "mobilenet_v3_small": lambda: fastff.models.mobilenet_v3_small(CLASSES, stem="cifar"),
    }[name]()
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    return SFF(net.to(dtype), CLASSES, "block", (3, 16, 16), **PAPER | options)


def minibatches(steps, dtype):
    """Of several sizes, so that ranks have unequal shares of some; the second is the largest, for which messages have to grow."""
    draw = torch.Generator().manual_seed(1)
    for step in range(steps):
        n = (19, 24, 14)[step % 3]
        yield torch.randn(n, 3, 16, 16, generator=draw).to(dtype), torch.randint(CLASSES, (n,), generator=draw)


def train(trainer, steps, dtype=torch.float32):
    ranks, losses = trainer.ranks, []
    trainer.train_mode()
    for images, target in minibatches(steps, dtype):
        own = slice(
            len(images) * ranks.data_rank // ranks.data_size, len(images) * (ranks.data_rank + 1) // ranks.data_size
        )
        given = (images[own], target[own]) if ranks.feeds else (None, None)
        losses.append(trainer.step(*given))
    trainer.synchronize()
    return torch.stack(losses)


def difference(sff, other):
    """0 for equal bits, else the greatest relative difference of a tensor, at least the smallest number above 0."""
    pairs = [(a, b) for a, b in zip(sff.state_dict().values(), other.state_dict().values(), strict=True)]
    if all(torch.equal(a, b) for a, b in pairs):
        return 0.0
    return max(5e-324, *(float((a - b).norm() / b.norm().clamp(min=1e-3)) for a, b in pairs if a.is_floating_point()))


def compared(distributed, name, steps, make=SGD, dtype=torch.float32, trainer={}, **options):  # noqa: B006
    sff = network(name, dtype, **options)
    one = copy.deepcopy(sff)
    several = Trainer(sff, make, distributed=distributed, **trainer)
    losses = several.ranks.sum(train(several, steps, dtype))  # of several ranks' blocks
    if not several.ranks.leads:
        return None
    alone = Trainer(one, make, **trainer)
    expected = train(alone, steps, dtype)
    if several.ranks.block_size > 1 and several.ranks.data_size == 1:
        assert torch.equal(losses, expected)
    return difference(sff, one)


def fitted(distributed, folder):
    """fit over a Loader that is shared out: history and weights against one process, and checkpoints between both."""
    draw = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (70, 3, 16, 16), generator=draw, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (70,), generator=draw)
    given = {"mean": [0.5] * 3, "std": [0.25] * 3}
    loader = Loader(pixels, labels, 16, augment=Augment(2, True), shuffle=True, dtype=torch.float64, **given)
    test = Loader(pixels[:33], labels[:33], 16, dtype=torch.float64, **given)
    sff = network("resnet18-8", torch.float64, readout=True)
    one = copy.deepcopy(sff)
    several = Trainer(sff, SGD, distributed=distributed)
    history = several.fit(loader, 2, test, out=folder / "several", save_every=3, progress=False)
    leads = several.ranks.leads
    alone = Trainer(one, SGD)
    if leads:
        expected = alone.fit(loader, 2, test, out=folder / "one", progress=False)
    dist.barrier()
    # one process goes on with the ranks' checkpoint, the ranks with that of one process
    several.load(folder / "one" / "checkpoint.pt")
    again = several.fit(loader, 3, test, progress=False)
    if not leads:
        return None
    alone.load(folder / "several" / "checkpoint.pt")
    alone.fit(loader, 3, test, progress=False)
    seconds = [key for key in expected[0] if key != "seconds"]
    off = max(abs(a[key] - b[key]) for a, b in zip(history, expected, strict=True) for key in seconds)
    return {"history": off, "difference": difference(sff, one), "epochs": len(again)}


def refused(function):
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def bytes_sent(distributed):
    """[(counted, predicted) bytes that a rank sends in a step]: gradients once around a ring, and the messages of link.py."""
    trainer = Trainer(network("resnet18-8"), SGD, distributed=distributed)
    ranks, steps = trainer.ranks, 8
    draw = torch.Generator().manual_seed(1)
    images, target = torch.randn(8, 3, 16, 16, generator=draw), torch.randint(CLASSES, (8,), generator=draw)
    given = (images, target) if ranks.feeds else (None, None)
    trainer.step(*given)  # a first message says how large they are
    trainer.engine.place.settle()  # the last sums of a step are on their way when it returns
    ranks.gather(None)
    time.sleep(0.5)  # until the receivers have acknowledged the last packets, which is when they count
    before = tcp_bytes_sent()
    for _ in range(steps):
        trainer.step(*given)
    trainer.engine.place.settle()
    ranks.gather(None)
    time.sleep(0.5)
    counted = (tcp_bytes_sent() - before) / steps
    blocks = [4 * sum(p.numel() for p in trainer.engine.parameters[index]) for index in trainer.engine.place.own]
    predicted = sum(blocks) * 2 * (ranks.data_size - 1) / ranks.data_size
    if not trainer.engine.place.has_last:
        main = trainer.sff.blocks[trainer.engine.place.own[-1]].output_shape
        predicted += HEADER + sum(-(-n // ALIGN) * ALIGN for n in (8 * 8, 8 * 4 * torch.Size(main).numel()))
    return ranks.gather((counted, predicted))


def messages(steps=2):
    """Sums over ranks in a step of a network whose gradients are 0.8 MiB in 9 blocks."""
    trainer = Trainer(network("resnet18-8"), SGD, distributed="data")
    called, original = [], dist.all_reduce
    dist.all_reduce = lambda *args, **options: called.append(args) or original(*args, **options)
    try:
        for images, target in minibatches(steps, torch.float32):
            trainer.step(images, target)
    finally:
        dist.all_reduce = original
    trainer.synchronize()
    return len(called) / steps


def state_bytes(trainer):
    return sum(t.numel() for o in trainer.optimizers for s in o.state.values() for t in s.values() if t.dim())


def main(folder):
    torch.set_num_threads(1)
    folder, found = Path(folder), {}
    fastff.parallel.start(torch.device("cpu"), 60)
    size, rank = dist.get_world_size(), dist.get_rank()
    blocks = Distributed(block_ranks=size)
    data = Distributed(batch_norm="synchronized")
    sharded = Distributed(batch_norm="synchronized", shard_optimizer=True)
    # ranks that share the blocks: equal to the last bit
    found["blocks"] = {
        "resnet18": compared(blocks, "resnet18", 20, None, channels_last=True),
        "mobilenet_v3_small": compared(blocks, "mobilenet_v3_small", 20, None),
        "micro-batches": compared(blocks, "resnet18-8", 4, trainer={"micro_batches": 3}, readout=True),
        "placed": compared(Distributed(size, [1] * (size - 1) + [10 - size]), "resnet18-8", 4),
        "segments that take turns": compared(
            blocks, "resnet18-8", 4, window=None, plan=[[0, 2, 3, 4, 8], [1, 2, 3, 4, 8]]
        ),
        "parts": compared(
            blocks,
            "resnet18-8",
            4,
            window=None,
            plan=[Segment(0, 1, 2), Segment(2, 3), Segment(4, 5, 2), Segment(6, 8)],
        ),
        "adamw, fit": fitted(blocks, folder / "blocks")["difference"]
        if rank == 0
        else fitted(blocks, folder / "blocks"),
    }
    # ranks that share minibatches: float64, so that only a wrong sum is seen and not amplified rounding
    wide = {"dtype": torch.float64}
    found["data"] = {
        "resnet18": compared(data, "resnet18", 6, **wide),
        "adamw": compared(data, "resnet18-8", 6, None, **wide),
        "mobilenet_v3_small": compared(data, "mobilenet_v3_small", 4, **wide),
        "window": compared(data, "resnet18-8", 5, window=2, **wide),
        "micro-batches": compared(data, "resnet18-8", 4, readout=True, normalize=None, **wide),
        "sharded": compared(sharded, "resnet18-8", 6, None, readout=True, **wide),
    }
    if size == 2:
        found["blocks"]["budget"] = compared(blocks, "resnet18-8", 4, window=None, memory=0.5)
    if size == 4:
        both = Distributed(block_ranks=2, batch_norm="synchronized", shard_optimizer=True)
        found["data"]["blocks too"] = compared(both, "resnet18-8", 6, readout=True, **wide)
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "block"))
        found["data"]["mesh"] = compared(Distributed(mesh=mesh, batch_norm="synchronized"), "resnet18-8", 3, **wide)
    found["fit"] = {"data": fitted(data, folder / "data"), "sharded": fitted(sharded, folder / "sharded")}
    found["bytes"] = {"data": bytes_sent(Distributed()), "blocks": bytes_sent(blocks)}
    if size == 4:
        found["bytes"]["both"] = bytes_sent(Distributed(block_ranks=2))
    found["messages"] = messages()
    # the optimiser's state is split over the ranks
    held = []
    for kind in (data, sharded):
        trainer = Trainer(network("resnet18-8"), optim.adamw(), distributed=kind)
        train(trainer, 1)
        held.append(state_bytes(trainer))
    found["state"] = trainer.ranks.gather(held)
    # local batch norm: every rank its own statistics, their mean after synchronize
    found["local"] = True
    for kind in ("data", Distributed(batch_norm="synchronized")):  # a hidden layer's are a rank's own in both
        trainer = Trainer(network("resnet18-8", grid=2, hidden=3), SGD, distributed=kind)
        train(trainer, 2)
        for norm in (trainer.sff.model.bn1, trainer.sff.heads[0].hidden_norm):
            means = trainer.ranks.gather(norm.running_mean)
            found["local"] &= all(torch.equal(means[0], other) for other in means)
    # another loader, with torch's sampler
    data_set = [(torch.randn(3, 16, 16), i % CLASSES) for i in range(32)]
    sampler = torch.utils.data.DistributedSampler(data_set)
    trainer = Trainer(network("resnet18-8"), SGD, distributed="data")
    history = trainer.fit(torch.utils.data.DataLoader(data_set, batch_size=4, sampler=sampler), 2, progress=False)
    weights = torch.cat([p.detach().flatten() for p in trainer.sff.parameters()])
    found["sampler"] = len(history) == 2 and all(torch.equal(weights, other) for other in trainer.ranks.gather(weights))
    # bad input, refused on every rank alike
    torch.manual_seed(rank)
    other = SFF(fastff.models.resnet18(CLASSES, stem="cifar", width=8 + rank), CLASSES, input_shape=(3, 16, 16))
    plain = torch.utils.data.DataLoader([(torch.zeros(3, 16, 16), 0)] * 8, batch_size=4)
    tiny = Loader(torch.zeros(5, 3, 16, 16, dtype=torch.uint8), torch.zeros(5).long(), 4, mean=[0] * 3, std=[1] * 3)
    found["refused"] = {
        "divisor": refused(lambda: Trainer(network("resnet18-8"), distributed=Distributed(size + 1))),
        "placement": refused(lambda: Trainer(network("resnet18-8"), distributed=Distributed(size, [9] * size))),
        "window": refused(lambda: Trainer(network("resnet18-8", window=2), distributed="block")),
        "pairs": refused(lambda: Trainer(network("resnet18-8", window=None, plan="pairs"), distributed="block")),
        "finish": refused(
            lambda: Trainer(
                network("resnet18-8", window=None, memory=0.5), finish=0.5, distributed=Distributed(min(size, 2))
            )
        ),
        "greedy": refused(lambda: Trainer(network("resnet18-8"), schedule="greedy", distributed="block")),
        "clip": refused(lambda: Trainer(network("resnet18-8"), distributed=sharded, clip_grad_norm=1.0)),
        "network": refused(lambda: Trainer(other, distributed="data")),
        "loader": refused(lambda: Trainer(network("resnet18-8"), distributed="data").fit(plain, 1)),
        "share": refused(lambda: Trainer(network("resnet18-8"), distributed="data").fit(tiny, 1)),
    }
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
