"""Predicts the time of goodness_step with layer normalization on a GPU, from bytes, FLOPs and launches of the Triton kernels.

    python -m benchmarks.roofline [--csv FILE]

The rates are those of an H100 SXM: 3.35 TB/s of device memory, 989 TFLOP/s in bfloat16, 495 in TF32 (NVIDIA's), and 5.5 TB/s between L2 and
the multiprocessors (others' measurements). The time of a kernel is the largest of the times of its bytes in memory, its bytes through L2 and its
FLOPs at these rates; a launch that is not hidden costs 4 us. The floor reads x once and writes the gradient and the next input once. These are
predictions, not measurements. They say what bounds a kernel, and a measured time can be compared with them.
"""

import argparse

from benchmarks import tables
from benchmarks.timing import print_environment, write_csv
from fastff.ops.plan import Gpu, plan
from fastff.spec import Plan

BYTES, L2_BYTES, BF16, TF32, LAUNCH = 3.35e12, 5.5e12, 989e12, 495e12, 4e-6
MULTIPROCESSORS, L2 = 132, 30e6  # of 50 MB, what stays while results pass through
CIFAR = [(512, 64, 32), (512, 128, 16), (512, 256, 8), (512, 512, 4)]
IMAGENET = [(256, 64, 56), (256, 128, 28), (256, 256, 14), (256, 512, 7), (256, 24, 56), (256, 112, 14), (256, 960, 7)]
SHAPES = [(*shape, K) for shape in CIFAR for K in (10, 100, 1000)] + [(*shape, 1000) for shape in IMAGENET]


def sweep(B, C, P, K, how: Plan):
    """Return (bytes of memory, bytes through L2, bfloat16 FLOPs, TF32 FLOPs) of each launch, or of three products where no kernel takes the step."""
    from fastff.kernels.triton import blocks

    sizes = blocks.table(how.algorithm, B, C, P, K, 0, 2)
    x, a, head = 2 * B * C * P, 2 * B * K * P, 4 * K * C
    if sizes is None:  # a = x W^T and its square; (a d) W and the normalization; (a d)^T x
        return [(4 * x + 5 * a + 3 * head, 4 * x + 5 * a + 3 * head, 2 * 3 * B * P * C * K, 0)]
    pieces, tiles, groups = -(-C // sizes.BC), -(-P // sizes.BP), -(-B // sizes.NS)
    programs = min(groups, max(1, MULTIPROCESSORS * blocks.resident(sizes) // pieces))
    # Samples stay in L2 until they are read again if those of all running programs fit.
    moved = 3 * x + (0 if programs * sizes.NS * C * P * 2 < L2 else x) + head + 3 * 4 * B * K
    if how.algorithm == "direct":
        outputs = 1 if tiles == 1 else 2  # times that a is computed, from all pieces of x, by the program of each piece
        weights = 4 * sizes.BK * C * pieces * groups * tiles * outputs if pieces > 1 else 0
        products = 2 * B * P * C * sizes.BK * (outputs * pieces + 2)
        partial = programs * head
        return [
            (moved + partial, (outputs * pieces + 3) * x + weights + partial, products, 0),
            (partial, partial, 0, 0),
        ]
    second, tiles = 4 * B * C * C, -(-K // sizes.HK)
    parts = max(1, 2 * MULTIPROCESSORS // tiles)
    return [
        (moved + second, 4 * x + second + 2 * B * head, 2 * 2 * B * P * C * C, 2 * 2 * B * K * C * C),
        (second + parts * head, tiles * second + parts * head, 0, 2 * B * K * C * C),
        (parts * head, parts * head, 0, 0),
    ]


def seconds(moved, through, bf16, tf32):
    """Return (time of a kernel, "memory", "L2" or "products": what bounds it)."""
    by = {"memory": moved / BYTES, "L2": through / L2_BYTES, "products": bf16 / BF16 + tf32 / TF32}
    bound = max(by, key=by.get)
    return by[bound], bound


def rows():
    for B, C, H, K in SHAPES:
        P = H * H
        how = plan(B, C, P, K, device_type="cuda", gpu=Gpu(2, 90))
        launches = sweep(B, C, P, K, how)
        times = [seconds(*each) for each in launches]
        total = sum(time for time, _ in times) + LAUNCH * len(launches)
        floor = 3 * 2 * B * C * P / BYTES
        yield {
            "B": B, "C": C, "H": H, "K": K, "algorithm": how.algorithm,
            "mbytes": sum(each[0] for each in launches) / 1e6, "l2_mbytes": sum(each[1] for each in launches) / 1e6,
            "gflop": sum(each[2] + each[3] for each in launches) / 1e9, "bound": max(times)[1], "launches": len(launches),
            "total_us": total * 1e6, "floor_us": floor * 1e6, "times_floor": total / floor,
        }  # fmt: skip


def table():
    found = tables.read("roofline")
    if not found:
        return tables.missing("python -m benchmarks.roofline --csv benchmarks/results/roofline.csv")
    header = (
        "B, C, H, K",
        "algorithm",
        "MB",
        "MB through L2",
        "GFLOP",
        "bound by",
        "predicted us",
        "floor us",
        "x floor",
    )
    body = [
        (
            f"{r['B']}, {r['C']}, {r['H']}, {r['K']}", r["algorithm"].replace("_", " "), f"{float(r['mbytes']):.0f}",
            f"{float(r['l2_mbytes']):.0f}", f"{float(r['gflop']):.1f}", r["bound"], f"{float(r['total_us']):.0f}", f"{float(r['floor_us']):.0f}",
            f"{float(r['times_floor']):.2f}",
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
    print(
        f"{'(B, C, H, K)':22} {'algorithm':14} {'MB':>6} {'L2 MB':>6} {'GFLOP':>6} {'bound':9} {'total':>6} {'floor':>6} {'x floor':>8}"
    )
    found = list(rows())
    for r in found:
        shape = f"({r['B']}, {r['C']}, {r['H']}, {r['K']})"
        print(
            f"{shape:22} {r['algorithm']:14} {r['mbytes']:6.0f} {r['l2_mbytes']:6.0f} {r['gflop']:6.1f} {r['bound']:9} "
            f"{r['total_us']:6.0f} {r['floor_us']:6.0f} {r['times_floor']:8.2f}"
        )
    if a.csv:
        write_csv(a.csv, found)


if __name__ == "__main__":
    main()
