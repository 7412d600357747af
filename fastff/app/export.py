"""Writes the network of a run as a program that needs no fastff: torch.export (.pt2) or ONNX (`fastff export`).

The program takes images [B, C, H, W] in float32 with values in 0..1, for any B, and returns probabilities [B, K]: the normalization with the
data set's mean and deviation, all blocks, and their vote are in it. fastff's ops are replaced by their definitions in plain PyTorch
(fastff/reference.py). Every file that is written is run, and compared with the network of the run.
"""

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from fastff import reference
from fastff.arguments import check_member
from fastff.training.checkpoint import write_atomically
from fastff.training.readers import optional

FORMATS = {"torch": ".pt2", "onnx": ".onnx"}
TOLERANCE = 1e-5  # of probabilities
BATCHES = (1, 2, 7)  # sizes that every written file is run with
# Plain PyTorch in place of fastff's ops; their last arguments say how to compute, which makes no difference here.
DEFINITIONS = {
    torch.ops.fastff.goodness.default: lambda *arguments: reference.goodness(*arguments[:5]),
    torch.ops.fastff.normalize.default: lambda x, *how: reference.normalized(x, *how[:3]).view_as(x),
}


class ExportError(RuntimeError):
    """Raised when an exported program would not compute what the network does."""


class Whole(nn.Module):
    """Returns the probabilities of all blocks together, from images in 0..1."""

    def __init__(self, network):
        super().__init__()
        self.sff, self.probabilities = network.sff, network.probabilities
        self.normalized = Normalized(network.meta)

    def forward(self, images):
        return self.probabilities(self.normalized(images))[0]


class Normalized(nn.Module):
    """Takes the data set's mean off images in 0..1, and divides them by its deviation."""

    def __init__(self, meta):
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(meta[name])[:, None, None])

    def forward(self, images):
        return (images - self.mean) / self.std


class Stage(nn.Module):
    """The blocks up to the next one that votes, for early exit. Takes images, or behind the first stage the vote so far and what the stage before
    passed on.

    Returns the vote so far, with this stage's, and what the next stage takes."""

    def __init__(self, network, number):
        super().__init__()
        voters = network.sff.plan.voters
        self.number, self.last = number, number + 1 == len(voters)
        self.weighted = network.sff.vote == "weighted"
        first = voters[number - 1] + 1 if number else 0
        self.blocks = network.sff.local_blocks[first : voters[number] + 1]
        self.normalized = Normalized(network.meta) if number == 0 else None

    def forward(self, *inputs):
        if self.number == 0:
            before, alive = None, (self.normalized(*inputs),)
        else:
            before, *alive = inputs
        for block in self.blocks:
            main, *others = block.outputs(*alive)
            alive = (block.next_input(main), *others)
        vote = self._vote(before, block.head.logits(block.head(main)))
        return (vote,) if self.last else (vote, *alive)

    def _vote(self, before, logits):
        """The vote [B, K] of this stage and those before it, from theirs; as SFF.votes."""
        n = self.number
        if before is None:
            return logits.softmax(1)
        if not self.weighted:
            return (before * n + logits.softmax(1)) / (n + 1)
        # log(before) is, but for a constant, the weighted mean of n log softmaxes, whose weights have the sum n (n + 1) / 2
        weight = n * (n + 1) / 2
        mean = (before.clamp_min(1e-38).log() * weight + (n + 1) * logits.log_softmax(1)) / (weight + n + 1)
        return mean.softmax(1)


def export(network, out, form, stages=False):
    """Write a Trained network (on the CPU) and return the paths of the files and the largest difference that was found.

    Args:
        network: fastff.app.trained.Trained.
        out: folder of the files model.pt2 or model.onnx, or with stages stage-00 and so on.
        form: "torch" or "onnx".
        stages: one program for each block that votes, and those before it, for early exit: the first takes images, the others all that the one
            before returned.

    Raises:
        ValueError: the format is unknown, or the network has no stages.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ExportError: a written file computes something else than the network; it is removed."""
    check_member("format", form, FORMATS)
    if stages and (network.backprop or network.sff.vote not in ("weighted", "softmax")):
        got = "backpropagation" if network.backprop else f"vote {network.sff.vote!r}"
        raise ValueError(f"stages: expected a network whose blocks vote with probabilities, got one of {got}")
    if form == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            optional(package, "ONNX", "export")
    count = len(network.sff.plan.voters) if stages else 1
    paths = [Path(out) / ((f"stage-{index:02d}" if stages else "model") + FORMATS[form]) for index in range(count)]
    truth = given = [(torch.rand(size, *network.meta["input_shape"]),) for size in BATCHES]
    worst = 0.0
    for index, path in enumerate(paths):
        module = (Stage(network, index) if stages else Whole(network)).eval()
        with _quiet(), torch.no_grad():
            _write(_program(module, given[-1]), path, form, _facts(network, index if stages else None, count))
            given = _run(
                path, form, given
            )  # a stage is run on what the files before it return, not on what they should
            truth = [_tuple(module(*inputs)) for inputs in truth]
        for found, wanted in zip(given, truth, strict=True):
            off = (found[0] - wanted[0]).abs().max().item()
            if not off <= TOLERANCE:  # also NaN
                path.unlink()
                text = f"expected the probabilities of the network to {TOLERANCE:g}, they differ by {off:.2g}"
                raise ExportError(f"{path}: {text}; the file is removed")
            worst = max(worst, off)
    return paths, worst


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


@contextlib.contextmanager
def _quiet():
    """Silence what the exporters of torch and onnxscript say of each other and of themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _facts(network, index, count):
    """Return what a reader of the file needs to know, as strings."""
    facts = {key: json.dumps(network.meta[key]) for key in ("classes", "input_shape")}
    facts["input"] = "float32 [B, C, H, W] in 0..1"
    return facts if index is None else facts | {"stage": str(index), "stages": str(count)}


def _program(module, inputs):
    """Return the module as torch.export's program for any size of the batch, without fastff's ops."""
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    shapes = (dynamic,) if isinstance(module, Stage) else dynamic  # a Stage has one argument, *inputs
    program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    program = program.run_decompositions(DEFINITIONS)
    left = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("fastff")}
    if left:
        raise ExportError(f"expected ops of PyTorch alone in the exported program, {', '.join(sorted(left))} are left")
    return program


def _write(program, path, form, facts):
    if form == "torch":
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files=facts)
        content = buffer.getvalue()
    else:
        names = [f"input_{i}" for i in range(len(program.graph_signature.user_inputs))]
        made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=names)
        made.model.metadata_props.update(facts)
        content = made.model_proto.SerializeToString()
    write_atomically(path, lambda file: file.write(content))


def _run(path, form, batches):
    """Run a written file on each tuple of inputs; returns a tuple of tensors for each."""
    if form == "torch":
        module = torch.export.load(io.BytesIO(path.read_bytes())).module()
        return [_tuple(module(*inputs)) for inputs in batches]
    session = optional("onnxruntime", "ONNX", "export").InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    feeds = [dict(zip(names, (t.numpy() for t in inputs), strict=True)) for inputs in batches]
    return [tuple(torch.from_numpy(t) for t in session.run(None, feed)) for feed in feeds]
