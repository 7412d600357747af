"""Times whole training steps of ResNet18 on a GPU, bfloat16 autocast, AdamW, and looks whether they learn as on the CPU.

Every variant has its own process state: times in milliseconds of a step with the host, the host's time to issue it without waiting, launches on the
device and the time that they take there, and the peak memory above parameters and optimizer state. A step as a CUDA graph has its peak when it is
recorded: the largest peak of the first steps after one that makes the optimizer's state counts.
"""

import argparse
import functools

import torch

import fastff
from benchmarks import scale
from benchmarks.gpu_device import DEVICE, DRY, IMPL, host_seconds, launched
from benchmarks.gpu_workers import Job
from fastff.bench import interleave, quantile
from fastff.memory import peak_memory
from fastff.training import Backprop, Trainer, data

BATCHES = (2,) if DRY else (128, 512)
SIZE, CLASSES, WIDTH, ROUNDS = (8, 5, 4, 1) if DRY else (32, 100, 64, 20)
PAPER = {"grid": 0, "window": 1}
GRAPH, COMPILED = {"cuda_graph": True}, {"compile": True}
STEPS = 2 if DRY else 6  # before a step is timed; a graph is recorded in one of them
VARIANTS = {  # name: (kind, options of SFF, options of the trainer)
    "backprop": (Backprop, {}, {}),
    "backprop, CUDA graph": (Backprop, {}, GRAPH),
    "backprop, compiled, CUDA graph": (Backprop, {}, COMPILED | GRAPH),
    "block": (Trainer, PAPER, {}),
    "block, CUDA graph": (Trainer, PAPER, GRAPH),
    "layer": (Trainer, PAPER | {"granularity": "layer"}, {}),
    "layer, CUDA graph": (Trainer, PAPER | {"granularity": "layer"}, GRAPH),
    "defaults": (Trainer, {}, {}),
    "defaults, CUDA graph": (Trainer, {}, GRAPH),
    "backprop, compiled": (Backprop, {}, COMPILED),
}


def adamw(groups):
    on_gpu = groups[0]["params"][0].is_cuda
    return torch.optim.AdamW(groups, lr=1e-3, fused=on_gpu, capturable=on_gpu)


def trainer_of(variant, classes, size, width, device, channels=3):
    """Return the trainer of a variant; on a CPU it neither compiles nor records, and beside a GPU it computes in float32."""
    kind, options, how = VARIANTS[variant]
    torch.manual_seed(0)
    net = fastff.models.resnet18(classes, stem="cifar", width=width, in_channels=channels)
    net = net.to(device, memory_format=torch.channels_last)
    sff = fastff.SFF(net, classes, input_shape=(channels, size, size), impl=IMPL, readout=kind is Backprop, **options)
    how = {"cuda_graph": False} | how if device.type == "cuda" else {}
    return kind(sff.to(device), adamw, amp="bf16" if device == DEVICE else None, **how)


def step_of(variant, batch):
    if "compiled" in variant and not DRY:
        from torch._inductor import config

        config.compile_threads = 4  # whole networks have many kernels
    trainer = trainer_of(variant, CLASSES, SIZE, WIDTH, DEVICE)
    images = torch.randn(batch, 3, SIZE, SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return functools.partial(trainer.step, images, torch.randint(CLASSES, (batch,), device=DEVICE))


def compile_ahead(variant, batch):
    """Compile all that steps of this variant run: Triton and torch.compile keep it on disk, for other processes too."""
    step_of(variant, batch)()
    return []


def measure(variant, batch):
    """Return the row of a variant."""
    step = step_of(variant, batch)
    step()
    peak = max(peak_memory(step, DEVICE) for _ in range(STEPS))
    seconds = interleave({"": step}, ROUNDS, warmup=1)[""]
    launches, device_seconds = launched(step)
    median, low, high = (1e3 * quantile(seconds, q) for q in (0.5, 0.2, 0.8))
    losses = step()
    return [{
        "model": "resnet18", "batch": batch, "size": SIZE, "classes": CLASSES, "variant": variant, "ms": median, "ms_20": low, "ms_80": high,
        "host_ms": 1e3 * host_seconds(step, ROUNDS), "launches": launches, "device_ms": 1e3 * device_seconds, "peak_mib": peak,
        "state": "ok" if bool(torch.isfinite(losses).all()) else f"wrong: losses {losses.tolist()}",
    }]  # fmt: skip


def jobs():
    """Return the jobs of this part."""
    return [Job(f"{variant}, batch {batch}", measure, (variant, batch)) for batch in BATCHES for variant in VARIANTS]


def jobs_ahead():
    """Return the jobs that compile for it: a graph has the kernels of the step that it records."""
    ahead = [v for v in reversed(VARIANTS) if "graph" not in v and v != "backprop" and not DRY]
    return [
        Job(f"compile {variant}, batch {batch}", compile_ahead, (variant, batch))
        for variant in ahead
        for batch in BATCHES
    ]


LEARNERS = ("backprop, CUDA graph", "block, CUDA graph", "defaults, CUDA graph")
FEWER_POINTS = 0.05  # of accuracy on the GPU, at most: other roundings and bfloat16 change some of 360 answers


def digits():
    """Return the digits data set, or one of the same sizes whose classes are easily told apart where scikit-learn is not installed."""
    try:
        return data.load("digits", **({"subset": 64, "test_subset": 20} if DRY else {}))
    except ImportError:
        generator, labels = torch.Generator().manual_seed(0), torch.arange(1800) % 10
        pixels = torch.randint(256, (10, 1, 8, 8), generator=generator)[labels]
        images = (pixels + torch.randint(-90, 90, pixels.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
        parts = images[:1440], labels[:1440], images[1440:], labels[1440:]
        return data.Dataset("synthetic", *parts, tuple("0123456789"), (0.5,), (0.3,), None)


def learn(variant):
    """Train ResNet18 of width 16 on the CPU and on the GPU. Returns a row for each, with the accuracy on the test images."""
    loaded, rows = digits(), []
    epochs, width = (1, 4) if DRY else (10, 16)
    for device in dict.fromkeys((torch.device("cpu"), DEVICE)):
        trainer = trainer_of(variant, loaded.num_classes, loaded.train_images.shape[-1], width, device, channels=1)
        trainer.fit(loaded.train_loader(64, drop_last=True, channels_last=True, device=device), epochs, progress=False)
        accuracy = trainer.evaluate(loaded.test_loader(512, channels_last=True, device=device))["vote"]
        worse = rows[0]["accuracy"] - accuracy if rows else 0
        state = "ok" if worse <= FEWER_POINTS else f"wrong: {worse:.1%} below the CPU's"
        columns = {"data": loaded.name, "variant": variant, "epochs": epochs, "on": device.type}
        rows.append(columns | {"accuracy": accuracy, "state": state})
    return rows


def learning_jobs():
    """Return the jobs of the part that learns."""
    return [Job(f"learn {variant}", learn, (variant,)) for variant in LEARNERS]


def scales():
    """Compare steps on all GPUs, 256 float32 images on each, with the model of benchmarks/scale.py."""
    given = {"model": "resnet18", "width": 64, "batch": 256, "classes": 100, "size": 32, "granularity": "block"}
    a = argparse.Namespace(**given, rounds=ROUNDS, device="cuda", processes=torch.cuda.device_count())
    rows, link = scale.compare(a, DEVICE)
    scale.show_compared(a, rows, link)
    return rows
