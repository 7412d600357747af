"""Predicts the time of goodness_step with layer normalization on a GPU, from bytes, FLOPs and launches of the Triton kernels, and of torch.compile.

    python -m benchmarks.roofline [--csv FILE]

The rates are those of an H100 SXM: 3.35 TB/s of device memory, 989 TFLOP/s in bfloat16, 495 in TF32 (NVIDIA's), and 5.5 TB/s between L2 and
the multiprocessors (others' measurements). The time of a kernel is the largest of the times of its bytes in memory, its bytes through L2 and its
FLOPs at these rates; a launch that is not hidden costs 4 us. The floor reads x once and writes the gradient and the next input once.

torch.compile is taken to make of the eager step on bfloat16 x in channels_last memory: W and dL/dW in the other dtype, the loss with d, and
layer normalization, a kernel each; three products of cuBLAS in tiles of 128 x 256; and between them two kernels of elementwise work on a [B P, K],
the sums of a^2, and d * a, written for the last two products to read. Nothing fuses into a product of cuBLAS. On an H100 cuBLAS has programs that
share what they load (clusters), which the kernels here have not; how much that saves is unknown. So there are two ratios: with L2 read tile by tile
as by our products, and with L2 bounding no product of cuBLAS. The truth lies between.

These are predictions, not measurements. They say what bounds a kernel, and a measured time can be compared with them.
"""

import argparse
from typing import NamedTuple

from benchmarks import tables
from benchmarks.timing import print_environment, write_csv
from fastff.kernels.triton import blocks
from fastff.ops.plan import Gpu, plan
from fastff.spec import Plan

BYTES, L2_BYTES, BF16, TF32, LAUNCH = 3.35e12, 5.5e12, 989e12, 495e12, 4e-6
MULTIPROCESSORS, L2 = 132, 30e6  # of 50 MB, what stays while results pass through
CIFAR = [(512, 64, 32), (512, 128, 16), (512, 256, 8), (512, 512, 4)]
IMAGENET = [
    *((256, 64, 56), (256, 128, 28), (256, 256, 14), (256, 512, 7)),
    *((256, 1024, 14), (256, 2048, 7), (256, 24, 56), (256, 40, 28), (256, 112, 14), (256, 960, 7)),
]
SHAPES = [(*shape, K) for shape in CIFAR for K in (10, 100, 1000)] + [(*shape, 1000) for shape in IMAGENET]


class Kernel(NamedTuple):
    """What a launch moves and computes: bytes of memory, bytes through L2 (at least as many), bfloat16 FLOPs, TF32 FLOPs."""

    moved: float
    through: float
    bf16: float = 0
    tf32: float = 0

    def seconds(self):
        """Return (time, "memory", "L2" or "products": what bounds it)."""
        by = {
            "memory": self.moved / BYTES,
            "L2": self.through / L2_BYTES,
            "products": self.bf16 / BF16 + self.tf32 / TF32,
        }
        bound = max(by, key=by.get)
        return by[bound], bound


def elementwise(*tensors):
    """A launch that reads or writes tensors of so many bytes once."""
    return Kernel(sum(tensors), sum(tensors))


def product(M, N, K, tile, result=2, read=0, rows=None):
    """[M, K] x [K, N] in bfloat16: memory has each operand once, L2 each as often as there are tiles beside it, of the rows that exist, and `read`
    bytes more. result: bytes of an element of the result."""
    down, across = -(-M // tile[0]), -(-N // tile[1])
    a, b, c = 2 * (rows or M) * K, 2 * K * N, result * (rows or M) * N
    return Kernel(a + b + c + read, a * across + b * down + c + read, 2 * down * tile[0] * across * tile[1] * K)


def layer_norm(x):
    """It reads samples a second time from L2."""
    return Kernel(2 * x, 3 * x)


def products(B, C, P, K, sizes):
    """The launches of fastff/kernels/triton/goodness/products.py."""
    rows, head, d, side, pieces = B * P, K * C, 2 * B * K, blocks.SIDE[2], -(-C // sizes.HK)
    padded = -(-B // sizes.NS) * sizes.NS * -(-P // sizes.BP) * sizes.BP
    tiles = pieces * -(-K // sizes.BK)
    parts = max(1, min(MULTIPROCESSORS // tiles, -(-rows // sizes.BC)))
    beside = 2 * K * (-(-rows // side) + B) * pieces  # d of the samples of each tile
    x, a, partial = 2 * rows * C, 2 * rows * K, 4 * head * parts
    goodness = 4 * B * K * -(-P // sizes.BP)
    return [
        elementwise(4 * head, 2 * head),
        product(padded, K, C, (sizes.NS * sizes.BP, sizes.BK), read=goodness, rows=rows),
        *([elementwise(goodness, 4 * B * K)] if sizes.BP < P else []),
        elementwise(4 * B * K, d),
        product(rows, C, K, (side, sizes.HK), read=beside),
        Kernel(
            x + a + d + partial, x * -(-K // sizes.BK) + a * pieces + beside + partial, 2 * rows * sizes.HK * sizes.BK * tiles
        ),
        elementwise(partial, 4 * head),
        layer_norm(x),
    ]  # fmt: skip


def compiled(B, C, P, K):
    """The launches of torch.compile."""
    rows, head, tile = B * P, K * C, (128, 256)
    a = 2 * rows * K
    return [
        elementwise(4 * head, 2 * head),
        product(rows, K, C, tile),
        elementwise(a, 4 * B * K),
        elementwise(4 * B * K, 4 * B * K),
        elementwise(a, a, 4 * B * K),
        product(rows, C, K, tile),
        product(K, C, rows, tile),
        elementwise(2 * head, 4 * head),
        layer_norm(2 * rows * C),
    ]


def sweep(B, C, P, K, how: Plan):
    """The launches of a plan of direct, second moment or products."""
    sizes = blocks.table(how.algorithm, B, C, P, K, 0, 2)
    if how.algorithm == "products":
        return products(B, C, P, K, sizes)
    x, head = 2 * B * C * P, 4 * K * C
    pieces, tiles, groups = -(-C // sizes.BC), -(-P // sizes.BP), -(-B // sizes.NS)
    programs = min(groups, max(1, MULTIPROCESSORS * blocks.resident(sizes) // pieces))
    # Samples stay in L2 until they are read again if those of all running programs fit.
    moved = 3 * x + (0 if programs * sizes.NS * C * P * 2 < L2 else x) + head + 3 * 4 * B * K
    if how.algorithm == "direct":
        outputs = 1 if tiles == 1 else 2  # times that a is computed, from all pieces of x, by the program of each piece
        weights = 4 * sizes.BK * C * pieces * groups * tiles * outputs if pieces > 1 else 0
        flops = 2 * B * P * C * sizes.BK * (outputs * pieces + 2)
        partial = programs * head
        return [
            Kernel(moved + partial, (outputs * pieces + 3) * x + weights + partial, flops),
            elementwise(partial),
        ]
    second, tiles = 4 * B * C * C, -(-K // sizes.HK)
    parts = max(1, 2 * MULTIPROCESSORS // tiles)
    return [
        Kernel(moved + second, 4 * x + second + 2 * B * head, 2 * 2 * B * P * C * C, 2 * 2 * B * K * C * C),
        Kernel(second + parts * head, tiles * second + parts * head, 0, 2 * B * K * C * C),
        elementwise(parts * head),
    ]


def total(launches):
    """Return (seconds of a step, what bounds its longest launch)."""
    times = [each.seconds() for each in launches]
    return sum(time for time, _ in times) + LAUNCH * len(launches), max(times)[1]


def predicted(B, C, H, K):
    """Return a row of the table."""
    how = plan(B, C, H * H, K, device_type="cuda", gpu=Gpu(2, 90))
    launches, theirs = sweep(B, C, H * H, K, how), compiled(B, C, H * H, K)
    (ours, bound), (time, _) = total(launches), total(theirs)
    least, _ = total([each._replace(through=each.moved) if each.bf16 else each for each in theirs])
    floor = 3 * 2 * B * C * H * H / BYTES
    return {
        "B": B, "C": C, "H": H, "K": K, "algorithm": how.algorithm,
        "mbytes": sum(each.moved for each in launches) / 1e6, "l2_mbytes": sum(each.through for each in launches) / 1e6,
        "gflop": sum(each.bf16 + each.tf32 for each in launches) / 1e9, "bound": bound, "launches": len(launches),
        "total_us": ours * 1e6, "floor_us": floor * 1e6, "times_floor": ours / floor,
        "compiled_mbytes": sum(each.moved for each in theirs) / 1e6, "compiled_us": time * 1e6, "ratio": time / ours,
        "least_ratio": least / ours,
    }  # fmt: skip


def table():
    found = tables.read("roofline")
    if not found:
        return tables.missing("python -m benchmarks.roofline --csv benchmarks/results/roofline.csv")
    header = (
        "B, C, H, K", "algorithm", "MB", "MB through L2", "GFLOP", "bound by", "predicted us", "x floor",
        "torch.compile MB", "torch.compile us", "torch.compile / fastff", "if L2 does not bound cuBLAS",
    )  # fmt: skip
    body = [
        (
            f"{r['B']}, {r['C']}, {r['H']}, {r['K']}", r["algorithm"].replace("_", " "), f"{float(r['mbytes']):.0f}",
            f"{float(r['l2_mbytes']):.0f}", f"{float(r['gflop']):.1f}", r["bound"], f"{float(r['total_us']):.0f}", f"{float(r['times_floor']):.2f}",
            f"{float(r['compiled_mbytes']):.0f}", f"{float(r['compiled_us']):.0f}", f"{float(r['ratio']):.2f}",
            f"{float(r['least_ratio']):.2f}",
        )
        for r in found
    ]  # fmt: skip
    return tables.table(header, body)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv")
    a = parser.parse_args()
    print_environment()
    print("predicted for an H100 SXM, bfloat16, microseconds; nothing here was measured on a GPU")
    found = [predicted(*shape) for shape in SHAPES]
    for r in found:
        shape = f"({r['B']}, {r['C']}, {r['H']}, {r['K']})"
        print(
            f"{shape:22} {r['algorithm']:14} {r['mbytes']:6.0f} MB, {r['l2_mbytes']:6.0f} through L2, {r['gflop']:6.1f} GFLOP, by {r['bound']:8} "
            f"{r['total_us']:5.0f} us, {r['times_floor']:5.2f} x floor; torch.compile {r['compiled_mbytes']:5.0f} MB, {r['compiled_us']:5.0f} us, "
            f"{r['ratio']:.2f} x, at least {r['least_ratio']:.2f} x"
        )
    if a.csv:
        write_csv(a.csv, found)


if __name__ == "__main__":
    main()
