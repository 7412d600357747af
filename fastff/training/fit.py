"""Epochs of training steps, and evaluation: the same for every engine (engine.py)."""

import contextlib
import itertools
import signal
import threading
import time
import warnings
from pathlib import Path

import torch

from fastff.arguments import check_labels, first_line, kind_of, whole_number
from fastff.parallel.watch import RankFailed
from fastff.training.batch import check_batch, unpack
from fastff.training.randomness import generators_of, random_state, set_random_state
from fastff.training.state import means


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
    """Ctrl-C or SIGTERM (`number`): the step was finished and a checkpoint saved (`path`, None if fit had no folder)."""

    def __init__(self, path, step, number=signal.SIGINT):
        self.path, self.number = path, number
        super().__init__(
            f"stopped after step {step}" + (f"; continue with --resume {Path(path).parent}" if path else "")
        )


def fit(trainer, loader, epochs, validation, path, save_every, evaluate_every, report):
    """Train until `epochs` epochs are done in every phase; Session.fit describes the arguments.

    path: the checkpoint's, or None. report: an object with the methods of fastff.training.report.Report. Returns the history."""
    epochs, evaluate_every = whole_number("epochs", epochs), whole_number("evaluate_every", evaluate_every)
    save_every = None if save_every is None else whole_number("save_every", save_every)
    if _length(loader) == 0:
        raise ValueError("loader: expected at least one minibatch, got an empty loader")
    if validation is not None:
        _check_classes(trainer.engine, "validation")
    state, ranks = trainer.state, trainer.ranks
    total = epochs * trainer.engine.phases
    if state.position["epoch"] >= total:
        text = f"nothing to train, all {total} epochs are done already: epochs counts from the start of training"
        warnings.warn(f"epochs: {text}", stacklevel=3)
    _follow_generators(loader, state)
    epoch = _Epoch(trainer, share_of(loader, ranks), epochs, path, save_every, report)
    report.start(trainer, total, len(epoch.loader))
    try:
        with _caught_interrupt(ranks) as epoch.interrupted:
            while state.position["epoch"] < total:
                row = epoch.train()
                done = row["epoch"]
                if validation is not None and (done % evaluate_every == 0 or done == total):
                    row |= {f"test {name}": value for name, value in trainer.evaluate(validation).items()}
                state.history.append(row)
                report.epoch(state.history)
                if path:
                    trainer.save(path)
    finally:
        report.close()
    trainer.synchronize()
    return state.history


def _length(loader):
    """Return the number of minibatches in an epoch. Raises TypeError."""
    try:
        return len(loader)
    except TypeError:
        text = "expected a number of minibatches, len(loader), along which the learning rate is scheduled"
        raise TypeError(f"loader: {text}, got {type(loader).__name__} without one") from None


def _check_classes(engine, name):
    if not engine.classifies:
        text = f"expected a goodness with classes, of which an accuracy is computed, got {engine.sff.goodness_name!r}"
        raise ValueError(f"{name}: {text}")


@contextlib.contextmanager
def failures_told(trainer, path):
    """Tell other ranks why this one ends, and give RankFailed and Interrupted the step and the checkpoint."""
    try:
        yield
    except RankFailed as error:
        raise RankFailed(error.reason, trainer.steps, _existing(path)) from error
    except BaseException as error:
        trainer.ranks.watch.report(first_line(error))
        # A rank cannot finish a step when others do not.
        if type(error) is KeyboardInterrupt and trainer.ranks.size > 1:
            raise Interrupted(_existing(path), trainer.steps) from error
        raise


def _existing(path):
    return path if path and path.exists() else None


class _Epoch:
    """Trains from the trainer's position to the end of an epoch."""

    def __init__(self, trainer, loader, epochs, path, save_every, report):
        self.trainer, self.loader, self.epochs = trainer, loader, epochs
        self.path, self.save_every, self.report = path, save_every, report
        self.interrupted = threading.Event()

    def train(self):
        """Return the epoch's row of the history."""
        trainer, state, engine = self.trainer, self.trainer.state, self.trainer.engine
        epoch = state.position["epoch"]
        engine.phase = epoch // self.epochs
        engine.train_mode()
        if state.position["batch"] == 0:
            state.totals, state.epoch_random = None, random_state(state.generators)
        start, images_seen = time.perf_counter(), 0
        for batch in _batches(self.loader, state, trainer.ranks):
            images, target = unpack(batch, engine.labelled) if trainer.ranks.feeds else (None, None)
            done = (epoch % self.epochs) * len(self.loader) + state.position["batch"]
            progress = min(1.0, (done + 1) / (self.epochs * len(self.loader)))
            engine.set_progress(trainer.lr_schedule, progress)
            counted = engine.counted(state.steps)
            trainer.step(images, target)
            state.add(trainer.result, counted)
            images_seen += trainer.result.samples * trainer.ranks.data_size
            self.after_step(images_seen / (time.perf_counter() - start))
        if state.totals is None:
            raise ValueError("loader: expected at least one minibatch, it gave none")
        self.check_finite()
        seconds = time.perf_counter() - start
        losses, accuracies = means(trainer.ranks.sum(state.totals))
        state.position = {"epoch": epoch + 1, "batch": 0}
        row = {"epoch": epoch + 1, "step": state.steps, "seconds": seconds}
        row |= {f"train loss {name}": value for name, value in zip(engine.names, losses, strict=True)}
        return row | {f"train accuracy {name}": value for name, value in zip(engine.names, accuracies, strict=True)}

    def after_step(self, images_per_second):
        """Report, save and stop where it is time to."""
        trainer, state = self.trainer, self.trainer.state
        if trainer.device.type == "cpu" or state.steps % 50 == 0:  # looking at a loss waits for a GPU
            self.check_finite()
        self.report.update(state, images_per_second)
        ends = state.position["batch"] == len(self.loader)
        due = self.save_every and state.steps % self.save_every == 0 and not ends
        stop = self.interrupted.is_set()
        if due or stop:
            self.check_finite()
            if self.path:
                trainer.save(self.path)
        if stop:
            raise Interrupted(self.path, state.steps, self.interrupted.number)

    def check_finite(self):
        state = self.trainer.state
        bad = (~torch.isfinite(state.totals[0])).nonzero().flatten().tolist()
        if bad:
            raise Diverged(self.trainer.names[bad[0]], state.steps, _existing(self.path))


def share_of(loader, ranks):
    """Return the loader of this rank's share of each minibatch. Raises ValueError."""
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


def _batches(loader, state, ranks):
    """Yield the minibatches of an epoch from the position on."""
    epoch, skip = state.position["epoch"], state.position["batch"]
    if not ranks.feeds:
        yield from [None] * (len(loader) - skip)
        return
    if hasattr(loader, "iter_from"):
        loader.set_epoch(epoch)
        yield from loader.iter_from(skip)
        return
    if hasattr(getattr(loader, "sampler", None), "set_epoch"):
        loader.sampler.set_epoch(epoch)
    if not skip:
        yield from loader
        return
    now = random_state()
    set_random_state(
        state.epoch_random, state.generators
    )  # the draws of the epoch are made again: the order is the same
    batches = iter(loader)
    for _ in itertools.islice(batches, skip):
        pass
    set_random_state(now)
    yield from batches


def _follow_generators(loader, state):
    """Set the loader's generators to what a loaded checkpoint says of them, or warn that the numbers they draw will be others."""
    state.generators, reason = generators_of(loader)
    saved, state.loader_random = state.loader_random, None
    if saved is None or hasattr(loader, "iter_from") or state.position == {"epoch": 0, "batch": 0}:
        return
    has = len(saved.get("loader", ()))
    if has != len(state.generators):
        reason = f"it has {len(state.generators)} generators of its own, the checkpoint has the states of {has}"
    if reason is not None:
        warnings.warn(f"loader: going on from a checkpoint is not bit for bit with it: {reason}", stacklevel=4)
    for generator, value in zip(state.generators, saved.get("loader", ()), strict=False):
        generator.set_state(value.cpu())


@contextlib.contextmanager
def _caught_interrupt(ranks):
    """Yield an event that Ctrl-C and SIGTERM set, so that the step can be finished. A second one stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread() or ranks.size > 1:
        yield event
        return

    def handler(number, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.number = number
        event.set()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, former in before.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)


@torch.no_grad()
def evaluate(engine, loader):
    """Return {name: accuracy} of everything `engine.scores` gives, over `loader`, in evaluation mode."""
    _check_classes(engine, "loader")
    if not hasattr(loader, "__iter__"):
        raise TypeError(f"loader: expected an iterable of minibatches (images, target, ...), got {kind_of(loader)}")
    ranks = engine.place.ranks
    if ranks.size > 1 and hasattr(loader, "shared"):
        loader = loader.shared(ranks.rank, ranks.size)
    modes = {module: module.training for module in engine.module.modules()}
    engine.module.eval()
    hits, names, count = None, [], 0
    try:
        for batch in loader:
            images, target = unpack(batch)
            check_batch(engine.sff, images, target, amp=engine.options.amp is not None)
            check_labels(target, engine.sff.num_classes)
            if len(target) == 0:
                continue
            images, target = (t.detach().to(engine.device, non_blocking=True) for t in (images, target))
            scores = engine.scores(images)
            right = torch.stack([(score.argmax(1) == target).sum() for score in scores.values()])
            hits = right if hits is None else hits + right
            names, count = list(scores), count + len(target)
    finally:
        for module, mode in modes.items():
            module.training = mode
    found = ranks.gather((names, [] if hits is None else hits.tolist(), count))
    found = [part for part in found if part[2]]
    if not found:
        raise ValueError("loader: expected at least one minibatch, it gave none")
    count = sum(part[2] for part in found)
    right = map(sum, zip(*(part[1] for part in found), strict=True))
    return {name: hits / count for name, hits in zip(found[0][0], right, strict=True)}
