"""The run for GPUs (make gpu): it goes through on a CPU, goes on after what fails in it, and finds wrong results."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastff.functional as ff
from benchmarks import (
    gpu,
    gpu_cases,
    gpu_check,
    gpu_device,
    gpu_kernels,
    gpu_report,
    tables,
)  # fmt: skip
from benchmarks.gpu_workers import Job, Pool
from fastff import Trainer, bench


def test_the_run_for_gpus_goes_through_on_a_cpu(tmp_path):
    """Some jobs of every part, in one process; make gpu GPU_DRY=1 runs all of them."""
    pytest.importorskip("triton")
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--processes", "0", "--every", "11"]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=tables.ROOT
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert gpu_report.tables_of(tmp_path) in run.stdout
    files = {path.stem for path in tmp_path.glob("*.csv")}
    assert files == {"rates", "check", "kernels", "steps", "learning"}
    for name in files:
        rows = tables.read(name, tmp_path)
        assert all(row.get("state", "ok") == "ok" and row["device"] and row["commit"] for row in rows)
    triton = [row for row in tables.read("kernels", tmp_path) if row["contender"] == "triton"]
    assert triton
    assert all(float(row[key]) > 0 for row in triton for key in ("cold_us", "warm_us", "host_us", "launches", "mbytes"))


def test_without_a_gpu_the_run_says_how_to_try_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="needs a CUDA device, and torch sees none here; make gpu GPU_DRY=1"):
        gpu.main()


def test_every_op_with_a_kernel_for_gpus_is_checked_and_timed():
    ops = {"goodness_step", "tail_step", "group_goodness_step", "layer_norm", "epilogue", "depthwise"}
    assert ops <= {case.function for case in gpu_kernels.cases()}
    checked = gpu_check.cases()
    assert ops | {"group_tail_step", "group_goodness", "goodness_loss", "normalize"} == {c.function for c in checked}
    for field, value in (("channels_last", False), ("dtype", "fp16"), ("C", 1024), ("K", 1000)):
        assert any(getattr(case, field) == value for case in checked)


def test_after_a_crash_the_next_job_runs():
    pool = Pool(1)
    jobs = [
        Job("raises", int, ("x",)), Job("ends the process", os._exit, (3,)), Job("works", list, ([{"a": 1}],)),
    ]  # fmt: skip
    outcomes = list(pool.run(jobs, time.monotonic() + 600))
    assert [outcome.job.name for outcome in outcomes] == [job.name for job in jobs]
    assert outcomes[0].problem.startswith("ValueError: invalid literal for int()")
    assert outcomes[1].problem == "the process ended with exit code 3"
    assert outcomes[2][1:4] == ([{"a": 1}], None, False)
    cut = list(pool.run([Job("hangs", time.sleep, (600,)), Job("waits", list)], time.monotonic() + 0.1))
    assert [outcome.cut for outcome in cut] == [True, True]
    pool.close()
    assert not pool.workers


def test_a_run_goes_on_after_errors_and_ends_with_status_1(tmp_path, capsys):
    rows = [{"implementation": "triton", "state": state} for state in ("ok", "refused: too wide", "wrong: other bits")]
    run = gpu.Run(tmp_path, 600, 0)
    run.run(gpu.Part("check", [Job("raises", int, ("x",)), *(Job(r["state"], list, ([r],)) for r in rows)], 1.0))
    run.run(gpu.Part("kernels", [Job("late", list)], 0.0))
    run.alone.close()
    assert [row["state"] for row in tables.read("check", tmp_path)] == [row["state"] for row in rows]
    problems = tables.read("problems", tmp_path)
    assert [row["job"] for row in problems] == ["raises", "wrong: other bits"]
    assert (run.cut, "kernels: no time for 1 of 1: late" in capsys.readouterr().out) == ({"kernels": ["late"]}, True)
    run.folder.joinpath("check.csv").unlink()
    assert run.close() == 1
    assert gpu.Run(tmp_path, 600, 0).close() == 0
    assert not list(tmp_path.glob("*.csv"))


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(gpu_cases, "rows_of", lambda case, x: ["torch"])
    monkeypatch.setattr(gpu_kernels, "compiled", lambda function: function)


@pytest.mark.parametrize("function", ["goodness_step", "tail_step", "group_goodness_step", "layer_norm"])
def test_the_check_for_gpus_finds_wrong_results_and_other_bits(function, on_the_cpu, monkeypatch):
    options = {"groups": 3} if function.startswith("group") else None
    case = gpu_cases.Case(function, 4, 8, 4, 3, "fp32", options=options)
    right = getattr(ff, function)
    assert [row["state"] for row in gpu_check.check(case)] == ["ok"]
    field = "normalized" if function.endswith("step") else None

    def off(by):
        def call(*args, **kw):
            found = right(*args, **kw)
            return found._replace(normalized=found.normalized * (1 + by())) if field else found * (1 + by())

        return call

    monkeypatch.setattr(ff, function, off(lambda: 1e-3))
    [row] = gpu_check.check(case)
    assert row["state"] == "wrong"
    assert row["error"] == pytest.approx(1e-3, rel=0.01)
    states = {row["contender"]: row for row in gpu_kernels.measure(case)}["torch"]
    assert states["state"].startswith("wrong: ")
    assert states["cold_us"] is None
    calls = iter([0.0, 1e-7])
    monkeypatch.setattr(ff, function, off(lambda: next(calls)))
    assert "other bits the second time" in gpu_check.check(case)[0]["state"]
    monkeypatch.setattr(ff, function, off(lambda: float(torch.empty(1)) * 0))
    assert "uninitialised memory" in gpu_check.check(case)[0]["state"]
    monkeypatch.setattr(ff, function, off(lambda: int("x")))
    assert gpu_check.check(case)[0]["state"].startswith("error: ValueError: invalid literal")


class Anything:
    """An object of torch.cuda, whose methods do nothing."""

    def __init__(self, *args, **options):
        pass

    def __getattr__(self, name):
        return lambda *args: 2.0  # milliseconds between two events


@pytest.fixture
def cuda(monkeypatch):
    """Stand-ins for torch.cuda: every replay of a graph takes two milliseconds and does nothing."""
    monkeypatch.setattr(bench, "on_gpu", lambda: True)
    for name in ("CUDAGraph", "Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, Anything)
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, pool=None: contextlib.nullcontext())
    for name in ("synchronize", "graph_pool_handle", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: Anything())


def test_fastff_bench_times_graphs_on_a_gpu(cuda):
    """Not the host: the time of a call is that of a replay over its calls, each with inputs of its own."""
    inputs = bench.input_sets(lambda seed: (torch.tensor(float(seed)),), 60_000_000)
    assert len(inputs) == 4
    seen = []
    times = bench._times({"one": lambda t: seen.append(float(t)), "other": lambda t: t + 1}, inputs, 3)
    assert times == {name: [pytest.approx(2e-3 / 4)] * 3 for name in ("one", "other")}
    assert seen[-4:] == [0.0, 1.0, 2.0, 3.0]
    assert bench.device_seconds(lambda: None) == pytest.approx(2e-3 / bench.MOST_CALLS)


def test_what_runs_on_a_gpu_only(on_the_cpu, cuda, monkeypatch):
    """Graphs, events and checks of steps with stand-ins for torch.cuda: nothing is timed, but all of it runs."""
    seen = []
    for module in (gpu_device, gpu_kernels, gpu_check):
        monkeypatch.setattr(module, "DRY", False)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", seen.append)
    monkeypatch.setattr(gpu_kernels, "launched", lambda function: (5, 0.0))
    rows = gpu_kernels.measure(gpu_cases.Case("goodness_step", 4, 8, 4, 3))
    assert [row["contender"] for row in rows] == ["eager", "compiled", "torch"]
    assert all((row["cold_us"], row["launches"]) == (pytest.approx(2e3 / bench.MOST_SETS), 5) for row in rows)
    monkeypatch.setattr(gpu_check, "Trainer", lambda *args, cuda_graph, **options: Trainer(*args, **options))
    assert [row["state"] for row in gpu_check.check_no_waiting({"grid": 0, "window": 1})] == ["ok"]
    assert seen == ["error", "default"]


def test_refusals_are_no_errors():
    x, weight, target = torch.randn(2, 4, 2, 2), torch.randn(3, 4), torch.zeros(2, dtype=torch.int64)
    _, state = gpu_check.tried(lambda: ff.goodness_step(x, weight, None, target, impl="triton"))
    assert state.startswith("refused: RuntimeError: impl='triton': no implementation of goodness")


def test_counters_of_nsight_compute():
    head = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    lines = [
        '"0","7","direct","dram__bytes_read.sum","byte","1,234"', '"0","7","direct","gpu__time_duration.sum","nsecond","56"',
        '"1","7","direct","dram__bytes_read.sum","byte","8"',
    ]  # fmt: skip
    first, second = gpu_kernels.parsed("\n".join(["==PROF== Connected", "", head, *lines]))
    assert (first["kernel"], first["dram_read"], first["ns"], first["registers"]) == ("direct", "1234", "56", None)
    assert second["dram_read"] == "8"
    assert gpu_kernels.parsed("==ERROR== no permission") == []
