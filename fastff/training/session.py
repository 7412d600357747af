"""What Trainer and Backprop offer alike: step, fit, evaluate, save, load. They differ in the engine they are made with."""

from pathlib import Path

import torch

from fastff.training import fit, optim, recording, state
from fastff.training.batch import check_batch
from fastff.training.engine import AMP


class Session:
    """An engine (engine.py), and how far training with it has come (state.py).

    Attributes: engine, state, sff, names (of the losses), optimizers, device, ranks (fastff.parallel.ranks.Ranks), result (StepResult of
    the last step, or None), recorded (the fastff.graph.recording.Recorded that replays steps, or a sentence that says why none does)."""

    def __init__(self, engine, options, lr_schedule):
        if not callable(lr_schedule) and lr_schedule not in optim.SCHEDULES:
            known = ", ".join(optim.SCHEDULES)
            raise ValueError(f"lr_schedule: expected one of {known} or a function, got {lr_schedule!r}")
        self.engine, self.sff, self.names, self.optimizers = engine, engine.sff, engine.names, engine.optimizers
        self.device, self.ranks = engine.device, engine.place.ranks
        self.lr_schedule = lr_schedule if callable(lr_schedule) else optim.SCHEDULES[lr_schedule]
        self.options, self.state, self.result = options, state.State(), None
        trained = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        self.trained = [  # (the dict of the module that has a parameter, its name, the parameter)
            (module._parameters, name, parameter)
            for module in self.sff.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in trained
        ]
        self.fitting = False  # updates may wait for other ranks over the end of a step
        self._prepare_steps()

    def _prepare_steps(self):
        self.recorded = recording.recorded(self.engine, self.options, AMP[self.options.amp])
        self.run_step = self.engine.run_step if isinstance(self.recorded, str) else self.recorded

    def __repr__(self):
        """Describe what is trained, where and how."""
        losses = "loss" if len(self.names) == 1 else "losses"
        amp = f", amp {self.options.amp}" if self.options.amp else ""
        how = "steps are not recorded: " if isinstance(self.recorded, str) else ""
        name = f"{type(self).__name__} on {self.device}"
        return f"{name}: {len(self.names)} {losses}, {self.steps} steps done{amp}\n{how}{self.recorded}"

    @property
    def steps(self):
        """Number of steps made."""
        return self.state.steps

    @property
    def position(self):
        """Dict of the number of epochs done ("epoch") and of minibatches done in the next one ("batch")."""
        return self.state.position

    @property
    def history(self):
        """List of one dict per epoch, which fit returns."""
        return self.state.history

    @property
    def correct(self):
        """Number of samples [L] that each block, or the network, classified correctly in the last step."""
        return self.result.correct

    def train_mode(self):
        """Put the network into training mode, frozen blocks into evaluation mode."""
        self.engine.train_mode()

    def step(self, images, target=None):
        """Train on one minibatch, images [B, *input_shape] and target [B] (int64).

        With a goodness or loss without labels the target is None, the first half of the images positive and the second half negative.
        Returns the losses [L], 0 for a block that is not trained, or not by this rank. Nothing in it waits for the device. Raises TypeError,
        ValueError, and RuntimeError where gradients are turned off or the model's parameters have been replaced."""
        if not torch.is_grad_enabled():
            raise RuntimeError("step: expected gradients to be on, got torch.no_grad() or torch.inference_mode()")
        if any(held.get(name) is not parameter for held, name, parameter in self.trained):
            raise RuntimeError(
                "step: expected the parameters that the optimizers were made for, but the model has got others (as by "
                f"load_state_dict(assign=True)): make the {type(self).__name__} after that"
            )
        if self.ranks.feeds:
            check_batch(self.sff, images, target, self.engine.labelled, self.options.amp is not None)
            if len(images) == 0:
                raise ValueError("images: expected at least one image, got an empty batch")
            images, target = (None if t is None else _moved(t, self.device) for t in (images, target))
        self.result = self.run_step(images, target, self.state.steps)
        self.state.steps += 1
        if not self.fitting:
            self.engine.place.settle()
        return self.result.losses

    def fit(
        self, loader, epochs, validation=None, out=None, save_every=None, progress=True, evaluate_every=1, meta=None
    ):
        """Train for `epochs` from where this trainer stands (a loaded checkpoint goes on).

        Args:
            loader: minibatches (images, target, ...) or dicts (fastff/training/batch.py), of a known number len(loader); with set_epoch and
                iter_from (fastff.training.data.Loader) resuming skips nothing. Without labels (see step) the target is left out.
            validation: minibatches to evaluate after every `evaluate_every` epochs and the last.
            out: folder for checkpoint.pt, metrics.csv and TensorBoard events; None writes nothing.
            save_every: steps between checkpoints; one is saved after each epoch in any case.
            progress: whether to show a live display, or an object with the methods of fastff.training.report.Report, which is then called
                in place of the display and of the metrics' writer (on rank 0 of several).
            meta: a dict of plain values kept in the checkpoint (how to build the network again).

        A module that is in evaluation mode while the network is in training mode stays there.

        Returns the history: one dict per epoch (on rank 0 of several), with NaN for blocks that an epoch did not train. Raises Diverged,
        Interrupted, RankFailed."""
        from fastff.training.report import Report

        path = None if out is None else Path(out) / "checkpoint.pt"
        if not self.ranks.leads:
            progress = Report(None, show=False)
        elif isinstance(progress, bool):
            progress = Report(out, show=progress)
        self.state.meta = self.state.meta if meta is None else meta
        self.fitting = True
        try:
            with fit.failures_told(self, path):
                return fit.fit(self, loader, epochs, validation, path, save_every, evaluate_every, progress)
        finally:
            self.fitting = False

    def evaluate(self, loader):
        """Return the accuracies over `loader` in evaluation mode, {name: 0..1}: of the vote, of each block, of the classifier.

        Several ranks share out a fastff Loader; of another each counts what it gives this rank. Call it on all of them."""
        self.synchronize()
        return fit.evaluate(self.engine, loader)

    def synchronize(self):
        """Finish all updates, and bring the blocks of all ranks to every rank, the statistics of batch norm averaged.

        Needed before the weights are used otherwise than by this trainer's steps; fit, evaluate and save do it. Call it on all ranks."""
        self.engine.place.synchronize()

    def save(self, path):
        """Write everything needed to go on: weights, optimisers, scalers, random states, position in the data, history. Atomic.

        Of several ranks the first writes, and all have to call it; the file does not say how many they were."""
        state.save(path, self)

    def load(self, path):
        """Go on from what `save` wrote, bit for bit. Raises CheckpointError for a damaged file or another network."""
        state.load(path, self)
        self._prepare_steps()  # the optimizers' tensors are new ones


def _moved(tensor, device):
    """A tensor of a minibatch on the device of the network. Autograd saves none that was made in inference mode: those are copied."""
    return (tensor.clone() if tensor.is_inference() else tensor.detach()).to(device, non_blocking=True)
