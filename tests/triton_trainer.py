"""Three steps of whole networks with the Triton kernels against the reference: test_triton.py runs this interpreted, with TRITON_INTERPRET=1."""

import copy

import pytest
import torch
from torch import nn

import fastff
from fastff import SFF, Trainer
from fastff.graph.recording import WARM_UP

NETS = {
    "resnet18": lambda: fastff.models.resnet18(10, stem="cifar", width=8),
    "mobilenet_v3_small": lambda: fastff.models.mobilenet_v3_small(10, stem="cifar", width_mult=0.25),
}


PAPER = {"grid": 0, "window": 1, "bias": True}  # with fused epilogues, and depthwise convolutions


@pytest.mark.parametrize(
    ("name", "options"), [("resnet18", PAPER), ("mobilenet_v3_small", PAPER), ("resnet18", {"learn_tau": True})]
)
def test_same_weights_as_the_reference(name, options, monkeypatch):
    torch.manual_seed(0)
    sff = SFF(NETS[name](), 10, input_shape=(3, 16, 16), **options)
    batches = [(torch.randn(4, 3, 16, 16), torch.randint(10, (4,))) for _ in range(3)]
    trained, ran = {}, []
    from fastff.kernels.triton import goodness

    monkeypatch.setattr(goodness.Launch, "sweep", spied(goodness.Launch.sweep, ran))
    for name, impl, dtype in (
        ("triton", "triton", torch.float32), ("plain", "reference", torch.float32), ("exact", "reference", torch.float64),
    ):  # fmt: skip
        monkeypatch.setenv("FASTFF_IMPL", impl)
        twin = copy.deepcopy(sff).to(dtype)
        trainer = Trainer(twin, lambda groups: torch.optim.SGD(groups, lr=0.05))
        losses = torch.stack([trainer.step(images.to(dtype), target) for images, target in batches])
        trained[name] = torch.cat([p.detach().double().flatten() for p in twin.parameters()]), losses.double()
        assert bool(ran) == (impl == "triton")
        ran.clear()
    start = torch.cat([p.detach().double().flatten() for p in sff.parameters()])
    assert float((trained["exact"][0] - start).norm()) > 1e-2
    for i, what in enumerate(("weights", "losses")):
        # batch norm over a few values amplifies roundings: the reference in float32 says by how much
        off, allowed = (float((trained[n][i] - trained["exact"][i]).norm()) for n in ("triton", "plain"))
        assert off <= 4 * allowed + 1e-6 * float(trained["exact"][i].norm()), (
            f"{what}: {off:.2g}, reference {allowed:.2g}"
        )


def test_steps_are_not_recorded():
    """Interpreted kernels are seen by no recording of operators: replayed, a step would be without them."""
    torch.manual_seed(0)
    layers = [
        layer for i in (3, 8) for layer in (nn.Conv2d(i, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    ]
    sff = SFF(nn.Sequential(*layers), 10, "layer", input_shape=(3, 8, 8), impl="torch", window=2, grid=0)
    trainers = [Trainer(copy.deepcopy(sff), record_steps=record) for record in ("auto", False)]
    for _ in range(WARM_UP + 3):
        images, target = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
        recorded, ordinary = (trainer.step(images, target) for trainer in trainers)
        assert torch.equal(recorded, ordinary)
    assert "interpreted" in repr(trainers[0])
    with pytest.raises(RuntimeError, match="record_steps: .*interpreted.*record_steps=False"):
        trainer = Trainer(sff, record_steps=True)
        for _ in range(WARM_UP + 1):
            trainer.step(images, target)


def spied(method, ran):
    def call(self, *args, **kwargs):
        ran.append(args)
        return method(self, *args, **kwargs)

    return call
