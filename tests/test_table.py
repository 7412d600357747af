"""Which implementation and which algorithm run: impl=, FASTFF_IMPL, the plan, its calibration file."""

import itertools
import json
import types

import pytest
import torch

import fastff.functional as ff
from fastff import cache, ops
from fastff.ops import TABLES, plan, table
from fastff.ops.goodness import plan_for
from fastff.ops.table import Implementation, always, choose
from fastff.spec import Plan

ROWS = [
    Implementation("native", lambda x: "no compiler" if x.dtype != torch.float32 else None, "fast"),
    Implementation("torch", always, "middle"),
    Implementation("reference", always, "slow"),
]
SINGLE, HALF = torch.empty(1), torch.empty(1, dtype=torch.float16)


@pytest.fixture(autouse=True)
def clean_plan(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTFF_IMPL", raising=False)
    monkeypatch.setenv("FASTFF_CACHE", str(tmp_path))
    forget()
    yield
    monkeypatch.undo()
    forget()


def forget():
    plan.second_moment_factor.cache_clear()
    plan.plan.cache_clear()


def test_auto_takes_the_first_that_can_run():
    assert choose("op", ROWS, "auto", SINGLE).run == "fast"
    assert choose("op", ROWS, "auto", HALF).run == "middle"


def test_a_name_runs_or_raises_with_the_reason():
    assert choose("op", ROWS, "reference", SINGLE).run == "slow"
    with pytest.raises(
        RuntimeError, match=r"impl='native': no implementation of op can run here \(native: no compiler\)"
    ):
        choose("op", ROWS, "native", HALF)
    with pytest.raises(RuntimeError, match=r"triton: there is no such implementation of op yet"):
        choose("op", ROWS, "triton", SINGLE)


def test_a_row_that_does_not_take_a_call_is_passed_over():
    fast = Implementation(
        "cuda", always, "fastest", takes=lambda call: None if call == "small" else f"{call} is no call for it"
    )
    for impl in ("auto", "cuda,native"):
        assert (
            choose("op", [fast, *ROWS], impl, SINGLE, "small").run
            == choose("op", [fast, *ROWS], impl, SINGLE).run
            == "fastest"
        )
        assert choose("op", [fast, *ROWS], impl, SINGLE, "large").run == "fast"
    with pytest.raises(RuntimeError, match="cuda: large is no call for it"):
        choose("op", [fast, *ROWS], "cuda", SINGLE, "large")


def test_names_in_order_of_preference():
    assert choose("op", ROWS, "triton, native,reference", SINGLE).run == "fast"
    assert choose("op", ROWS, "triton,native,reference", HALF).run == "slow"


@pytest.mark.parametrize("wrong", ["fastest", "", "native,", "Native"])
def test_unknown_names(wrong):
    with pytest.raises(
        ValueError, match="impl: expected 'auto' or names out of cuda, triton, native, torch, reference, got"
    ):
        choose("op", ROWS, wrong, SINGLE)


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("FASTFF_IMPL", "reference")
    assert choose("op", ROWS, "auto", SINGLE).run == "slow"
    assert choose("op", ROWS, "torch", SINGLE).run == choose("op", ROWS, "composed", SINGLE).run == "middle", (
        "an argument goes before the environment"
    )
    monkeypatch.setenv("FASTFF_IMPL", "quick")
    with pytest.raises(ValueError, match="FASTFF_IMPL: expected 'auto' or names"):
        choose("op", ROWS, "auto", SINGLE)
    monkeypatch.setenv("FASTFF_IMPL", "auto")
    assert choose("op", ROWS, "auto", SINGLE).run == "fast"


def test_public_functions_follow_both(monkeypatch):
    """Through the op, not only through choose(): the row asked for is the one that computes."""
    x, weight, target = torch.randn(2, 3, 4, 4), torch.randn(5, 3), torch.tensor([0, 1])
    calls = []

    def spied(op, row, wanted):
        functions = {name: spy(calls, (op, row.name, name), getattr(row.run, name)) for name in wanted}
        return row._replace(run=types.SimpleNamespace(**functions))

    tables = {
        "goodness": (ops.goodness, "ROWS", ["goodness", "step"]),
        "goodness_step": (ops.goodness, "STEP_ROWS", ["goodness", "step"]),
        "layer_norm": (ops.group_goodness, "ROWS", ["normalize"]),
    }
    for op, (module, name, wanted) in tables.items():
        rows = [spied(op, row, wanted) for row in getattr(module, name) if row.name not in ("cuda", "triton")]
        monkeypatch.setattr(module, name, rows)
    ff.goodness(x, weight, impl="reference")
    ff.layer_norm(x, impl="reference")
    assert calls == [("goodness", "reference", "goodness"), ("layer_norm", "reference", "normalize")]
    for name in ("torch", "composed"):  # its former name
        calls.clear()
        monkeypatch.setenv("FASTFF_IMPL", name)
        ff.goodness_step(x, weight, None, target)
        ff.layer_norm(x)
        assert calls == [("goodness_step", "torch", "step"), ("layer_norm", "torch", "normalize")]
    with pytest.raises(RuntimeError, match="there is no such implementation of goodness yet"):
        ff.goodness(x, weight, impl="cuda")


def spy(calls, note, function):
    def run(*args, **kwargs):
        calls.append(note)
        return function(*args, **kwargs)

    return run


def test_names_of_the_tables_are_known():
    for rows in TABLES.values():
        names = [row.name for row in rows]
        preferred = [name for name in table.NAMES if name in names]
        assert names == preferred, "the order of preference is the same everywhere"


# --- the plan


def test_the_cheaper_algorithm_by_counted_cost():
    factor, source = plan.second_moment_factor()
    assert (factor, source) == (plan.SECOND_MOMENT_FACTOR, "default")
    chosen = set()
    for B, C, P, K in itertools.product([1, 32], [8, 64, 512], [1, 16, 1024, 3136], [10, 100, 1000]):
        how = plan.plan(B, C, P, K)
        # products as in sff.md section 3, counted for the forward and the backward pass
        second = factor * plan.second_moment_cost(C, P, K)
        direct = plan.direct_cost(C, P, K, recompute=plan.budget("cpu") // 4 < K * P)
        assert how.algorithm == ("second_moment" if second < direct else "direct")
        chosen.add(how.algorithm)
    assert chosen == {"direct", "second_moment"}
    assert plan.plan(8, 64, 3136, 1000).algorithm == "second_moment"
    assert plan.plan(32, 512, 16, 100).algorithm == "direct"


def test_costs_count_what_they_say():
    """Leading terms: 3 P C K for direct (4 when computed again), 2 P C^2 + 2 K C^2 for the second moment."""
    C, P, K = 1000, 2000, 3000
    assert plan.direct_cost(C, P, K) / (P * C * K) == pytest.approx(3, rel=0.05)
    assert plan.direct_cost(C, P, K, recompute=True) / (P * C * K) == pytest.approx(4, rel=0.05)
    assert plan.second_moment_cost(C, P, K) / (2 * (P + K) * C * C) == pytest.approx(1, rel=0.05)


def test_temporaries_of_a_chunk_stay_within_the_budget():
    for B, C, P, K in itertools.product([1, 5, 64], [8, 64, 512], [1, 16, 1024, 3136], [1, 10, 1000]):
        how = plan.plan(B, C, P, K)
        assert 1 <= how.samples <= B
        assert 1 <= how.classes <= K
        if how.algorithm == "direct":
            room = plan.budget("cpu")
            assert 4 * how.classes * P <= max(room, 4 * P)
            assert how.samples == 1 or 4 * how.samples * P * (C + how.classes) <= room


def test_algorithm_can_be_asked_for():
    for algorithm in ("direct", "second_moment"):
        assert plan.plan(8, 64, 64, 100, algorithm=algorithm).algorithm == algorithm
    assert plan.plan(8, 64, 64, 100, kernel=(3, 3)).algorithm == "convolution"
    x, weight = torch.empty(8, 64, 32, 32), torch.empty(1000, 64, 1, 1)
    assert isinstance(plan_for(x, weight, None, (0, 0)), Plan)
    assert plan_for(x, weight, None, (0, 0), "direct").algorithm == "direct"
    assert plan_for(x, weight, None, (0, 0)).algorithm == "second_moment"


def test_calibration_file_is_read():
    shape = (8, 64, 3136, 1000)
    assert plan.plan(*shape).algorithm == "second_moment"
    cache.file(plan.FILE).write_text(json.dumps({"second_moment_factor": 1e6}))
    forget()
    assert plan.second_moment_factor() == (1e6, str(cache.file(plan.FILE)))
    assert plan.plan(*shape).algorithm == "direct"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", "{}", '{"second_moment_factor": "fast"}', '{"second_moment_factor": null}', '{"second_moment_factor": NaN}']
    + ['{"second_moment_factor": 0}', '{"second_moment_factor": -1}', '{"second_moment_factor": 1e999}', '{"second_moment_factor": [1]}', "\x00\xff"],
)  # fmt: skip
def test_damaged_calibration_file_is_ignored(text):
    cache.file(plan.FILE).write_bytes(text.encode("latin-1"))
    forget()
    assert plan.second_moment_factor() == (plan.SECOND_MOMENT_FACTOR, "default")


def test_calibration_file_that_cannot_be_opened_is_ignored():
    cache.file(plan.FILE).mkdir()
    forget()
    assert plan.second_moment_factor() == (plan.SECOND_MOMENT_FACTOR, "default")


def test_calibrate_measures_and_keeps(monkeypatch):
    monkeypatch.setattr(plan, "CALIBRATION_SHAPES", [(2, 8, 16, 10), (1, 4, 64, 30), (2, 16, 4, 5)])
    seen = []

    class Counted:
        """An implementation whose second moment costs a quarter of the torch implementation's."""

        SECOND_MOMENT_COST = 0.25

        @staticmethod
        def goodness_backward(d, x, projection, chosen, need_grad_x):
            seen.append(chosen.algorithm)

    ticks = itertools.count()
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(ticks))  # each call takes the same time
    factor = plan.calibrate(Counted, repeats=3)
    assert seen.count("direct") == seen.count("second_moment") == 12, "it measures the implementation that it is given"
    shapes = sorted(
        plan.direct_cost(C, P, K) / plan.second_moment_cost(C, P, K) for _, C, P, K in plan.CALIBRATION_SHAPES
    )
    assert factor == pytest.approx(shapes[1] / 0.25)
    assert json.loads(cache.file(plan.FILE).read_text())["second_moment_factor"] == factor
    assert plan.second_moment_factor() == (factor, str(cache.file(plan.FILE)))
    assert [p.name for p in cache.file(plan.FILE).parent.iterdir()] == [cache.file(plan.FILE).name], (
        "nothing temporary is left"
    )


def test_the_choice_stays_for_the_same_shape():
    """Resumed runs repeat their bits: a factor measured meanwhile by another process changes nothing before the next start."""
    before = plan.plan(8, 64, 3136, 1000)
    cache.file(plan.FILE).write_text(json.dumps({"second_moment_factor": 1e6}))
    assert plan.plan(8, 64, 3136, 1000) == before
