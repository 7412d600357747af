"""The ops where users call them: threads in parallel, forked children, workers of a DataLoader, models that torch.package carries away."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from oracle import same_bits
from torch import package

import fastff
import fastff.functional as ff
from fastff.graph.fused import Convolution

HERE = Path(__file__).parent


def calls():
    """One call of each op that has a kernel, each giving its tensors."""
    torch.manual_seed(0)
    x, target = torch.randn(6, 16, 9, 9), torch.tensor([0, 3, 1, 2, 3, 0])
    weight, norm = torch.randn(4, 16), torch.rand(2, 16)
    dense, depthwise = (
        torch.nn.Conv2d(16, 8, 3, padding=1, bias=False),
        torch.nn.Conv2d(16, 16, 3, padding=1, groups=16),
    )

    def convolution(module):
        y = Convolution(module)(x)
        return (y, *torch.autograd.grad(y.square().sum(), list(module.parameters())))

    return {
        "goodness": lambda: ff.goodness_step(x, weight, None, target),
        "second moment": lambda: ff.goodness_step(x, weight, None, target, algorithm="second_moment"),
        "tail": lambda: ff.tail_step(x, weight, None, target, bn_weight=norm[0], bn_bias=norm[1], residual=x),
        "layer norm": lambda: (ff.layer_norm(x),),
        "group goodness": lambda: ff.group_goodness_step(x, target, 4),
        "convolution": lambda: convolution(dense),
        "depthwise": lambda: convolution(depthwise),
    }


def test_threads_in_parallel():
    """Eight threads, each all ops in another order, twenty times: the bits of one thread alone."""
    ops = calls()
    alone = {name: call() for name, call in ops.items()}

    def rounds(first):
        names = sorted(ops)[first:] + sorted(ops)[:first]
        return [(name, ops[name]()) for _ in range(20) for name in names]

    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(rounds, range(8)):
            for name, result in results:
                for got, want in zip(result, alone[name], strict=True):
                    assert got is None or same_bits(got, want), name


# In an interpreter of its own: a fork that hangs must not take the test process with it.
FORKED = """
import os, sys
import torch
from oracle import same_bits
from test_processes import calls

ops = calls()
mine = {name: call() for name, call in ops.items()}  # torch's pool and the library are in use before the fork
children = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # as a DataLoader's workers do: the threads of the parent's pool are not copied
        same = all(
            got is None or same_bits(got, want)
            for name, call in ops.items() for got, want in zip(call(), mine[name], strict=True)
        )
        os._exit(0 if same else 1)
    children.append(pid)
again = {name: call() for name, call in ops.items()}  # while they run
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
same = all(got is None or same_bits(got, want) for name in ops for got, want in zip(again[name], mine[name], strict=True))
print(codes, same)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
def test_forked_children():
    run = subprocess.run([sys.executable, "-c", FORKED], cwd=HERE, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[0, 0, 0] True"


class Goodness(torch.utils.data.Dataset):
    """Samples that are goodness of images: preprocessing with an op."""

    def __init__(self):
        torch.manual_seed(0)
        self.images, self.weight = torch.randn(8, 3, 6, 6), torch.randn(4, 3)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return ff.goodness(self.images[i][None], self.weight)[0]


def test_workers_of_a_loader():
    data = Goodness()
    batches = list(torch.utils.data.DataLoader(data, batch_size=4, num_workers=2, timeout=120))
    assert same_bits(torch.cat(batches), torch.stack([data[i] for i in range(8)]))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("kind", ["block", "sff"])
def test_package(kind):
    """A model with our ops through torch.package, fastff itself left outside as torch is: the same outputs, and it goes on training."""
    torch.manual_seed(0)
    if kind == "block":
        model, x = fastff.nn.FFConv2d(3, 8, 3, num_classes=4), torch.randn(4, 3, 8, 8)
    else:
        net = fastff.models.resnet18(num_classes=4, stem="cifar", width=8)
        model, x = fastff.SFF(net, num_classes=4, input_shape=(3, 16, 16)), torch.randn(4, 3, 16, 16)
    file = io.BytesIO()
    with package.PackageExporter(file) as exporter:
        exporter.extern(["torch.**", "fastff.**", "numpy.**"])
        exporter.save_pickle("models", "model.pkl", model)
    file.seek(0)
    copy = package.PackageImporter(file).load_pickle("models", "model.pkl")
    model.eval(), copy.eval()
    outputs = [m(x) if kind == "sff" else m(x)[1] for m in (model, copy)]
    assert same_bits(*outputs)
    target = torch.tensor([0, 1, 2, 3])
    for m in (model, copy):
        m.train()
        if kind == "sff":
            fastff.Trainer(m, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)).step(x, target)
        else:
            m.local_step(x, target)
            torch.optim.SGD(m.parameters(), lr=0.1).step()
    for (name, a), b in zip(model.named_parameters(), copy.parameters(), strict=True):
        assert same_bits(a, b), name
