"""Sends activations from a rank to the rank with the next blocks: the normalized outputs of its last block, before that block's backward pass.

A message is a header (pickled: the part, with tensors on the device "meta" in the place of its own) and one buffer that holds all tensors. The
receiver posts its receive calls in advance, so that the next message arrives while it computes on this one. For that it must know the size of the
buffer. So the size only grows: a smaller minibatch leaves the end of the buffer unused, and a message without data announces a larger size. Nothing
is sent back, and a rank waits only for its data.
"""

import pickle
from typing import NamedTuple

import torch
import torch.distributed as dist

HEADER = 8192  # bytes of a header
ALIGN = 256  # bytes of the first buffer; in a buffer, every tensor starts at a multiple of it
IN_FLIGHT = 2  # messages that may be sent before the receiver has taken the first of them


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
        self.capacity = ALIGN  # bytes of the buffer that the next rank has posted
        self.in_flight = []  # sends that may still run: one list of (work, tensor) a message
        self.posted = None  # (header, buffer, works) of the receive calls that wait for the next message

    def send(self, part, count):
        """Send `part` to the next rank. `count` is the number of parts that its minibatch has."""
        likes = [torch.empty_like(t, device="meta") for t in _tensors(part)]
        size = sum(map(_room, likes))
        with self.ranks.watch.guard():
            if size > self.capacity:
                # the receive call that is posted for the tensors still expects the old size
                self._send(size, torch.empty(self.capacity, dtype=torch.uint8, device=self.device))
                self.capacity = size
            buffer = torch.empty(self.capacity, dtype=torch.uint8, device=self.device)
            torch._foreach_copy_(_views(buffer, likes), _tensors(part))
            self._send((_with_tensors(part, likes), count), buffer)

    def _send(self, header, buffer):
        """Send (part, number of parts) with its buffer, or the size that buffers have from the next message on."""
        text = pickle.dumps(header)
        if len(text) > HEADER:
            raise ValueError(
                f"sff: {len(header[0].alive)} tensors are alive behind the last block of rank {self.ranks.rank}, more than a message describes"
            )
        text = torch.frombuffer(bytearray(text.ljust(HEADER)), dtype=torch.uint8)
        while len(self.in_flight) >= IN_FLIGHT:
            for work, _ in self.in_flight.pop(0):
                work.wait()
        both = (text, self.ranks.control), (buffer, self.ranks.messages)
        self.in_flight.append([(dist.isend(t, self.next, group=group), t) for t, group in both])

    def minibatch(self):
        """Receive the next minibatch: yields (Part, number of parts) for each part of it."""
        part, count = self._receive()
        yield part, count
        for _ in range(count - 1):
            yield self._receive()

    def _receive(self):
        if self.posted is None:
            self._post_receive(ALIGN)
        text, buffer, works = self.posted
        self.ranks.watch.wait(works)
        header = pickle.loads(text.numpy())
        if isinstance(header, int):
            self._post_receive(header)
            return self._receive()
        self._post_receive(len(buffer))
        part, count = header
        return _with_tensors(part, _views(buffer, _tensors(part))), count

    def _post_receive(self, capacity):
        """Start to receive the next message, whose buffer has `capacity` bytes, without waiting for it."""
        text = torch.empty(HEADER, dtype=torch.uint8)
        buffer = torch.empty(capacity, dtype=torch.uint8, device=self.device)
        with self.ranks.watch.guard():
            both = (text, self.ranks.control), (buffer, self.ranks.messages)
            works = [dist.irecv(t, self.previous, group=group) for t, group in both]
        self.posted = text, buffer, works


def _tensors(part):
    return [t for t in (part.target, *part.alive) if isinstance(t, torch.Tensor)]


def _with_tensors(part, tensors):
    """The part with these in the place of its own tensors, in their order."""
    rest = iter(tensors)
    target, *alive = (next(rest) if isinstance(t, torch.Tensor) else t for t in (part.target, *part.alive))
    return part._replace(target=target, alive=tuple(alive))


def _room(t):
    """Bytes of the buffer that hold a tensor."""
    return -(-t.nbytes // ALIGN) * ALIGN


def _views(buffer, likes):
    """Tensors that lie in `buffer` one after the other, with the shapes, strides and dtypes of these, which are without gaps."""
    views, start = [], 0
    for t in likes:
        views.append(buffer[start : start + t.nbytes].view(t.dtype).as_strided(t.shape, t.stride()))
        start += _room(t)
    return views
