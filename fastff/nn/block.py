"""Blocks that train themselves: any module, or a convolution / depthwise convolution / linear layer, with a goodness head of its own.

block(x)                     -> output, goodness [B, K]      ordinary, differentiable
block.local_step(x, target)  -> normalised detached output (the next block's input), loss
                                adds this block's gradients to .grad; step your optimiser after it
"""

import contextlib

import torch
from torch import nn

import fastff.functional as ff
from fastff import spec
from fastff.graph.fused import Epilogue
from fastff.graph.operators import Operators
from fastff.graph.recording import Recorded
from fastff.graph.tape import Tape
from fastff.graph.training import training_graph
from fastff.nn.group_head import GOODNESS, GroupGoodness
from fastff.nn.head import GoodnessHead, LossHead
from fastff.nn.visit import EpilogueVisit, Visit, detached
from fastff.ops.convolution import Quick
from fastff.ops.epilogue import implementation
from fastff.ops.gradients import GroupNormGuard


class LocalBlock(nn.Module):
    """A module, its goodness head, and what is passed on to the next block: all that local training needs of a block.

    Args:
        module: maps its inputs to one tensor, or to a tuple whose first tensor is the output that the goodness is of.
        head: a GoodnessHead or GroupGoodness; or instead of it
        loss: any function of the module's output and of local_step's target that returns a scalar. An nn.Module's parameters learn, too.
        normalize: of the output passed on, a name of spec.NORMALIZATIONS or None.
        eps: of that normalization, added to the variance or to the length.
        fuse: train the module's graph with faster layers and its epilogue as one op with the goodness (fastff/graph/training.py).
        open_modules: whether `fuse` looks into modules of the model's own, or into nn.Sequential alone.
    """

    def __init__(
        self, module, head=None, normalize="layer_norm", fuse=True, open_modules=False, eps=1e-5, *, loss=None
    ):  # fmt: skip
        super().__init__()
        if (head is None) == (loss is None):
            raise TypeError("head, loss: expected one of them")
        head = LossHead(loss) if head is None else head
        normalization = spec.Normalization.checked(normalize, getattr(head, "channels", 1), head.groups, eps)
        self.module, self.head, self.eps = module, head, normalization.eps
        self.normalize = None if normalization.name == "none" else normalization.name
        self._fuse, self._open, self._graph, self._compiled = fuse, open_modules, None, {}
        # forms of the module that were seen not to write to their inputs, as a ReLU in place does; to call no group norm
        self._without_writes, self._without_group_norm = set(), set()
        self._recorded = None  # the Recorded of its local steps

    def __setattr__(self, name, value):
        if isinstance(value, nn.Module) and hasattr(LocalBlock, name):  # it would stay hidden behind the block's own
            raise AttributeError(f"{name}: expected another name for a module, which blocks of fastff have themselves")
        super().__setattr__(name, value)

    @property
    def graph(self):
        """The TrainingGraph that the block trains with, or None."""
        if not self._fuse or not (self._open or type(self.module) is nn.Sequential):
            return None
        if self._graph is None:
            self._graph = training_graph(getattr(self.module, "training_module", self.module), self._open)
            if not isinstance(self._graph, str):
                self._without_writes.update(self._graph.without_writes())
        return None if isinstance(self._graph, str) else self._graph

    def whole(self):
        """{name: reason} of modules that training does not open because their Python does more than compute with tensors."""
        if isinstance(self._graph, str):
            return {"the block itself": self._graph}
        return {} if self._graph is None else self._graph.whole

    def ready_graph(self):
        """The TrainingGraph for a step now, made again where what it depends on has changed; None where the module itself has to run."""
        if self._open:
            self.module.check()
        graph = self.graph
        if graph is None or graph.ready():
            return graph
        if graph.watch.unchanged():
            return None  # a mode or a hook
        self._graph = None
        self._without_writes.clear()
        self._without_group_norm.clear()
        if self._compiled:
            self.compile_forward()
        graph = self.graph
        return graph if graph is not None and graph.ready() else None

    @property
    def epilogue(self):
        """The fused.Epilogue that the step op computes, or None."""
        ending = None if self.graph is None else self.graph.ending
        images = self.head.takes_epilogue and self.head.channel_dim == 1
        return ending if images and isinstance(ending, Epilogue) else None

    def compile_forward(self):
        """Run the module and its training graphs through torch.compile from now on."""
        module, graph = self.module, self.graph
        self._compiled[module] = (
            module.compiled(dynamic=False) if hasattr(module, "compiled") else torch.compile(module, dynamic=False)
        )
        for form in graph.graph_modules() if graph is not None else ():
            self._compiled[form] = torch.compile(form, dynamic=False)

    def _run(self, form, *inputs):
        if form in self._compiled or form in self._without_group_norm:
            outputs = self._compiled.get(form, form)(*inputs)
        else:
            with GroupNormGuard() as guard:
                outputs = form(*inputs)
            if not guard.used:
                self._without_group_norm.add(form)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _run_on_leaves(self, form, inputs):
        """Run on inputs that gradients may be asked for. PyTorch lets no module write to such leaves: one that does gets copies."""
        if form in self._without_writes or not any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs):
            return self._run(form, *inputs)
        copies = [t.clone() if isinstance(t, torch.Tensor) else t for t in inputs]
        outputs = self._run(form, *copies)
        if not any(isinstance(t, torch.Tensor) and t._version > 0 for t in copies):
            self._without_writes.add(form)
        return outputs

    def outputs(self, *inputs):
        """The module's outputs as a tuple."""
        return self._run(self.module, *inputs)

    def next_input(self, output):
        """What is passed on to the next block, from an output of the module."""
        if self.normalize is None:
            return output
        groups = self.head.groups if self.normalize == "group_norm" else 1
        return ff.normalize(output, self.normalize, groups, self.eps, channel_dim=self.head.channel_dim)

    def visit(self, inputs, target, grad_scale=None, autocast=None, has_loss=True):
        """Forward pass and goodness step on `inputs`, a tuple. Returns the Visit to call backward on, whose `following` is passed on.

        grad_scale: 0-dimensional tensor that multiplies the gradients, or None. autocast: a function that makes a context for the forward
        pass, or None. has_loss: False for a block that later blocks' losses train, without a goodness step of its own."""
        form, ending, context = self.module, None, autocast or contextlib.nullcontext
        graph = self.ready_graph()
        if graph is not None:
            ending = self._ending(graph)
            form = graph.forward if ending is None else graph.body
        epilogue = isinstance(ending, Epilogue)
        with torch.enable_grad(), context():
            outputs = self._run_on_leaves(form, inputs)
            if epilogue and not ending.fits(*outputs[:2]):
                outputs, epilogue = (ending.by_modules(*outputs[:2]), *outputs[2:]), False
        tape = Tape(inputs, outputs)
        del outputs
        loss = (target, grad_scale) if has_loss else None
        if epilogue:
            return self._epilogue_visit(tape, loss, ending)
        return self._plain_visit(tape, loss, relu=ending == "relu")

    def _ending(self, graph):
        """The end of the block that its training graph leaves to the step, in its present mode, or None."""
        epilogue = self.epilogue
        if epilogue is not None and epilogue.ready():
            return epilogue
        return "relu" if graph.ending == "relu" else None

    def _plain_visit(self, tape, loss, relu=False):
        main = tape.outputs[0].detach()
        if relu:
            main = torch.relu_(main)
        if loss is None:
            with torch.no_grad():
                step = spec.StepResult(None, None, normalized=self.next_input(main))
        else:
            target, scale = loss
            options = {"eps": self.eps, "grad_scale": scale, "need_grad_x": tape.needed[0]}
            step = self.head.local_step(main, target, self.normalize, **options)
        following = main if step.normalized is None else step.normalized
        return Visit(tape, step, (following, *detached(tape.outputs[1:])), self.next_input, relu)

    def _epilogue_visit(self, tape, loss, ending):
        y, residual, *others = tape.outputs
        y, description = y.detach(), ending.description(residual, tape.needed[1])
        normalization = spec.Normalization(self.normalize or "none", self.head.groups, self.eps)
        if loss is None:
            step = self._after_epilogue(spec.StepResult(None, None), y, description, normalization)
        else:
            target, scale = loss
            options = {"eps": self.eps, "grad_scale": scale, "epilogue": description}
            step = self.head.local_step(y, target, self.normalize, **options)
            if self.normalize is None:
                step = self._after_epilogue(step, y, description, normalization)
        ending.update(y, step.mean, step.var)
        return EpilogueVisit(tape, step, (step.normalized, *detached(others)), ending, description, normalization)

    @torch.no_grad()
    def _after_epilogue(self, step, y, description, normalization):
        """Return the step's result with what is passed on, which the step op does not compute where it is not normalized."""
        plain, known = normalization.name == "none", None if step.mean is None else (step.mean, step.var)
        options = {"need_x": plain, "statistics": known}
        x, normalized, mean, var = implementation(y).forward(
            y, description, None if plain else normalization, **options
        )
        return step._replace(normalized=x if plain else normalized, mean=mean, var=var)

    def local_step(self, x, target=None, details=False):
        """One local training step: (next block's input, loss), both detached; with `details` (next block's input, loss, goodness). x gets no
        gradient.

        target [B] int64; None for losses of positive and negative samples, where x is the positive and then as many negative ones.

        After a few steps of a shape on a CPU, a recorded step is replayed, whose results have the same bits (fastff/graph/recording.py), where the
        block's modules are known to do the same in each step: layers of PyTorch in an nn.Sequential."""
        if x.is_cpu and not torch.compiler.is_compiling() and self._is_known():
            if self._recorded is None:
                self._recorded = Recorded(self, self._local_step, Operators((self,), self.head.num_classes))
            found = self._recorded(x, target)
        else:
            found = self._local_step(x, target)
        return found if details else found[:2]

    def _is_known(self):
        """Whether the block's Python does the same in each step, which is known of PyTorch's layers."""
        if self._compiled or self.graph is None or isinstance(self.head, LossHead):
            return False
        return all(type(m).__module__.startswith("torch.nn.") for m in self.module.modules())

    def _local_step(self, x, target):
        visit = self.visit((x.detach(),), target)
        following, loss, goodness = visit.following[0], visit.step.loss, visit.step.goodness
        visit.backward()
        return following, loss, goodness

    def __getstate__(self):
        return self.__dict__ | {"_recorded": None}


class FFBlock(LocalBlock):
    """`module` as one locally trained block.

    Args:
        module: maps x to one tensor of `channels` channels.
        channels, num_classes: of the head (num_classes None for goodness without classes).
        goodness: "sff", the paper's 1 x 1 head (GoodnessHead); "projection": a learned matrix on the flattened activations (Mono-Forward,
            arXiv 2501.09238), whose positions are given as grid=(H, W); or without weights "class_group", "class_group_mean",
            "sum_of_squares", "mean_of_squares", "position" (GroupGoodness). Further keywords (grid, tau, loss, theta, ...) are the head's.
        normalize: of the output passed on: "layer_norm", "layer_norm_channels", "l2", "rms", ... as in fastff.functional.normalize ("group_norm"
            with a group for each class), or None.
        eps: of that normalization.
        device, dtype: of the head's parameters.
    """

    def __init__(
        self, module, channels, num_classes=None, *, goodness="sff", normalize="layer_norm", eps=1e-5, device=None, dtype=None, **head
    ):  # fmt: skip
        if goodness not in GOODNESS:  # those have no parameters
            head |= {"device": device, "dtype": dtype}
        super().__init__(module, make_head(channels, num_classes, goodness, head), normalize, eps=eps)
        if normalize == "group_norm" and self.head.num_classes is None:
            raise ValueError(f"normalize: group_norm takes a group for each class, and {goodness} has no classes")

    def forward(self, x):
        """x -> (output, goodness [B, K]): the output as it is, not normalised, with gradients."""
        quick = not torch.compiler.is_compiling() and any(p.dim() == 4 and p.is_cpu for p in self.module.parameters())
        with Quick() if quick else contextlib.nullcontext():
            output = self.module(x)
        return output, self.head(output)


def make_head(channels, num_classes, goodness, options):
    """The head of this name."""
    if goodness in GOODNESS:
        return GroupGoodness(channels, num_classes, goodness, **options)
    if goodness == "projection":
        return GoodnessHead(channels, num_classes, squares=False, **{"grid": 1} | options)
    if goodness != "sff":
        raise ValueError(f"goodness: expected one of sff, projection, {', '.join(GOODNESS)}, got {goodness!r}")
    return GoodnessHead(channels, num_classes, **options)


class FFConv2d(FFBlock):
    """Convolution, batch norm and activation as one block: [B, in_channels, H, W] -> [B, out_channels, H', W'].

    Convolution arguments as of nn.Conv2d, but padding=None is "same" for stride 1 (kernel_size // 2). `norm` and `activation` are
    callables that make modules (norm gets the channels); None for none. Head keywords as of GoodnessHead.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=None, dilation=1, groups=1, bias=None, *, num_classes=None,
        padding_mode="zeros", device=None, dtype=None, norm=nn.BatchNorm2d, activation=nn.ReLU, normalize="layer_norm", head_kernel_size=1,
        **head,
    ):  # fmt: skip
        if padding is None:
            sizes = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
            dilations = (dilation, dilation) if isinstance(dilation, int) else tuple(dilation)
            padding = tuple(d * (k - 1) // 2 for k, d in zip(sizes, dilations, strict=True))
        bias = norm is None if bias is None else bias
        factory = {"device": device, "dtype": dtype}
        options = (stride, padding, dilation, groups, bias, padding_mode)
        layers = [nn.Conv2d(in_channels, out_channels, kernel_size, *options, **factory)]
        layers += [norm(out_channels)] if norm is not None else []
        layers += [activation()] if activation is not None else []
        if head_kernel_size != 1:
            head["kernel_size"] = head_kernel_size
        module = nn.Sequential(*layers).to(**factory)
        super().__init__(module, out_channels, num_classes, normalize=normalize, **factory, **head)


class FFDepthwiseConv2d(FFConv2d):
    """Depthwise convolution (one filter a channel), batch norm and activation as one block. Arguments as of FFConv2d."""

    def __init__(
        self, channels, kernel_size, stride=1, padding=None, dilation=1, bias=None, *, num_classes=None, **options
    ):
        sizes = (channels, channels, kernel_size, stride, padding, dilation, channels)
        super().__init__(*sizes, bias, num_classes=num_classes, **options)


class FFLinear(FFBlock):
    """Linear layer and activation as one block: [B, in_features] -> [B, out_features], or tokens [B, N, in] with channel_dim=-1."""

    def __init__(
        self, in_features, out_features, bias=True, *, num_classes=None, activation=nn.ReLU, device=None, dtype=None, **options
    ):  # fmt: skip
        factory = {"device": device, "dtype": dtype}
        layers = [nn.Linear(in_features, out_features, bias, **factory)]
        layers += [activation()] if activation is not None else []
        super().__init__(nn.Sequential(*layers), out_features, num_classes, **factory, **options)
