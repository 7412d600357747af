"""What the twelve programs share: 8 x 8 digits enlarged to 32 x 32, labels drawn into images, and a loop over epochs."""

import torch
import torch.nn.functional as F

from fastff.training import data

CLASSES = 10


def images():
    """(train images [1,437, 1, 32, 32] float32, labels), (test images, labels)."""
    digits = data.load("digits")

    def enlarged(x):
        return F.interpolate(x.float() / 255, size=(32, 32), mode="bilinear")

    return (enlarged(digits.train_images), digits.train_labels), (enlarged(digits.test_images), digits.test_labels)


def squares(x, label):
    """x with its label in the upper edge: one of ten 3 x 3 squares is white."""
    x = x.clone()
    x[:, :, :3, :30] = F.one_hot(label, CLASSES).to(x.dtype).repeat_interleave(3, 1)[:, None, None]
    return x


def waves(x, label):
    """x with its label over all of it, as waves whose direction is the label's: convolutions see them everywhere."""
    angle = torch.arange(CLASSES) * torch.pi / CLASSES
    place = torch.arange(32) * 2 * torch.pi / 8
    drawn = torch.cos(angle.cos()[:, None, None] * place + angle.sin()[:, None, None] * place[:, None])
    return 0.5 * x + 0.25 * (drawn[label][:, None] + 1)


def positive_and_negative(x, label, draw):
    """Images with their own labels, and with wrong ones."""
    wrong = (label + torch.randint(1, CLASSES, label.shape)) % CLASSES
    return draw(x, label), draw(x, wrong)


def fit(net, epochs=5, batch=64, seed=0, quiet=False):
    """Trains on the digits and prints the test accuracy after each epoch; returns the last."""
    (x, label), (test, test_label) = images()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            if len(rows) == batch:
                net.train_batch(x[rows], label[rows])
        if not quiet or epoch == epochs - 1:
            accuracy = (net.predict(test) == test_label).float().mean().item()
        if not quiet:
            print(f"epoch {epoch + 1}: test accuracy {accuracy:.1%}")
    return accuracy
