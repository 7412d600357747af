"""Measuring block sizes, with a clock that prefers one candidate: test_triton.py runs this interpreted, with TRITON_INTERPRET=1."""

import json

import pytest
import torch

import fastff.functional as ff
from fastff import cache
from fastff.kernels.triton import blocks, tuning


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTFF_CACHE", str(tmp_path))
    blocks.measured.cache_clear()
    yield
    blocks.measured.cache_clear()


def test_tune_keeps_the_fastest_and_launches_use_it():
    device, said, count = torch.device("cpu"), [], iter(range(100, 0, -1))

    def clock(step):
        losses, g, *_ = step()
        assert torch.isfinite(losses).all()
        assert g.shape == (4, 5)
        return float(next(count))  # every one faster than those before it

    tuning.tune(device, clock, shapes=[(16, 4, 5)], dtype=torch.float32, B=4, report=said.append)
    kept = json.loads(cache.file(blocks.FILE).read_text())["interpreter"]
    assert {key.split()[0] for key in kept} == {"direct", "second_moment"}
    assert len(said) == 2
    for key, sizes in kept.items():
        start = blocks.table(key.split()[0], 4, 16, 16, 5, 0, 4)
        assert sizes == list(list(tuning.candidates(start))[-1])
        assert blocks.sizes(device, key.split()[0], 4, 16, 16, 5, 0, 4) == blocks.Blocks(*sizes)
    assert blocks.sizes(device, "direct", 4, 16, 25, 5, 0, 4) == blocks.table("direct", 4, 16, 25, 5, 0, 4)
    torch.manual_seed(0)
    x, weight, target = torch.randn(4, 16, 4, 4), torch.randn(5, 16), torch.arange(4)
    tuned = ff.goodness_step(x, weight, None, target, impl="triton").grad_x
    exact = ff.goodness_step(x.double(), weight.double(), None, target, impl="reference").grad_x
    # elements are sums over classes that cancel: roundings are of the size of their terms
    assert (tuned - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"interpreter": {"direct 1 2 3 0 4 0": [1, 2]}}'])
def test_a_damaged_file_means_the_table(text):
    cache.write(blocks.FILE, {})
    cache.file(blocks.FILE).write_text(text)
    assert blocks.sizes(torch.device("cpu"), "direct", 4, 1, 2, 3, 0, 4) == blocks.table("direct", 4, 1, 2, 3, 0, 4)


def test_a_failing_candidate_is_left_out_but_the_table_must_run():
    said, calls = [], []

    def clock(step, failing):
        calls.append(step)
        if len(calls) == failing:
            raise RuntimeError("out of resource: shared memory")
        return 1.0

    shape = {"shapes": [(256, 4, 5)], "dtype": torch.float32, "B": 4, "report": said.append}
    tuning.tune(torch.device("cpu"), lambda step: clock(step, 2), **shape)
    assert sum("out of resource" in text for text in said) == 1
    calls.clear()
    with pytest.raises(RuntimeError, match="out of resource"):
        tuning.tune(torch.device("cpu"), lambda step: clock(step, 1), **shape)


def test_candidates_are_compiled_by_a_pool_of_processes(tmp_path, monkeypatch):
    """Each process makes a step, and one that fails does not end the others."""
    sizes = blocks.table("direct", 4, 16, 16, 5, 0, 4)
    case, said = tuning.Case("direct", 4, 16, 4, 5, torch.float32), []
    jobs = [(case, sizes, torch.device("cpu")), (case, sizes._replace(BP=3), torch.device("cpu"))]
    tuning.compile_ahead(jobs, 2, said.append)
    assert said == ["compiling 2 candidates in 2 processes"]
    pools = []

    def compile_ahead(jobs, processes, report):
        pools.append((len(jobs), processes))

    monkeypatch.setattr(tuning, "compile_ahead", compile_ahead)
    monkeypatch.setattr(tuning.Case, "step", lambda self, device: lambda sizes: None)
    monkeypatch.setattr(blocks, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(blocks, "architecture", lambda device: 90)
    for processes in (3, 0):
        tuning.tune(torch.device("cuda"), lambda step: 1.0, shapes=[(16, 4, 5)], B=4, processes=processes)
    of_both = sum(
        len(list(tuning.candidates(case._replace(algorithm=a, dtype=torch.bfloat16).table(torch.device("cpu")))))
        for a in ("direct", "second_moment")
    )
    assert pools == [(of_both, 3)]
