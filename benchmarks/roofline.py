"""Predicts the time of goodness_step with layer normalization on a GPU, from bytes, FLOPs and launches of the Triton kernels.

    python -m benchmarks.roofline [--csv FILE]

The rates are NVIDIA's for an H100 SXM: 3.35 TB/s, 989 TFLOP/s in bfloat16, 495 in TF32. The time of a kernel is the larger of the times of its bytes
and its FLOPs at these rates; a launch that is not hidden costs 4 us. The floor reads x once and writes the gradient and the next input once. These
are predictions, not measurements. They say what bounds a kernel, and a measured time can be compared with them.
"""

import argparse

from benchmarks import tables
from benchmarks.timing import print_environment, write_csv
from fastff.ops.plan import plan
from fastff.spec import Plan

BYTES, BF16, TF32, LAUNCH = 3.35e12, 989e12, 495e12, 4e-6
MULTIPROCESSORS, L2 = 132, 50e6
SECOND_MOMENT_CHANNELS = 128  # fastff/kernels/triton/goodness.py
CIFAR = [(512, 64, 32), (512, 128, 16), (512, 256, 8), (512, 512, 4)]
IMAGENET = [(256, 64, 56), (256, 128, 28), (256, 256, 14), (256, 512, 7), (256, 24, 56), (256, 112, 14), (256, 960, 7)]
SHAPES = [(*shape, K) for shape in CIFAR for K in (10, 100, 1000)] + [(*shape, 1000) for shape in IMAGENET]


def sweeps(B, C, P, K, how: Plan):
    """Return (bytes, bfloat16 FLOPs, TF32 FLOPs) of the launch that reads x twice: for the goodness, and for its gradient."""
    x, head = 2 * B * C * P, 4 * K * C
    # Samples stay in L2 between the two sweeps if those of all running programs fit. The weight is read from memory once.
    again = 0 if MULTIPROCESSORS * 2 * C * P * 2 < L2 else x
    moved = 3 * x + again + head + 3 * 4 * B * K
    if how.algorithm == "direct":
        return moved, 2 * 3 * B * P * C * K, 0
    return moved + 4 * B * C * C, 2 * 2 * B * P * C * C, 2 * 2 * B * K * C * C


def head(B, C, P, K, how: Plan):
    """Return (bytes, bfloat16 FLOPs, TF32 FLOPs) of the launch for dL/dW, with the partial sums and their addition."""
    tile = 32 if C <= 128 else 16
    parts = max(1, 2 * MULTIPROCESSORS // -(-K // tile))
    partial = 2 * 4 * parts * K * C
    if how.algorithm == "direct":
        return 2 * B * C * P + partial + 4 * B * K, 2 * 2 * B * P * C * K, 0
    return 4 * B * C * C + partial + 4 * B * K, 0, 2 * B * K * C * C


def seconds(moved, bf16, tf32):
    """Return (time of a kernel, "memory" or "products": what bounds it)."""
    by = {"memory": moved / BYTES, "products": bf16 / BF16 + tf32 / TF32}
    bound = max(by, key=by.get)
    return by[bound], bound


def rows():
    for B, C, H, K in SHAPES:
        P = H * H
        how = plan(B, C, P, K, device_type="cuda", most=SECOND_MOMENT_CHANNELS)
        first, second = sweeps(B, C, P, K, how), head(B, C, P, K, how)
        (a, bound), (b, _) = seconds(*first), seconds(*second)
        floor = 3 * 2 * B * C * P / BYTES
        eager = (2 * B * C * P * 3 + 2 * B * K * P * 6) / BYTES + 2 * 3 * B * P * C * K / BF16
        yield {
            "B": B, "C": C, "H": H, "K": K, "algorithm": how.algorithm, "mbytes": (first[0] + second[0]) / 1e6,
            "gflop": (sum(first[1:]) + sum(second[1:])) / 1e9, "bound": bound, "sweeps_us": a * 1e6, "head_us": b * 1e6,
            "total_us": (a + b + LAUNCH) * 1e6, "floor_us": floor * 1e6, "times_floor": (a + b + LAUNCH) / floor,
            "eager_us": eager * 1e6,
        }  # fmt: skip


def table():
    found = tables.read("roofline")
    if not found:
        return tables.missing("python -m benchmarks.roofline --csv benchmarks/results/roofline.csv")
    header = ("B, C, H, K", "algorithm", "MB", "GFLOP", "bound by", "predicted us", "floor us", "x floor")
    body = [
        (
            f"{r['B']}, {r['C']}, {r['H']}, {r['K']}", r["algorithm"].replace("_", " "), f"{float(r['mbytes']):.0f}",
            f"{float(r['gflop']):.1f}", r["bound"], f"{float(r['total_us']):.0f}", f"{float(r['floor_us']):.0f}",
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
        f"{'(B, C, H, K)':22} {'algorithm':14} {'MB':>7} {'GFLOP':>7} {'bound':9} {'sweeps':>7} {'head':>6} {'total':>7} {'floor':>6} {'x floor':>8}"
    )
    found = list(rows())
    for r in found:
        shape = f"({r['B']}, {r['C']}, {r['H']}, {r['K']})"
        print(
            f"{shape:22} {r['algorithm']:14} {r['mbytes']:7.0f} {r['gflop']:7.1f} {r['bound']:9} {r['sweeps_us']:7.0f} "
            f"{r['head_us']:6.0f} {r['total_us']:7.0f} {r['floor_us']:6.0f} {r['times_floor']:8.2f}"
        )
    if a.csv:
        write_csv(a.csv, found)


if __name__ == "__main__":
    main()
