"""Inputs of the model of scaling, measured in one process: seconds, bytes and memory of each block of a network."""

import contextlib
import itertools
import time

import torch
import torch.nn.functional as F

from benchmarks.scale_model import Block, Blocks
from benchmarks.step import ADAM, PAPER, build
from fastff.memory import peak_memory
from fastff.parallel.reduce import _Bucket
from fastff.training import Backprop, Trainer


def measure_blocks(a, device):
    """Measure the blocks of a network and return {"sff": Blocks, "backprop": Blocks}.

    Each time is the fastest of several. The last block of backpropagation contains the classifier."""
    found = {}
    for kind, measure in (("sff", _sff_blocks), ("backprop", _backprop_blocks)):
        trainer = make(a, kind, minibatch(a, 1, device)[0])
        sizes = (max(1, a.batch // 4), a.batch)
        found[kind] = Blocks(*((n, measure(trainer.engine, *minibatch(a, n, device))) for n in sizes))
    return found


def minibatch(a, images, device):
    """Return images [images, 3, a.size, a.size] in channels_last, and labels."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(images, 3, a.size, a.size, generator=draw).contiguous(memory_format=torch.channels_last)
    return x.to(device), torch.randint(a.classes, (images,), generator=draw).to(device)


def make(a, kind, like, optimizer=ADAM, **options):
    """Return a trainer of the network that `a` describes, in channels_last, with the device and dtype of the images `like`."""
    sff = build(a, kind, True, a.granularity, **(PAPER if kind == "sff" else {})).sff.to(like.device, like.dtype)
    return (Trainer if kind == "sff" else Backprop)(sff, optimizer, **options)


class Clock:
    """Callable that returns the seconds since its last call."""

    def __init__(self, device):
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self()

    def __call__(self):
        self.wait()
        now = time.perf_counter()
        elapsed, self.last = now - getattr(self, "last", now), now
        return elapsed


def _size(values):
    return sum(t.numel() * t.element_size() for t in values if isinstance(t, torch.Tensor))


def _rounds(least=5, seconds=2.0):
    """Yield the numbers of the rounds of a measurement. Round 0 does not count, since it creates the optimizers' state."""
    start = time.perf_counter()
    for number in itertools.count():
        if number > least and time.perf_counter() - start > seconds:
            return
        yield number


def _sff_blocks(engine, images, target):
    """Measure the blocks of an engine: LocalStep.train with a clock: the message to the next rank is sent at the end of `forward`."""
    engine.train_mode()
    seconds, route = [], engine.step.route(engine.segments(0))
    for number in _rounds():
        (part,), times, outputs = engine.step.split(images, target), [], []
        clock = Clock(engine.device)
        for index in range(len(engine.sff.blocks)):
            visit, alive = engine.step.visit(route, index, part)
            part = part._replace(alive=alive)
            forward = clock()
            if visit is not None:
                visit.backward()
                del visit
            backward = clock()
            summed = _Bucket({index: []}, [[p for p in engine.parameters[index] if p.grad is not None]], 1.0)
            for _, flat, *_ in summed.flats:
                flat.div_(flat[-1].clone())
            bucket = clock()
            engine.place.updated(index, engine.step.weight)
            times.append((forward, backward, clock(), bucket))
            outputs.append(_size(alive))
        if number:
            seconds.append(times)
    held, memory = [engine.step.split(images, target)], []
    for chain in route.chains:
        step = lambda chain=chain: held.append(engine.step.train(route, chain, held.pop()))  # noqa: E731
        memory.append(peak_memory(step, engine.device) * 2**20)
    weights = [_size(engine.parameters[index]) for index in range(len(outputs))]
    return _fastest(seconds, outputs, weights, memory)


def _backprop_blocks(engine, images, target):
    sff = engine.sff
    engine.train_mode()
    seconds = []
    for number in _rounds():
        inputs, results, times, kept = (images,), [], [], []
        clock = Clock(engine.device)
        for index, block in enumerate(sff.blocks):
            with _kept_bytes([*engine.parameters, *inputs], kept):
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
        engine.optimizer.step()
        update = clock()
        engine.optimizer.zero_grad()
        weights = [_size(block.parameters()) for block in sff.blocks]
        weights[-1] += _size(sff.readout[0].parameters())
        for index, of_block in enumerate(times):
            of_block.append(update * weights[index] / sum(weights))
        if number:
            seconds.append(times)
    return _fastest(seconds, [_size(outputs) for _, outputs, _ in results], weights, kept)


def _fastest(seconds, *others):
    """Return [Block] with the fastest times. `seconds` holds, for each round, the (forward, backward, update[, bucket]) of each block."""
    found = []
    for times, *rest in zip(zip(*seconds, strict=True), *others, strict=True):
        forward, backward, update, *bucket = (min(values) for values in zip(*times, strict=True))
        found.append(Block(forward, backward, update, *rest, *bucket))
    return found


@contextlib.contextmanager
def _kept_bytes(others, found):
    """Context manager that appends to `found` the bytes that are kept for the backward pass of what runs in it, without the tensors `others`."""
    excluded, kept = {t.untyped_storage().data_ptr() for t in others if isinstance(t, torch.Tensor)}, {}

    def note(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield
    found.append(sum(kept.values()))
