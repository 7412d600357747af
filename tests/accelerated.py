"""What the tests of accelerate share: a module, a layer that trains itself."""

import torch
from torch import nn

B, C, K = 4, 12, 3


class Around(nn.Module):
    """A convolution, an expression of its output, and what only runs in eager mode as it should: another convolution behind it."""

    def __init__(self, expression):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(C, 5, (3, 1), (1, 2), padding="valid")
        self.expression = expression

    def forward(self, x):
        y = torch.tanh(self.first(x))
        return self.expression(y), self.second(y), y


class Conv(nn.Conv2d):
    """A layer that is a convolution and trains itself: returns what people return."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1, bias=False)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=0.01)

    def forward(self, x):
        return torch.relu(self._conv_forward(x, self.weight, self.bias))

    def fit(self, x):
        y = self.forward(x)
        self.optimizer.zero_grad()
        y.view(len(y), -1).pow(2).mean(1).sub(1).exp().mean().backward()
        self.optimizer.step()
        self.seen = y.detach()
        return y.detach()


def equal(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
