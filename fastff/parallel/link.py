"""Activations from the rank with a run of blocks to the rank with the next: the normalised, un-updated outputs, sent before the backward pass.

A message is a header (JSON on the CPU: shapes, strides, dtypes) and one buffer with all tensors in it. The receiver posts both ahead, so the message
of the next minibatch comes in while it computes this one; for that it must know the buffer's size, which therefore only grows: a smaller minibatch
leaves room at its end, a larger one is announced by an empty message. Nothing goes back, and nobody waits but for data.
"""

import json
import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from fastff.parallel.ranks import dense_strides

HEADER = 8192  # bytes
ALIGN = 256
IN_FLIGHT = 2  # messages that a rank may be ahead of the next
DTYPES = {
    str(dtype): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}


class Part(NamedTuple):
    """A micro-batch on its way through the blocks: the tensors alive, its labels, its share of the minibatch; the minibatch's samples."""

    alive: tuple
    target: torch.Tensor
    share: float
    samples: int


class Link:
    """To the rank with the next blocks (send) and from the one before (minibatch)."""

    def __init__(self, ranks, device):
        self.ranks, self.device = ranks, device
        at = lambda rank: ranks.global_rank(ranks.block_group, rank)  # noqa: E731
        self.before = at(ranks.block_rank - 1) if ranks.block_rank > 0 else None
        self.after = at(ranks.block_rank + 1) if ranks.block_rank + 1 < ranks.block_size else None
        self.room = 0  # bytes of the next rank's buffer
        self.flying = []
        self.coming = None

    # --- to the next rank

    def send(self, part, count):
        """Send `part`, of `count` parts of its minibatch, on."""
        tensors = [t for t in (part.target, *part.alive) if isinstance(t, torch.Tensor)]
        forms = [_form(t) for t in tensors]
        size = sum(map(_aligned, forms))
        with self.ranks.watch.guard():
            if size > self.room:
                self._post({"room": size})
                self.room = size
            buffer = torch.empty(self.room, dtype=torch.uint8, device=self.device)
            torch._foreach_copy_(_views(buffer, forms), tensors)
            target, *rest = forms
            rest = iter(rest)
            alive = [next(rest) if isinstance(t, torch.Tensor) else {"value": t} for t in part.alive]
            header = {"alive": alive, "target": target, "share": part.share, "samples": part.samples}
            self._post(header | {"parts": count}, buffer)

    def _post(self, header, buffer=None):
        text = json.dumps(header).encode()
        if len(text) > HEADER:
            raise ValueError(
                f"sff: {len(header['alive'])} tensors are alive behind the last block of rank {self.ranks.rank}, more than a message describes"
            )
        text = torch.frombuffer(bytearray(text.ljust(HEADER)), dtype=torch.uint8)
        if buffer is None:  # what the receiver has posted for the tensors is of the old size
            buffer = torch.empty(self.room, dtype=torch.uint8, device=self.device)
        while len(self.flying) >= IN_FLIGHT:
            for work, _ in self.flying.pop(0):
                work.wait()
        works = [(dist.isend(text, self.after, group=self.ranks.control), text)]
        if len(buffer):
            works.append((dist.isend(buffer, self.after, group=self.ranks.messages), buffer))
        self.flying.append(works)

    # --- from the rank before

    def minibatch(self):
        """Yields the Parts of the next minibatch, and how many they are."""
        parts, index = 1, 0
        while index < parts:
            part, parts = self._receive()
            yield part, parts
            index += 1

    def _receive(self):
        while True:
            if self.coming is None:
                self._expect(0)
            text, buffer, works = self.coming
            with self.ranks.watch.guard():
                for work in works:
                    work.wait()
            header = json.loads(text.numpy().tobytes())
            if "room" not in header:
                break
            self._expect(header["room"])
        self._expect(len(buffer))
        forms = [header["target"], *(form for form in header["alive"] if "shape" in form)]
        target, *tensors = _views(buffer, forms)
        tensors = iter(tensors)
        alive = tuple(next(tensors) if "shape" in form else form["value"] for form in header["alive"])
        return Part(alive, target, header["share"], header["samples"]), header["parts"]

    def _expect(self, room):
        """Be ready for the next message before it is needed."""
        text = torch.empty(HEADER, dtype=torch.uint8)
        buffer = torch.empty(room, dtype=torch.uint8, device=self.device)
        with self.ranks.watch.guard():
            works = [dist.irecv(text, self.before, group=self.ranks.control)]
            if room:
                works.append(dist.irecv(buffer, self.before, group=self.ranks.messages))
        self.coming = text, buffer, works


def _form(t):
    """What a header says of a tensor: as dense at the receiver as its memory format allows."""
    return {"shape": list(t.shape), "stride": list(dense_strides(t)), "dtype": str(t.dtype)}


def _bytes(form):
    return math.prod(form["shape"]) * DTYPES[form["dtype"]].itemsize


def _aligned(form):
    return -(-_bytes(form) // ALIGN) * ALIGN


def _views(buffer, forms):
    """Tensors of these forms in the buffer, one after the other."""
    views, start = [], 0
    for form in forms:
        part = buffer[start : start + _bytes(form)].view(DTYPES[form["dtype"]])
        views.append(part.as_strided(form["shape"], form["stride"]))
        start += _aligned(form)
    return views
