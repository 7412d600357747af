"""Compares every kernel for GPUs with float64, its error beside that of plain PyTorch in the same dtype. A second run must give the same bits, with
NaN in all memory that is allocated uninitialised.

A result is wrong if its error, a quotient of norms, is more than four times PyTorch's and more than a rounding of x's dtype besides.
"""

import contextlib
import functools

import torch

import fastff
from benchmarks import gpu_cases
from benchmarks.gpu_cases import DTYPES, Case
from benchmarks.gpu_device import DEVICE, DRY, IMPL
from benchmarks.gpu_workers import Job
from fastff import spec
from fastff.bench import synchronize
from fastff.training import Trainer

ALL = ("bias", "grid_weight", "hidden", "tau", "grad_scale")
SHAPES = [  # (B, C, H, K); B >= 133 with several tiles a sample, few samples, one position, all channels that are taken, many classes
    (150, 64, 16, 100), (150, 128, 16, 10), (5, 24, 9, 7), (3, 64, 32, 100), (70, 96, 1, 10), (40, 256, 8, 33), (40, 512, 4, 11),
    (40, 768, 3, 10), (33, 1024, 7, 10), (2, 64, 56, 1000), (4, 128, 28, 1000), (4, 256, 7, 1000), (300, 40, 7, 10), (150, 512, 7, 100),
]  # fmt: skip


def cases():
    """Return the Cases that are checked."""
    step, tail = "goodness_step", "tail_step"
    found = [Case(step, *shape) for shape in SHAPES]
    found += [Case(step, *shape, dtype) for shape in SHAPES[:6] for dtype in ("fp32", "fp16")]
    both = [(150, 64, 16, 100), (150, 128, 16, 10), (5, 24, 9, 7), (64, 64, 16, 10)]
    found += [
        Case(step, *shape, dtype, options={"algorithm": algorithm})
        for shape, dtype in zip(both, ("bf16", "fp16", "fp32", "bf16"), strict=True)
        for algorithm in spec.ALGORITHMS[1:]
    ]
    found += [Case(step, *shape, channels_last=False) for shape in (SHAPES[0], SHAPES[6])]
    found += [Case(step, 40, 64, 8, 10, options={"normalize": how}) for how in spec.NORMALIZATIONS[2:]]
    found += [
        Case(step, *shape, dtype, given)
        for shape, dtype, given in (
            (SHAPES[0], "bf16", ("grid_weight",)), (SHAPES[1], "bf16", ("grid_weight", "hidden")), (SHAPES[2], "fp32", ALL),
            (SHAPES[3], "fp16", ALL), (SHAPES[5], "bf16", ALL), (SHAPES[6], "bf16", ("grid_weight", "bias")),
        )
    ]  # fmt: skip
    found += [Case(step, 64, 64, 16, 10, given=ALL, options={"algorithm": a}) for a in spec.ALGORITHMS[1:]]
    options = {"margin": 0.5, "label_smoothing": 0.1, "reduction": "sum"}
    found += [Case(step, *SHAPES[i], given=("tau", "grad_scale", "bias"), options=options) for i in (0, 2)]
    found += [Case(step, *SHAPES[1], options={"need_grad_x": False, "reduction": "none", "normalize": None})]
    activations = zip(spec.ACTIVATIONS, SHAPES, strict=False)
    found += [Case(tail, *shape, options={"activation": activation}) for activation, shape in activations]
    found += [
        Case(tail, *SHAPES[i], dtype, ("residual", *given), options)
        for i, dtype, given, options in (
            (0, "bf16", (), {}), (0, "fp32", (), {}), (1, "fp16", ("grid_weight", "hidden"), {}), (5, "bf16", ALL, {"activation": "silu"}),
            (6, "bf16", (), {"need_grad_residual": False}), (3, "bf16", ("grid_weight",), {}), (13, "bf16", (), {"normalize": "rms"}),
        )
    ]  # fmt: skip
    found += [Case(tail, *SHAPES[0], given=("residual",), channels_last=False)]
    groups = [
        {"loss": "softplus", "normalize": "l2"}, {"loss": "symba"}, {"loss": "softplus", "positions": True}, {"groups": 10},
        {"groups": 10, "power": 1, "normalize": "group_norm"},
    ]  # fmt: skip
    shape = (64, 80, 16, 10)
    found += [Case("group_goodness_step", *shape, dtype, options=o) for o in groups for dtype in ("bf16", "fp32")]
    found += [Case("group_tail_step", *shape, given=("residual",), options=o) for o in groups[1:4]]
    found += [
        Case("group_goodness", *shape, options={"groups": 10}),
        Case("goodness_loss", *SHAPES[1], given=("bias",)),
    ]
    found += [Case("layer_norm", B, C, H, 1, dtype) for B, C, H in ((16, 64, 56), (512, 64, 8)) for dtype in DTYPES]
    found += [Case("normalize", *shape, options={"how": how}) for how in ("layer_norm_channels", "rms", "l2_channels")]
    found += [Case("epilogue", *shape, given=given, options={"activation": "relu"}) for given in ((), ("residual",))]
    found += [
        Case("depthwise", 32, 96, H, 1, dtype, options={"kernel": kernel, "stride": stride})
        for H, kernel, stride, dtype in ((28, 3, 1, "bf16"), (28, 3, 2, "fp32"), (14, 5, 1, "bf16"), (7, 5, 2, "fp16"))
    ]
    return found


COMPARED = ("result", "error", "plain_error", "allowed")


def distance(got, true):
    """Return the norm of the difference over that of the exact result; infinite for another shape."""
    if got.shape != true.shape:
        return float("inf")
    return float((got.detach().double() - true).norm() / true.norm().clamp(min=1e-30))


def largest(found, plain, true, dtype):
    """Return (name, error, error of plain PyTorch, allowed error) of the result that is nearest to being wrong, or is wrong."""
    rounding = max(1e-6, torch.finfo(dtype).eps) * (2 if DRY else 1)  # the interpreter cuts 16-bit results off
    compared = []
    for name, value in found.items():
        if name in true:
            error, base = distance(value, true[name]), distance(plain[name], true[name])
            compared.append((name, error, base, 4 * base + rounding))
    missing = set(true) - set(found)
    if missing:
        return ", ".join(sorted(missing)), float("nan"), 0.0, 0.0
    return max(compared, key=lambda c: c[1] / c[3] if c[1] <= c[3] else float("inf"))  # NaN is the worst


def tried(function):
    """Return (result, "ok"), or (None, why there is none): "refused" where an implementation says that it does not take such a call."""
    try:
        result = function()
        synchronize()
        return result, "ok"
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:400]
        refused = "can run here" in text or text.startswith("ValueError: algorithm:")
        return None, f"{'refused' if refused else 'error'}: {text}"


def judged(case, found, plain, true):
    """Return ({"result", "error", "plain_error", "allowed"} of the result nearest to being wrong, "ok" or "wrong")."""
    row = dict(zip(COMPARED, largest(found, plain, true, DTYPES[case.dtype]), strict=True))
    return row, "ok" if row["error"] <= row["allowed"] else "wrong"


@contextlib.contextmanager
def poisoned():
    """Let PyTorch fill with NaN all memory that is allocated uninitialised: a kernel that reads what nobody wrote has other results then."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def twice(case, t, impl):
    """Return the results of two calls, the second with poisoned memory."""
    first = gpu_cases.ours(case, t, impl)
    with poisoned():
        return first, gpu_cases.ours(case, t, impl)


def check(case):
    """Return a row for each implementation of a case."""
    torch.backends.cudnn.allow_tf32 = False  # the error of plain PyTorch in float32 is that of float32
    case = gpu_cases.of(case)
    t = gpu_cases.tensors(case)
    true, plain = gpu_cases.exact(case, t), gpu_cases.plain(case, t) | gpu_cases.statistics(case, t)
    rows = []
    for impl in gpu_cases.rows_of(case, t["x"]):
        compared = dict.fromkeys(COMPARED)
        found, state = tried(functools.partial(twice, case, t, impl))
        if found:
            compared, state = judged(case, found[0], plain, true)
            other = [name for name, value in found[0].items() if not torch.equal(value, found[1][name])]
            state = (
                f"wrong: other bits the second time, or of uninitialised memory: {', '.join(other)}" if other else state
            )
        rows.append(case.columns | {"implementation": impl} | compared | {"state": state})
    return rows


BATCH, SIZE, WIDTH = (2, 8, 4) if DRY else (32, 32, 16)  # of the steps that are checked


def minibatch():
    return torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE), torch.randint(10, (BATCH,), device=DEVICE)


def small_trainer(options, **of_trainer):
    torch.manual_seed(0)
    net = fastff.models.resnet18(10, stem="cifar", width=WIDTH).to(DEVICE, memory_format=torch.channels_last)
    make = lambda groups: torch.optim.AdamW(groups, lr=1e-3, eps=1e-2, capturable=DEVICE.type == "cuda")  # noqa: E731
    sff = fastff.SFF(net, 10, input_shape=(3, SIZE, SIZE), impl=IMPL, **options).to(DEVICE)
    return Trainer(sff, make, amp="bf16", **of_trainer)


def of_steps(what, error, allowed, state):
    """A row of the same columns as those of `check`."""
    columns = Case("Trainer.step", BATCH, WIDTH, SIZE, 10).columns | {"options": what}
    compared = dict(zip(COMPARED, ("weights", error, None, allowed), strict=True))
    return [columns | {"implementation": "auto"} | compared | {"state": state}]


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.sff.parameters()])


def check_graph(options):
    """Compare what replayed steps change in the weights with what ordinary ones change.

    eps is large in Adam, so that a tiny gradient makes a tiny update, and cuDNN is told to be deterministic: then only roundings are left."""
    torch.backends.cudnn.deterministic = True
    batches = [minibatch() for _ in range(2 if DRY else 6)]
    changes = []
    for graph in (False, True):
        trainer = small_trainer(options, cuda_graph=graph and not DRY)
        before = weights_of(trainer)
        for batch in batches:
            trainer.step(*batch)
        changes.append(weights_of(trainer) - before)
    off = float((changes[0] - changes[1]).norm() / changes[0].norm())
    return of_steps(f"graph against ordinary {options}", off, 1e-3, "ok" if off < 1e-3 else "wrong")


def check_no_waiting(options):
    """Check that a step never makes the host wait for the GPU: PyTorch raises an error if it does."""
    trainer = small_trainer(options, cuda_graph=False)
    images, target = minibatch()
    for _ in range(1 if DRY else 3):
        trainer.step(images, target)
    if not DRY:
        torch.cuda.set_sync_debug_mode("error")
    try:
        losses = trainer.step(images, target)
    finally:
        if not DRY:
            torch.cuda.set_sync_debug_mode("default")
    finite = bool(torch.isfinite(losses).all())
    return of_steps(f"no waiting {options}", None, None, "ok" if finite else f"wrong: losses {losses.tolist()}")


def jobs():
    """Return the jobs of this part."""
    settings = ({"grid": 0, "window": 1}, {})
    whole = [
        Job(f"{f.__name__} {options}", f, (options,)) for options in settings for f in (check_graph, check_no_waiting)
    ]
    return whole + [Job(case.name, check, (case,)) for case in gpu_cases.different(cases())]
