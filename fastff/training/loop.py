"""The loop that block-local training and backpropagation share: fit, evaluate, checkpoints, metrics, and what a step needs of them."""

import contextlib
import math
import signal
import threading
import time
from pathlib import Path

import torch

from fastff.parallel.ranks import Ranks
from fastff.parallel.watch import RankFailed
from fastff.training import checkpoint, graph, optim
from fastff.training.report import Metrics, Progress

AMP = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


def loss_dtype(images):
    """Losses are float32, of float64 images float64."""
    return torch.float64 if images.dtype == torch.float64 else torch.float32


class Diverged(RuntimeError):
    """A loss became NaN or infinite. Attributes: block (its name), step."""

    def __init__(self, block, step, checkpoint_path):
        self.block, self.step = block, step
        kept = f"; the last checkpoint {checkpoint_path} is intact" if checkpoint_path else ""
        super().__init__(
            f"the loss of block {block} became NaN or infinite at step {step}{kept}. Look for NaN in the data or labels out of range, "
            f"or lower the learning rate (or set clip_grad_norm)"
        )


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the step was finished and a checkpoint saved (`path`, None where fit had no folder)."""

    def __init__(self, path, step):
        self.path = path
        super().__init__(
            f"stopped after step {step}" + (f"; continue with --resume {Path(path).parent}" if path else "")
        )


class Loop:
    """Subclasses have sff, run_step(images, target) -> losses [L] and right answers [L], scores(images) -> {name: [B, K]}, train_mode(), and
    `names` of the losses.

    Args:
        module: whose state_dict a checkpoint holds.
        names: of the L losses.
        optimizers: all of them.
        lr_schedule: "cosine" (with warm-up over the first 5 % of fit), "constant", or a function of progress in 0..1.
        micro_batches: parts a minibatch is cut into; gradients add up over them.
        amp: None, "bf16" or "fp16" (with loss scaling): autocast of the forward passes.
        clip_grad_norm: greatest norm of the gradients of an optimiser, or None.
        compile: whether to run forwards through torch.compile.
        cuda_graph: record the whole step as a CUDA graph (graph.py) and replay it; CUDA only, with an optimiser that can be captured.
        ranks: this process among others (fastff/parallel); only the first of them shows and writes.
    """

    phases = 1

    def __init__(
        self,
        module,
        names,
        optimizers,
        *,
        lr_schedule="cosine",
        micro_batches=1,
        amp=None,
        clip_grad_norm=None,
        compile=False,
        cuda_graph=False,
        ranks=None,
    ):
        if not callable(lr_schedule) and lr_schedule not in optim.SCHEDULES:
            raise ValueError(
                f"lr_schedule: expected one of {', '.join(optim.SCHEDULES)} or a function, got {lr_schedule!r}"
            )
        if not isinstance(micro_batches, int) or micro_batches < 1:
            raise ValueError(f"micro_batches: expected a whole number of at least 1, got {micro_batches!r}")
        if amp not in AMP:
            raise ValueError(f"amp: expected None, 'bf16' or 'fp16', got {amp!r}")
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm: expected a positive number or None, got {clip_grad_norm!r}")
        self.module, self.names, self.optimizers = module, names, optimizers
        self.steppers = {}
        self.lr_schedule = lr_schedule if callable(lr_schedule) else optim.SCHEDULES[lr_schedule]
        self.micro_batches, self.amp, self.clip_grad_norm, self.compile = (
            micro_batches,
            AMP[amp],
            clip_grad_norm,
            compile,
        )
        self.device = next(module.parameters()).device
        self.ranks = ranks or Ranks()
        self.counted = torch.ones(len(names), device=self.device)  # which of the losses this rank sees
        self.steps, self.fitting = 0, False
        self.position = {"epoch": 0, "batch": 0}
        self.history, self.totals = [], None
        self.scalers = []
        self.own, self.own_optimizers = range(len(names)), range(len(optimizers))  # what this rank trains
        self.step_graph = None
        if cuda_graph:
            self._make_step_graph()

    # --- a step

    def step(self, images, target):
        """One minibatch: images [B, *input_shape], target [B] int64. Returns the losses [L] (0 for a block that was not trained, or not here).

        Nothing in it waits for the device. `self.correct` [L] holds how many samples each block, or the network, had right.
        """
        if self.ranks.feeds:
            self.check_batch(images, target)
            images, target = self.to_device(images), self.to_device(target)
            self.samples = len(target)
        if self.step_graph is None:
            losses, self.correct = self.run_step(images, target)
        else:
            losses, self.correct = self.step_graph(images, target, self.recorded_state())
        if not self.fitting:
            self.settle()
        return losses

    def settle(self):
        """Finish updates that wait for other ranks."""

    def synchronize(self):
        """Bring the weights of all ranks to every rank."""

    def _make_step_graph(self):
        graph.prepare(self.optimizers, self.device, self.amp)
        self.step_graph = graph.StepGraph(self.run_step, graph.Cuda(self.device))

    def recorded_state(self):
        """What the recording of a step depends on beside its minibatch."""

    def check_batch(self, images, target):
        if not isinstance(images, torch.Tensor) or not images.is_floating_point():
            raise TypeError(
                f"images: expected a floating-point tensor, got {images.dtype if isinstance(images, torch.Tensor) else type(images).__name__}"
            )
        if not isinstance(target, torch.Tensor) or target.dtype != torch.int64:
            raise TypeError(
                f"target: expected int64 labels, got {target.dtype if isinstance(target, torch.Tensor) else type(target).__name__}"
            )
        self.sff.check_images(images)
        if len(images) == 0:
            raise ValueError("images: expected at least one image, got an empty batch")
        if target.shape != (len(images),):
            raise ValueError(f"target: expected one label for each of {len(images)} images, got {list(target.shape)}")

    def to_device(self, tensor):
        return tensor.detach().to(self.device, non_blocking=True)

    def autocast(self):
        if self.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.amp)

    def make_scaler(self):
        return torch.amp.GradScaler(self.device.type) if self.amp == torch.float16 else None

    def optimizer_step(self, optimizer, scaler, parameters):
        if scaler is not None:
            scaler.unscale_(optimizer)
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_grad_norm)
        if scaler is None:
            if optimizer not in self.steppers:
                self.steppers[optimizer] = optim.Stepper(optimizer)
            self.steppers[optimizer]()
        else:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

    # --- the loop

    def start_phase(self, phase):
        """Called when fit goes through its epochs once more (greedy schedule)."""

    def fit(
        self, loader, epochs, validation=None, out=None, save_every=None, progress=True, evaluate_every=1, meta=None
    ):
        """Train for `epochs` from where this trainer stands (a loaded checkpoint goes on).

        Args:
            loader: minibatches (images, target); with set_epoch and iter_from (fastff.training.data.Loader) resuming skips nothing.
            validation: minibatches to evaluate after every `evaluate_every` epochs and the last.
            out: folder for checkpoint.pt, metrics.csv and TensorBoard events; None writes nothing.
            save_every: steps between checkpoints; one is saved after each epoch in any case.
            progress: whether to show a live display.
            meta: a dict of plain values kept in the checkpoint (how to build the network again).

        Returns the history: one dict an epoch (on rank 0 of several). Raises Diverged, Interrupted, RankFailed.
        """
        self.fitting = True  # updates may wait for other ranks over the end of a step
        path = None if out is None else Path(out) / "checkpoint.pt"
        try:
            return self._fit(loader, epochs, validation, out, path, save_every, progress, evaluate_every, meta)
        except RankFailed as error:
            raise RankFailed(error.reason, self.steps, path if path and path.exists() else None) from error
        except BaseException as error:
            text = str(error).splitlines()
            self.ranks.watch.report(text[0] if text else type(error).__name__)
            # A rank cannot finish a step when others do not.
            if type(error) is KeyboardInterrupt and self.ranks.size > 1:
                raise Interrupted(path if path and path.exists() else None, self.steps) from error
            raise
        finally:
            self.fitting = False

    def _fit(self, loader, epochs, validation, out, path, save_every, progress, evaluate_every, meta):
        if not isinstance(epochs, int) or epochs < 1:
            raise ValueError(f"epochs: expected a whole number of at least 1, got {epochs!r}")
        if len(loader) == 0:
            raise ValueError("loader: expected at least one minibatch, got an empty loader")
        loader, ranks = self._share_of(loader), self.ranks
        total, steps_per_phase = epochs * self.phases, epochs * len(loader)
        self.meta = meta if meta is not None else getattr(self, "meta", None)
        metrics = Metrics(out if ranks.leads else None, self.names, self.steps)
        display = Progress(progress and ranks.leads, self.names, total, len(loader))
        with self._catch_interrupt() as interrupted, display:
            while self.position["epoch"] < total:
                epoch = self.position["epoch"]
                self.start_phase(epoch // epochs)
                self.train_mode()
                if self.position["batch"] == 0:
                    self.totals = None
                    self.epoch_random_state = checkpoint.random_state()
                start, images_seen = time.perf_counter(), 0
                for images, target in self._batches(loader, epoch):
                    done = (epoch % epochs) * len(loader) + self.position["batch"]
                    optim.set_progress(self.optimizers, self.lr_schedule, min(1.0, (done + 1) / steps_per_phase))
                    losses = self.step(images, target)
                    self.steps += 1
                    ranks.watch.steps = self.steps
                    self.position["batch"] += 1
                    images_seen += self.samples * ranks.data_size
                    self._add(losses, self.samples)
                    if self.device.type == "cpu" or self.steps % 50 == 0:  # looking at a loss waits for a GPU
                        self._check_finite(path)
                    display.update(self, images_seen / (time.perf_counter() - start))
                    ends = self.position["batch"] == len(loader)
                    if not ends and path and save_every and self.steps % save_every == 0:
                        self._check_finite(path)
                        self.save(path)
                    if interrupted.is_set():
                        self._check_finite(path)
                        if path:
                            self.save(path)
                        raise Interrupted(path, self.steps)
                self._check_finite(path)
                if self.totals is None:
                    raise ValueError("loader: expected at least one minibatch, it gave none")
                row = {
                    "epoch": epoch + 1,
                    "step": self.steps,
                    "seconds": time.perf_counter() - start,
                } | self._epoch_row(ranks.sum(self.totals))
                self.position = {"epoch": epoch + 1, "batch": 0}
                if validation is not None and ((epoch + 1) % evaluate_every == 0 or epoch + 1 == total):
                    row |= {f"test {name}": value for name, value in self.evaluate(validation).items()}
                self.history.append(row)
                metrics.write(self.history)
                display.epoch(row)
                if path:
                    self.save(path)
        metrics.close()
        self.synchronize()
        return self.history

    def _share_of(self, loader):
        """The loader of this rank's share of each minibatch. Raises ValueError."""
        ranks = self.ranks
        if ranks.data_size == 1:
            return loader
        if hasattr(loader, "shared"):
            loader = loader.shared(ranks.data_rank, ranks.data_size)
            if loader.least == 0:
                text = f"one image for each of {ranks.data_size} ranks in every minibatch"
                raise ValueError(
                    f"loader: expected at least {text}, the last does not have it: drop_last=True leaves it out"
                )
            return loader
        sampler = getattr(loader, "sampler", None)
        if type(sampler) in (torch.utils.data.SequentialSampler, torch.utils.data.RandomSampler):
            text = "fastff's Loader, or a DataLoader with sampler=DistributedSampler(dataset)"
            raise ValueError(f"loader: expected one that gives each of {ranks.data_size} ranks its share ({text})")
        return loader

    def _batches(self, loader, epoch):
        """The minibatches of an epoch from the position on."""
        skip = self.position["batch"]
        if not self.ranks.feeds:
            yield from [(None, None)] * (len(loader) - skip)
            return
        if hasattr(loader, "iter_from"):
            loader.set_epoch(epoch)
            yield from loader.iter_from(skip)
            return
        if hasattr(getattr(loader, "sampler", None), "set_epoch"):
            loader.sampler.set_epoch(epoch)
        state = checkpoint.random_state()
        if skip:  # repeat the draws of the epoch's beginning, so that the order is the same
            checkpoint.set_random_state(self.epoch_random_state)
        for index, batch in enumerate(loader):
            if index < skip:
                continue
            if index == skip and skip:
                checkpoint.set_random_state(state)
            yield batch

    def _add(self, losses, size):
        # In float64, where these sums are exact: the same at any number of ranks and after any number of restarts.
        wide = torch.float32 if losses.device.type == "mps" else torch.float64
        now = torch.stack([losses.detach() * size, self.correct, self.counted.to(losses) * size]).to(wide)
        self.totals = now if self.totals is None else self.totals + now

    def _check_finite(self, path):
        bad = (~torch.isfinite(self.totals[0])).nonzero().flatten().tolist()
        if bad:
            raise Diverged(self.names[bad[0]], self.steps, path if path and path.exists() else None)

    def running(self, totals=None):
        """(losses, accuracies) of the epoch so far, lists of L numbers, of this rank's samples unless given; waits for the device."""
        losses, correct, count = (self.totals if totals is None else totals).tolist()
        of = lambda values: [v / n if n else math.nan for v, n in zip(values, count, strict=True)]  # noqa: E731
        return of(losses), of(correct)  # NaN: a block of another rank

    def _epoch_row(self, totals):
        losses, accuracies = self.running(totals)
        row = {f"train loss {name}": value for name, value in zip(self.names, losses, strict=True)}
        return row | {f"train accuracy {name}": value for name, value in zip(self.names, accuracies, strict=True)}

    @contextlib.contextmanager
    def _catch_interrupt(self):
        """Ctrl-C sets an event, so that the step can be finished; a second one stops at once."""
        event = threading.Event()
        if threading.current_thread() is not threading.main_thread() or self.ranks.size > 1:
            yield event
            return

        def handler(number, frame):
            if event.is_set():
                raise KeyboardInterrupt
            event.set()

        before = signal.signal(signal.SIGINT, handler)
        try:
            yield event
        finally:
            signal.signal(signal.SIGINT, before)

    @torch.no_grad()
    def evaluate(self, loader):
        """Accuracy of everything `scores` gives, over `loader`, in eval mode: {name: 0..1}.

        Several ranks share out a fastff Loader; of another each counts what it gives this rank. Call it on all of them."""
        self.synchronize()
        if self.ranks.size > 1 and hasattr(loader, "shared"):
            loader = loader.shared(self.ranks.rank, self.ranks.size)
        modes = {module: module.training for module in self.module.modules()}
        self.module.eval()
        hits, names, count = None, [], 0
        try:
            for images, target in loader:
                if len(target) == 0:
                    continue
                target = self.to_device(target)
                scores = self.scores(self.to_device(images))
                right = torch.stack([(score.argmax(1) == target).sum() for score in scores.values()])
                hits = right if hits is None else hits + right
                names, count = list(scores), count + len(target)
        finally:
            for module, mode in modes.items():
                module.training = mode
        found = self.ranks.gather((names, [] if hits is None else hits.tolist(), count))
        found = [part for part in found if part[2]]
        if not found:
            raise ValueError("loader: expected at least one minibatch, it gave none")
        count = sum(part[2] for part in found)
        right = map(sum, zip(*(part[1] for part in found), strict=True))
        return {name: hits / count for name, hits in zip(found[0][0], right, strict=True)}

    # --- checkpoints

    def save(self, path):
        """Write everything needed to go on: weights, optimisers, scalers, random states, position in the data, history. Atomic.

        Of several ranks the first writes, and all have to call it; the file says nothing of how many they were."""
        self.synchronize()
        optimizers = {k: self.optimizers[k].state_dict() for k in self.own_optimizers}
        scalers = {k: self.scalers[k].state_dict() for k in self.own if self.scalers[k] is not None}
        totals = None if self.totals is None else self.ranks.sum(self.totals)
        needed = self.ranks.data_rank == 0 or self.ranks.distributed.shard_optimizer  # other replicas have the same
        if (parts := self.ranks.collect((optimizers, scalers) if needed else ({}, {}))) is None:
            return
        scalers = {k: state for _, part in parts for k, state in part.items()}
        checkpoint.save(path, {
            "format": "fastff", "version": 1, "kind": type(self).__name__, "names": list(self.names), "meta": getattr(self, "meta", None),
            "module": self.module.state_dict(), "optimizers": [
                checkpoint.joined([part[k] for part, _ in parts if k in part]) for k in range(len(self.optimizers))
            ],
            "scalers": [scalers.get(k) for k in range(len(self.scalers))], "random": checkpoint.random_state(),
            "epoch_random": getattr(self, "epoch_random_state", None), "steps": self.steps, "position": dict(self.position),
            "history": self.history, "totals": totals,
        })  # fmt: skip

    def load(self, path):
        """Go on from what `save` wrote, bit for bit. Raises CheckpointError for a damaged file or another network."""
        state = checkpoint.load(path, self.device)
        if state["kind"] != type(self).__name__ or state["names"] != list(self.names):
            raise checkpoint.CheckpointError(
                f"{path}: of another network or cut: it has {state['kind']} of {state['names']}, expected {type(self).__name__} of {list(self.names)}"
            )
        shapes = [{name: tuple(t.shape) for name, t in d.items()} for d in (state["module"], self.module.state_dict())]
        if shapes[0] != shapes[1]:  # looked at before anything is written
            name = next(n for n in (*shapes[1], *shapes[0]) if shapes[0].get(n) != shapes[1].get(n))
            has, expected = (s.get(name, "nothing") for s in shapes)
            raise checkpoint.CheckpointError(
                f"{path}: its weights do not fit this network: {name} is {has} there, expected {expected}"
            )
        try:
            self.module.load_state_dict(state["module"])
            for k, (optimizer, saved) in enumerate(zip(self.optimizers, state["optimizers"], strict=True)):
                if k in self.own_optimizers:
                    optimizer.load_state_dict(self.own_state(optimizer, saved))
        except (RuntimeError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"{path}: its optimisers do not fit this trainer: {str(error).splitlines()[0]}"
            ) from error
        for scaler, saved in zip(self.scalers, state["scalers"], strict=True):
            if scaler is not None and saved is not None:
                scaler.load_state_dict(saved)
        if self.step_graph is not None:  # the optimisers' tensors are others now
            self._make_step_graph()
        checkpoint.set_random_state(state["random"])
        self.epoch_random_state, self.meta = state["epoch_random"], state["meta"]
        self.steps, self.position, self.history = state["steps"], state["position"], state["history"]
        totals = state["totals"]  # of all ranks: rank 0 goes on with them
        self.totals = totals if totals is None or self.ranks.leads else torch.zeros_like(totals)

    def own_state(self, optimizer, saved):
        """What this rank keeps of an optimiser's saved state."""
        return saved
