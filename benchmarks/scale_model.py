"""Model of scaling: predicts the time of a step on 1 to 1,024 devices, the bytes that it sends and its memory (benchmarks/scale.py prints them).

The inputs are the seconds, gradient bytes and activation bytes of every block, measured on this machine with one thread, and the speed of a link. A
step is a set of tasks of the devices and of their links. Each task waits for others, and a simulation computes when all of them end:

    SFF, data-parallel     the all-reduce of a block overlaps with the next blocks; only the next forward pass of this block waits for it
    SFF, block-parallel    a rank receives, computes, and sends the output before the backward pass of its last block; it may be two messages
                           ahead of the next rank; the pipeline is never flushed
    backpropagation, DDP   buckets of 25 MB (the first of 1 MB) are reduced during the backward pass; the update waits for all of them
    backpropagation, 1F1B  1, 2 or 4 micro-batches for each stage, whichever is fastest; forward and backward passes alternate, and the pipeline is
                           flushed at the end of every step
    2-D                    replicas of block-parallel or 1F1B devices; the fastest of all splits of the devices

A step has the same images for all methods: the batch of a device times the number of devices (or --global-batch). SFF sends them in minibatches of a
device's batch. The model leaves out other traffic on a link, different speeds of devices, the input pipeline, links of several speeds in one machine,
and kernels that slow down during communication.
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

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes of the buckets of torch's DistributedDataParallel
ADAM_STATES = 2  # tensors of optimizer state for each parameter
MICRO_BATCHES = 1, 2, 4  # for each stage of 1F1B
ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Block:
    """Measurements of one block on one minibatch.

    Fields:
        forward, backward, update: seconds of the forward pass (for SFF with the goodness step), the backward pass and the update.
        activation_bytes, gradient_bytes: bytes of its output and of its gradients.
        memory_bytes: for SFF the peak above the parameters, for backpropagation what is kept for the backward pass.
        bucket: for SFF the seconds that it takes to copy the gradients into one bucket and to average them after the all-reduce.
    """

    forward: float
    backward: float
    update: float
    activation_bytes: float
    gradient_bytes: float
    memory_bytes: float = 0.0
    bucket: float = 0.0

    @property
    def seconds(self):
        """Seconds of the block in a step."""
        return self.forward + self.backward + self.update


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices with one link each.

    Fields:
        bandwidth: bytes per second of a link.
        latency: seconds of a message without data.
        all_reduce: "ring" needs 2 (R - 1) messages one after the other for R ranks, "tree" needs 2 log2 R (recursive halving and doubling, or
            NCCL's trees). Both send 2 (R - 1) / R of the bytes.
        cores: number of cores that all devices and links share, if they are processes of one machine. A transfer takes time of a core then.
    """

    bandwidth: float
    latency: float
    all_reduce: str = "tree"
    cores: float = math.inf

    def send_seconds(self, size):
        """Seconds of a message of `size` bytes."""
        return self.latency + size / self.bandwidth

    def reduce_seconds(self, size, ranks):
        """Seconds of an all-reduce of `size` bytes."""
        steps = 2 * (ranks - 1) if self.all_reduce == "ring" else 2 * math.ceil(math.log2(ranks))
        return steps * self.latency + 2 * (ranks - 1) / ranks * size / self.bandwidth


LINKS = {
    "Ethernet 10 Gbit/s, 50 us": Machine(10e9 / 8, 50e-6),
    "Ethernet 100 Gbit/s, 10 us": Machine(100e9 / 8, 10e-6),
    "NVLink 300 GB/s, 5 us": Machine(300e9, 5e-6),
}


class Blocks:
    """Blocks of a network, measured on minibatches of two sizes. `at` interpolates: a constant part and a part proportional to the size."""

    def __init__(self, small, large):
        (self.few, self.small), (self.many, self.large) = small, large

    def __len__(self):
        return len(self.large)

    def at(self, images, faster=1.0):
        """Return [Block] for minibatches of `images` images, on devices that are `faster` times as fast."""

        def line(a, b):
            fixed = min(max(0.0, (a * self.many - b * self.few) / (self.many - self.few)), b)
            return fixed + (b - fixed) * images / self.many

        found = []
        for a, b in zip(self.small, self.large, strict=True):
            values = {f.name: line(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Block)}
            found.append(Block(**values | {k: values[k] / faster for k in ("forward", "backward", "update", "bucket")}))
        return found


class Tasks:
    """Tasks to simulate. Each has a key, and occupies a resource (a device or a link) for some seconds after other tasks have ended.

    A link serves tasks in the order in which they become ready, a device in the order in which they were added."""

    def __init__(self):
        self.tasks, self.last = {}, {}

    def compute(self, rank, key, seconds=0.0, after=()):
        """Add a task of the device `rank`, which starts after its previous task and those with the keys `after`."""
        before = [self.last[rank]] if rank in self.last else []
        self.tasks[key] = (("device", rank), seconds, [*before, *after])
        self.last[rank] = key

    def transfer(self, rank, key, seconds, after):
        """Add a task of the link of device `rank`."""
        self.tasks[key] = (("link", rank), seconds, after)

    def run(self, cores=math.inf):
        """Simulate and return {key: second at which the task ends}. If more tasks run than there are cores, all slow down to cores / tasks."""
        ahead, following = {}, collections.defaultdict(list)
        for key, (_, _, after) in self.tasks.items():
            needed = {k for k in after if k in self.tasks}  # tasks of steps before the first do not exist
            ahead[key] = len(needed)
            for k in needed:
                following[k].append(key)
        ends, running, busy, queues = {}, [], set(), collections.defaultdict(collections.deque)
        number = itertools.count()
        now = work = 0.0  # work: seconds of computation that a task running from the start would have done

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


def block_ranges(placement):
    """Return [range of the blocks' indices] of each rank."""
    ends = [sum(placement[: i + 1]) for i in range(len(placement))]
    return [range(end - n, end) for end, n in zip(ends, placement, strict=True)]


def message_bytes(block, images):
    """Return the bytes of a message of fastff.parallel.link: header, labels and activations, aligned."""
    return HEADER + sum(math.ceil(size / ALIGN) * ALIGN for size in (8 * images, block.activation_bytes))


def bucket_bytes(block):
    """Return the bytes of a bucket of fastff.parallel.reduce: the gradients of a block and the number of samples."""
    return block.gradient_bytes + 4


def sff_tasks(blocks, machine, images, data, placement, parts, steps):
    """Return the Tasks of one replica in SFF training; the other replicas do the same at the same time.

    Args:
        blocks: [Block] for one of the `parts` of a minibatch.
        machine: Machine.
        images: number of images in a part.
        data: number of replicas.
        placement: number of blocks of each rank.
        parts: number of parts (micro-batches) of a minibatch.
        steps: number of steps to simulate.
    """
    tasks, ranges = Tasks(), block_ranges(placement)
    for step in range(steps):
        for rank, indices in enumerate(ranges):
            for j in indices:
                if data > 1:
                    tasks.compute(
                        rank, ("update", j, step - 1), blocks[j].update if step else 0.0, [("reduced", j, step - 1)]
                    )
                for part in range(parts):
                    n = step * parts + part
                    if rank > 0 and j == indices.start:
                        tasks.compute(rank, ("received", rank, n), after=[("sent", rank - 1, n)])
                    tasks.compute(rank, ("forward", j, n), blocks[j].forward)
                    if rank + 1 < len(ranges) and j + 1 == indices.stop:
                        tasks.compute(rank, ("send", rank, n), after=[("sent", rank, n - IN_FLIGHT)])
                        seconds = machine.send_seconds(message_bytes(blocks[j], images))
                        # the next rank can receive a message after it has taken the previous one
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
    """Return [("F" or "B", micro-batch)], the order of the passes of a stage (Narayanan et al. 2021, PipeDream-flush)."""
    first = min(count, stages - 1 - stage)
    order = [("F", i) for i in range(first)]
    for i in range(count - first):
        order += [("F", first + i), ("B", i)]
    return order + [("B", i) for i in range(count - first, count)]


def backprop_tasks(blocks, machine, data, placement, micro_batches, steps):
    """Return the Tasks of one replica in backpropagation with 1F1B, or with DDP for one stage and one micro-batch.

    Gradients are reduced during the last backward pass. The arguments are those of `sff_tasks`."""
    tasks, ranges = Tasks(), block_ranges(placement)
    for step in range(steps):
        for rank, indices in enumerate(ranges):
            for kind, n in one_forward_one_backward(rank, len(ranges), micro_batches):
                forward = kind == "F"
                to, neighbour = (rank + 1, rank - 1) if forward else (rank - 1, rank + 1)
                arrived = [(f"{kind} sent", neighbour, step, n)]
                if forward or n + 1 < micro_batches or data == 1:
                    seconds = sum(blocks[j].forward if forward else blocks[j].backward for j in indices)
                    tasks.compute(rank, (kind, rank, step, n), seconds, arrived)
                else:
                    reduced = _buckets(tasks, blocks, machine, data, rank, indices, step, arrived)
                    tasks.compute(rank, (kind, rank, step, n))
                if 0 <= to < len(ranges):
                    size = blocks[indices.stop - 1 if forward else indices.start - 1].activation_bytes
                    tasks.transfer(
                        rank, (f"{kind} sent", rank, step, n), machine.send_seconds(size), [(kind, rank, step, n)]
                    )
            tasks.compute(
                rank, ("update", rank, step), sum(blocks[j].update for j in indices), reduced if data > 1 else []
            )
            tasks.compute(rank, ("end", rank, step))
    return tasks


def _buckets(tasks, blocks, machine, data, rank, indices, step, arrived):
    """Add the last backward pass, block by block, and the all-reduces of its buckets. Returns the keys of the all-reduces."""
    waiting, limit, keys = 0.0, FIRST_BUCKET, []
    for j in reversed(indices):
        tasks.compute(rank, ("backward", j, step), blocks[j].backward, arrived)
        waiting += blocks[j].gradient_bytes
        while waiting > 0 and (waiting >= limit or j == indices.start):
            size = min(waiting, limit)
            keys.append(("reduced", rank, step, len(keys)))
            tasks.transfer(rank, keys[-1], machine.reduce_seconds(size, data), [("backward", j, step)])
            waiting, limit = waiting - size, BUCKET
    return keys


class Plan(NamedTuple):
    """Distribution of training over data x stages devices.

    Fields:
        kind: "sff" or "backprop".
        data, stages: number of replicas, and of devices that share the blocks of one.
        parts: number of micro-batches in a step of a replica.
        images: number of images in a micro-batch.
    """

    kind: str
    data: int
    stages: int
    parts: int
    images: float

    def placement(self, blocks):
        """Return the number of blocks of each stage that balances their times."""
        return balanced([b.seconds if self.kind == "sff" else b.forward + b.backward for b in blocks], self.stages)

    def tasks(self, blocks, machine, placement, steps):
        """Return the Tasks of `steps` steps."""
        if self.kind == "sff":
            return sff_tasks(blocks, machine, self.images, self.data, placement, self.parts, steps)
        return backprop_tasks(blocks, machine, self.data, placement, self.parts, steps)


def plan(kind, data, stages, images, each=MICRO_BATCHES[-1]):
    """Return the Plan for steps with `images` images a replica. Backpropagation has `each` micro-batches for each stage."""
    if stages == 1:
        return Plan(kind, data, 1, 1, images)
    parts = min(stages if kind == "sff" else each * stages, max(1, int(images)))
    return Plan(kind, data, stages, parts, images / parts)


class Prediction(NamedTuple):
    """What the model says about a step: its seconds when the pipeline is full, and the largest numbers of bytes of any device."""

    seconds: float
    sent_bytes: float
    memory_bytes: float
    placement: list


def predict(plan, blocks, machine, placement=None):
    """Return the Prediction for a step. `blocks` is a list of Block for minibatches of plan.images images."""
    placement = placement or plan.placement(blocks)
    steps = 4 * plan.stages + 8 if plan.kind == "sff" else 4
    tasks = plan.tasks(blocks, machine, placement, steps)
    ends = tasks.run(machine.cores / plan.data)
    first, last = ([ends["end", rank, step] for step in range(steps)] for rank in (0, plan.stages - 1))
    last = [end for end in last if end <= first[-1]]  # while all devices are working
    half = len(last) // 2
    seconds = (last[-1] - last[half - 1]) / (len(last) - half)
    sent = max(bytes_per_step(plan, blocks, placement))
    return Prediction(seconds, sent, max(memory_bytes(plan, blocks, placement, tasks, ends)), placement)


def bytes_per_step(plan, blocks, placement=None):
    """Return [bytes that a device of each stage sends in a step]: its share of the ring all-reduces, and its messages."""
    ring, found = 2 * (plan.data - 1) / plan.data, []
    placement = placement or plan.placement(blocks)
    for rank, indices in enumerate(block_ranges(placement)):
        last = rank + 1 == len(placement)
        if plan.kind == "sff":
            size = ring * sum(bucket_bytes(blocks[j]) for j in indices)
            size += 0 if last else plan.parts * message_bytes(blocks[indices.stop - 1], plan.images)
        else:
            size = ring * sum(blocks[j].gradient_bytes for j in indices)
            size += 0 if last else plan.parts * blocks[indices.stop - 1].activation_bytes
            size += 0 if rank == 0 else plan.parts * blocks[indices.start - 1].activation_bytes
        found.append(size)
    return found


def memory_bytes(plan, blocks, placement, tasks, ends):
    """Return [peak memory in bytes of a device of each stage]: parameters, the state of Adam, and

    SFF               the largest block, gradients that wait for their all-reduce (from the simulation), the activations of the other
                      micro-batches, and messages: two that are sent, one that is received
    backpropagation   all gradients, and what all blocks keep for the backward passes of the micro-batches in flight, at most one for each stage
    """
    found = []
    for rank, indices in enumerate(block_ranges(placement)):
        weights = sum(blocks[j].gradient_bytes for j in indices)
        size = (1 + ADAM_STATES) * weights
        if plan.kind == "backprop":
            kept = sum(blocks[j].memory_bytes for j in indices) + (
                blocks[indices.start - 1].activation_bytes if rank else 0
            )
            found.append(size + weights + min(plan.parts, plan.stages - rank) * kept)
            continue
        size += max(blocks[j].memory_bytes for j in indices) + _waiting_gradients(
            indices, blocks, tasks, ends, plan.parts
        )
        size += (plan.parts - 1) * max(blocks[j].activation_bytes for j in indices)
        size += IN_FLIGHT * blocks[indices.stop - 1].activation_bytes if rank + 1 < plan.stages else 0
        size += blocks[indices.start - 1].activation_bytes if rank > 0 else 0
        found.append(size)
    return found


def _waiting_gradients(indices, blocks, tasks, ends, parts):
    """Return the largest number of bytes of gradients that wait for their all-reduce at the same time."""
    changes = []
    for kind, j, step, *_ in tasks.tasks:
        if kind == "reduced" and j in indices:
            size = blocks[j].gradient_bytes
            changes += [(ends["backward", j, (step + 1) * parts - 1], size), (ends["reduced", j, step], -size)]
    now = most = 0.0
    for _, size in sorted(changes):
        now += size
        most = max(most, now)
    return most


METHODS = {  # {name: (kind, function that says whether a split of `devices` into data x stages is allowed)}
    "SFF, data": ("sff", lambda devices, stages: stages == 1),
    "SFF, blocks": ("sff", lambda devices, stages: stages == devices),
    "SFF, 2-D": ("sff", lambda devices, stages: True),
    "backprop, DDP": ("backprop", lambda devices, stages: stages == 1),
    "backprop, 1F1B": ("backprop", lambda devices, stages: stages == devices),
    "backprop, 2-D": ("backprop", lambda devices, stages: True),
}


def predictions(measured, machine, devices, images, faster=1.0):
    """Return {method: (Plan, Prediction)} for `images` images a device. A method that cannot use so many devices is left out."""
    found = {}
    for kind, blocks in measured.items():
        splits = [(devices // n, n) for n in range(1, min(len(blocks), devices) + 1) if devices % n == 0]
        for data, stages in splits:
            for each in MICRO_BATCHES if kind == "backprop" and stages > 1 else (1,):
                candidate = plan(kind, data, stages, images * stages, each)
                result = candidate, predict(candidate, blocks.at(candidate.images, faster), machine)
                for name, (its_kind, allowed) in METHODS.items():
                    best = name not in found or result[1].seconds < found[name][1].seconds
                    if its_kind == kind and allowed(devices, stages) and best:
                        found[name] = result
    return {name: found[name] for name in METHODS if name in found}
