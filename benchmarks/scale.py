"""How far training scales: a model of the time of a step on 1 to 1,024 devices, and what it says against what 1, 2 and 4 processes do.

    python -m benchmarks.scale [--model resnet18] [--width 64] [--batch 32] [--granularity block] [--faster 1 100]
        [--link GBIT_PER_S MICROSECONDS] [--global-batch N] [--csv FILE]
    python -m benchmarks.scale --measure [--csv FILE]

Given: seconds, gradient bytes and activation bytes of every block, measured on this machine with one thread, and the speed of a link. A step is
written down as tasks of the devices and of their links, each with what it waits for, and a simulation finds when they end:

    SFF, data-parallel     a block's all-reduce runs beside the next blocks; the block's next forward pass waits for it, and for no other
    SFF, block-parallel    receive, compute, send each output before the last block's backward, at most two messages ahead; no flush
    backpropagation, DDP   buckets of 25 MB (the first of 1 MB) are reduced beside the rest of the backward pass; the update waits for all
    backpropagation, 1F1B  1, 2 or 4 micro-batches for each stage, whichever is fastest, one forward and one backward in turn, a flush at the end
                           of every step
    2-D                    replicas of block-parallel or 1F1B devices: of all splits of the devices the fastest

A step is of the same images for all of them: the batch of a device times the devices (or --global-batch). SFF passes it on in minibatches of a
device's batch. Left out: other traffic on a link, jitter between devices (all are alike), the input pipeline, links of several speeds in one
machine, kernels that take longer beside communication.

--measure runs both kinds with torchrun on this machine, checks the weights that come out, and compares seconds and sent bytes.
"""

import argparse
import collections
import contextlib
import dataclasses
import heapq
import itertools
import json
import math
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.step import ADAM, PAPER, build
from benchmarks.timing import print_environment, write_csv
from fastff import Distributed, parallel
from fastff.bench import quantile
from fastff.parallel.link import ALIGN, HEADER, IN_FLIGHT
from fastff.parallel.placement import balanced
from fastff.parallel.reduce import _Bucket
from fastff.training import Backprop, Trainer, optim
from fastff.training.memory import peak_memory

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes: torch's DistributedDataParallel
ADAM_STATES = 2  # of a parameter's size
MICRO_BATCHES = 1, 2, 4  # of 1F1B, for each stage
ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Block:
    """One block on one minibatch: seconds of its forward pass (SFF: with the goodness step), backward pass and update; bytes of its output, of its
    gradients, and of what training it holds (SFF: its peak above parameters; backpropagation: what its backward pass keeps); SFF: seconds of
    copying its gradients together for an all-reduce and of averaging them after it."""

    forward: float
    backward: float
    update: float
    activation_bytes: float
    gradient_bytes: float
    memory_bytes: float = 0.0
    bucket: float = 0.0

    @property
    def seconds(self):
        return self.forward + self.backward + self.update


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices, each with one link of `bandwidth` bytes/s and `latency` seconds a message. all_reduce: "ring" takes 2 (R - 1) messages one after
    the other, "tree" 2 log2 R (halving and doubling, or NCCL's trees); both send 2 (R - 1) / R of the bytes. cores: on one machine, where all
    devices and their links take turns on them; a transfer is then work for a core too."""

    bandwidth: float
    latency: float
    all_reduce: str = "tree"
    cores: float = math.inf

    def send_seconds(self, size):
        return self.latency + size / self.bandwidth

    def reduce_seconds(self, size, ranks):
        steps = 2 * (ranks - 1) if self.all_reduce == "ring" else 2 * math.ceil(math.log2(ranks))
        return steps * self.latency + 2 * (ranks - 1) / ranks * size / self.bandwidth


LINKS = {
    "Ethernet 10 Gbit/s, 50 us": Machine(10e9 / 8, 50e-6),
    "Ethernet 100 Gbit/s, 10 us": Machine(100e9 / 8, 10e-6),
    "NVLink 300 GB/s, 5 us": Machine(300e9, 5e-6),
}


class Blocks:
    """Blocks measured on minibatches of two sizes; at(images) is the line through both, with a part that does not grow with the images."""

    def __init__(self, small, large):
        (self.few, self.small), (self.many, self.large) = small, large

    def __len__(self):
        return len(self.large)

    def at(self, images, faster=1.0):
        """[Block] for minibatches of so many images, on devices `faster` times as fast."""

        def line(a, b):
            fixed = min(max(0.0, (a * self.many - b * self.few) / (self.many - self.few)), b)
            return fixed + (b - fixed) * images / self.many

        found = []
        for a, b in zip(self.small, self.large, strict=True):
            values = {f.name: line(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Block)}
            found.append(Block(**values | {k: values[k] / faster for k in ("forward", "backward", "update", "bucket")}))
        return found


# --- simulation


class Tasks:
    """Tasks by key: each takes a resource (a device, a link) for some seconds once others have ended. A resource serves in the order in which
    tasks become ready; those of a device come in the order of its program."""

    def __init__(self):
        self.tasks, self.last = {}, {}

    def compute(self, rank, key, seconds=0.0, after=()):
        before = [self.last[rank]] if rank in self.last else []
        self.tasks[key] = (("device", rank), seconds, [*before, *after])
        self.last[rank] = key

    def transfer(self, rank, key, seconds, after):
        self.tasks[key] = (("link", rank), seconds, after)

    def run(self, cores=math.inf):
        """{key: second it ends}. With more tasks at a time than cores, all go at cores / tasks of their speed."""
        ahead, following = {}, collections.defaultdict(list)
        for key, (_, _, after) in self.tasks.items():
            needed = {k for k in after if k in self.tasks}  # what comes before the first step has ended
            ahead[key] = len(needed)
            for k in needed:
                following[k].append(key)
        ends, running, busy, queues = {}, [], set(), collections.defaultdict(collections.deque)
        number = itertools.count()
        now = work = 0.0  # work: seconds that a task running all the time would have done

        def start(resource):
            if queues[resource] and resource not in busy:
                key = queues[resource].popleft()
                busy.add(resource)
                heapq.heappush(running, (work + self.tasks[key][1], next(number), key))

        def ready(key):
            resource = self.tasks[key][0]
            queues[resource].append(key)
            start(resource)

        for key, count in ahead.items():
            if count == 0:
                ready(key)
        while running:
            rate = min(1.0, cores / len(running))
            end, _, key = heapq.heappop(running)
            now, work = now + (end - work) / rate, end
            ends[key] = now
            resource = self.tasks[key][0]
            busy.discard(resource)
            for k in following[key]:
                ahead[k] -= 1
                if ahead[k] == 0:
                    ready(k)
            start(resource)
        if len(ends) < len(self.tasks):
            raise RuntimeError("the tasks wait for each other")
        return ends


def runs_of(placement):
    """[range of blocks of each rank]."""
    ends = [sum(placement[: i + 1]) for i in range(len(placement))]
    return [range(end - n, end) for end, n in zip(ends, placement, strict=True)]


def message_bytes(block, images):
    """Of a message of fastff.parallel.link: header, labels and activations, aligned."""
    return HEADER + sum(math.ceil(size / ALIGN) * ALIGN for size in (8 * images, block.activation_bytes))


def bucket_bytes(block):
    """Of a block's gradients in fastff.parallel.reduce, with the number of samples at their end."""
    return block.gradient_bytes + 4


def sff_tasks(blocks, machine, images, data, placement, parts, steps):
    """Of one replica: the others do the same at the same time. Block times are those of one of the `parts` of a minibatch."""
    tasks, own = Tasks(), runs_of(placement)
    for step in range(steps):
        for rank, mine in enumerate(own):
            for j in mine:
                if data > 1:
                    tasks.compute(
                        rank, ("update", j, step - 1), blocks[j].update if step else 0.0, [("reduced", j, step - 1)]
                    )
                for part in range(parts):
                    n = step * parts + part
                    if rank > 0 and j == mine.start:
                        tasks.compute(rank, ("received", rank, n), after=[("sent", rank - 1, n)])
                    tasks.compute(rank, ("forward", j, n), blocks[j].forward)
                    if rank + 1 < len(own) and j + 1 == mine.stop:
                        tasks.compute(rank, ("send", rank, n), after=[("sent", rank, n - IN_FLIGHT)])
                        seconds = machine.send_seconds(message_bytes(blocks[j], images))
                        # the next rank is ready for a message once it has taken the one before
                        tasks.transfer(
                            rank, ("sent", rank, n), seconds, [("send", rank, n), ("received", rank + 1, n - 1)]
                        )
                    tasks.compute(rank, ("backward", j, n), blocks[j].backward)
                if data > 1:
                    seconds = machine.reduce_seconds(bucket_bytes(blocks[j]), data)
                    tasks.compute(rank, ("bucket", j, step), blocks[j].bucket)
                    tasks.transfer(rank, ("reduced", j, step), seconds, [("bucket", j, step)])
                else:
                    tasks.compute(rank, ("update", j, step), blocks[j].update)
            tasks.compute(rank, ("end", rank, step))
    return tasks


def one_forward_one_backward(stage, stages, count):
    """[("F" or "B", micro-batch)]: the order in which a stage works (Narayanan et al. 2021, PipeDream-flush)."""
    first = min(count, stages - 1 - stage)
    order = [("F", i) for i in range(first)]
    for i in range(count - first):
        order += [("F", first + i), ("B", i)]
    return order + [("B", i) for i in range(count - first, count)]


def backprop_tasks(blocks, machine, data, placement, micro_batches, steps):
    """Backpropagation of one replica in 1F1B; with one stage and one micro-batch DDP. Gradients are reduced beside the last backward pass."""
    tasks, own = Tasks(), runs_of(placement)
    for step in range(steps):
        for rank, mine in enumerate(own):
            for kind, n in one_forward_one_backward(rank, len(own), micro_batches):
                forward = kind == "F"
                to, neighbour = (rank + 1, rank - 1) if forward else (rank - 1, rank + 1)
                arrived = [(f"{kind} sent", neighbour, step, n)]
                if forward or n + 1 < micro_batches or data == 1:
                    seconds = sum(blocks[j].forward if forward else blocks[j].backward for j in mine)
                    tasks.compute(rank, (kind, rank, step, n), seconds, arrived)
                else:
                    reduced = _buckets(tasks, blocks, machine, data, rank, mine, step, arrived)
                    tasks.compute(rank, (kind, rank, step, n))
                if 0 <= to < len(own):
                    size = blocks[mine.stop - 1 if forward else mine.start - 1].activation_bytes
                    tasks.transfer(
                        rank, (f"{kind} sent", rank, step, n), machine.send_seconds(size), [(kind, rank, step, n)]
                    )
            tasks.compute(
                rank, ("update", rank, step), sum(blocks[j].update for j in mine), reduced if data > 1 else []
            )
            tasks.compute(rank, ("end", rank, step))
    return tasks


def _buckets(tasks, blocks, machine, data, rank, mine, step, arrived):
    """The last backward pass block by block, and the all-reduces of its buckets, which end with any byte of a gradient; returns their keys."""
    waiting, limit, keys = 0.0, FIRST_BUCKET, []
    for j in reversed(mine):
        tasks.compute(rank, ("backward", j, step), blocks[j].backward, arrived)
        waiting += blocks[j].gradient_bytes
        while waiting > 0 and (waiting >= limit or j == mine.start):
            size = min(waiting, limit)
            keys.append(("reduced", rank, step, len(keys)))
            tasks.transfer(rank, keys[-1], machine.reduce_seconds(size, data), [("backward", j, step)])
            waiting, limit = waiting - size, BUCKET
    return keys


class Plan(NamedTuple):
    """How `kind` ("sff", "backprop") is spread: data x stages devices; parts (micro-batches) of a replica's step; images of one."""

    kind: str
    data: int
    stages: int
    parts: int
    images: float

    def placement(self, blocks):
        return balanced([b.seconds if self.kind == "sff" else b.forward + b.backward for b in blocks], self.stages)

    def tasks(self, blocks, machine, placement, steps):
        if self.kind == "sff":
            return sff_tasks(blocks, machine, self.images, self.data, placement, self.parts, steps)
        return backprop_tasks(blocks, machine, self.data, placement, self.parts, steps)


def plan(kind, data, stages, images, each=MICRO_BATCHES[-1]):
    """The Plan for a replica's step of `images`, backpropagation's in `each` micro-batches for each stage."""
    if stages == 1:
        return Plan(kind, data, 1, 1, images)
    parts = min(stages if kind == "sff" else each * stages, max(1, int(images)))
    return Plan(kind, data, stages, parts, images / parts)


class Prediction(NamedTuple):
    seconds: float  # a step, when the pipeline is full
    sent_bytes: float  # by the device that sends most
    memory_bytes: float  # of the device that needs most
    placement: list


def predict(plan, blocks, machine, placement=None):
    """What a step takes. `blocks` are for plan.images."""
    placement = placement or plan.placement(blocks)
    steps = 4 * plan.stages + 8 if plan.kind == "sff" else 4
    tasks = plan.tasks(blocks, machine, placement, steps)
    ends = tasks.run(machine.cores / plan.data)
    first, last = ([ends["end", rank, step] for step in range(steps)] for rank in (0, plan.stages - 1))
    last = [end for end in last if end <= first[-1]]  # while all are at work
    half = len(last) // 2
    seconds = (last[-1] - last[half - 1]) / (len(last) - half)
    sent = max(bytes_per_step(plan, blocks, placement))
    return Prediction(seconds, sent, max(memory_bytes(plan, blocks, placement, tasks, ends)), placement)


def bytes_per_step(plan, blocks, placement=None):
    """[bytes that a device of each stage sends in a step]: its share of the all-reduces in a ring, and its messages."""
    ring, found = 2 * (plan.data - 1) / plan.data, []
    placement = placement or plan.placement(blocks)
    for rank, mine in enumerate(runs_of(placement)):
        last = rank + 1 == len(placement)
        if plan.kind == "sff":
            size = ring * sum(bucket_bytes(blocks[j]) for j in mine)
            size += 0 if last else plan.parts * message_bytes(blocks[mine.stop - 1], plan.images)
        else:
            size = ring * sum(blocks[j].gradient_bytes for j in mine)
            size += 0 if last else plan.parts * blocks[mine.stop - 1].activation_bytes
            size += 0 if rank == 0 else plan.parts * blocks[mine.start - 1].activation_bytes
        found.append(size)
    return found


def memory_bytes(plan, blocks, placement, tasks, ends):
    """[bytes of a device of each stage at its peak]: parameters and Adam's state; then

    SFF               the block that takes most, gradients that wait for their all-reduce (by the simulation), the other parts' tensors between
                      blocks, and messages: two on their way out, one coming
    backpropagation   all gradients, what all blocks keep for the backward pass of each micro-batch in flight, at most one for each stage
    """
    found = []
    for rank, mine in enumerate(runs_of(placement)):
        weights = sum(blocks[j].gradient_bytes for j in mine)
        size = (1 + ADAM_STATES) * weights
        if plan.kind == "backprop":
            kept = sum(blocks[j].memory_bytes for j in mine) + (blocks[mine.start - 1].activation_bytes if rank else 0)
            found.append(size + weights + min(plan.parts, plan.stages - rank) * kept)
            continue
        size += max(blocks[j].memory_bytes for j in mine) + _waiting_gradients(mine, blocks, tasks, ends, plan.parts)
        size += (plan.parts - 1) * max(blocks[j].activation_bytes for j in mine)
        size += IN_FLIGHT * blocks[mine.stop - 1].activation_bytes if rank + 1 < plan.stages else 0
        size += blocks[mine.start - 1].activation_bytes if rank > 0 else 0
        found.append(size)
    return found


def _waiting_gradients(mine, blocks, tasks, ends, parts):
    """The most bytes of gradients at a time that are complete and not yet reduced."""
    changes = []
    for kind, j, step, *_ in tasks.tasks:
        if kind == "reduced" and j in mine:
            size = blocks[j].gradient_bytes
            changes += [(ends["backward", j, (step + 1) * parts - 1], size), (ends["reduced", j, step], -size)]
    now = most = 0.0
    for _, size in sorted(changes):
        now += size
        most = max(most, now)
    return most


METHODS = {  # {name: (kind, which splits of `devices` into data x stages)}
    "SFF, data": ("sff", lambda devices, stages: stages == 1),
    "SFF, blocks": ("sff", lambda devices, stages: stages == devices),
    "SFF, 2-D": ("sff", lambda devices, stages: True),
    "backprop, DDP": ("backprop", lambda devices, stages: stages == 1),
    "backprop, 1F1B": ("backprop", lambda devices, stages: stages == devices),
    "backprop, 2-D": ("backprop", lambda devices, stages: True),
}


def predictions(measured, machine, devices, images, faster=1.0):
    """{method: (Plan, Prediction)} for `images` a device; a method without a split of so many devices is left out."""
    found = {}
    for kind, blocks in measured.items():
        splits = [(devices // n, n) for n in range(1, min(len(blocks), devices) + 1) if devices % n == 0]
        for data, stages in splits:
            for each in MICRO_BATCHES if kind == "backprop" and stages > 1 else (1,):
                how = plan(kind, data, stages, images * stages, each)
                result = how, predict(how, blocks.at(how.images, faster), machine)
                for name, (of, fits) in METHODS.items():
                    best = name not in found or result[1].seconds < found[name][1].seconds
                    if of == kind and fits(devices, stages) and best:
                        found[name] = result
    return {name: found[name] for name in METHODS if name in found}


# --- measurement of blocks


def measure_blocks(a, device):
    """{"sff": Blocks, "backprop": Blocks} of this network, each of its times the fastest; backpropagation's classifier is in its last block."""
    found = {}
    for kind, measure in (("sff", _sff_blocks), ("backprop", _backprop_blocks)):
        trainer = make(a, kind, minibatch(a, 1, device)[0])
        sizes = (max(1, a.batch // 4), a.batch)
        found[kind] = Blocks(*((n, measure(trainer, *minibatch(a, n, device))) for n in sizes))
    return found


def minibatch(a, images, device):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(images, 3, a.size, a.size, generator=draw).contiguous(memory_format=torch.channels_last)
    return x.to(device), torch.randint(a.classes, (images,), generator=draw).to(device)


def make(a, kind, like, optimizer=ADAM, **options):
    """A trainer of this network, channels_last, for images on this device and of this type."""
    sff = build(a, kind, True, a.granularity, **(PAPER if kind == "sff" else {})).sff.to(like.device, like.dtype)
    return (Trainer if kind == "sff" else Backprop)(sff, optimizer, **options)


class _Clock:
    """Seconds since the last call."""

    def __init__(self, device):
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self()

    def __call__(self):
        self.wait()
        now = time.perf_counter()
        passed, self.then = now - getattr(self, "then", now), now
        return passed


def _size(values):
    return sum(t.numel() * t.element_size() for t in values if isinstance(t, torch.Tensor))


def _rounds(least=5, seconds=2.0):
    """Numbers of the rounds of a measurement, of which the first does not count: it makes the optimisers' state."""
    start = time.perf_counter()
    for number in itertools.count():
        if number > least and time.perf_counter() - start > seconds:
            return
        yield number


def _sff_blocks(trainer, images, target):
    """Trainer.train_block with a clock: the message to the next rank leaves where `forward` ends."""
    trainer.train_mode()
    seconds = []
    for number in _rounds():
        (part,), times, outputs = trainer.split(images, target), [], []
        clock = _Clock(trainer.device)
        for index in range(len(trainer.sff.blocks)):
            visit, alive = trainer._visit(index, part)
            part = part._replace(alive=alive)
            forward = clock()
            if visit is not None:
                seed = visit.seed()
                del visit
                if seed is not None:
                    seed.backward()
                    del seed
            backward = clock()
            _Bucket(index, trainer.parameters[index], 1.0, []).average()
            bucket = clock()
            trainer._update(index)
            times.append((forward, backward, clock(), bucket))
            outputs.append(_size(alive))
        if number:
            seconds.append(times)
    parts, memory = trainer.split(images, target), []
    for index in range(len(trainer.sff.blocks)):
        step = lambda index=index, parts=parts: trainer.train_block(index, parts)  # noqa: E731
        memory.append(peak_memory(step, trainer.device) * 2**20)
    weights = [_size(trainer.parameters[index]) for index in range(len(outputs))]
    return _fastest(seconds, outputs, weights, memory)


def _backprop_blocks(trainer, images, target):
    sff = trainer.sff
    trainer.train_mode()
    seconds = []
    for number in _rounds():
        inputs, results, times, kept = (images,), [], [], []
        clock = _Clock(trainer.device)
        for index, block in enumerate(sff.blocks):
            with _kept_bytes([*trainer.parameters, *inputs], kept):
                outputs = block(*inputs)
                loss = None
                if index + 1 == len(sff.blocks):
                    loss = F.cross_entropy(sff.readout[0](*outputs)[0], target)
            times.append([clock()])
            results.append((inputs, outputs, loss))
            inputs = tuple(
                t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, torch.Tensor) else t for t in outputs
            )
        clock()
        for index, (_, outputs, loss) in reversed(list(enumerate(results))):
            if loss is not None:
                loss.backward()
            else:
                following = results[index + 1][0]
                pairs = [
                    (o, t.grad)
                    for o, t in zip(outputs, following, strict=True)
                    if isinstance(t, torch.Tensor) and t.grad is not None
                ]
                torch.autograd.backward(*zip(*pairs, strict=True))
            times[index].append(clock())
        trainer.optimizer.step()
        update = clock()
        trainer.optimizer.zero_grad()
        weights = [_size(block.parameters()) for block in sff.blocks]
        weights[-1] += _size(sff.readout[0].parameters())
        for index, of_block in enumerate(times):
            of_block.append(update * weights[index] / sum(weights))
        if number:
            seconds.append(times)
    return _fastest(seconds, [_size(outputs) for _, outputs, _ in results], weights, kept)


def _fastest(seconds, *others):
    """[Block] from rounds of [(forward, backward, update, bucket or nothing) of each block]."""
    found = []
    for times, *rest in zip(zip(*seconds, strict=True), *others, strict=True):
        forward, backward, update, *bucket = (min(values) for values in zip(*times, strict=True))
        found.append(Block(forward, backward, update, *rest, *bucket))
    return found


@contextlib.contextmanager
def _kept_bytes(others, found):
    """Appends the bytes that the backward pass of what runs inside keeps, beside these tensors."""
    own, kept = {t.untyped_storage().data_ptr() for t in others if isinstance(t, torch.Tensor)}, {}

    def note(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield
    found.append(sum(kept.values()))


# --- what processes do


def tcp_bytes_sent():
    """Bytes that the other ends of this process's TCP connections have acknowledged (Linux: tcpi_bytes_acked of struct tcp_info)."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as s:
                if s.family in (socket.AF_INET, socket.AF_INET6) and s.type == socket.SOCK_STREAM:
                    total += struct.unpack_from("Q", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 120)[0]
        except OSError:  # closed meanwhile
            continue
    return total


class Run(NamedTuple):
    """A network in training over all processes: step(), settle() for what waits over its end, weights() -> [tensor] on rank 0."""

    step: object
    settle: object
    weights: object


def alone(a, kind, optimizer, images, target, micro_batches=1):
    """In this process, whatever the others do."""
    trainer = make(a, kind, images, optimizer, micro_batches=micro_batches)
    trainer.train_mode()
    module = trainer.sff if kind == "sff" else trainer.sff.model
    return Run(lambda: trainer.step(images, target), trainer.settle, lambda: list(module.parameters()))


def in_step(run):
    """The same with all processes waiting for each other after every step."""

    def step():
        run.step()
        dist.barrier()

    return run._replace(step=step)


def spread(a, plan, placement, optimizer, images, target):
    """As planned over all processes; images and target are those of all."""
    if plan.kind == "backprop":
        start = data_parallel if plan.stages == 1 else pipeline
        return start(a, plan, placement, optimizer, images, target)
    given = Distributed(block_ranks=plan.stages, placement=placement if plan.stages > 1 else None)
    trainer = make(a, "sff", images, optimizer, distributed=given, micro_batches=plan.parts)
    trainer.train_mode()
    trainer.fitting = True  # updates may wait over the end of a step, as in fit
    ranks = trainer.ranks
    share = [t.chunk(ranks.data_size)[ranks.data_rank] if ranks.feeds else None for t in (images, target)]

    def weights():
        trainer.synchronize()
        return list(trainer.sff.parameters())

    return Run(lambda: trainer.step(*share), trainer.settle, weights)


def data_parallel(a, plan, placement, optimizer, images, target):
    """torch's DistributedDataParallel with its defaults, but for batch norm's statistics, which SFF does not send every step either."""
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
    """A tensor in one memory format, its gradient in the other: blocks run channels_last, and gloo sends contiguous tensors."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return x.contiguous(memory_format=there if x.dim() == 4 else torch.contiguous_format).view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous(memory_format=ctx.back if grad.dim() == 4 else torch.contiguous_format), None, None


class Stage(nn.Module):
    """The blocks of a stage; the last ends in the classifier."""

    def __init__(self, sff, mine):
        super().__init__()
        self.blocks = nn.ModuleList(sff.blocks[j] for j in mine)
        self.readout = sff.readout[0] if mine.stop == len(sff.blocks) else None

    def forward(self, *alive):
        alive = tuple(_Layout.apply(t, torch.channels_last, torch.contiguous_format) for t in alive)
        for block in self.blocks:
            alive = block(*alive)
        if self.readout is not None:
            alive = self.readout(*alive)
        alive = tuple(_Layout.apply(t, torch.contiguous_format, torch.channels_last) for t in alive)
        return alive if len(alive) > 1 else alive[0]


def pipeline(a, plan, placement, optimizer, images, target):
    """torch.distributed.pipelining's 1F1B."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    sff, rank = make(a, "backprop", images).sff, dist.get_rank()
    sff.train()
    own = runs_of(placement)
    module = Stage(sff, own[rank])
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
        stages = [list(Stage(sff, mine).parameters()) for mine in own]
        found = {p: w for mine, sent in zip(stages, parts, strict=True) for p, w in zip(mine, sent, strict=True)}
        return [found[p] for p in sff.model.parameters()]

    return Run(step, lambda: None, weights)


def check(a, plan, placement, device):
    """How far the weights are from those of one process after three steps, in units of what these changed; None on ranks but the first.

    One process sees the same micro-batches, each normalised by itself. Sums over ranks are checked in float64, where only a wrong one shows."""
    torch.backends.cudnn.deterministic = True
    sgd = lambda groups: torch.optim.SGD(groups, lr=1e-2)  # noqa: E731
    size = plan.data * plan.stages
    images, target = minibatch(a, a.batch * size, device)
    images = images.double() if plan.data > 1 else images
    run = spread(a, plan, placement, sgd, images, target)
    for _ in range(3):
        run.step()
    run.settle()
    weights = run.weights()
    if dist.get_rank() > 0:
        return None
    one = alone(a, plan.kind, sgd, images, target, plan.data * plan.parts)
    before = [p.detach().clone() for p in one.weights()]
    for _ in range(3):
        one.step()
    flat = lambda tensors: torch.cat([t.detach().flatten().to(device) for t in tensors])  # noqa: E731
    weights, expected, before = flat(weights), flat(one.weights()), flat(before)
    return float((weights - expected).norm() / (expected - before).norm())


def measure_link(device, rounds=9):
    """Of two processes: {"latency": seconds, "bandwidth": bytes/s} of all-reduces, and of messages from one to the other."""

    def all_reduce(t):
        dist.all_reduce(t)

    def send(t):  # there and back
        for source in range(2):
            (dist.send if dist.get_rank() == source else dist.recv)(t, 1 - dist.get_rank())

    found, large = {}, 2**21 if device.type == "cpu" else 2**26  # bytes
    for name, function in (("all-reduce", all_reduce), ("send", send)):
        seconds = []
        for size in (4, large):
            t, times = torch.zeros(size // 4, device=device), []
            for _ in range(rounds):
                dist.barrier()
                clock = _Clock(device)
                function(t)
                times.append(clock())
            seconds.append(min(times) / 2)  # an all-reduce of two is two messages of half the size, a ping two of all
        few, many = seconds
        size = large / 2 if name == "all-reduce" else large
        found[name] = {"latency": few, "bandwidth": size / max(many - few, 1e-9)}
    return found


class Round(NamedTuple):
    """A few steps of a Run: what other processes computed meanwhile (cores), seconds a step of the slowest rank, [bytes sent a step by each rank]."""

    others: float
    seconds: float
    sent: list


def _computed():
    """Seconds that the cores of this machine, and this process, have computed so far (Linux; niced processes give way and do not count)."""
    user, _, system, *_ = map(int, Path("/proc/stat").read_text().split()[1:8])
    own = os.times()
    return (user + system) / os.sysconf("SC_CLK_TCK"), own.user + own.system


def time_run(run, device, warm=2, steps=4):
    """A Round, the same on all ranks."""
    dist.barrier()
    sent, (all_before, own_before), stamps, clock = tcp_bytes_sent(), _computed(), [], _Clock(device)
    began = clock.then
    for step in range(warm + steps):
        run.step()
        if step + 1 in (warm, warm + steps):
            clock()
            stamps.append(clock.then)
    run.settle()
    dist.barrier()
    clock()
    (every, own), sent = _computed(), (tcp_bytes_sent() - sent) / (warm + steps)
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, (stamps, sent, every - all_before, own - own_before, clock.then - began))
    first, last = (max(stamps[i] for stamps, *_ in found) for i in range(2))
    others = (found[0][2] - sum(own for *_, own, _ in found)) / found[0][4]
    return Round(others, (last - first) / steps, [sent for _, sent, *_ in found])


def time_runs(runs, device, rounds, quiet=0.1):
    """[[Round] of each Run], interleaved: `rounds` in which the machine was left to them, else of twice as many those most left alone."""
    found = [[] for _ in runs]
    for _ in range(2 * rounds):
        for run, own in zip(runs, found, strict=True):
            if sum(r.others < quiet for r in own) < rounds:
                own.append(time_run(run, device))
    return [sorted(own)[:rounds] for own in found]


def worker(path):
    """One process of several: reads what to measure from the file, rank 0 writes what came out into it."""
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
    runs = [in_step(alone(a, kind, ADAM, images[: a.batch], target[: a.batch])) for kind in ("sff", "backprop")]
    runs += [spread(a, plan, placement, ADAM, images, target) for plan, placement in plans]
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
    """What `worker` measures in so many processes."""
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
    for (plan, _), off in zip(plans, result["off"], strict=True):
        if not off <= (1e-6 if plan.data > 1 else 0):
            raise SystemExit(f"wrong result: after three steps of {plan} weights are off by {off:.1e} of their change")
    return result


def planned(processes, batch):
    """The Plans that so many processes run."""
    shapes = [("sff", processes, 1), ("sff", 1, processes), ("backprop", processes, 1), ("backprop", 1, processes)]
    if processes % 2 == 0 and processes > 2:
        shapes.insert(2, ("sff", processes // 2, 2))
    return [plan(kind, data, stages, batch * stages) for kind, data, stages in shapes] if processes > 1 else []


def compare(a, device):
    """(rows of measured and predicted steps of 1, 2, 4, ... processes, what measure_link found)."""
    measured = measure_blocks(a, device)
    cores = os.cpu_count() if device.type == "cpu" else math.inf
    link, rows = None, []
    for processes in (n for n in (1, 2, 4, 8) if n <= a.processes):
        plans = planned(processes, a.batch)
        blocks = [measured[how.kind].at(how.images) for how in plans]
        placements = [how.placement(of) for how, of in zip(plans, blocks, strict=True)]
        result = launch(a, processes, list(zip(plans, placements, strict=True)))
        link = link or result.get("link")
        others = max(result["others"])
        if others > 0.1:
            print(f"{processes} processes: others computed beside them, on {others:.1f} cores", file=sys.stderr)
        slower, seconds, sent = {}, iter(result["seconds"]), result["bytes"][len(measured) :]
        for kind in measured:
            here = next(seconds)
            predicted = sum(block.seconds for block in measured[kind].at(a.batch)) * max(1, processes / cores)
            slower[kind] = quantile(here, 0.5) / predicted
            rows.append(_row(a, processes, kind, "none", 1, 1, here, predicted))
        for how, of, placement, here, by_rank in zip(plans, blocks, placements, seconds, sent, strict=True):
            speed = link["all-reduce" if how.stages == 1 else "send"]
            machine = Machine(speed["bandwidth"], speed["latency"], "ring", cores)  # gloo has rings
            found = predict(how, of, machine, placement)
            slowed = predict(how, measured[how.kind].at(how.images, 1 / slower[how.kind]), machine, placement).seconds
            split = "data" if how.stages == 1 else "blocks" if how.data == 1 else "2-D"
            by_most = max(by_rank) if device.type == "cpu" else math.nan  # past TCP nothing is counted
            rows.append(_row(
                a, processes, how.kind, split, how.data, how.stages, here, found.seconds, slowed, by_most, found.sent_bytes
            ))  # fmt: skip
    return rows, link


def _row(a, processes, kind, split, data, stages, seconds, predicted, slowed=None, sent=None, predicted_bytes=None):
    median, low, high = (quantile(seconds, q) for q in (0.5, 0.2, 0.8))
    row = {
        "model": a.model, "width": a.width, "batch": a.batch, "size": a.size, "classes": a.classes, "granularity": a.granularity,
        "processes": processes, "kind": kind, "split": split, "data": data, "stages": stages, "milliseconds": median * 1e3,
        "milliseconds_20": low * 1e3, "milliseconds_80": high * 1e3, "predicted": predicted * 1e3, "error": predicted / median - 1,
    }  # fmt: skip
    if slowed is not None:
        row |= {"slowed": slowed * 1e3, "slowed_error": slowed / median - 1, "mbytes": sent / 1e6}
        row |= {"predicted_mbytes": predicted_bytes / 1e6, "bytes_error": predicted_bytes / sent - 1}
    return row


def label(row):
    """What a row of `compare` measured, in words."""
    kind = {"sff": "SFF", "backprop": "backpropagation"}[row["kind"]]
    if row["split"] == "none":
        return kind if int(row["processes"]) == 1 else f"{kind}, no communication"
    split = {"data": "data-parallel" if row["kind"] == "sff" else "DDP", "2-D": f"2-D, {row['data']} x {row['stages']}"}
    return f"{kind}, {split.get(row['split'], 'block-parallel' if row['kind'] == 'sff' else '1F1B')}"


def show_compared(a, rows, link):
    link = link or {}
    speeds = [f"{name} {v['bandwidth'] / 1e9:.2f} GB/s and {v['latency'] * 1e6:.0f} us" for name, v in link.items()]
    print(
        f"\n{_network(a)}, {a.batch} images a process; {os.cpu_count()} cores; between two of them: {', '.join(speeds)}"
    )
    header = f"{'processes':>9} {'':33} {'ms a step':>9} {'20-80 %':16} {'predicted':>9} {'off':>7}"
    print(f"{header} {'slowed':>8} {'off':>7} {'MB sent':>8} {'off':>7}")
    for r in rows:
        measured = f"{r['milliseconds']:9.1f} [{r['milliseconds_20']:6.1f}, {r['milliseconds_80']:6.1f}]"
        line = f"{r['processes']:9} {label(r):33} {measured} {r['predicted']:9.1f} {r['error']:+7.1%}"
        if "slowed" in r:
            line += f" {r['slowed']:8.1f} {r['slowed_error']:+7.1%} {r['mbytes']:8.3f} {r['bytes_error']:+7.2%}"
        print(line)


def _network(a):
    width = f", width {a.width}" if a.model.startswith("resnet") else ""
    return f"{a.model}{width}, {a.granularity} granularity, {a.size} x {a.size}, {a.classes} classes"


def model(a, device):
    """Rows of the model: every link, speed of the devices, number of devices and method."""
    measured, rows = measure_blocks(a, device), []
    links = {f"{gbit:g} Gbit/s, {us:g} us": Machine(gbit * 1e9 / 8, us * 1e-6) for gbit, us in a.link} or LINKS
    for faster in a.faster:
        one = {}
        for name, machine in links.items():
            machine = dataclasses.replace(machine, all_reduce=a.all_reduce)
            for devices in (2**n for n in range(11)):
                images = a.global_batch / devices if a.global_batch else a.batch
                for method, (how, found) in predictions(measured, machine, devices, images, faster).items():
                    rate = devices * images / found.seconds
                    rows.append({
                        "model": a.model, "width": a.width, "granularity": a.granularity, "batch": images, "global_batch": a.global_batch or "",
                        "faster": faster, "link": name, "all_reduce": a.all_reduce, "devices": devices, "method": method, "data": how.data,
                        "stages": how.stages, "parts": how.parts, "milliseconds": found.seconds * 1e3, "images_per_second": rate,
                        "efficiency": rate / devices / one.setdefault(how.kind, rate),
                        "mbytes_sent": found.sent_bytes / 1e6, "memory_mib": found.memory_bytes / 2**20,
                    })  # fmt: skip
    return rows


WIDTHS = dict(zip(METHODS, (11, 13, 43, 15, 16, 43), strict=True))  # characters


def show(a, rows):
    images = f"{a.global_batch:,} images a step" if a.global_batch else f"{a.batch} images a device"
    print(f"{_network(a)}; {images}, Adam, {a.all_reduce} all-reduce")
    print(
        "Efficiency against one device; 2-D: replicas x stages of the fastest split, images/s, and of the devices with most the MB"
    )
    print("sent a step and the MiB of memory.")
    for faster, link in dict.fromkeys((r["faster"], r["link"]) for r in rows):
        mine = [r for r in rows if (r["faster"], r["link"]) == (faster, link)]
        speed = f"assumed: devices {faster:g} times" if faster != 1 else "devices"
        print(f"\n{link}; {speed} as fast as one core here")
        print(f"{'devices':>7}" + "".join(f"{method:>{width}}" for method, width in WIDTHS.items()))
        for devices in dict.fromkeys(r["devices"] for r in mine):
            found = {r["method"]: r for r in mine if r["devices"] == devices}
            cells = [f"{_cell(found.get(method)):>{width}}" for method, width in WIDTHS.items()]
            print(f"{devices:7,}" + "".join(cells))


def _cell(r):
    if r is None:
        return ""
    if "2-D" not in r["method"]:
        return f"{r['efficiency']:.0%}"
    shape = f"{r['data']} x {r['stages']}"
    most = f"{r['mbytes_sent']:3.0f} MB {r['memory_mib']:5,.0f} MiB"
    return f"{shape} {r['images_per_second']:9,.0f}/s {most} {r['efficiency']:5.0%}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", choices=["resnet18", "mobilenet_v3_small", "mobilenet_v3_large"])
    parser.add_argument("--granularity", default="block", choices=["layer", "block", "stage"])
    parser.add_argument("--measure", action="store_true", help="run 1, 2, ... --processes processes and compare")
    parser.add_argument("--width", type=int, help="64, with --measure 16")
    parser.add_argument("--batch", type=int, nargs="+", help="images a device: 32, with --measure 32 and 4")
    for name, default in (("classes", 100), ("size", 32), ("rounds", 5), ("processes", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--global-batch", type=int, help="images a step whatever the devices, instead of --batch for each"
    )
    parser.add_argument("--faster", type=float, nargs="+", default=[1, 100, 1000], help="devices than one core here")
    given = {"nargs": 2, "action": "append", "default": [], "metavar": ("GBIT_PER_S", "MICROSECONDS")}
    parser.add_argument("--link", type=float, help="instead of the three that are built in", **given)
    parser.add_argument("--all-reduce", default="tree", choices=["ring", "tree"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        return worker(a.worker)
    torch.set_num_threads(1)
    print_environment()
    rows = measure(a) if a.measure else modelled(a)
    if a.csv:
        write_csv(a.csv, rows)
    return None


def measure(a):
    rows = []
    for batch in a.batch or [32, 4]:
        of = argparse.Namespace(**vars(a) | {"batch": batch, "width": a.width or 16})
        found, link = compare(of, torch.device(a.device))
        show_compared(of, found, link)
        rows += found
    print("\nno communication: all at once, each by itself, waiting for the others after each step")
    print("slowed: predicted from block times that are as much longer as these steps were")
    return rows


def modelled(a):
    rows = []
    for batch in a.batch or [32]:
        of = argparse.Namespace(**vars(a) | {"batch": batch, "width": a.width or 64})
        found = model(of, torch.device(a.device))
        show(of, found)
        rows += found
    return rows


if __name__ == "__main__":
    main()
