"""Scaling to many devices: a model predicts the time of a step on 1 to 1,024 devices, and is compared with steps of 1, 2 and 4 processes.

    python -m benchmarks.scale [--model resnet18] [--width 64] [--batch 32] [--granularity block] [--faster 1 100]
        [--link GBIT_PER_S MICROSECONDS] [--global-batch N] [--csv FILE]
    python -m benchmarks.scale --measure [--csv FILE]

--measure runs SFF and backpropagation with torchrun on this machine, checks the weights, and compares times and sent bytes with the model.

benchmarks/scale_model.py is the model; benchmarks/scale_blocks.py measures what it takes, benchmarks/scale_processes.py what it predicts.
"""

import argparse
import dataclasses
import math
import os
import sys

import torch

from benchmarks.scale_blocks import measure_blocks
from benchmarks.scale_model import LINKS, METHODS, Machine, predict, predictions
from benchmarks.scale_processes import launch, planned, worker
from benchmarks.timing import print_environment, write_csv
from fastff.bench import quantile


def compare(a, device):
    """Measure and predict steps of 1, 2, 4, ... processes. Returns (rows, result of measure_link)."""
    measured = measure_blocks(a, device)
    cores = os.cpu_count() if device.type == "cpu" else math.inf
    link, rows = None, []
    for processes in (n for n in (1, 2, 4, 8) if n <= a.processes):
        plans = planned(processes, a.batch)
        blocks = [measured[plan.kind].at(plan.images) for plan in plans]
        placements = [plan.placement(its_blocks) for plan, its_blocks in zip(plans, blocks, strict=True)]
        result = launch(a, processes, list(zip(plans, placements, strict=True)))
        link = link or result.get("link")
        others = max(result["others"])
        if others > 0.1:
            print(f"{processes} processes: other programs used {others:.1f} cores at the same time", file=sys.stderr)
        slower, seconds, sent = {}, iter(result["seconds"]), result["bytes"][len(measured) :]
        for kind in measured:
            times = next(seconds)
            predicted = sum(block.seconds for block in measured[kind].at(a.batch)) * max(1, processes / cores)
            slower[kind] = quantile(times, 0.5) / predicted
            rows.append(_row(a, processes, kind, "none", 1, 1, times, predicted))
        for plan, its_blocks, placement, times, by_rank in zip(plans, blocks, placements, seconds, sent, strict=True):
            speed = link["all-reduce" if plan.stages == 1 else "send"]
            machine = Machine(speed["bandwidth"], speed["latency"], "ring", cores)  # gloo uses rings
            found = predict(plan, its_blocks, machine, placement)
            slowed_blocks = measured[plan.kind].at(plan.images, 1 / slower[plan.kind])
            slowed = predict(plan, slowed_blocks, machine, placement).seconds
            split = "data" if plan.stages == 1 else "blocks" if plan.data == 1 else "2-D"
            most_sent = max(by_rank) if device.type == "cpu" else math.nan  # only bytes sent by TCP are counted
            rows.append(_row(
                a, processes, plan.kind, split, plan.data, plan.stages, times, found.seconds, slowed, most_sent, found.sent_bytes
            ))  # fmt: skip
    return rows, link


def _row(a, processes, kind, split, data, stages, seconds, predicted, slowed=None, sent=None, predicted_bytes=None):
    median, low, high = (quantile(seconds, q) for q in (0.5, 0.2, 0.8))
    row = {
        "model": a.model, "width": a.width, "batch": a.batch, "size": a.size, "classes": a.classes, "granularity": a.granularity,
        "processes": processes, "kind": kind, "split": split, "data": data, "stages": stages, "milliseconds": median * 1e3,
        "milliseconds_20": low * 1e3, "milliseconds_80": high * 1e3, "predicted": predicted * 1e3, "error": predicted / median - 1,
    }  # fmt: skip
    if slowed is not None:
        row |= {"slowed": slowed * 1e3, "slowed_error": slowed / median - 1, "mbytes": sent / 1e6}
        row |= {"predicted_mbytes": predicted_bytes / 1e6, "bytes_error": predicted_bytes / sent - 1}
    return row


def label(row):
    """Return what a row of `compare` measured, in words."""
    kind = {"sff": "SFF", "backprop": "backpropagation"}[row["kind"]]
    if row["split"] == "none":
        return kind if int(row["processes"]) == 1 else f"{kind}, no communication"
    split = {"data": "data-parallel" if row["kind"] == "sff" else "DDP", "2-D": f"2-D, {row['data']} x {row['stages']}"}
    return f"{kind}, {split.get(row['split'], 'block-parallel' if row['kind'] == 'sff' else '1F1B')}"


def show_compared(a, rows, link):
    link = link or {}
    speeds = [f"{name} {v['bandwidth'] / 1e9:.2f} GB/s and {v['latency'] * 1e6:.0f} us" for name, v in link.items()]
    print(
        f"\n{_network(a)}, {a.batch} images a process; {os.cpu_count()} cores; between two of them: {', '.join(speeds)}"
    )
    header = f"{'processes':>9} {'':33} {'ms a step':>9} {'20-80 %':16} {'predicted':>9} {'off':>7}"
    print(f"{header} {'slowed':>8} {'off':>7} {'MB sent':>8} {'off':>7}")
    for r in rows:
        measured = f"{r['milliseconds']:9.1f} [{r['milliseconds_20']:6.1f}, {r['milliseconds_80']:6.1f}]"
        line = f"{r['processes']:9} {label(r):33} {measured} {r['predicted']:9.1f} {r['error']:+7.1%}"
        if "slowed" in r:
            line += f" {r['slowed']:8.1f} {r['slowed_error']:+7.1%} {r['mbytes']:8.3f} {r['bytes_error']:+7.2%}"
        print(line)


def _network(a):
    width = f", width {a.width}" if a.model.startswith("resnet") else ""
    return f"{a.model}{width}, {a.granularity} granularity, {a.size} x {a.size}, {a.classes} classes"


def model(a, device):
    """Return the rows of the model for every link, speed of the devices, number of devices and method."""
    measured, rows = measure_blocks(a, device), []
    links = {f"{gbit:g} Gbit/s, {us:g} us": Machine(gbit * 1e9 / 8, us * 1e-6) for gbit, us in a.link} or LINKS
    for faster in a.faster:
        one_device = {}  # {kind: images per second of one device}
        for name, machine in links.items():
            machine = dataclasses.replace(machine, all_reduce=a.all_reduce)
            for devices in (2**n for n in range(11)):
                images = a.global_batch / devices if a.global_batch else a.batch
                for method, (plan, found) in predictions(measured, machine, devices, images, faster).items():
                    rate = devices * images / found.seconds
                    rows.append({
                        "model": a.model, "width": a.width, "granularity": a.granularity, "batch": images, "global_batch": a.global_batch or "",
                        "faster": faster, "link": name, "all_reduce": a.all_reduce, "devices": devices, "method": method, "data": plan.data,
                        "stages": plan.stages, "parts": plan.parts, "milliseconds": found.seconds * 1e3, "images_per_second": rate,
                        "efficiency": rate / devices / one_device.setdefault(plan.kind, rate),
                        "mbytes_sent": found.sent_bytes / 1e6, "memory_mib": found.memory_bytes / 2**20,
                    })  # fmt: skip
    return rows


WIDTHS = dict(zip(METHODS, (11, 13, 43, 15, 16, 43), strict=True))  # characters


def show(a, rows):
    images = f"{a.global_batch:,} images a step" if a.global_batch else f"{a.batch} images a device"
    print(f"{_network(a)}; {images}, Adam, {a.all_reduce} all-reduce")
    print(
        "Efficiency against one device; 2-D: replicas x stages of the fastest split, images/s, and of the devices with most the MB"
    )
    print("sent a step and the MiB of memory.")
    for faster, link in dict.fromkeys((r["faster"], r["link"]) for r in rows):
        mine = [r for r in rows if (r["faster"], r["link"]) == (faster, link)]
        speed = f"assumed: devices {faster:g} times" if faster != 1 else "devices"
        print(f"\n{link}; {speed} as fast as one core here")
        print(f"{'devices':>7}" + "".join(f"{method:>{width}}" for method, width in WIDTHS.items()))
        for devices in dict.fromkeys(r["devices"] for r in mine):
            found = {r["method"]: r for r in mine if r["devices"] == devices}
            cells = [f"{_cell(found.get(method)):>{width}}" for method, width in WIDTHS.items()]
            print(f"{devices:7,}" + "".join(cells))


def _cell(r):
    if r is None:
        return ""
    if "2-D" not in r["method"]:
        return f"{r['efficiency']:.0%}"
    shape = f"{r['data']} x {r['stages']}"
    most = f"{r['mbytes_sent']:3.0f} MB {r['memory_mib']:5,.0f} MiB"
    return f"{shape} {r['images_per_second']:9,.0f}/s {most} {r['efficiency']:5.0%}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", choices=["resnet18", "mobilenet_v3_small", "mobilenet_v3_large"])
    parser.add_argument("--granularity", default="block", choices=["layer", "block", "stage"])
    parser.add_argument("--measure", action="store_true", help="run 1, 2, ... --processes processes and compare")
    parser.add_argument("--width", type=int, help="64, with --measure 16")
    parser.add_argument("--batch", type=int, nargs="+", help="images a device: 32, with --measure 32 and 4")
    for name, default in (("classes", 100), ("size", 32), ("rounds", 5), ("processes", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--global-batch", type=int, help="images a step whatever the devices, instead of --batch for each"
    )
    parser.add_argument("--faster", type=float, nargs="+", default=[1, 100, 1000], help="devices than one core here")
    given = {"nargs": 2, "action": "append", "default": [], "metavar": ("GBIT_PER_S", "MICROSECONDS")}
    parser.add_argument("--link", type=float, help="instead of the three that are built in", **given)
    parser.add_argument("--all-reduce", default="tree", choices=["ring", "tree"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        return worker(a.worker)
    torch.set_num_threads(1)
    print_environment()
    rows = measure(a) if a.measure else modelled(a)
    if a.csv:
        write_csv(a.csv, rows)
    return None


def measure(a):
    rows = []
    for batch in a.batch or [32, 4]:
        of = argparse.Namespace(**vars(a) | {"batch": batch, "width": a.width or 16})
        found, link = compare(of, torch.device(a.device))
        show_compared(of, found, link)
        rows += found
    print("\nno communication: all at once, each by itself, waiting for the others after each step")
    print("slowed: predicted from block times that are as much longer as these steps were")
    return rows


def modelled(a):
    rows = []
    for batch in a.batch or [32]:
        of = argparse.Namespace(**vars(a) | {"batch": batch, "width": a.width or 64})
        found = model(of, torch.device(a.device))
        show(of, found)
        rows += found
    return rows


if __name__ == "__main__":
    main()
