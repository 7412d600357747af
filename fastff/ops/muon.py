"""Muon's update of convolutions' weights: no op of PyTorch's dispatcher, but with implementations as all ops have."""

import torch

from fastff.kernels import native
from fastff.kernels.native import muon as native_muon
from fastff.kernels.torch import muon as torch_muon
from fastff.ops.table import Implementation, always, kernel_for

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
    row = kernel_for("muon", ROWS, params[0])
    (torch_muon if row is None else row.run).update(params, *arguments)
