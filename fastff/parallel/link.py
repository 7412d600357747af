"""Sends activations from a rank to the rank with the next blocks: the normalized outputs of its last block, before that block's backward pass.

A message is a header (JSON on the CPU: shapes, strides, dtypes) and one buffer that holds all tensors. The receiver posts its receive calls in
advance, so that the next message arrives while it computes on this one. For that it must know the size of the buffer. So the size only grows: a
smaller minibatch leaves the end of the buffer unused, and a message without data announces a larger size. Nothing is sent back, and a rank waits
only for its data.
"""

import json
import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from fastff.parallel.ranks import dense_strides

HEADER = 8192  # bytes of a header, padded with spaces
ALIGN = 256  # bytes; every tensor in the buffer starts at a multiple of it
IN_FLIGHT = 2  # messages that may be sent before the receiver has taken the first of them
DTYPES = {
    str(dtype): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}


class Part(NamedTuple):
    """A micro-batch on its way through the blocks.

    Fields:
        alive: the tensors (and other values) that later blocks still read; the first is the next block's input [b, ...].
        target: labels [b] int64.
        share: b / samples, the weight of the micro-batch in the minibatch's gradients.
        samples: number of samples in the whole minibatch."""

    alive: tuple
    target: torch.Tensor
    share: float
    samples: int


class Link:
    """Connection to the rank with the next blocks (`send`) and to the rank with the previous ones (`minibatch`)."""

    def __init__(self, ranks, device):
        self.ranks, self.device = ranks, device
        row = dist.get_process_group_ranks(ranks.block_group)  # of the ranks of this replica, among all
        self.previous = row[ranks.block_rank - 1] if ranks.block_rank > 0 else None
        self.next = row[ranks.block_rank + 1] if ranks.block_rank + 1 < ranks.block_size else None
        self.capacity = 0  # bytes of the buffer that the next rank has posted
        self.in_flight = []  # sends that may still run: one list of (work, tensor) a message
        self.posted = None  # (header, buffer, works) of the receive calls that wait for the next message

    def send(self, part, count):
        """Send `part` to the next rank. `count` is the number of parts that its minibatch has."""
        tensors = [t for t in (part.target, *part.alive) if isinstance(t, torch.Tensor)]
        layouts = [_layout(t) for t in tensors]
        size = sum(map(_aligned_bytes, layouts))
        with self.ranks.watch.guard():
            if size > self.capacity:
                self._send({"capacity": size})
                self.capacity = size
            buffer = torch.empty(self.capacity, dtype=torch.uint8, device=self.device)
            torch._foreach_copy_(_views(buffer, layouts), tensors)
            target, *rest = layouts
            rest = iter(rest)
            alive = [next(rest) if isinstance(t, torch.Tensor) else {"value": t} for t in part.alive]
            header = {"alive": alive, "target": target, "share": part.share, "samples": part.samples}
            self._send(header | {"parts": count}, buffer)

    def _send(self, header, buffer=None):
        text = json.dumps(header).encode()
        if len(text) > HEADER:
            raise ValueError(
                f"sff: {len(header['alive'])} tensors are alive behind the last block of rank {self.ranks.rank}, more than a message describes"
            )
        text = torch.frombuffer(bytearray(text.ljust(HEADER)), dtype=torch.uint8)
        if buffer is None:  # the receive call that is posted for the tensors still expects the old size
            buffer = torch.empty(self.capacity, dtype=torch.uint8, device=self.device)
        while len(self.in_flight) >= IN_FLIGHT:
            for work, _ in self.in_flight.pop(0):
                work.wait()
        works = [(dist.isend(text, self.next, group=self.ranks.control), text)]
        if len(buffer):
            works.append((dist.isend(buffer, self.next, group=self.ranks.messages), buffer))
        self.in_flight.append(works)

    def minibatch(self):
        """Receive the next minibatch: yields (Part, number of parts) for each part of it."""
        parts, index = 1, 0
        while index < parts:
            part, parts = self._receive()
            yield part, parts
            index += 1

    def _receive(self):
        while True:
            if self.posted is None:
                self._post_receive(0)
            text, buffer, works = self.posted
            with self.ranks.watch.guard():
                for work in works:
                    work.wait()
            header = json.loads(text.numpy().tobytes())
            if "capacity" not in header:
                break
            self._post_receive(header["capacity"])
        self._post_receive(len(buffer))
        layouts = [header["target"], *(item for item in header["alive"] if "shape" in item)]
        target, *tensors = _views(buffer, layouts)
        tensors = iter(tensors)
        alive = tuple(next(tensors) if "shape" in item else item["value"] for item in header["alive"])
        return Part(alive, target, header["share"], header["samples"]), header["parts"]

    def _post_receive(self, capacity):
        """Start to receive the next message, whose buffer has `capacity` bytes, without waiting for it."""
        text = torch.empty(HEADER, dtype=torch.uint8)
        buffer = torch.empty(capacity, dtype=torch.uint8, device=self.device)
        with self.ranks.watch.guard():
            works = [dist.irecv(text, self.previous, group=self.ranks.control)]
            if capacity:
                works.append(dist.irecv(buffer, self.previous, group=self.ranks.messages))
        self.posted = text, buffer, works


def _layout(t):
    """A header's entry for tensor t. The strides are those of a copy without gaps."""
    return {"shape": list(t.shape), "stride": list(dense_strides(t)), "dtype": str(t.dtype)}


def _bytes(layout):
    return math.prod(layout["shape"]) * DTYPES[layout["dtype"]].itemsize


def _aligned_bytes(layout):
    return -(-_bytes(layout) // ALIGN) * ALIGN


def _views(buffer, layouts):
    """Tensors with these layouts that lie in `buffer` one after the other."""
    views, start = [], 0
    for layout in layouts:
        values = buffer[start : start + _bytes(layout)].view(DTYPES[layout["dtype"]])
        views.append(values.as_strided(layout["shape"], layout["stride"]))
        start += _aligned_bytes(layout)
    return views
