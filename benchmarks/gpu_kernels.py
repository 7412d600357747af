"""Times every kernel for GPUs at the shapes of training, as replayed CUDA graphs, beside plain PyTorch, eager and compiled.

Results are compared with float64 first: a wrong one gets no time. Times are those of the device. "cold" goes through more inputs than the L2 cache
holds, and keeps all results; "warm" repeats one call. The host's time to issue a call, and the launches in it, have columns of their own.
"""

import csv
import functools
import io
import shutil
import subprocess
import sys

import torch

from benchmarks import gpu_cases, runner
from benchmarks.gpu_cases import Case
from benchmarks.gpu_check import judged, tried
from benchmarks.gpu_device import DEVICE, DRY, host_seconds, launched
from benchmarks.gpu_workers import Job
from fastff.bench import device_seconds, input_sets, quantile, recorded, repeats, replays, synchronize
from fastff.memory import peak_memory

ROUNDS = 1 if DRY else 9
STAGES = [(64, 32), (128, 16), (256, 8), (512, 4)]  # (C, H) of ResNet18 at 32 x 32 pixels
WIDE = [  # B, C, H of ResNet18, ResNet50 and MobileNetV3 at 224 x 224 pixels, with 1,000 classes
    (256, 64, 56), (256, 256, 14), (256, 512, 7), (256, 1024, 14), (256, 24, 56), (256, 40, 28), (256, 112, 14), (256, 960, 7), (256, 2048, 7),
]  # fmt: skip
RESIDUAL = ("residual",)


def cases():
    """Return the Cases that are timed, the most important first."""
    step, tail, default = "goodness_step", "tail_step", {"given": ("residual", "grid_weight", "hidden")}
    found = [Case(step, B, *stage, K) for B, K in ((128, 10), (512, 100), (128, 100), (512, 10)) for stage in STAGES]
    found += [Case(tail, B, *stage, K, given=RESIDUAL) for B, K in ((128, 10), (512, 100)) for stage in STAGES]
    found += [Case(tail, 128, *stage, 10, **default) for stage in STAGES[1::2]]
    found += [Case(step, 512, *stage, 1000) for stage in STAGES] + [Case(step, *shape, 1000) for shape in WIDE]
    found += [Case(step, 128, *STAGES[0], 10, dtype="fp32"), Case(step, 128, *STAGES[0], 10, channels_last=False)]
    found += [Case("layer_norm", 512, *stage, 1) for stage in STAGES[::2]]
    found += [Case("epilogue", 512, *STAGES[0], 1, given=RESIDUAL, options={"activation": "relu"})]
    groups = {"hinton": {"loss": "softplus", "normalize": "l2"}, "cwcomp": {"groups": 10}}
    found += [Case("group_goodness_step", 512, 80, 32, 10, options=options) for options in groups.values()]
    found += [Case("depthwise", 256, 96, 28, 1, options={"kernel": k, "stride": 1}) for k in (3, 5)]
    return found


def compiled(function):
    """Return torch.compile(function); in a dry run only its first half, since the compiler takes 10 s or more."""
    return torch.compile(function, backend="eager") if DRY else runner.compiled(function)


def contenders(case):
    """Return {name: function of the tensors}: plain PyTorch, eager and for steps compiled, PyTorch's row of the op, and those for GPUs."""
    found = {"eager": functools.partial(gpu_cases.plain, case)}
    if case.function.endswith("step"):
        forward = compiled(functools.partial(gpu_cases.loss_of_step, case))
        found["compiled"] = functools.partial(gpu_cases.plain_step, case, forward=forward)
    x = torch.empty(1, case.C, 1, 1, dtype=gpu_cases.DTYPES[case.dtype], device=DEVICE)
    impls = ("torch", *gpu_cases.rows_of(case, x))
    return found | {impl: functools.partial(gpu_cases.ours, case, impl=impl) for impl in impls}


def compile_ahead(case):
    """Compile all that `measure` will run: Triton and torch.compile keep it on disk, for other processes too."""
    case = gpu_cases.of(case)
    t = gpu_cases.tensors(case)
    for name, function in contenders(case).items():
        if name not in ("eager", "torch"):
            tried(functools.partial(function, t))  # `measure` says what went wrong
    return []


def checked(case, functions):
    """Return {name of a contender: "ok", or why it is not timed}."""
    t = gpu_cases.tensors(case)
    true, plain, states = gpu_cases.exact(case, t), functions["eager"](t) | gpu_cases.statistics(case, t), {}
    for name, function in functions.items():
        found, states[name] = tried(functools.partial(function, t))
        if found:
            row, state = judged(case, found, plain, {key: value for key, value in true.items() if key in found})
            if state != "ok":
                states[name] = "wrong: {result} is off by {error:.1e}, allowed are {allowed:.1e}".format(**row)
    return states


def measure(case):
    """Return a row for each contender of a case."""
    case = gpu_cases.of(case)
    functions = contenders(case)
    states = checked(case, functions)
    size = gpu_cases.tensors(case)["x"].nbytes
    sets = input_sets(lambda seed: gpu_cases.tensors(case, seed), size)
    pool = None if DRY else torch.cuda.graph_pool_handle()
    cold, warm, rows = {}, {}, {}
    for name, function in functions.items():
        rows[name] = case.columns | {"contender": name, "state": states[name]}
        columns = ("cold_us", "cold_20", "cold_80", "warm_us", "host_us", "launches", "peak_mib", "mbytes")
        rows[name] |= dict.fromkeys(columns)
        if states[name] != "ok":
            continue
        one = functools.partial(function, sets[0])
        warm_calls = repeats(one)
        cold_calls = [functools.partial(function, t) for t in sets]
        warm[name] = recorded([one] * warm_calls, False, pool), warm_calls
        cold[name] = recorded(cold_calls, True, pool), len(cold_calls)
        rows[name] |= {
            "host_us": host_seconds(one, ROUNDS) * 1e6, "launches": launched(one)[0], "peak_mib": peak_memory(one, DEVICE),
            "mbytes": gpu_cases.mbytes(case),
        }  # fmt: skip
    for name, times in replays(cold, ROUNDS).items():
        rows[name] |= {f"cold_{key}": quantile(times, q) * 1e6 for key, q in (("us", 0.5), ("20", 0.2), ("80", 0.8))}
    for name, times in replays(warm, ROUNDS).items():
        rows[name]["warm_us"] = quantile(times, 0.5) * 1e6
    return list(rows.values())


def rates():
    """Return rows with the rates of this device: copies in memory and in L2, products of matrices in bfloat16, TF32 and float32."""
    found = []

    def rate(name, unit, work, function):
        found.append({"rate": name, "value": work / device_seconds(function, ROUNDS), "unit": unit})

    for name, megabytes in (("copy", 1 if DRY else 1024), ("copy in L2", 1 if DRY else 8)):
        source = torch.randn(megabytes * 2**18, device=DEVICE)
        target = torch.empty_like(source)
        rate(name, "GB/s", 2 * source.nbytes / 1e9, lambda source=source, target=target: target.copy_(source))
    n = 64 if DRY else 8192
    for name, dtype, precision in (
        ("bf16 product", torch.bfloat16, "highest"), ("TF32 product", torch.float32, "high"), ("fp32 product", torch.float32, "highest"),
    ):  # fmt: skip
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        rate(name, "TFLOP/s", 2 * n**3 / 1e12, lambda a=a, b=b: a @ b)
    torch.set_float32_matmul_precision("highest")
    return found


PROFILED = [
    Case("goodness_step", 512, *STAGES[0], 100), Case("goodness_step", 512, *STAGES[2], 100),
    Case("tail_step", 512, *STAGES[0], 100, given=RESIDUAL), Case("layer_norm", 512, *STAGES[0], 1),
]  # fmt: skip
METRICS = {  # of Nsight Compute; the names of the tensor cores' differ from chip to chip, and what is unknown stays empty
    "gpu__time_duration.sum": "ns", "dram__bytes_read.sum": "dram_read", "dram__bytes_write.sum": "dram_written", "lts__t_bytes.sum": "l2_bytes",
    "launch__registers_per_thread": "registers", "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_percent",
    "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active": "hmma_percent",
}  # fmt: skip


def profiled(index):
    """Run one call of PROFILED for the profiler, which looks at nothing else: python -m benchmarks.gpu_kernels INDEX."""
    case = gpu_cases.of(PROFILED[index])
    t = gpu_cases.tensors(case)
    gpu_cases.ours(case, t, "triton")
    if DRY:
        return
    torch.cuda.profiler.start()
    gpu_cases.ours(case, t, "triton")
    synchronize()
    torch.cuda.profiler.stop()


def counter_jobs():
    """Return the jobs that count, none where there is no profiler."""
    found = [Job(f"ncu {case.name}", counters, (index,)) for index, case in enumerate(PROFILED)]
    return found if DRY or shutil.which("ncu") else []


def jobs():
    """Return the jobs of this part."""
    return [Job(case.name, measure, (case,)) for case in gpu_cases.different(cases())]


def jobs_ahead():
    """Return the jobs that compile for it."""
    return [Job(f"compile {case.name}", compile_ahead, (case,)) for case in gpu_cases.different(cases())]


def counters(index):
    """Return a row for each kernel of one call of PROFILED, with what Nsight Compute counted."""
    if DRY:
        profiled(index)
        return []
    for metrics in (list(METRICS), list(METRICS)[:-2]):  # without the names that differ from chip to chip
        command = [
            "ncu", "--csv", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off", "--metrics", ",".join(metrics),
            sys.executable, "-m", "benchmarks.gpu_kernels", str(index),
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if rows := parsed(run.stdout):
            return [PROFILED[index].columns | row for row in rows]
    said = (run.stdout + run.stderr)[-1500:]
    raise RuntimeError(f"ncu: expected counters, got exit code {run.returncode} and {said}")


def parsed(text):
    """Return a row {"kernel", the names of METRICS} for each kernel in the output of ncu --csv."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        kernel = found.setdefault(row["ID"], {"kernel": row["Kernel Name"]} | dict.fromkeys(METRICS.values()))
        if row["Metric Name"] in METRICS:
            kernel[METRICS[row["Metric Name"]]] = row["Metric Value"].replace(",", "")
    return list(found.values())


if __name__ == "__main__":
    profiled(int(sys.argv[1]))
