"""Activations from the rank with a run of blocks to the rank with the next: the normalised, un-updated outputs, sent before the backward pass.

A message is a header (JSON on the CPU: shapes, strides, dtypes) and one buffer with all tensors in it. The receiver posts both ahead, so the message
of the next minibatch comes in while it computes this one; for that it must know the buffer's size, which therefore only grows: a smaller minibatch
leaves room at its end, a larger one is announced by an empty message. Nothing goes back, and nobody waits but for data.
"""

import json
from typing import NamedTuple

import torch
import torch.distributed as dist

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
        size = sum(_aligned(t) for t in tensors)
        with self.ranks.watch.guard():
            if size > self.room:
                self._post({"room": size})
                self.room = size
            buffer = torch.empty(self.room, dtype=torch.uint8, device=self.device)
            torch._foreach_copy_(_views(buffer, tensors), tensors)
            alive = [_form(t) if isinstance(t, torch.Tensor) else {"value": t} for t in part.alive]
            header = {"alive": alive, "target": _form(part.target), "share": part.share, "samples": part.samples}
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
        target, *tensors = _views(buffer, [_Form(form) for form in forms])
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


class _Form:
    """Shape, strides and dtype of a tensor in a header."""

    def __init__(self, form):
        self.shape, self.strides, self.dtype = form["shape"], form["stride"], DTYPES[form["dtype"]]

    def stride(self):
        return self.strides

    def numel(self):
        return torch.Size(self.shape).numel()

    def element_size(self):
        return self.dtype.itemsize


def _dense(t):
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def _form(t):
    """The receiver's tensor is as dense as this one's memory format allows."""
    strides = t.stride() if _dense(t) else torch.empty(t.shape, device="meta").stride()
    return {"shape": list(t.shape), "stride": list(strides), "dtype": str(t.dtype)}


def _aligned(t):
    return -(-t.numel() * t.element_size() // ALIGN) * ALIGN


def _views(buffer, tensors):
    views, start = [], 0
    for t in tensors:
        part = buffer[start : start + t.numel() * t.element_size()].view(t.dtype)
        stride = t.stride() if isinstance(t, _Form) or _dense(t) else torch.empty(t.shape, device="meta").stride()
        views.append(part.as_strided(list(t.shape), list(stride)))
        start += _aligned(t)
    return views
