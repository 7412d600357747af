"""Recorded steps without a GPU: a recorder that keeps the function and calls it again, as a graph launches its kernels again."""

import copy

import pytest
import torch

import fastff
from fastff import SFF, Trainer
from fastff.training import Backprop, graph


class Recorder:
    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def run(self, function):
        return function()

    def record(self, function):
        self.recorded += 1
        results = []

        def replay():
            self.replayed += 1
            results[:] = function()

        return replay, results


def adam(groups):
    return torch.optim.AdamW(groups, lr=1e-3)


@pytest.mark.parametrize("kind", [Trainer, Backprop])
def test_a_recorded_step_is_the_step(kind):
    """Weights, losses and counts, over changing minibatches, two shapes of them, and phases of a greedy schedule."""
    torch.manual_seed(0)
    net = fastff.models.resnet18(5, stem="cifar", width=4)
    sff = SFF(net, 5, input_shape=(3, 16, 16), readout=True, window=1)
    options = {"schedule": "greedy"} if kind is Trainer else {}
    plain, recorded = (kind(copy.deepcopy(sff), adam, **options) for _ in range(2))
    recorder = Recorder()
    recorded.run_step = graph.StepGraph(recorded.engine, recorder)
    sizes = [4, 4, 3, 4, 4, 4, 3, 3, 3, 4, 4]
    for phase in range(2 if kind is Trainer else 1):
        for trainer in (plain, recorded):
            trainer.engine.phase = phase
            trainer.train_mode()
        for size in sizes:
            images, target = torch.randn(size, 3, 16, 16), torch.randint(5, (size,))
            losses, again = plain.step(images, target), recorded.step(images, target)
            assert torch.equal(losses, again)
            assert torch.equal(plain.correct, recorded.correct)
    phases = 2 if kind is Trainer else 1
    assert recorder.recorded == 2 * phases
    assert recorder.replayed == (len(sizes) - 2 * graph.WARM_UP) * phases
    for (name, a), b in zip(plain.sff.state_dict().items(), recorded.sff.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_what_cannot_be_recorded_is_said():
    sff = SFF(fastff.models.resnet18(5, stem="cifar", width=4), 5, readout=True)
    for kind in (Trainer, Backprop):
        with pytest.raises(ValueError, match="cuda_graph: expected a network on a CUDA device, got it on cpu"):
            kind(sff, adam, cuda_graph=True)
    device, parameters = torch.device("cuda"), [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match="capturable=True.* got SGD"):
        graph.prepare([torch.optim.SGD(parameters, lr=0.1)], device, None)
    with pytest.raises(ValueError, match="cuda_graph: expected amp None or 'bf16'.* got 'fp16'"):
        graph.prepare([adam(parameters)], device, torch.float16)


def test_learning_rates_of_recorded_steps_are_tensors():
    from fastff.training import optim

    optimizer = optim.build(adam, [torch.nn.Parameter(torch.zeros(2, 2))])
    rate = optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)
    optim.set_progress([optimizer], lambda t: 1 - t, 0.75)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.25e-3)
