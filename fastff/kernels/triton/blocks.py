"""Sizes of the goodness kernels' launches: a heuristic table, and what `fastff bench --tune` measured on the user's own GPU (tuning.py).

blocks.json in the cache folder: {name of the GPU: {"algorithm C P K cells bytes epilogue": [sizes of Blocks]}}
"""

import functools
from typing import NamedTuple

import torch
import triton

from fastff import cache

FILE = "blocks.json"


class Blocks(NamedTuple):
    """Sizes of a launch: samples, positions, channels and classes of a tile, cells of the grid, warps of the sweeps and of the head."""

    NS: int
    BP: int
    BC: int
    BK: int
    BG: int
    warps: int
    head_warps: int


def table(algorithm, B, C, P, K, cells, itemsize, epilogue=False):
    """The heuristic table, for 64 K registers and 160 KiB of shared memory (sm_80, 90, 100); tests/test_triton.py compiles all of it.

    Direct holds a tile X [BC, R] in shared memory and its gradient [BC, R] in registers, with one [BK, BC] of W at a time; R is what leaves no
    spill. 16 bits: 16 K elements, on tensor cores; 16 positions and twice the warps from BC = 512 on. float32: products are FMA, whose
    operands take registers too: 4 K elements, BC <= 256.
    Second moment holds S or M [BC, BC] in registers: at BC = 128 that is 128 a thread with 4 warps, so it has 8 (16 in float32).
    With an epilogue, y and the residual of a tile are in registers beside it: half as many positions, 8 warps in the head from float16 on."""
    narrow = itemsize == 2
    BC = max(16, triton.next_power_of_2(C))
    most = triton.next_power_of_2(P)
    BG = max(16, triton.next_power_of_2(cells)) if cells else 16
    if algorithm == "second_moment":
        warps = (8 if BC > 64 else 4) * (1 if narrow else 2)
        positions = (64 if narrow and not cells else 32) // (2 if epilogue else 1)
        return Blocks(1, min(max(16, most), positions), BC, 16 if BC > 64 else 32, BG, warps, warps)
    R = max(16, min(64, (16384 if narrow and BC < 512 else 4096) // BC) // (2 if epilogue else 1))
    BP = min(R, most)
    NS = max(R // BP, 1)
    while NS > 1 and NS * BP > 16 and NS // 2 >= B:
        NS //= 2
    if cells:  # the grid's products have NS BG columns
        NS = min(NS, max(1, 16 // BP, 64 // BG))
    BK = min(max(16, triton.next_power_of_2(K)), 32 if BC <= 128 and narrow else 16)
    warps = 16 if BC > 256 else 8 if BC > 128 or not narrow or (epilogue and BC > 64) else 4 if BC > 16 else 2
    return Blocks(NS, BP, BC, BK, BG, warps, warps if narrow or epilogue else 4)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def key_of(algorithm, C, P, K, cells, itemsize, epilogue):
    return f"{algorithm} {C} {P} {K} {cells} {itemsize} {int(epilogue)}"


@functools.lru_cache
def measured(name):
    """{key: Blocks} for a GPU of this name."""
    found = cache.read(FILE).get(name, {})
    return {key: Blocks(*sizes) for key, sizes in found.items() if len(sizes) == len(Blocks._fields)}


def sizes(device, algorithm, B, C, P, K, cells, itemsize, epilogue=False):
    """Sizes of a launch: measured for this shape, or by the table."""
    found = measured(device_name(device)).get(key_of(algorithm, C, P, K, cells, itemsize, epilogue))
    return found or table(algorithm, B, C, P, K, cells, itemsize, epilogue)
