"""What is done with the network of a finished run: classify image files, evaluate it on a data set. export.py writes it to a file."""

from pathlib import Path
from typing import NamedTuple

import torch

from fastff.app.experiment import build_network, load_data, read_run, short
from fastff.arguments import check_member, first_line
from fastff.training import data
from fastff.training.checkpoint import CheckpointError


class Trained(NamedTuple):
    """The network of a run, in evaluation mode: its SFF, the `meta` of its checkpoint (experiment.describe), and its device."""

    sff: torch.nn.Module
    meta: dict
    device: torch.device

    @property
    def backprop(self):
        """Whether the network was trained by backpropagation, so that its own classifier answers and no block votes."""
        return self.meta["settings"]["mode"] == "backprop"

    def loader(self, images, labels, batch_size=256):
        """Return a Loader of uint8 images [N, C, H, W], normalized like those that the network was trained with."""
        options = {"mean": self.meta["mean"], "std": self.meta["std"], "device": self.device}
        return data.Loader(images, labels, batch_size, channels_last=self.meta["settings"]["channels_last"], **options)

    def probabilities(self, images):
        """Return the answers to normalized images as probabilities: of all [B, K], and of the blocks that vote, a list of [B, K]."""
        if self.backprop:
            return self.sff.model(images).softmax(1), []
        goodness = self.sff.goodness(images)
        blocks = [logits.softmax(1) for logits in self.sff.logits(goodness)]
        return self.sff.probabilities(self.sff.votes(goodness)), blocks


def load(folder, device="cpu"):
    """Return the Trained network of the run in `folder`.

    Raises CheckpointError: there is no run, or its weights do not fit its settings."""
    state, meta = read_run(folder, device)
    sff = build_network(meta["settings"], meta["num_classes"], tuple(meta["input_shape"]), device)
    try:
        (sff.model if meta["settings"]["mode"] == "backprop" else sff).load_state_dict(state["module"])
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: its weights do not fit its settings: {first_line(error)}") from error
    return Trained(sff.eval(), meta, torch.device(device))


def check_threshold(exit_threshold, backprop):
    """Raises ValueError: `exit_threshold` is no probability, or given for a network without blocks that vote."""
    if exit_threshold is not None and backprop:
        text = "expected none with a network trained by backpropagation"
        raise ValueError(f"exit_threshold: {text}, got {exit_threshold}")
    if exit_threshold is not None and not 0 < exit_threshold <= 1:
        raise ValueError(f"exit_threshold: expected a probability above 0 and at most 1, got {exit_threshold}")


class Answer(NamedTuple):
    """Classification of an image.

    Fields:
        label: name of the class.
        confidence: its probability.
        blocks: [(name, class, probability)] of each block that was computed and votes."""

    label: str
    confidence: float
    blocks: list


@torch.no_grad()
def classify(folder, paths, device, exit_threshold=None):
    """Classify image files with the network of the run in `folder`, and return a list of Answers.

    Args:
        folder: folder of a run.
        paths: image files; they are resized and cropped like images of the run's data set.
        device: torch.device.
        exit_threshold: confidence, in (0, 1], from which on an image skips the remaining blocks; None computes all blocks.

    Raises:
        ValueError: `exit_threshold` is out of range, or given for a network trained by backpropagation.
        CheckpointError, DataError (ValueErrors): the run or an image cannot be read."""
    network = load(folder, device)
    sff, classes, (channels, *size) = network.sff, network.meta["classes"], network.meta["input_shape"]
    check_threshold(exit_threshold, network.backprop)
    pixels = torch.stack([data.read_image(path, tuple(size), channels) for path in paths])
    answers = []
    unknown = torch.zeros(len(pixels), dtype=torch.int64)  # the Loader needs labels; these are not used
    for images, _ in network.loader(pixels, unknown):
        vote, votes = network.probabilities(images)
        confidence, label = (t.tolist() for t in vote.max(1))
        last = [len(sff.blocks)] * len(images)
        if exit_threshold is not None:
            label, confidence, last = (t.tolist() for t in sff.predict(images, exit_threshold))
        sure, of_block = (t.tolist() for t in torch.stack(votes or [vote]).max(2))
        for i in range(len(images)):
            computed = [] if network.backprop else [(n, b) for n, b in enumerate(sff.plan.voters) if b <= last[i]]
            blocks = [(sff.blocks[b].name, classes[of_block[n][i]], sure[n][i]) for n, b in computed]
            answers.append(Answer(classes[label[i]], confidence[i], blocks))
    return answers


class Evaluation(NamedTuple):
    """How well a network classifies labelled images.

    Fields:
        accuracy: share of right answers, of all blocks' vote (or the classifier of backpropagation).
        blocks: the same of each block that votes, alone, a list.
        confusion: int64 [K, K], the number of images of each class (row) that were given each class (column).
        wrong: [(index of the image, class that was given, its probability)], the surest mistake first.
        early: (accuracy, mean number of blocks computed) with early exit, or None."""

    accuracy: float
    blocks: list
    confusion: torch.Tensor
    wrong: list
    early: tuple | None


@torch.no_grad()
def evaluate(network, images, labels, exit_threshold=None):
    """Return the Evaluation of a Trained network on uint8 images [N, C, H, W] with labels [N]."""
    check_threshold(exit_threshold, network.backprop)
    count, right, early_right, computed, answers = network.meta["num_classes"], [], 0, 0, []
    for batch, target in network.loader(images, labels):
        vote, blocks = network.probabilities(batch)
        right.append([(block.argmax(1) == target).sum() for block in blocks])
        answers.append(torch.stack([*vote.max(1)]).cpu())
        if exit_threshold is not None:
            early = network.sff.predict(batch, exit_threshold)
            early_right += int((early.label == target).sum())
            computed += int((early.block + 1).sum())
    sure, given = torch.cat(answers, 1)
    given = given.long()
    mistakes = (given != labels).nonzero().flatten()
    mistakes = mistakes[sure[mistakes].argsort(descending=True, stable=True)]
    size = len(labels)
    return Evaluation(
        accuracy=1 - len(mistakes) / size,
        blocks=[float(sum(counts)) / size for counts in zip(*right, strict=True)],
        confusion=torch.bincount(labels * count + given, minlength=count * count).view(count, count),
        wrong=[(int(i), int(given[i]), float(sure[i])) for i in mistakes],
        early=None if exit_threshold is None else (early_right / size, computed / size),
    )


def labelled_images(network, name, root=None, split="test"):
    """Load the images that a Trained network is to be evaluated on, and return (title, images, labels).

    Args:
        name: a data set as in fastff.training.data.load, or None for that of the run.
        root: folder of its official files, or None.
        split: "test" or "train"; of the run's own data set, "train" is the images that it was trained with.

    Raises ValueError: the data set has other classes or images of another size than that of the run."""
    check_member("split", split, ("test", "train"))
    meta = network.meta
    if name is None:
        s = meta["settings"] | ({} if root is None else {"root": root})
    else:
        sized = name in ("imagenette", "folder") or name not in data.NAMES
        s = meta["settings"] | {"data": name, "root": root, "subset": None}
        s["image_size"] = meta["input_shape"][-1] if sized else None
    found = load_data(s)
    for what, value, wanted in (
        ("classes", list(found.classes), meta["classes"]), ("images of shape", list(found.input_shape), meta["input_shape"])
    ):  # fmt: skip
        if value != wanted:
            got = f"{short(value)} in {Path(s['data']).name}"
            raise ValueError(f"data: expected {what} {short(wanted)}, as the run has, got {got}")
    return f"{found.name}, {split} images", getattr(found, f"{split}_images"), getattr(found, f"{split}_labels")
