"""Steps of 1, 2 and 4 processes, measured, to compare the model of scaling with.

The weights after a few steps are checked first. If ranks share blocks, they must equal those of one process to the last bit; if ranks share
minibatches, they may differ by rounding errors.
"""

import argparse
import json
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.scale_blocks import Clock, make, minibatch
from benchmarks.scale_model import ROOT, Plan, block_ranges, plan
from benchmarks.step import ADAM
from fastff import Distributed, parallel
from fastff.bench import quantile
from fastff.training import optim


def tcp_bytes_sent():
    """Return the bytes that were sent on this process's TCP connections and acknowledged (Linux: tcpi_bytes_acked of struct tcp_info)."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as s:
                if s.family in (socket.AF_INET, socket.AF_INET6) and s.type == socket.SOCK_STREAM:
                    total += struct.unpack_from("Q", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 120)[0]
        except OSError:  # the file was closed in the meantime
            continue
    return total


class Run(NamedTuple):
    """Training over all processes: step() does one step, settle() finishes updates that still wait, weights() returns [tensor] on rank 0."""

    step: object
    settle: object
    weights: object


def single_process(a, kind, optimizer, images, target, micro_batches=1):
    """Return the Run that trains in this process only."""
    trainer = make(a, kind, images, optimizer, micro_batches=micro_batches)
    trainer.train_mode()
    module = trainer.sff if kind == "sff" else trainer.sff.model
    return Run(lambda: trainer.step(images, target), trainer.engine.place.settle, lambda: list(module.parameters()))


def with_barrier(run):
    """Return a Run whose processes wait for each other after every step."""

    def step():
        run.step()
        dist.barrier()

    return run._replace(step=step)


def distributed_run(a, plan, placement, optimizer, images, target):
    """Return the Run of a Plan over all processes. `images` and `target` are those of all processes together."""
    if plan.kind == "backprop":
        start = data_parallel if plan.stages == 1 else pipeline
        return start(a, plan, placement, optimizer, images, target)
    given = Distributed(block_ranks=plan.stages, placement=placement if plan.stages > 1 else None)
    trainer = make(a, "sff", images, optimizer, distributed=given, micro_batches=plan.parts)
    trainer.train_mode()
    trainer.fitting = True  # as in fit, updates may be finished after the end of a step
    ranks = trainer.ranks
    share = [t.chunk(ranks.data_size)[ranks.data_rank] if ranks.feeds else None for t in (images, target)]

    def weights():
        trainer.synchronize()
        return list(trainer.sff.parameters())

    return Run(lambda: trainer.step(*share), trainer.engine.place.settle, weights)


def data_parallel(a, plan, placement, optimizer, images, target):
    """Return the Run of torch's DistributedDataParallel. It does not broadcast the statistics of batch norm in every step, as SFF does not."""
    sff = make(a, "backprop", images).sff
    module = nn.parallel.DistributedDataParallel(sff.model, broadcast_buffers=False, gradient_as_bucket_view=True)
    update = optim.build(optimizer, sff.model.parameters())
    x, y = (t.chunk(plan.data)[dist.get_rank()] for t in (images, target))

    def step():
        F.cross_entropy(module(x), y).backward()
        update.step()
        update.zero_grad()

    return Run(step, lambda: None, lambda: list(sff.model.parameters()))


class _Layout(torch.autograd.Function):
    """Converts a tensor to one memory format and its gradient to another: blocks use channels_last, and gloo sends contiguous tensors."""

    @staticmethod
    def forward(ctx, x, memory_format, grad_format):
        ctx.grad_format = grad_format
        return x.contiguous(memory_format=memory_format if x.dim() == 4 else torch.contiguous_format).view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return (
            grad.contiguous(memory_format=ctx.grad_format if grad.dim() == 4 else torch.contiguous_format),
            None,
            None,
        )


class Stage(nn.Module):
    """The blocks of a pipeline stage, with the classifier in the last stage."""

    def __init__(self, sff, indices):
        super().__init__()
        self.blocks = nn.ModuleList(sff.blocks[j] for j in indices)
        self.readout = sff.readout[0] if indices.stop == len(sff.blocks) else None

    def forward(self, *alive):
        alive = tuple(_Layout.apply(t, torch.channels_last, torch.contiguous_format) for t in alive)
        for block in self.blocks:
            alive = block(*alive)
        if self.readout is not None:
            alive = self.readout(*alive)
        alive = tuple(_Layout.apply(t, torch.contiguous_format, torch.channels_last) for t in alive)
        return alive if len(alive) > 1 else alive[0]


def pipeline(a, plan, placement, optimizer, images, target):
    """Return the Run of 1F1B from torch.distributed.pipelining."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    sff, rank = make(a, "backprop", images).sff, dist.get_rank()
    sff.train()
    ranges = block_ranges(placement)
    module = Stage(sff, ranges[rank])
    stage = PipelineStage(module, rank, plan.stages, images.device)
    schedule = Schedule1F1B(stage, plan.parts, loss_fn=F.cross_entropy)
    update = optim.build(optimizer, module.parameters())
    given = (images,) if rank == 0 else ()
    labels = {"target": target, "losses": []} if rank + 1 == plan.stages else {}

    def step():
        schedule.step(*given, **labels)
        update.step()
        update.zero_grad()

    def weights():
        parts = [None] * plan.stages if rank == 0 else None
        dist.gather_object([p.detach().cpu() for p in module.parameters()], parts)
        if rank > 0:
            return None
        stages = [list(Stage(sff, indices).parameters()) for indices in ranges]
        found = {p: w for stage, sent in zip(stages, parts, strict=True) for p, w in zip(stage, sent, strict=True)}
        return [found[p] for p in sff.model.parameters()]

    return Run(step, lambda: None, weights)


def check(a, plan, placement, device):
    """Train three steps with this Plan and in one process, and compare the weights.

    The single process gets the same micro-batches, each with its own batch-norm statistics. Sums over ranks are checked in float64, where rounding
    errors are small.

    Returns: on rank 0, the norm of the difference relative to the norm of the update; None on the other ranks."""
    torch.backends.cudnn.deterministic = True
    sgd = lambda groups: torch.optim.SGD(groups, lr=1e-2)  # noqa: E731
    size = plan.data * plan.stages
    images, target = minibatch(a, a.batch * size, device)
    images = images.double() if plan.data > 1 else images
    run = distributed_run(a, plan, placement, sgd, images, target)
    for _ in range(3):
        run.step()
    run.settle()
    weights = run.weights()
    if dist.get_rank() > 0:
        return None
    one = single_process(a, plan.kind, sgd, images, target, plan.data * plan.parts)
    before = [p.detach().clone() for p in one.weights()]
    for _ in range(3):
        one.step()
    flat = lambda tensors: torch.cat([t.detach().flatten().to(device) for t in tensors])  # noqa: E731
    weights, expected, before = flat(weights), flat(one.weights()), flat(before)
    return float((weights - expected).norm() / (expected - before).norm())


def measure_link(device, rounds=9):
    """Measure the link between two processes. Returns {"all-reduce" and "send": {"latency": seconds, "bandwidth": bytes/s}}."""

    def all_reduce(t):
        dist.all_reduce(t)

    def send(t):  # to the other process and back
        for source in range(2):
            (dist.send if dist.get_rank() == source else dist.recv)(t, 1 - dist.get_rank())

    found, large = {}, 2**21 if device.type == "cpu" else 2**26  # bytes
    for name, function in (("all-reduce", all_reduce), ("send", send)):
        seconds = []
        for size in (4, large):
            t, times = torch.zeros(size // 4, device=device), []
            for _ in range(rounds):
                dist.barrier()
                clock = Clock(device)
                function(t)
                times.append(clock())
            seconds.append(
                min(times) / 2
            )  # an all-reduce sends two messages of half the size; send() sends two of the whole
        few, many = seconds
        size = large / 2 if name == "all-reduce" else large
        found[name] = {"latency": few, "bandwidth": size / max(many - few, 1e-9)}
    return found


class Round(NamedTuple):
    """Measurement of a few steps of a Run.

    Fields:
        others: number of cores that other programs used at the same time.
        seconds: time of a step on the slowest rank.
        sent: bytes that each rank sent in a step.
    """

    others: float
    seconds: float
    sent: list


def _cpu_seconds():
    """Return the CPU seconds of this machine and of this process so far (Linux). Processes with low priority are not counted."""
    user, _, system, *_ = map(int, Path("/proc/stat").read_text().split()[1:8])
    process = os.times()
    return (user + system) / os.sysconf("SC_CLK_TCK"), process.user + process.system


def time_run(run, device, warm=2, steps=4):
    """Run `warm` and then `steps` steps, and return the Round of the latter, the same on all ranks."""
    dist.barrier()
    sent, (machine_before, process_before), stamps, clock = tcp_bytes_sent(), _cpu_seconds(), [], Clock(device)
    began = clock.last
    for step in range(warm + steps):
        run.step()
        if step + 1 in (warm, warm + steps):
            clock()
            stamps.append(clock.last)
    run.settle()
    dist.barrier()
    clock()
    (machine, process), sent = _cpu_seconds(), (tcp_bytes_sent() - sent) / (warm + steps)
    found = [None] * dist.get_world_size()
    dist.all_gather_object(
        found, (stamps, sent, machine - machine_before, process - process_before, clock.last - began)
    )
    first, last = (max(stamps[i] for stamps, *_ in found) for i in range(2))
    others = (found[0][2] - sum(process for *_, process, _ in found)) / found[0][4]
    return Round(others, (last - first) / steps, [sent for _, sent, *_ in found])


def time_runs(runs, device, rounds, quiet=0.1):
    """Measure Runs in turn and return [[Round] of each Run].

    A Round counts if other programs used less than `quiet` cores. If fewer than `rounds` of 2 * rounds count, the quietest ones are returned."""
    found = [[] for _ in runs]
    for _ in range(2 * rounds):
        for run, measured in zip(runs, found, strict=True):
            if sum(r.others < quiet for r in measured) < rounds:
                measured.append(time_run(run, device))
    return [sorted(measured)[:rounds] for measured in found]


def worker(path):
    """Main function of each process: it reads what to measure from the file `path`, and rank 0 writes the results into it."""
    torch.set_num_threads(1)
    given = json.loads(Path(path).read_text())
    a, plans = argparse.Namespace(**given["a"]), [(Plan(*p), placement) for p, placement in given["plans"]]
    device = torch.device(a.device, int(os.environ["LOCAL_RANK"])) if a.device == "cuda" else torch.device("cpu")
    parallel.start(device, 120)
    size = dist.get_world_size()
    result = {"off": [check(a, plan, placement, device) for plan, placement in plans]}
    torch.backends.cudnn.deterministic = False
    if size == 2:
        result["link"] = measure_link(device)
    images, target = minibatch(a, a.batch * size, device)
    runs = [
        with_barrier(single_process(a, kind, ADAM, images[: a.batch], target[: a.batch]))
        for kind in ("sff", "backprop")
    ]
    runs += [distributed_run(a, plan, placement, ADAM, images, target) for plan, placement in plans]
    found = time_runs(runs, device, a.rounds)
    result["seconds"] = [[r.seconds for r in rounds] for rounds in found]
    result["others"] = [quantile([r.others for r in rounds], 0.5) for rounds in found]
    by_rank = [zip(*(r.sent for r in rounds), strict=True) for rounds in found]
    result["bytes"] = [[quantile(sent, 0.5) for sent in ranks] for ranks in by_rank]
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def launch(a, processes, plans):
    """Start processes that run `worker`, and return its results. Raises SystemExit if they fail or weights are wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        path.write_text(json.dumps({"a": vars(a), "plans": plans}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "benchmarks.scale", "--worker", str(path)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{processes} processes failed:\n{done.stderr[-4000:]}")
        result = json.loads(path.read_text())
    for (checked, _), off in zip(plans, result["off"], strict=True):
        if not off <= (1e-6 if checked.data > 1 else 0):
            raise SystemExit(
                f"wrong result: after three steps of {checked} weights are off by {off:.1e} of their change"
            )
    return result


def planned(processes, batch):
    """Return the Plans that are measured with so many processes."""
    shapes = [("sff", processes, 1), ("sff", 1, processes), ("backprop", processes, 1), ("backprop", 1, processes)]
    if processes % 2 == 0 and processes > 2:
        shapes.insert(2, ("sff", processes // 2, 2))
    return [plan(kind, data, stages, batch * stages) for kind, data, stages in shapes] if processes > 1 else []
