"""The model of scale: how long a step takes on 1 to 1,024 devices, what it sends and what it keeps (benchmarks/scale.py prints it).

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
"""

import collections
import dataclasses
import heapq
import itertools
import math
from pathlib import Path
from typing import NamedTuple

from fastff.parallel.link import ALIGN, HEADER, IN_FLIGHT
from fastff.parallel.placement import balanced

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
