"""Muon's update of convolutions' weights: no op of PyTorch's dispatcher, but with implementations as all ops have."""

import torch

from fastff.kernels import native
from fastff.kernels.native import muon as native_muon
from fastff.kernels.torch import muon as torch_muon
from fastff.ops.table import Implementation, always, choose, concerns

ROWS = [
    Implementation(
        "native",
        native.takes(torch.float32),
        native_muon,
        "weights that are no matrices in memory by PyTorch",
        native.slow,
    ),
    Implementation("torch", always, torch_muon),
    Implementation("reference", always, torch_muon, "the same as torch"),
]


def update(params, *arguments):
    """Update weights of one device and dtype; the arguments are those of fastff.kernels.torch.muon.update."""
    run = choose("muon", ROWS, "auto", params[0]).run if concerns(ROWS) else torch_muon
    run.update(params, *arguments)
