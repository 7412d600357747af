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
    """Sizes of a launch: samples, positions, channels and classes of a tile, cells of the grid, warps of the sweep and loads that are under way
    in its loops; classes of a tile and warps of second moment's head."""

    NS: int
    BP: int
    BC: int
    BK: int
    BG: int
    warps: int
    stages: int = 3
    HK: int = 16
    head_warps: int = 4


MOST_CLASSES = 128  # of the direct algorithm: g, d and a row of a are in registers


def table(algorithm, B, C, P, K, cells, itemsize, epilogue=False):
    """The heuristic table, for 64 K registers; tests/test_triton.py compiles all of it. None where nothing fits (`refusal` says why)."""
    narrow = itemsize == 2
    BC = max(16, triton.next_power_of_2(C))
    most = max(16, triton.next_power_of_2(P))
    BG = max(16, triton.next_power_of_2(cells)) if cells else 16
    if algorithm == "second_moment":
        warps = (8 if BC > 64 else 4) * (1 if narrow else 2)
        positions = (64 if narrow and not cells else 32) // (2 if epilogue else 1)
        return Blocks(1, min(most, positions), BC, 16 if BC > 64 else 32, BG, warps, 3, min(64, max(16, triton.next_power_of_2(K))), 8)
    BK = max(16, triton.next_power_of_2(K))
    if BK > MOST_CLASSES:
        return None
    BC = min(BC, 128 if narrow else 64)
    R = 64
    warps = 4 if BC <= 64 else 8
    BP = min(R, triton.next_power_of_2(P))
    NS = max(R // BP, 1)
    while NS > 1 and NS * BP > 16 and NS // 2 >= B:
        NS //= 2
    if cells:  # the grid's products have NS BG columns
        NS = min(NS, max(1, 16 // BP, 64 // BG))
    return Blocks(NS, BP, BC, BK, BG, warps)


def refusal(algorithm, C, K):
    """Why `table` has no sizes."""
    return f"direct holds the classes of a sample in registers, at most {MOST_CLASSES}, the head has {K}"


def resident(blocks):
    """Programs that a multiprocessor runs at a time: 64 K registers, of which a thread may take 255."""
    return max(1, 8 // blocks.warps)


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
