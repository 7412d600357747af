"""Three steps of whole networks with the Triton kernels against the reference: test_triton.py runs this interpreted, with TRITON_INTERPRET=1."""

import copy

import pytest
import torch

import fastff
from fastff import SFF, Trainer

NETS = {
    "resnet18": lambda: fastff.models.resnet18(10, stem="cifar", width=8),
    "mobilenet_v3_small": lambda: fastff.models.mobilenet_v3_small(10, stem="cifar", width_mult=0.25),
}


@pytest.mark.parametrize("options", [{"grid": 0, "window": 1, "bias": True}, {"learn_tau": True}])
@pytest.mark.parametrize("name", NETS)
def test_same_weights_as_the_reference(name, options, monkeypatch):
    torch.manual_seed(0)
    sff = SFF(NETS[name](), 10, input_shape=(3, 16, 16), **options)
    batches = [(torch.randn(4, 3, 16, 16), torch.randint(10, (4,))) for _ in range(3)]
    trained, ran = {}, []
    from fastff.kernels.triton import goodness

    monkeypatch.setattr(goodness.Launch, "sweep", spied(goodness.Launch.sweep, ran))
    for impl in ("triton", "reference"):
        monkeypatch.setenv("FASTFF_IMPL", impl)
        twin = copy.deepcopy(sff)
        trainer = Trainer(twin, lambda groups: torch.optim.SGD(groups, lr=0.05))
        losses = torch.stack([trainer.step(*batch) for batch in batches])
        trained[impl] = torch.cat([p.detach().flatten() for p in twin.parameters()]), losses
        assert bool(ran) == (impl == "triton")
        ran.clear()
    start = torch.cat([p.detach().flatten() for p in sff.parameters()])
    weights, losses = zip(trained["triton"], trained["reference"], strict=True)
    assert float((weights[1] - start).norm()) > 1e-2
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    assert float((weights[0] - weights[1]).norm()) < 1e-4 * float((weights[1] - start).norm())


def spied(method, ran):
    def call(self, *args, **kwargs):
        ran.append(args)
        return method(self, *args, **kwargs)

    return call
