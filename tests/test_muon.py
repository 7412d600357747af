"""Muon: orthogonalised updates of convolutions, against the plain iteration and AdamW; training, checkpoints."""

import copy

import pytest
import torch
from torch import nn

import fastff
from fastff.kernels import native
from fastff.kernels.native import muon as native_muon
from fastff.kernels.torch import muon as torch_muon
from fastff.kernels.torch.muon import COEFFICIENTS, STEPS, orthogonalizers
from fastff.training import Backprop, Trainer, optim
from fastff.training.muon import Muon, parameter_groups


def plainly(matrix):
    """The iteration as it is published, on one matrix."""
    a, b, c = COEFFICIENTS
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm()
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def orthogonalized(matrix):
    """By the library's iteration on the smaller Gram matrix."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalized(matrix.mT).mT
    return orthogonalizers((matrix @ matrix.mT)[None])[0] @ matrix


@pytest.mark.parametrize("shape", [(16, 144), (64, 32), (8, 8), (128, 1152)])
def test_orthogonalized(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    found = orthogonalized(matrix)
    torch.testing.assert_close(found.double(), plainly(matrix.double()), rtol=0, atol=1e-4)
    if min(shape) < max(shape):  # square ones may have singular values near zero
        values = torch.linalg.svdvals(found)
        assert float(values.min()) > 0.65 and float(values.max()) < 1.25
    assert torch.equal(orthogonalized(torch.zeros(shape)), torch.zeros(shape))


def test_badly_conditioned_matrices():
    """In float32 as in float64, though A has the squares of the singular values."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(32, 288, dtype=torch.float64), full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -6, 32, dtype=torch.float64)) @ v
    torch.testing.assert_close(orthogonalized(matrix.float()).double(), plainly(matrix), rtol=0, atol=1e-3)


def test_groups():
    net = nn.ModuleList([nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Linear(8, 5)])
    head = fastff.nn.GoodnessHead(8, 5, grid=2)
    parameters = [*net.parameters(), *head.parameters()]
    convolutions, weights, rest = parameter_groups(parameters, {id(p) for p in head.parameters()})
    assert convolutions["orthogonal"] and [p is net[0].weight for p in convolutions["params"]] == [True]
    assert {id(p) for p in weights["params"]} == {id(p) for p in (net[1].weight, net[3].weight, *head.parameters())}
    assert rest["weight_decay"] == 0 and all(p.dim() < 2 for p in rest["params"])
    net[0].weight.requires_grad_(False)
    assert len(parameter_groups(parameters, set())) == 3  # without knowing the head, its weights are convolutions


def test_a_step_is_the_formula_and_adamw_s():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(5))
    x = torch.randn(4, 3, 6, 6)
    net(x)
    other = copy.deepcopy(net)
    ours = optim.build(optim.muon(0.01, 0.1), net.parameters())
    adamw = optim.build(optim.adamw(0.01, 0.1), list(other.parameters())[1:])
    momentum, weight = torch.zeros(8, 27), other[0].weight.detach().flatten(1).clone()
    for _ in range(3):
        for model, optimizer in ((net, ours), (other, adamw)):
            with torch.no_grad():
                other[0].weight.copy_(net[0].weight)
            model.zero_grad()
            model(x).square().mean().backward()
            if model is other:
                grad = other[0].weight.grad.flatten(1)
                momentum = 0.95 * momentum + 0.05 * grad
                update = plainly(0.05 * grad + 0.95 * momentum)
                weight = weight * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 27**0.5 * update
            optimizer.step() if model is other else None
        ours.step()
        torch.testing.assert_close(net[0].weight.flatten(1), weight, rtol=1e-3, atol=1e-5)
        for p, q in zip(list(net.parameters())[1:], list(other.parameters())[1:], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="closure: expected None"):
        ours.step(lambda: 0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_wide_weights_are_taken_in_parts_whatever_their_layout(layout):
    torch.manual_seed(0)
    weight = torch.randn(300, 4, 3, 3)
    p = nn.Parameter(weight.clone(memory_format=layout))
    p.grad = torch.randn_like(weight)
    before = p.grad.clone()
    Muon([{"params": [p], "orthogonal": True}], lr=0.1, weight_decay=0).step()
    assert torch.equal(p.grad, before)
    expected = weight.flatten(1).clone()
    for rows in range(0, 300, 60):  # parts of at most ROWS rows
        part = before.flatten(1)[rows : rows + 60]
        expected[rows : rows + 60] -= 0.1 * 0.2 * 60**0.5 * plainly(part)
    torch.testing.assert_close(p.detach().flatten(1), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "available")
@pytest.mark.parametrize(
    "shape", [(300, 4, 3, 3), (130, 5, 1, 1), (7, 70, 1, 1), (2, 2, 1, 1), (65, 64, 3, 3), (3, 4, 2, 2, 2)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_native_update_is_that_of_float64(shape, layout):
    """Weights, momenta and gradients in several layouts, some of which PyTorch's operators take; two steps, since the first has no momentum."""
    if layout == torch.channels_last and len(shape) == 5:
        layout = torch.channels_last_3d
    torch.manual_seed(0)
    weight = torch.randn(shape).contiguous(memory_format=layout)
    exact, average, ours = weight.double(), torch.zeros(shape, dtype=torch.float64), torch.zeros_like(weight)
    for _ in range(2):
        grad = torch.randn(shape)
        native_muon.update([weight], [grad], [ours], 0.1, 0.9, 0.5)
        torch_muon.update([exact], [grad.double()], [average], 0.1, 0.9, 0.5)
    torch.testing.assert_close(ours.double(), average, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.double(), exact, rtol=1e-4, atol=1e-5)
    if layout != torch.contiguous_format and min(shape[1:]) > 1:
        with pytest.raises(RuntimeError, match="strides of their weights"):
            torch.ops.fastff.muon_native([weight], [weight.contiguous()], [ours], 64, 0.9, 1.0, 0.1)


def test_a_recorded_step_reads_the_rate_from_a_tensor(monkeypatch):
    """A CUDA graph's learning rate is a tensor, which its replays read (training/recording.py)."""
    monkeypatch.setenv("FASTFF_IMPL", "torch")  # both by the operators that are recorded
    torch.manual_seed(0)
    weights, grads = (torch.randn(70, 4, 3, 3), torch.randn(6)), (torch.randn(70, 4, 3, 3), torch.randn(6))
    found = []
    for lr in (0.1, torch.tensor(0.1)):
        params = [nn.Parameter(w.clone()) for w in weights]
        groups = [{"params": params[:1], "orthogonal": True}, {"params": params[1:]}]
        optimizer = Muon(groups, lr=lr)
        for _ in range(2):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
        found.append(params)
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_parameters_of_two_dtypes():
    params = [nn.Parameter(torch.ones(8, 8, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    for p in params:
        p.grad = torch.eye(8, dtype=p.dtype)
    Muon([{"params": params, "orthogonal": True}], lr=0.1).step()
    Muon([{"params": params}], lr=0.1).step()
    torch.testing.assert_close(params[0].double(), params[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["sff", "backprop"])
def test_training_goes_on_from_a_checkpoint_with_the_same_bits(kind, tmp_path):
    def trainer():
        torch.manual_seed(0)
        net = fastff.models.resnet18(num_classes=5, stem="cifar", width=8)
        sff = fastff.SFF(net, 5, "stage", (3, 8, 8), readout=kind == "backprop")
        return (Backprop if kind == "backprop" else Trainer)(sff, optim.muon())

    torch.manual_seed(1)
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(5, (8,))) for _ in range(4)]
    whole, first, second = trainer(), trainer(), trainer()
    for t in (whole, first, second):
        t.train_mode()
    losses = [whole.step(*batch).sum() for batch in batches * 5]
    assert losses[-1] < losses[0]
    for batch in batches:
        first.step(*batch)
    first.save(tmp_path / "c.pt")
    second.load(tmp_path / "c.pt")
    second.train_mode()
    for batch in batches:
        torch.testing.assert_close(first.step(*batch), second.step(*batch), rtol=0, atol=0)
    for a, b in zip(first.sff.state_dict().values(), second.sff.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert any(isinstance(o, Muon) and "momentum" in s for o in second.optimizers for s in o.state.values())
