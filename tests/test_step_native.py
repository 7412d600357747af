"""The compiled local step, torch.ops.fastff.step_native, against fastff/reference.py in float64, called with what flat.flatten gives."""

import re
from pathlib import Path

import pytest
import torch
from oracle import EAGER, assert_as_exact

from fastff import flat, reference, spec
from fastff.kernels import native
from fastff.kernels.native.step import run
from fastff.spec import Epilogue, Groups, Hidden, Loss, Normalization, Projection, Step, StepResult

pytestmark = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "available")

ENUMS = {
    "Activation": spec.ACTIVATIONS, "LossName": spec.LOSSES, "Reduction": spec.REDUCTIONS, "NormalizationName": spec.NORMALIZATIONS
}  # fmt: skip
SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cpu"


def step_native(step):
    """StepResult of the compiled step, None for absent results."""
    return run(step, step.algorithm == "second_moment")


def eager_normalized(x, normalization):
    name, groups, eps = normalization
    return None if name == "none" else reference.normalized(x, name, groups, eps)


def eager_step(step):
    """StepResult by autograd, in the dtype of x."""
    wide = step.x.dtype

    def leaf(t):
        return None if t is None else t.detach().to(wide).clone().requires_grad_()

    x, epilogue, head = leaf(step.x), step.epilogue, step.goodness
    h, bn_weight, bn_bias, residual, mean, var = x, None, None, None, None, None
    if epilogue is not None:
        bn_weight, bn_bias, residual = leaf(epilogue.weight), leaf(epilogue.bias), leaf(epilogue.residual)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        h = (x - mean[:, None, None]) / (var[:, None, None] + epilogue.eps).sqrt()
        h = h if bn_weight is None else h * bn_weight[:, None, None]
        h = h if bn_bias is None else h + bn_bias[:, None, None]
        h = h if residual is None else h + residual
        h = EAGER[epilogue.activation](h)
    hidden, statistics = [None] * 3, (None, None)
    if isinstance(head, Projection):
        weight, bias, grid_weight = leaf(head.weight), leaf(head.bias), leaf(head.grid_weight)
        layer = head.hidden
        if layer is not None:
            hidden = [leaf(t) for t in layer[:3]]
            layer = Hidden(*hidden, *layer[3:])
            means = reference.cell_means(h, grid_weight).detach()
            statistics = [t.detach() for t in reference.hidden_layer(means, *layer)[-2:]]
        g = reference.goodness(h, weight, bias, grid_weight, hidden=layer)
    else:
        weight = bias = grid_weight = None
        g = reference.group_goodness(h, *head)
    loss, tau = step.loss, leaf(step.loss.learned_tau)
    if loss.name == "cross_entropy":
        factor = loss.tau if tau is None else loss.tau * tau
        losses = reference.margin_cross_entropy(g, loss.target, factor, loss.margin, loss.label_smoothing)
    else:
        losses = reference.forward_forward_losses(g, loss.name, loss.theta, loss.alpha)
    scale = loss.scale(len(x)) * (1 if loss.grad_scale is None else loss.grad_scale.to(wide))
    leaves = [x, weight, bias, grid_weight, tau, residual, bn_weight, bn_bias, *hidden]
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad((losses * scale).sum(), wanted, allow_unused=True))
    grads = [None if leaf is None else next(found) for leaf in leaves]
    normalized = eager_normalized(h.detach(), step.normalization)
    reduced = reference.reduced(losses, loss.reduction)
    return StepResult(reduced, g, *grads[:5], normalized, *grads[5:8], mean, var, *grads[8:], *statistics)


def to(step, dtype):
    """The step with all floating tensors in another dtype."""

    def cast(value):
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(cast, value))
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return cast(step)


def check(step):
    got, plain = step_native(step), eager_step(step)
    wide = eager_step(to(step, torch.float64))
    for name, result, exact, float32 in zip(StepResult._fields, got, wide, plain, strict=True):
        if exact is None or (name == "grad_x" and not step.need_grad_x):
            batch_norm = step.epilogue is not None and name in ("grad_bn_weight", "grad_bn_bias")
            batch_norm |= name in ("grad_hidden_bn_weight", "grad_hidden_bn_bias")
            assert result is None or batch_norm, f"{name} is not absent"
            continue
        assert_as_exact(
            name,
            result,
            exact.detach().view(result.shape),
            float32.detach().view(result.shape),
            exact.abs().max().clamp(min=1),
        )
        if name in ("grad_x", "normalized", "grad_residual"):
            assert result.is_contiguous(memory_format=torch.channels_last) or not step.x.is_contiguous(
                memory_format=torch.channels_last
            )


def drawn(shape=(6, 12, 7, 5), channels_last=False, seed=0):
    """(generator, x)"""
    generator = torch.manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return generator, x.contiguous(memory_format=torch.channels_last) if channels_last else x


def projection(generator, C, K=10, bias=True, grid=True, hidden=0, known=False):
    def draw(*size):
        return torch.randn(size, generator=generator) / C**0.5

    made = Projection(draw(K, C, 1, 1), draw(K) if bias else None, draw(K, hidden or C, 2, 3) if grid else None)
    if not hidden:
        return made
    statistics = (draw(hidden), draw(hidden).square() + 0.1) if known else (None, None)
    return Projection(*made[:4], draw(hidden, C), draw(hidden) + 1 if bias else None, draw(hidden), 1e-3, *statistics)


def loss_of(name, B, K, **options):
    target = torch.arange(B) * 7 % K if name == "cross_entropy" else None
    return Loss(name, target, **options)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("algorithm", ["direct", "second_moment"])
@pytest.mark.parametrize("K", [10, 40])
@pytest.mark.parametrize("activation", [None, *spec.ACTIVATIONS])
def test_projection(channels_last, algorithm, K, activation):
    generator, x = drawn((7, 12, 9, 8), channels_last)
    residual = torch.randn(x.shape, generator=generator)
    epilogue = (
        None
        if activation is None
        else Epilogue(torch.rand(12) + 0.5, torch.rand(12) - 0.5, 1e-5, residual, True, activation)
    )
    loss = loss_of(
        "cross_entropy",
        7,
        K,
        tau=0.7,
        learned_tau=torch.tensor([1.3]),
        margin=0.4,
        label_smoothing=0.1,
        grad_scale=torch.tensor(2.0),
    )
    check(Step(x, epilogue, projection(generator, 12, K), loss, Normalization("layer_norm"), True, algorithm))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("algorithm", ["direct", "second_moment"])
@pytest.mark.parametrize("shape", [(7, 12, 9, 8), (33, 5, 3, 4), (6, 40, 20, 20)])
def test_hidden_layer(channels_last, algorithm, shape):
    """Of every size of task, with the batch's statistics and with given ones, with and without a block's epilogue, of losses of pairs too."""
    generator, x = drawn(shape, channels_last)
    for K, M, known, activation, name in (
        (10, 16, False, "silu", "cross_entropy"), (40, 70, True, None, "cross_entropy"), (10, 3, False, "none", "symba"),
    ):  # fmt: skip
        x = x if name == "cross_entropy" else x[: len(x) // 2 * 2]
        epilogue = (
            None if activation is None else Epilogue(torch.rand(shape[1]) + 0.5, residual=x, activation=activation)
        )
        head = projection(generator, shape[1], K, known is False, hidden=M, known=known)
        loss = loss_of(name, len(x), K, tau=0.7, grad_scale=torch.tensor(2.0))
        check(Step(x, epilogue, head, loss, Normalization("layer_norm"), activation is not None, algorithm))
        check(Step(x, epilogue, head._replace(weight=None, bias=None), loss, Normalization()))


@pytest.mark.parametrize("name", spec.LOSSES)
@pytest.mark.parametrize("normalization", spec.NORMALIZATIONS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("head", ["projection", "groups", "positions"])
def test_losses_and_normalizations(name, normalization, channels_last, head):
    generator, x = drawn((6, 12, 3, 5), channels_last)
    goodness = (
        projection(generator, 12, 10)
        if head == "projection"
        else Groups(5, 2)
        if head == "groups"
        else Groups(1, 1, True, True)
    )
    K = {"projection": 10, "groups": 5, "positions": 15}[head]
    loss = loss_of(name, 6, K, learned_tau=torch.tensor(0.9) if name == "cross_entropy" else None, reduction="sum")
    for epilogue in (None, Epilogue(activation="silu")):
        check(Step(x, epilogue, goodness, loss, Normalization(normalization, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["cross_entropy", "symba"])
def test_groups_of_other_types(dtype, name):
    _, x = drawn()
    step = Step(x.to(dtype), None, Groups(4), loss_of(name, 6, 4), Normalization("group_norm", 4))
    got = step_native(step)
    exact = eager_step(to(step, torch.float64))
    for result, want in zip(got, exact, strict=True):
        if want is not None:
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5 if result.dtype == torch.float32 else 1e-2
            torch.testing.assert_close(result.double(), want.detach(), rtol=tolerance, atol=tolerance)
    assert got.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_reads_tensors_of_any_strides():
    generator, x = drawn((6, 12, 4, 5))
    columns = torch.arange(12).view(6, 2) % 10
    weight = torch.randn(12, 10, generator=generator).T[:, :, None, None] / 3
    factors = torch.tensor([[2.0, 0.5], [1.0, 1.0]])
    epilogue = Epilogue(
        factors.repeat(6, 1)[:, 0], torch.rand(24)[::2], residual=torch.randn(6, 4, 5, 12).permute(0, 3, 1, 2)
    )
    loss = Loss(target=columns[:, 1], learned_tau=factors[0, 1:], grad_scale=factors[:1, 0])
    for step in (
        Step(x, epilogue, Projection(weight), loss, Normalization()),
        Step(x, epilogue, Groups(10), loss, Normalization()),
        Step(torch.randn(6, 12, 8, 5)[:, :, ::2], None, Groups(10), loss, Normalization("rms")),
    ):
        check(step)


def test_leaves_out_what_is_not_asked_for():
    generator, x = drawn((4, 8, 3, 3))
    for goodness in (projection(generator, 8, grid=False), Groups(8)):
        check(Step(x, None, goodness, loss_of("cross_entropy", 4, 8), Normalization(), need_grad_x=False))
    got = step_native(
        Step(
            x,
            Epilogue(residual=x, need_grad_residual=False),
            Groups(8),
            loss_of("cross_entropy", 4, 8),
            Normalization(),
        )
    )
    assert got.grad_residual is None and got.grad_x.shape == x.shape


@pytest.mark.parametrize("head", ["projection", "groups"])
def test_many_positions_do_not_add_up_errors(head):
    """Of sums over positions: those of values that are all alike lose digits in float32 once the sum is far greater than its terms."""
    torch.manual_seed(0)
    # Float sums of 256 positions, each a rounding of half a unit, in g and in what the loss makes of it (tests/test_sums.py: of each sum).
    bound = 256 * 2.0**-23
    x = torch.rand(2, 3, 2048, 1024) + 1
    x = x.contiguous(memory_format=torch.channels_last)
    goodness = (
        Projection(torch.rand(4, 3, 1, 1), torch.rand(4), torch.rand(4, 3, 1, 1)) if head == "projection" else Groups(3)
    )
    for algorithm in ("direct", "second_moment") if head == "projection" else ("direct",):
        for layout in (torch.channels_last, torch.contiguous_format):
            step = Step(
                x.contiguous(memory_format=layout),
                Epilogue(),
                goodness,
                loss_of("cross_entropy", 2, 3),
                Normalization(),
                True,
                algorithm,
            )
            got, exact = step_native(step), eager_step(to(step, torch.float64))
            for name in ("loss", "goodness", "mean", "var", "grad_weight", "grad_bias"):
                if (want := getattr(exact, name)) is not None:
                    error = (getattr(got, name).double() - want.detach()).abs().max() / want.abs().max()
                    assert error < bound, f"{name}: relative error {error:.2g}"


@pytest.mark.parametrize("head", ["projection", "hidden", "groups"])
@pytest.mark.parametrize("name", ["cross_entropy", "symba"])
def test_number_of_threads_changes_no_bit(head, name):
    generator, x = drawn((8, 16, 5, 5))
    goodness = Groups(10) if head == "groups" else projection(generator, 16, hidden=20 if head == "hidden" else 0)
    step = Step(x, Epilogue(residual=x), goodness, loss_of(name, 8, 10), Normalization("layer_norm"))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(step_native(step))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, filter(torch.is_tensor, results[0]), filter(torch.is_tensor, other)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 3, 4)}, "x must be"),
        ({"loss": Loss(target=torch.tensor([0, 10, 1, 2]))}, "target must be in 0 .. 9"),
        ({"loss": Loss(target=torch.tensor([0, 1, 1]))}, "int64"),
        ({"loss": Loss(target=torch.tensor([0.0, 1, 1, 2]))}, "int64"),
        ({"x": torch.ones(3, 8, 3, 3), "loss": Loss("softplus")}, "as many positive as negative"),
        ({"goodness": Projection(torch.ones(10, 8, 3, 3))}, "1 x 1 heads"),
        (
            {"goodness": Projection(None, grid_weight=torch.ones(10, 8, 2, 2), hidden_weight=torch.ones(5, 8))},
            "hidden_weight",
        ),
    ],
)
def test_errors_are_raised(change, message):
    generator, x = drawn((4, 8, 3, 3))
    step = Step(x, None, projection(generator, 8), Loss(target=torch.arange(4)), Normalization())
    for _ in range(3):
        with pytest.raises(RuntimeError, match=message):
            step_native(step._replace(**change))


def test_other_types_than_float32_are_refused():
    weight = torch.ones(10, 8, 1, 1, dtype=torch.float64)
    for x, w in ((torch.ones(4, 8, 3, 3), weight), (torch.ones(4, 8, 3, 3).double(), weight.float())):
        with pytest.raises(RuntimeError, match="float32"):
            torch.ops.fastff.goodness_forward_native(x, *Projection(w), False)


def test_schema_is_that_of_spec():
    arguments = torch.ops.fastff.step_native.default._schema.arguments
    types, names = zip(*(argument.split() for argument in flat.schema().split(", ")), strict=True)
    assert [argument.name for argument in arguments] == ["x", *names, "need_grad_x", "second_moment"]
    as_int = {"str": "int", "SymInt[2]": "List[int]", "Tensor?": "Optional[Tensor]"}
    assert [str(argument.type) for argument in arguments[1:-2]] == [as_int.get(t, t) for t in types]
    returned = [result.name for result in torch.ops.fastff.step_native.default._schema.returns]
    assert returned == list(StepResult._fields)


def test_enumerators_are_in_the_order_of_spec():
    found = dict(re.findall(r"enum class (\w+) \{([^}]*)\}", "".join(path.read_text() for path in SOURCES.glob("*.h"))))
    assert {name: tuple(re.findall(r"\w+", found[name])) for name in ENUMS} == ENUMS
