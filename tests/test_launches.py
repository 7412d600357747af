"""Launches of a step on a GPU, counted on a CPU (tests/launches.py), and how launches are specialised and compiled as they are made."""

import contextlib
import itertools
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from launches import SHAPES, as_on_a_gpu
from torch.utils._python_dispatch import TorchDispatchMode

import fastff
from fastff import SFF, Trainer, spec
from fastff.kernels.triton import blocks
from fastff.ops import goodness as ops_goodness
from fastff.ops import step as ops_step
from fastff.ops.plan import Gpu, gpu_microseconds, on_gpu
from fastff.training import Backprop, optim

pytest.importorskip("triton", reason="Triton is not installed")

# A GPU of few multiprocessors, which a small batch fills as a large one fills a large GPU: each program takes whole samples.
FEW = 4


def step_of(kind, granularity, optimizer=None, micro_batches=1, **options):
    """The Launches of a step of ResNet18, by default with AdamW."""
    sff = SFF(fastff.models.resnet18(10, stem="cifar", width=16), 10, granularity, readout=True, **options)
    trainer = kind(sff, optimizer or optim.adamw(), micro_batches=micro_batches)
    batch = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    with as_on_a_gpu(FEW) as launches:
        trainer.step(*batch)  # makes the state of the optimizers
        with launches:
            trainer.step(*batch)
    return launches


PAPER = {"grid": 0, "window": 1}
# Today's numbers, by granularity and optimizer, of the settings of the paper and ("auto") of the defaults. Lower them with every launch that goes.
MOST = {
    ("block", "adamw"): 175, ("layer", "adamw"): 191, ("auto", "adamw"): 353, ("block", "muon"): 373, ("auto", "muon"): 570
}  # fmt: skip


@pytest.mark.parametrize(("granularity", "optimizer"), MOST)
def test_launches_of_a_resnet18_step(granularity, optimizer):
    launches = step_of(Trainer, granularity, getattr(optim, optimizer)(), **({} if granularity == "auto" else PAPER))
    assert launches.kernels > 30  # the kernels of fastff are what runs
    assert launches.total <= MOST[granularity, optimizer], launches.count.most_common()


TWO_MICRO_BATCHES = 393


def test_launches_of_two_micro_batches():
    """Twice those of one, less what is done once a step; the rest adds gradients."""
    launches = step_of(Trainer, "block", micro_batches=2, **PAPER)
    assert launches.total <= TWO_MICRO_BATCHES, launches.count.most_common()
    assert launches.count["triton direct"] == 2 * 9
    assert launches.count["_fused_adamw_"] == 20
    assert launches.count["full"] == 0  # the shares of micro-batches are kept from step to step


PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is in the source tree")
def test_the_page_has_these_numbers():
    text = PAGE.read_text("utf-8")
    paragraph = text.split("Launches of a step of ResNet18")[1].split("\n\n")[0]
    assert {str(most) for most in (*MOST.values(), TWO_MICRO_BATCHES)} <= set(re.findall(r"\d+", paragraph))


def test_backpropagation_is_counted_likewise():
    launches = step_of(Backprop, "block", **PAPER)
    assert launches.kernels == 0
    assert launches.count["convolution"] == launches.count["convolution_backward"] == 20
    assert 150 < launches.total < 190


def head_step(
    epilogue=False, algorithm="auto", grid=0, hidden=0, loss="cross_entropy", B=8, C=16, H=8, K=10, dtype=torch.float32,
    plan=None,
):  # fmt: skip
    """The Launches of one step of a head, behind an epilogue or not."""
    x, weight = torch.randn(B, C, H, H, dtype=dtype), torch.randn(K, C, 1, 1)
    around = spec.Epilogue(torch.rand(C), torch.randn(C), residual=torch.randn_like(x)) if epilogue else None
    loss = spec.Loss(loss)
    if loss.name == "cross_entropy":
        loss = loss._replace(target=torch.randint(K, (B,)), learned_tau=torch.tensor(1.0))
    cells = torch.randn(K, hidden or C, grid, grid) if grid else None
    layer = (torch.randn(hidden, C), torch.ones(hidden), torch.zeros(hidden)) if hidden else ()
    head = spec.Projection(weight, torch.randn(K), cells, (0, 0), *layer)
    planned = mock.patch.object(ops_goodness, "planned", lambda *_: plan) if plan else contextlib.nullcontext()
    with as_on_a_gpu(FEW) as launches, planned, launches:
        ops_step.run(spec.Step(x, around, head, loss, spec.Normalization("layer_norm"), algorithm=algorithm))
    return launches


EPILOGUE = ["channel_sums"]  # the sweep and the reduction do the rest
HEAD_OF_SECOND_MOMENT = ["head_second_moment", "reduce"]
HIDDEN_LAYER = ["spatial", "hidden_gradient"]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, ["direct", "reduce"]),
        ({"grid": 2}, ["direct", "reduce"]),
        ({"algorithm": "second_moment"}, ["second_moment", *HEAD_OF_SECOND_MOMENT]),
        ({"epilogue": True}, [*EPILOGUE, "direct", "reduce"]),
        ({"loss": "symba"}, ["direct", "loss_kernel", "direct", "reduce"]),
        ({"grid": 2, "epilogue": True, "dtype": torch.bfloat16}, [*EPILOGUE, "direct", "reduce"]),
        ({"grid": 2, "epilogue": True}, [*EPILOGUE, "direct", "spatial", "direct", "reduce"]),
        ({"grid": 2, "algorithm": "second_moment"}, ["second_moment", *HEAD_OF_SECOND_MOMENT]),
        (
            {"grid": 2, "algorithm": "second_moment", "epilogue": True, "dtype": torch.bfloat16},
            [*EPILOGUE, "second_moment", *HEAD_OF_SECOND_MOMENT],
        ),
        (
            {"grid": 2, "algorithm": "second_moment", "epilogue": True},
            [*EPILOGUE, "second_moment", "spatial", "second_moment", *HEAD_OF_SECOND_MOMENT],
        ),
        ({"grid": 2, "hidden": 8}, ["direct", *HIDDEN_LAYER, "direct", "reduce"]),
        ({"grid": 2, "hidden": 8, "epilogue": True}, [*EPILOGUE, "direct", *HIDDEN_LAYER, "direct", "reduce"]),
        (
            {"grid": 2, "hidden": 8, "algorithm": "second_moment"},
            ["second_moment", *HIDDEN_LAYER, "second_moment", *HEAD_OF_SECOND_MOMENT],
        ),
    ],
)
def test_launches_of_a_head(how, expected):
    launches = head_step(**how)
    assert [kernel.fn.__name__ for kernel, *_ in launches.recorded] == expected
    assert launches.total == len(expected), launches.count


@pytest.mark.parametrize(
    ("how", "most"),
    [
        ({}, 25), ({"epilogue": True}, 42), ({"grid": 2}, 33), ({"algorithm": "second_moment"}, 27), ({"loss": "symba"}, 22),
        ({"grid": 2, "hidden": 8}, 43), ({"grid": 2, "hidden": 8, "epilogue": True}, 60),
    ],
)  # fmt: skip
def test_the_host_does_little_for_a_step_and_waits_for_nothing(how, most):
    """Each operator, a view or new memory too, takes microseconds of the host, which a small batch on a GPU waits for. What reads a number back
    is the check of the labels, which a GPU's tensors do not have."""
    launches = head_step(**how)
    assert sum(launches.called.values()) <= most, launches.called.most_common()
    assert launches.called["_local_scalar_dense"] == 2 * launches.called["aminmax"] <= 2
    assert launches.called["_to_copy"] == launches.called["copy_"] == 0


@pytest.mark.parametrize(
    ("how", "launches", "operators"),
    [
        ({}, 6, 1),  # W in bfloat16
        ({"dtype": torch.float32}, 6, 0), ({"dtype": torch.float16}, 6, 5),  # W, and d as a multiple of its largest
        ({"H": 24}, 7, 1), ({"epilogue": True}, 11, 1),
        ({"grid": 2, "K": 100}, 6, 10), ({"grid": 2, "hidden": 8, "K": 100}, 8, 10),  # two thin products each of the means and of their gradient
    ],
)  # fmt: skip
def test_launches_of_products(how, launches, operators):
    """Three products, the loss, the reduction and the normalization; one more joins the squares of several tiles, five are an epilogue."""
    how = {"C": 256, "H": 8, "K": 1000, "dtype": torch.bfloat16, "plan": spec.Plan("products", 8, 1000)} | how
    head_step(**how)  # makes the matrices of the grid
    counted = head_step(**how)
    assert (counted.kernels, counted.total - counted.kernels) == (launches, operators), counted.count
    assert all(counted.count[f"triton {name}"] == 1 for name in ("outputs", "input_gradient", "weight_gradient"))


@pytest.mark.parametrize(
    ("how", "launches"),
    [
        ({}, 5), ({"epilogue": True}, 6), ({"algorithm": "second_moment"}, 7), ({"grid": 2}, 5), ({"grid": 2, "hidden": 8}, 7),
        ({"grid": 2, "hidden": 8, "epilogue": True}, 8),
    ],
)  # fmt: skip
def test_launches_of_few_samples(how, launches):
    """Several programs share a sample: two sweeps, and between them a launch that joins what the first wrote of parts of samples."""
    counted = head_step(B=1, H=24, **how)
    assert counted.count["triton join"] == 1
    assert counted.total == counted.kernels == launches, counted.count


def test_a_batch_that_leaves_some_multiprocessors_idle_is_one_sweep():
    """Programs share samples, in three launches more, only where they leave half of the multiprocessors idle."""
    assert head_step(B=FEW // 2 + 1, H=24).total == 2
    assert head_step(B=FEW // 2, H=24).total == 5


@pytest.mark.parametrize("arch", blocks.SHARED)
def test_a_grid_behind_an_epilogue_is_one_sweep_where_registers_hold_it(arch):
    """In 16 bits, on devices whose products read W from shared memory; elsewhere there are two sweeps."""
    for itemsize, C, P, K in itertools.product((2, 4), (24, 64, 512), (16, 49, 1024), (10, 16)):
        sizes = blocks.table("direct", 64, C, P, K, 4, itemsize, True, arch)
        around = blocks.with_grid_inside(sizes, 64, C, K, 4, itemsize, True, arch)
        assert (around is not None) == (itemsize == 2 and arch in (90, 100))
        assert around is None or 16 <= around.NS * around.BP <= 32
    alone = blocks.table("direct", 64, 64, 1024, 10, 16, 2, arch=arch)
    assert blocks.with_grid_inside(alone, 64, 64, 10, 16, 2, arch=arch) == alone
    of_a_large_batch = blocks.with_grid_inside(alone, 10**5, 64, 10, 16, 2, arch=arch)
    assert of_a_large_batch is None  # too many bytes of the grid's weights


@pytest.mark.parametrize(
    "how", [{"K": 140, "algorithm": "second_moment"}, {"loss": "symba"}, {"loss": "symba", "epilogue": True}]
)
@pytest.mark.parametrize("hidden", [0, 8])
def test_launches_of_a_grid_whose_products_are_those_of_cublas(how, hidden, monkeypatch):
    """Two sweeps, the loss and the reduction, three products, and three launches more of a hidden layer, one of an epilogue."""
    monkeypatch.setattr(blocks, "GRID_BYTES", 0)
    launches = head_step(grid=2, hidden=hidden, **how)
    assert launches.count["addmm_"] == launches.count["triton loss_kernel"] == 1
    assert launches.count["mm"] == 2
    more = (how.get("algorithm") == "second_moment") + 3 * bool(hidden) + how.get("epilogue", False)
    assert launches.total <= 7 + more, launches.count


def test_tables_of_groups_stay_where_a_recorded_step_reads_them():
    """However many other heads there are: a recorded step has their addresses."""
    from fastff.kernels.triton.group_goodness import groups_of

    first = groups_of(8, 3, torch.device("cpu"))
    for channels in range(9, 600):
        groups_of(channels, 3, torch.device("cpu"))
    assert all(a is b for a, b in zip(first, groups_of(8, 3, torch.device("cpu")), strict=True))
    assert [t.tolist() for t in first[:2]] == [[0, 3, 6, 8], [0, 0, 0, 1, 1, 1, 2, 2]]


def test_statistics_of_a_step_are_one_launch_for_all_blocks():
    launches = step_of(Trainer, "block", **PAPER)
    assert launches.count["argmax"] == launches.count["eq"] == 1
    assert launches.count["copy_"] + launches.count["zeros"] == 0


# --- the plan of a GPU

H100, CONSUMER = Gpu(2, 90), Gpu(2, 86)


@pytest.mark.parametrize(
    ("B", "C", "H", "K", "gpu", "chosen"),
    [
        (128, 128, 16, 10, H100, "direct"), (512, 256, 8, 10, H100, "direct"), (512, 256, 8, 100, H100, "products"),
        (512, 512, 4, 10, H100, "direct"), (512, 512, 4, 100, H100, "products"), (512, 64, 32, 100, H100, "second_moment"),
        (512, 64, 32, 1000, H100, "second_moment"), (256, 64, 56, 1000, H100, "second_moment"), (256, 24, 56, 1000, H100, "second_moment"),
        (256, 256, 14, 1000, H100, "products"), (256, 512, 7, 1000, H100, "products"), (256, 1024, 14, 1000, H100, "products"),
        (256, 960, 7, 1000, H100, "products"), (256, 2048, 7, 10, H100, "products"), (512, 128, 16, 1000, CONSUMER, "products"),
        (512, 64, 32, 10, CONSUMER, "direct"), (256, 64, 32, 10, Gpu(2, None), "cublas"), (512, 64, 32, 10, Gpu(4, 90), "direct"),
        (512, 256, 8, 1000, Gpu(4, 90), "cublas"), (512, 256, 8, 1000, Gpu(4, 90, True), "products"),
    ],
)  # fmt: skip
def test_algorithm_on_a_gpu(B, C, H, K, gpu, chosen):
    from fastff.ops.plan import plan

    assert plan(B, C, H * H, K, device_type="cuda", gpu=gpu).algorithm == chosen
    times = on_gpu(B, C, H * H, K, gpu)
    assert next(iter(times)) == chosen
    assert times == {name: gpu_microseconds(name, B, C, H * H, K, gpu) for name in times}


@pytest.mark.parametrize("arch", blocks.SHARED)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_plan_knows_what_the_kernels_take(arch, itemsize):
    """What it chooses of Triton's has sizes, and a refusal has none."""
    for C, K in itertools.product(
        (16, 64, 65, 128, 129, 256, 257, 1024, 1025), (10, 16, 17, 32, 33, 64, 65, 128, 129, 1000)
    ):
        times = on_gpu(128, C, 64, K, Gpu(itemsize, arch))
        for algorithm in ("direct", "second_moment", "products"):
            assert (algorithm in times) == (blocks.table(algorithm, 128, C, 64, K, 0, itemsize, arch=arch) is not None)


@pytest.mark.parametrize("arch", blocks.SHARED)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_shape_is_taken_or_refused_with_the_reason(arch, itemsize):
    """Of each algorithm there are sizes, which test_triton.py compiles, or a limit that the shape exceeds; the quickest that runs is taken."""
    from fastff.ops.plan import plan

    gpu, chosen = Gpu(itemsize, arch), set()
    for B, C, H, K in SHAPES:
        times = on_gpu(B, C, H * H, K, gpu)
        for algorithm in ("direct", "second_moment", "products"):
            sizes = blocks.table(algorithm, B, C, H * H, K, 0, itemsize, arch=arch)
            why = blocks.refusal(algorithm, C, K, itemsize, arch=arch)
            assert (why is None) == (sizes is not None) == (algorithm in times)
            if why is not None:
                (limit,), got = re.findall(r"at most (\d+)", why), int(re.search(r"has (\d+)$", why)[1])
                assert int(limit) < got == (C if "x has" in why else K), why
        assert list(times) == sorted(times, key=times.get)
        assert plan(B, C, H * H, K, device_type="cuda", gpu=gpu).algorithm == next(iter(times))
        chosen.add(next(iter(times)))
    assert chosen == {"direct", "second_moment", "products" if itemsize == 2 else "cublas"}


def test_no_algorithm_is_taken_silently():
    """The products are the direct algorithm too; nothing stands for the second moment."""
    from fastff.ops.plan import plan

    assert plan(8, 256, 49, 100, algorithm="direct", device_type="cuda", gpu=H100).algorithm == "direct"
    assert plan(8, 256, 49, 100, algorithm="direct", device_type="cuda", gpu=CONSUMER).algorithm == "products"
    with pytest.raises(ValueError, match="algorithm: .* got second_moment: .* at most 64 channels.* x has 128"):
        plan(8, 128, 49, 10, algorithm="second_moment", device_type="cuda", gpu=CONSUMER)


@pytest.mark.parametrize(("arch", "K", "products"), [(86, 10, False), (86, 100, True), (90, 100, False)])
def test_products_of_many_classes(arch, K, products, monkeypatch):
    """Where registers do not hold the classes, three products run, still behind Triton's epilogue."""
    monkeypatch.setattr(blocks, "architecture", lambda device: arch)
    x, weight, bn = torch.randn(8, 256, 2, 2).bfloat16(), torch.randn(K, 256, 1, 1), torch.rand(256)
    loss = spec.Loss(target=torch.arange(8))
    step = spec.Step(
        x, spec.Epilogue(bn, bn), spec.Projection(weight), loss, spec.Normalization("layer_norm"), algorithm="direct"
    )
    with as_on_a_gpu(FEW) as launches, launches:
        ops_step.run(step)
    assert (launches.count["triton direct"] == 0) == (launches.count["triton outputs"] == 1) == products
    assert launches.count["triton channel_sums"] == 1


def test_gpus_of_amd_are_refused_with_the_reason(monkeypatch):
    from fastff.kernels import triton

    triton.device_reason.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA" in triton.device_reason(torch.device("cuda"))
    triton.device_reason.cache_clear()


def test_tf32_is_read_however_it_was_set():
    from fastff.kernels.triton.launch import float32_precision

    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for value, expected in (("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")):
            settings.fp32_precision = value
            assert float32_precision() == expected
            head_step(epilogue=True)
    finally:
        settings.fp32_precision = before


# --- products in the dtype of x


class Widest(TorchDispatchMode):
    """Within it, `most` is the number of elements of the largest float32 tensor that an operator made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(t, torch.Tensor) and t.dtype == torch.float32:
                self.most = max(self.most, t.numel())
        return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("kernel", "grid"), [(1, False), (1, True), (3, False)])
def test_products_are_in_the_dtype_of_x_and_widen_nothing(kernel, grid, channels_last, dtype, monkeypatch):
    from fastff.kernels.torch import goodness

    device_of = goodness.product_dtype
    assert device_of(torch.empty(1, dtype=dtype), torch.float32, "cublas") == torch.float32  # on a CPU
    monkeypatch.setattr(goodness, "product_dtype", lambda x, wide, algorithm: dtype if x.dtype == dtype else wide)
    torch.manual_seed(0)
    x = torch.randn(6, 24, 8, 6).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weight, bias = torch.randn(5, 24, kernel, kernel) / 5, torch.randn(5)
    head = spec.Projection(weight, bias, torch.randn(5, 24, 2, 2) / 5 if grid else None, (kernel // 2,) * 2)
    loss, how = spec.Loss(target=torch.arange(6) % 5), spec.Plan("convolution" if kernel > 1 else "cublas", 6, 5)
    with Widest() as widest:
        got = goodness.step(spec.Step(x, None, head, loss, spec.Normalization()), how)
    assert widest.most < x.numel()
    wide, exact_head = head.in_dtype(x.double())
    exact = goodness.step(spec.Step(wide, None, exact_head, loss, spec.Normalization()), how)
    rounding = torch.finfo(dtype).eps
    for name in ("loss", "goodness", "grad_x", "grad_weight", "grad_bias", "grad_grid_weight"):
        a, b = getattr(got, name), getattr(exact, name)
        assert (a is None) == (b is None), name
        # a, the gradient of a, d and the result are each rounded once; of the spatial term the sums of rows, and both terms' sum
        assert a is None or float((a.double() - b).norm() / b.norm()) < 4 * rounding, name
    assert got.goodness.dtype == got.grad_weight.dtype == torch.float32
    assert got.grad_x.dtype == dtype
