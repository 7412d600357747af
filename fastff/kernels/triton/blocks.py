"""Sizes of the goodness kernels' launches: a heuristic table, and what `fastff bench --tune` measured on the user's own GPU (tuning.py).

blocks.json in the cache folder: {name of the GPU: {"algorithm C P K cells bytes epilogue": [sizes of Blocks]}}
"""

import functools
from typing import NamedTuple

import torch

from fastff import cache

FILE = "blocks.json"


class Blocks(NamedTuple):
    """Sizes of a launch: samples, positions, channels and classes of a tile, cells of the grid, warps of the sweep and loads that are under way
    in its loops; classes of a tile and warps of second moment's head. HK of products: channels of a tile of the two gradients."""

    NS: int
    BP: int
    BC: int
    BK: int
    BG: int
    warps: int
    stages: int = 3
    HK: int = 0
    head_warps: int = 4


SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a program may have, by compute capability
# Classes that registers hold where products read W from shared memory: with more of them these devices spill.
CLASSES = {90: 128, 100: 64}
# Bytes of the grid's weights that a sweep reads, at most, for all its groups of samples: from L2 about 50 us.
GRID_BYTES = 2**28


SIDE = {2: 128, 4: 64}  # of the tiles of products, the shorter one, by the size of an element


def power_of_2(n):
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def refusal(algorithm, C, K, itemsize, epilogue=False, arch=90):
    """Why the kernels do not take a step by this algorithm, or None: the plan (ops/plan.py), `table` and `goodness.reason` all ask here.

    Direct: g, d, a row of a and a column of dL/dW for each class are in registers; where C is large, W, which does not stay on chip then, would be
    read too often, and x again for each piece of channels. Second moment: S [C, C] is in registers, in float32 beside operands."""
    if algorithm == "second_moment":
        most = 128 if SHARED[arch] >= 128 and itemsize == 2 else 64
        why = f"with {SHARED[arch]} KiB of shared memory" if itemsize == 2 else "in float32"
    elif algorithm == "direct":
        most, why = 1024, "which it reads again in pieces"
    elif algorithm == "products":
        return "products read x, which other kernels make in an epilogue" if epilogue else None
    else:
        return f"{algorithm} runs on PyTorch's operators"
    if most < C:
        return f"{algorithm} takes at most {most} channels, {why}, x has {C}"
    classes = 16 if itemsize > 2 else CLASSES.get(arch, 32) if C <= 256 and not epilogue else 32
    if algorithm == "direct" and classes < K:
        return (
            f"direct holds the classes of a sample in registers, with {C} channels at most {classes}, the head has {K}"
        )
    return None


def table(algorithm, B, C, P, K, cells, itemsize, epilogue=False, arch=90):
    """The heuristic table, for 64 K registers and the shared memory of `arch`; tests/test_triton.py compiles all of it. None where nothing fits
    (`refusal` says why).

    Direct: 64 rows, the M of a tensor core's product on sm_90 (in float32, whose products are FMA and have their operands in registers, tiles of
    2048 elements, with an epilogue or in pieces 1024); 128 channels in a piece where the rest leaves the registers, else 64. Second moment: S or M
    [BC, BC] is in registers, in float32 beside the operands of its products, so that its loads are not pipelined."""
    narrow = itemsize == 2
    BC = max(16, power_of_2(C))
    most = power_of_2(P)
    BG = max(16, power_of_2(cells)) if cells else 16
    if refusal(algorithm, C, K, itemsize, epilogue, arch):
        return None
    if algorithm == "second_moment":
        warps = (8 if BC > 64 else 4) * (1 if narrow else 2)
        positions = (32 if cells or (BC > 64 and arch == 100) else 64) // ((4 if BC > 64 else 2) if epilogue else 1)
        BP = max(16, min(most, positions if narrow else 16))
        HK = min((128 if BC <= 64 else 64) if narrow else 32, max(16, power_of_2(K)))
        return Blocks(1, BP, BC, 16 if BC > 64 else 32, BG, warps, 3 if narrow else 1, HK, 8)
    if algorithm == "products":
        side = SIDE[itemsize]
        wide = 2 * side if narrow and arch in CLASSES else side
        BP = min((min(most, n) for n in (64, 128, 256) if n <= wide), key=lambda n: (-(-P // n) * n, -n))
        NS = wide // BP
        while NS > 1 and NS * BP > 16 and NS // 2 >= B:
            NS //= 2
        step, BK = (64 if arch in CLASSES else 32) if narrow else 16, min(side, max(64, power_of_2(K)))
        return Blocks(NS, BP, step, BK, BG, 8, 3 if narrow else 2, wide)
    BK = max(16, power_of_2(K))
    few = narrow and BK <= 32 and not cells and not epilogue
    BC = min(BC, 128 if few else 64)
    R = 64 if narrow else max(16, min(64, (1024 if epilogue or C > BC else 2048) // BC))
    if narrow and (BC > 64 or epilogue) and arch not in CLASSES:
        R = 32  # operands are in registers there: with 64 rows some spill
    BP = min(R, most)
    NS = R // BP
    while NS > 1 and NS * BP > 16 and NS // 2 >= B:
        NS //= 2
    if cells:  # the grid's products have NS BG columns
        NS = min(NS, max(1, 16 // BP, 64 // BG))
    return Blocks(NS, BP, BC, BK, BG, 4 if few and BC <= 64 else 8, 3 if arch in CLASSES else 2)


def with_grid_inside(blocks, B, C, K, cells, itemsize, epilogue=False, arch=90):
    """The sizes of one sweep that computes the grid's term too, or None where the grid's weights are large, and behind an epilogue where registers do
    not hold all that: with 32 bits, where products do not read W from shared memory, and of second moment with more than 64 channels."""
    if epilogue:
        if itemsize > 2 or arch not in CLASSES or (blocks.HK and blocks.BC > 64):
            return None
        while blocks.NS * blocks.BP > 32:
            half = {"NS": blocks.NS // 2} if blocks.NS > 1 else {"BP": blocks.BP // 2}
            blocks = blocks._replace(**half, stages=2)
    read = 4 * K * C * cells * -(-B // blocks.NS) * (1 + -(-C // blocks.BC))
    return blocks if read <= GRID_BYTES else None


@functools.cache
def architecture(device):
    """The latest compute capability that `table` knows and the device has, as 10 major + minor (90 for the interpreter)."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((arch for arch in SHARED if arch <= 10 * major + minor), default=80)


def resident(blocks):
    """Programs that a multiprocessor runs at a time."""
    return max(1, 8 // blocks.warps)


def options(blocks):
    """Options of the sweep's launch; registers are those that `resident` programs leave a thread, which the assembler does not always take itself."""
    registers = min(255, 2**16 // (32 * blocks.warps * resident(blocks)))
    return {"num_warps": blocks.warps, "num_stages": blocks.stages, "maxnreg": registers}


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
    return found or table(algorithm, B, C, P, K, cells, itemsize, epilogue, architecture(device))
