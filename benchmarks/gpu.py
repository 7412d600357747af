"""Everything that needs a GPU, in one run of a few minutes: it checks the Triton kernels, and times kernels and training steps.

    python -m benchmarks.gpu [--out FOLDER] [--only check kernels epilogues step scale]      (make gpu)

A kernel with a wrong result prints no time.

    check          results of the kernels against float64 on the CPU, and steps as a CUDA graph against ordinary ones
    kernels, epilogues goodness_step and tail_step with layer normalization, bfloat16, channels_last: against PyTorch eager and compiled, against
                   the torch implementation, and against the floor: the bytes that must move (x three times; y three
                   times, the residual, dL/dy and the next input) at the measured copy bandwidth
    step           ResNet18 and MobileNetV3-large with bfloat16 autocast, against backpropagation eager, compiled and as a CUDA graph
    scale          with several GPUs, steps over 2, 4 and 8 of them against the predictions of benchmarks/scale.py

The names of the CSV files contain the name of the GPU.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import fastff
import fastff.functional as ff
from benchmarks import scale
from benchmarks.roofline import SHAPES
from benchmarks.timing import print_environment, write_csv
from fastff.bench import interleave, quantile, ratios
from fastff.memory import peak_memory
from fastff.training import Backprop, Trainer

PARTS = ["check", "kernels", "epilogues", "step", "scale"]
CHECKED = [(5, 24, 9, 7), (3, 64, 32, 100), (40, 128, 4, 11), (6, 256, 7, 33), (70, 96, 1, 10), (2, 64, 56, 1000)]


def problem(B, C, H, K, dtype, device, channels_last=True):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(B, C, H, H, generator=generator) + 0.5).to(device, dtype)
    weight = (torch.randn(K, C, generator=generator) * 2 / C**0.5).to(device)
    target = torch.randint(K, (B,), generator=generator).to(device)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x, weight, target


def check(device):
    """Compare every output of goodness_step with float64 on the CPU. Exits at the first error that is too large."""
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 3e-3)):
        for shape in CHECKED:
            for grid in (0, 4):
                for algorithm in ("direct", "second_moment"):
                    if algorithm == "second_moment" and shape[1] > 128:
                        continue
                    x, weight, target = problem(*shape, dtype, device)
                    grid_weight = torch.randn(shape[3], shape[1], grid, grid, device=device) * 0.05 if grid else None
                    bias = torch.linspace(-1, 1, shape[3], device=device)
                    given = {"grid_weight": grid_weight, "tau": 0.7, "margin": 0.5, "algorithm": algorithm}
                    got, again = (ff.goodness_step(x, weight, bias, target, impl="triton", **given) for _ in range(2))
                    wide = [t.double().cpu() for t in (x, weight, bias)]
                    given |= {"grid_weight": None if grid_weight is None else grid_weight.double().cpu()}
                    want = ff.goodness_step(*wide, target.cpu(), impl="reference", **given)
                    for name, a, b, twice in zip(got._fields, got, want, again, strict=True):
                        if a is None:
                            continue
                        error = float((a.double().cpu() - b).abs().max() / b.abs().max().clamp(min=1e-6))
                        if not error < most or not torch.equal(a, twice):
                            reason = (
                                f"error {error:.1e}, allowed {most:.0e}"
                                if not error < most
                                else "other bits the second time"
                            )
                            sys.exit(f"wrong result: {name} of {shape}, {dtype}, grid {grid}, {algorithm}: {reason}")
        print(f"checked: goodness_step in {dtype} on {len(CHECKED)} shapes, within {most:.0e}", flush=True)


def check_epilogue(device):
    """Compare every output of tail_step with float64 on the CPU. Exits at the first error that is too large."""
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 4e-2), (torch.float16, 4e-3)):
        for shape in CHECKED:
            for activation, with_residual in (("relu", True), ("hardswish", False), ("silu", True)):
                y, weight, target = problem(*shape, dtype, device)
                residual = torch.roll(y, 1, 0) if with_residual else None
                bn = torch.linspace(0.5, 1.5, shape[1], device=device)
                given = {"activation": activation, "tau": 0.7}
                pair = [
                    ff.tail_step(
                        y, weight, None, target, bn_weight=bn, bn_bias=bn, residual=residual, impl="triton", **given
                    )
                    for _ in range(2)
                ]
                wide = [None if t is None else t.double().cpu() for t in (y, weight, bn, residual)]
                want = ff.tail_step(
                    *wide[:2],
                    None,
                    target.cpu(),
                    bn_weight=wide[2],
                    bn_bias=wide[2],
                    residual=wide[3],
                    impl="reference",
                    **given,
                )
                for name, a, b, twice in zip(want._fields, pair[0], want, pair[1], strict=True):
                    if a is None:
                        continue
                    # the norm and not the maximum, since rounding moves single elements across the kink of an activation
                    error = float((a.double().cpu() - b).norm() / b.norm().clamp(min=1e-6))
                    if not error < most or not torch.equal(a, twice):
                        what = (
                            f"error {error:.1e}, allowed {most:.0e}"
                            if not error < most
                            else "other bits the second time"
                        )
                        sys.exit(f"wrong result: {name} of the epilogue, {shape}, {dtype}, {activation}: {what}")
        print(f"checked: tail_step in {dtype} on {len(CHECKED)} shapes, within {most:.0e}", flush=True)


def check_graph(device):
    """Check that steps replayed from a CUDA graph give the same weights as ordinary steps."""
    batches = [(torch.randn(16, 3, 32, 32, device=device), torch.randint(10, (16,), device=device)) for _ in range(6)]
    weights = []
    for recorded in (False, True):
        torch.manual_seed(0)
        net = fastff.models.resnet18(10, stem="cifar", width=16).to(device, memory_format=torch.channels_last)
        sff = fastff.SFF(net, 10, grid=0, window=1).to(device)
        make = lambda groups: torch.optim.AdamW(groups, lr=1e-3, capturable=True)  # noqa: E731
        trainer = Trainer(sff, make, amp="bf16", cuda_graph=recorded)
        for batch in batches:
            trainer.step(*batch)
        weights.append(torch.cat([p.detach().flatten() for p in sff.parameters()]))
    off = float((weights[0] - weights[1]).norm() / weights[0].norm())
    if not off < 1e-3:
        sys.exit(f"wrong result: weights after replayed steps are off by {off:.1e}")
    print(f"checked: replayed steps give the weights of ordinary ones to {off:.1e}", flush=True)


def check_step(device):
    """Check that a training step never makes the host wait for the GPU: PyTorch raises an error if it does."""
    torch.manual_seed(0)
    net = fastff.models.resnet18(10, stem="cifar", width=16).to(device, memory_format=torch.channels_last)
    images, target = torch.randn(32, 3, 32, 32, device=device), torch.randint(10, (32,), device=device)
    for options in ({"grid": 0, "window": 1}, {}):
        trainer = Trainer(fastff.SFF(net, 10, **options).to(device), amp="bf16")
        for _ in range(2):
            trainer.step(images, target)
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = trainer.step(images, target)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if not torch.isfinite(losses).all():
            sys.exit(f"wrong result: losses {losses.tolist()} of a step with {options}")
    print("checked: no step waits for the device", flush=True)


def bandwidth(device, megabytes=512):
    """Return the bytes per second of a copy on the GPU. Bytes read and written both count."""
    a = torch.empty(megabytes * 2**18, device=device)
    b = torch.empty_like(a)
    times = interleave({"copy": lambda: b.copy_(a)}, 20)["copy"]
    return 2 * a.numel() * 4 / quantile(times, 0.5)


def kernels(device, rounds):
    rate = bandwidth(device)
    print(f"copy bandwidth {rate / 1e9:.0f} GB/s")
    rows = []
    for B, C, H, K in SHAPES:
        x, weight, target = problem(B, C, H, K, torch.bfloat16, device)
        leaf, head = x.clone().requires_grad_(), weight.bfloat16()[:, :, None, None].requires_grad_()

        def eager(leaf=leaf, head=head, target=target):
            leaf.grad = head.grad = None
            loss = F.cross_entropy(F.conv2d(leaf, head).square().mean((2, 3)).float(), target)
            loss.backward()
            return F.layer_norm(leaf.detach(), leaf.shape[1:])

        functions = {"eager": eager, "compiled": torch.compile(eager, dynamic=False)}
        for impl in ("triton", "torch"):
            functions[impl] = lambda impl=impl, given=(x, weight, None, target): ff.goodness_step(*given, impl=impl)
        times = interleave(functions, rounds)
        floor = 3 * x.numel() * 2 / rate
        row = {"B": B, "C": C, "H": H, "K": K, "floor_us": floor * 1e6}
        for name in functions:
            row |= {f"{name}_us": quantile(times[name], 0.5) * 1e6}
        row["speedup"], row["speedup_20"], row["speedup_80"] = ratios(times, "compiled", "triton")
        rows.append(row)
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def epilogues(device, rounds):
    rate = bandwidth(device)
    rows = []
    for B, C, H, K in SHAPES:
        y, weight, target = problem(B, C, H, K, torch.bfloat16, device)
        residual, bn = torch.roll(y, 1, 0), torch.ones(C, device=device)
        leaf, head = y.clone().requires_grad_(), weight.bfloat16()[:, :, None, None].requires_grad_()
        scale, shift = bn.clone().requires_grad_(), bn.clone().requires_grad_()

        def eager(leaf=leaf, head=head, target=target, residual=residual, scale=scale, shift=shift):
            leaf.grad = head.grad = scale.grad = shift.grad = None
            x = F.relu(F.batch_norm(leaf, None, None, scale, shift, training=True) + residual)
            F.cross_entropy(F.conv2d(x, head).square().mean((2, 3)).float(), target).backward()
            return F.layer_norm(x.detach(), x.shape[1:])

        functions = {"eager": eager, "compiled": torch.compile(eager, dynamic=False)}
        for impl in ("triton", "torch"):
            functions[impl] = lambda impl=impl, given=(y, weight, None, target), r=residual, bn=bn: ff.tail_step(
                *given, bn_weight=bn, bn_bias=bn, residual=r, need_grad_residual=False, impl=impl
            )
        times = interleave(functions, rounds)
        row = {"B": B, "C": C, "H": H, "K": K, "floor_us": 7 * y.numel() * 2 / rate * 1e6}
        for name in functions:
            row |= {f"{name}_us": quantile(times[name], 0.5) * 1e6}
        row["speedup"], row["speedup_20"], row["speedup_80"] = ratios(times, "compiled", "triton")
        rows.append(row)
        print(
            "epilogue  " + "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
            flush=True,
        )
    return rows


def steps(device, rounds):
    adam = lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True)  # noqa: E731
    rows = []
    for model, batch, size, classes, stem in (
        ("resnet18", 512, 32, 100, "cifar"),
        ("mobilenet_v3_large", 256, 224, 1000, "imagenet"),
    ):
        images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        target, functions, memory = torch.randint(classes, (batch,), device=device), {}, {}
        for name, kind, granularity, options in (
            ("backprop", Backprop, "block", {}),
            ("backprop, compiled", Backprop, "block", {"compile": True}),
            ("backprop, CUDA graph", Backprop, "block", {"cuda_graph": True}),
            ("block", Trainer, "block", {}),
            ("layer", Trainer, "layer", {}),
            ("block, compiled", Trainer, "block", {"compile": True}),
            ("block, CUDA graph", Trainer, "block", {"cuda_graph": True}),
            ("layer, CUDA graph", Trainer, "layer", {"cuda_graph": True}),
        ):
            torch.manual_seed(0)
            net = getattr(fastff.models, model)(classes, stem=stem).to(device, memory_format=torch.channels_last)
            sff = fastff.SFF(net, classes, granularity, (3, size, size), grid=0, window=1, readout=kind is Backprop).to(
                device
            )
            trainer = kind(sff, adam, amp="bf16", **options)
            functions[name] = functools.partial(trainer.step, images, target)
            for _ in range(5):  # a CUDA graph is captured in the fourth step
                functions[name]()
            memory[name] = peak_memory(functions[name], device)
        times = interleave(functions, rounds)
        base = min(
            (name for name in functions if name.startswith("backprop")), key=lambda name: quantile(times[name], 0.5)
        )
        for name in functions:
            ratio, low, high = ratios(times, name, base)
            milliseconds = quantile(times[name], 0.5) * 1e3
            print(
                f"{model:20} {name:20} {milliseconds:8.2f} ms  {ratio:5.2f} x [{low:.2f}, {high:.2f}]  {memory[name]:7.0f} MiB",
                flush=True,
            )
            rows.append({
                "model": model, "variant": name, "batch": batch, "size": size, "classes": classes, "base": base, "milliseconds": milliseconds,
                "ratio": ratio, "ratio_20": low, "ratio_80": high, "peak_mib": memory[name],
            })  # fmt: skip
    return rows


def scales(device, rounds):
    """Compare steps of ResNet18 on all GPUs, 256 float32 images on each, with the model of scale. Exits if weights are wrong."""
    given = {"model": "resnet18", "width": 64, "batch": 256, "classes": 100, "size": 32, "granularity": "block"}
    a = argparse.Namespace(**given, rounds=rounds, device="cuda", processes=torch.cuda.device_count())
    rows, link = scale.compare(a, device)
    scale.show_compared(a, rows, link)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=20)
    a = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks.gpu needs a CUDA device, and torch sees none here; the kernels are interpreted in `make test` instead"
        )
    print_environment()
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device).replace(" ", "-").lower()
    if "check" in a.only:
        check(device)
        check_epilogue(device)
        check_step(device)
        check_graph(device)
    for part, measure in (("kernels", kernels), ("epilogues", epilogues), ("step", steps), ("scale", scales)):
        if part in a.only and (part != "scale" or torch.cuda.device_count() > 1):
            write_csv(a.out / f"gpu-{part}-{name}.csv", measure(device, a.rounds))


if __name__ == "__main__":
    main()
