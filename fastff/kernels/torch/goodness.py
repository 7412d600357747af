"""Goodness, its loss and its local gradient as batched matrix products, a few samples at a time.

loss_b needs only sample b, so a chunk of samples is taken through everything while it is in cache: goodness, loss, d, gradient.
x is read and dL/dx written once from beyond the last-level cache; what lies between stays inside it. Formulas: fastff/reference.py.

Direct         a = W X for a tile of classes at a time; kept for the gradient when the chunk needs one tile only, else recomputed.
Second moment  S = X X^T / P [C, C]; t = W S [K, C]; g = w . t; M = W^T diag(d) W [C, C]; dL/dx = (2/P)(M X + c). K never meets P.
Convolution    kernel sizes 3 and 5: a from PyTorch's convolution, its gradients from convolution_backward.

Arithmetic is in float32 (float64 for float64): chunks of 16-bit tensors are widened as they are read. On a GPU the products of 16-bit tensors are in
their own dtype, as its tensor cores take them (sums in float32), and nothing of x's size is widened; the second moment alone is as on a CPU.
"""

import torch
import torch.nn.functional as F

from fastff import reference
from fastff.kernels.layout import dense, empty_like, is_channels_last, matrices
from fastff.kernels.torch.epilogue import completed
from fastff.kernels.torch.normalization import normalize
from fastff.spec import StepResult


class Direct:
    """Two forms. Batched: a [b, K, P] per sample. Flat: one product over all samples, a [b*P, K], for few positions and many
    classes, where products per sample are too small to fill the machine (1.3 to 4 times faster at P = 16, K = 100 to 1000)."""

    def __init__(self, weight, bias, plan):
        self.weight, self.bias = weight.flatten(1), bias
        self.tiles = [slice(k, min(k + plan.classes, len(weight))) for k in range(0, len(weight), plan.classes)]

    def _flat(self, X):
        if X.element_size() == 2:  # one product, whose result is dL/dweight and not a summand of it for each sample
            return True
        positions, classes = X.shape[2], len(self.weight)
        return positions <= 4 or (positions <= 16 and classes >= 32) or (positions <= 64 and classes >= 512)

    def _outputs(self, tile):
        W, beta = self.weight[tile], None if self.bias is None else self.bias[tile]
        if self.flat:
            return F.linear(self.X, W, beta)  # [b*P, k]
        if beta is None:
            return torch.bmm(W.expand(len(self.X), -1, -1), self.X)  # [b, k, P]
        return torch.baddbmm(beta[:, None], W.expand(len(self.X), -1, -1), self.X)

    def goodness(self, x):
        X = matrices(x)
        self.samples, self.positions, self.flat = len(X), X.shape[2], self._flat(X)
        self.X = X.mT.reshape(-1, X.shape[1]) if self.flat else X
        g = []
        for tile in self.tiles:
            a = self._outputs(tile)
            per_sample = a.view(self.samples, self.positions, -1) if self.flat else a
            g.append(squared_length(per_sample, 1 if self.flat else 2))
        self.kept = a if len(self.tiles) == 1 else None
        return (g[0] if len(g) == 1 else torch.cat(g, 1)).div_(self.positions)

    def gradients(self, d, x, grad_x, grad_weight, grad_bias, add):
        """Adds to grad_weight and grad_bias; writes grad_x (as x) where it is not None, or adds to it where `add`."""
        d = (d * (2 / self.positions)).to(self.X.dtype)
        grad_weight = grad_weight.flatten(1)
        for tile in self.tiles:
            a = self._outputs(tile) if self.kept is None else self.kept
            W = self.weight[tile]
            if self.flat:
                e = a.view(self.samples, self.positions, -1).mul_(d[:, None, tile]).flatten(0, 1)
                if e.dtype == grad_weight.dtype:
                    grad_weight[tile].addmm_(e.T, self.X)
                else:
                    grad_weight[tile].add_(e.T @ self.X)
                if grad_bias is not None:
                    grad_bias[tile].add_(e.sum(0, dtype=grad_bias.dtype))
                if grad_x is not None:
                    _write_rows(grad_x, e, W, add)
            else:
                e = a.mul_(d[:, tile, None])
                grad_weight[tile].add_(torch.bmm(e, self.X.mT).sum(0))
                if grad_bias is not None:
                    grad_bias[tile].add_(e.sum((0, 2)))
                if grad_x is not None:
                    _write_product(grad_x, W.T.expand(self.samples, -1, -1), e, add)
            add = True
        self.kept = None


def squared_length(a, dim):
    """Sums of squares along a dimension, in float32 for 16-bit a."""
    if a.element_size() > 2:
        return torch.linalg.vecdot(a, a, dim=dim)
    return torch.linalg.vector_norm(a, dim=dim, dtype=torch.float32).square_()


def _write_product(x, a, b, add):
    """x (=, or += where `add`) a @ b per sample, for x as matrices(x): BLAS writes in place in either layout."""
    x = matrices(x)
    if x.is_contiguous():
        x.baddbmm_(a, b, beta=int(add))
    else:
        x.mT.baddbmm_(b.mT, a.mT, beta=int(add))


def _write_rows(x, a, b, add):
    """The same for a product over all samples, a @ b [b*P, C]."""
    if is_channels_last(x):
        x.permute(0, 2, 3, 1).view(-1, x.shape[1]).addmm_(a, b, beta=int(add))
    else:
        rows = (a @ b).view(len(x), -1, x.shape[1]).mT
        matrices(x).add_(rows) if add else matrices(x).copy_(rows)


class SecondMoment:
    """g = w^T S w + 2 beta (w . mu) + beta^2; dL/dx = (2/P)(M X + c)."""

    def __init__(self, weight, bias, plan):
        self.weight, self.bias = weight.flatten(1), bias
        self.weight_t = self.weight.T.contiguous()

    def goodness(self, x):
        X, C = matrices(x), self.weight.shape[1]
        second = torch.bmm(X, X.mT).div_(X.shape[2])
        self.t = (second.view(-1, C) @ self.weight_t).view(len(X), C, -1)  # S is symmetric: t[b, :, k] = S_b w_k
        g = (self.t * self.weight_t).sum(1)
        if self.bias is not None:
            mean = X.mean(2)
            self.linear = mean @ self.weight_t
            self.t.addcmul_(mean[:, :, None], self.bias)  # now S_b w_k + beta_k mu_b
            g.addcmul_(self.linear, self.bias, value=2).add_(self.bias.square())
        return g

    def gradients(self, d, x, grad_x, grad_weight, grad_bias, add):
        X, C = matrices(x), self.weight.shape[1]
        grad_weight.flatten(1).add_(self.t.mul_(d[:, None, :]).sum(0).T, alpha=2)
        if grad_bias is not None:
            grad_bias.add_((d * (self.linear + self.bias)).sum(0), alpha=2)
        if grad_x is not None:
            d = d * (2 / X.shape[2])
            M = (torch.mul(self.weight_t, d[:, None, :], out=self.t).view(-1, d.shape[1]) @ self.weight).view(-1, C, C)
            _write_product(grad_x, M, X, add)
            if self.bias is not None:
                matrices(grad_x).add_(((d * self.bias) @ self.weight)[:, :, None])
        self.t = None


class Convolution:
    """The direct algorithm for k x k heads, on PyTorch's convolutions."""

    def __init__(self, weight, bias, plan, padding=(0, 0)):
        self.weight, self.bias, self.padding = weight, bias, padding

    def goodness(self, x):
        self.a = F.conv2d(x, self.weight, self.bias, padding=self.padding)
        return squared_length(self.a.flatten(2), 2).div_(self.a[0, 0].numel())

    def gradients(self, d, x, grad_x, grad_weight, grad_bias, add):
        e = self.a.mul_((d * (2 / self.a[0, 0].numel())).to(self.a.dtype)[:, :, None, None])
        sizes = None if self.bias is None else [len(self.bias)]
        dx, dw, db = torch.ops.aten.convolution_backward(
            e, x, self.weight, sizes, [1, 1], self.padding, [1, 1], False, [0, 0], 1,
            [grad_x is not None, True, self.bias is not None],
        )  # fmt: skip
        grad_weight.add_(dw)
        if grad_bias is not None:
            grad_bias.add_(db)
        if grad_x is not None:
            grad_x.add_(dx) if add else grad_x.copy_(dx)
        self.a = None


class Grid:
    """Means over the cells of the spatial term by two thin matrix products, one per axis, and their adjoint."""

    def __init__(self, cells, sizes, dtype, device):
        """cells: rows and columns of the grid; sizes: those of x."""
        self.down, self.right = (_pooling_matrix(size, n, dtype, device) for size, n in zip(sizes, cells, strict=True))

    def means(self, x):
        """[b, C, rows, columns] of cells."""
        b, c, h, w = x.shape
        if is_channels_last(x):
            means = self.right.T.to(x.dtype) @ x.permute(0, 2, 3, 1).view(b * h, w, c)
            means = self.down.T @ means.view(b, h, -1).to(self.down.dtype)
            return means.view(b, self.down.shape[1], -1, c).permute(0, 3, 1, 2)
        return self.down.T @ (x @ self.right.to(x.dtype)).to(self.down.dtype)

    def spread(self, cells, grad_x):
        """Write grad_x from the gradient of the means."""
        b, c, h, w = cells.shape
        right = self.right.to(grad_x.dtype)
        if is_channels_last(grad_x):
            rows = (self.down @ cells.permute(0, 2, 3, 1).reshape(b, h, -1)).view(-1, w, c).to(grad_x.dtype)
            torch.bmm(right.expand(len(rows), -1, -1), rows, out=grad_x.permute(0, 2, 3, 1).view(len(rows), -1, c))
        else:
            torch.matmul((self.down @ cells).to(grad_x.dtype), right.T, out=grad_x)


def _pooling_matrix(size, cells, dtype, device):
    """[size, cells]: column j averages the positions of cell j; edges of adaptive average pooling."""
    cells = min(cells, size)
    position, cell = torch.arange(size, device=device)[:, None], torch.arange(cells, device=device)
    start, end = cell * size // cells, ((cell + 1) * size + cells - 1) // cells
    return ((position >= start) & (position < end)).to(dtype) / (end - start)


ALGORITHMS = {"direct": Direct, "cublas": Direct, "second_moment": SecondMoment, "convolution": Convolution}


def product_dtype(x, dtype, algorithm):
    """Return the dtype in which products of x are computed, where the arithmetic is in `dtype`."""
    own = x.device.type == "cuda" and x.element_size() == 2 and dtype == torch.float32 and algorithm != "second_moment"
    return x.dtype if own else dtype


class _Head:
    """The head over chunks of samples: parameters widened once, one gradient buffer for each."""

    def __init__(self, x, projection, plan):
        self.x, self.plan, self.dtype = x, plan, projection.dtype(x)
        _, projection = projection.in_dtype(x[:0])
        weight, bias, self.grid_weight, *_ = parameters = projection[:3]
        self.hidden, self.means = projection.hidden, None
        extra = {"padding": projection.padding} if plan.algorithm == "convolution" else {}
        self.kind = product_dtype(x, self.dtype, plan.algorithm)
        of_kind = (None if p is None else p.to(self.kind) for p in (weight, bias))
        self.squares = None if weight is None else ALGORITHMS[plan.algorithm](*of_kind, plan, **extra)
        cells = self.grid_weight
        self.grid = None if cells is None else Grid(cells.shape[2:], x.shape[2:], cells.dtype, x.device)
        self.grads = [
            None if p is None else torch.zeros_like(p, memory_format=torch.contiguous_format) for p in parameters
        ]

    def chunks(self, samples=None):
        samples = samples or self.plan.samples
        for start in range(0, len(self.x), samples):
            chunk = slice(start, start + samples)
            yield chunk, dense(self.x[chunk].to(self.kind))

    def goodness(self, x):
        """g of a chunk, and its `means`. A hidden layer's part is left out: its batch norm needs the means of all chunks."""
        g = None if self.squares is None else self.squares.goodness(x)
        if self.grid is not None:
            self.means = self.grid.means(x)
        if self.grid is None or self.hidden is not None:
            return self.grid_weight.new_zeros(len(x), len(self.grid_weight)) if g is None else g
        linear, *_ = reference.spatial(self.means, self.grid_weight)
        return linear if g is None else g.add_(linear)

    def gradients(self, d, x, grad_x, cells=None):
        """Add to the parameters' gradients; overwrite grad_x, of x's shape and any dtype, unless it is None. cells: dL/dmeans of a hidden layer."""
        grad_weight, grad_bias, grad_grid = self.grads
        wide = grad_x if grad_x is None or grad_x.dtype == self.kind else empty_like(grad_x, self.kind)
        if self.grid is not None:
            if self.hidden is None:
                cells, of_chunk = reference.spatial_gradients(d, self.means, self.grid_weight)
                grad_grid.add_(of_chunk)
            if wide is not None:
                self.grid.spread(cells, wide)
        if self.squares is not None:
            self.squares.gradients(d, x, wide, grad_weight, grad_bias, add=self.grid is not None)
        if wide is not grad_x:
            grad_x.copy_(wide)


def goodness(x, projection, plan):
    head = _Head(x, projection, plan)
    g = [head.goodness(chunk) for _, chunk in head.chunks()]
    return _joined(g) if g else x.new_empty((0, projection.classes), dtype=head.dtype)


def goodness_backward(d, x, projection, plan, need_grad_x):
    head = _Head(x, projection, plan)
    grad_x = empty_like(x) if need_grad_x else None
    for part, chunk in head.chunks():
        head.goodness(chunk)
        head.gradients(d[part].to(head.dtype), chunk, None if grad_x is None else grad_x[part])
    return grad_x, *head.grads


def step(local, plan, normalize=normalize):
    return completed(local, lambda local: _step(local, plan), normalize)


def _step(local, plan):
    """Take each chunk through everything: goodness, loss, d, gradients."""
    x, loss = local.x, local.loss
    head, scale = _Head(x, local.goodness, plan), loss.scale(len(x))
    grad_x = empty_like(x) if local.need_grad_x else None
    if head.hidden is not None:
        return _step_with_hidden_layer(head, loss, scale, grad_x)
    parts = []
    for part, chunk in head.chunks(None if loss.name == "cross_entropy" else len(x)):
        g = head.goodness(chunk)
        of_part = loss if loss.target is None else loss._replace(target=loss.target[part])
        losses, (d, grad_tau) = reference.losses(g, of_part), reference.loss_gradient(g, of_part, scale)
        head.gradients(d, chunk, None if grad_x is None else grad_x[part])
        parts.append((losses, g, grad_tau))
    losses, g, grad_tau = zip(*parts, strict=True)
    grad_tau = None if grad_tau[0] is None else torch.stack(grad_tau).sum()
    return StepResult(_joined(losses), _joined(g), grad_x, *head.grads, grad_tau)


def _step_with_hidden_layer(head, loss, scale, grad_x):
    """Take all chunks through the squares and the cells, and, after the loss, once more through the gradients."""
    g, means = map(_joined, zip(*((head.goodness(chunk), head.means) for _, chunk in head.chunks()), strict=True))
    term, mean, var = reference.spatial(means, head.grid_weight, head.hidden)
    g = g + term
    losses, (d, grad_tau) = reference.losses(g, loss), reference.loss_gradient(g, loss, scale)
    cells, head.grads[2], *of_hidden = reference.spatial_gradients(d, means, head.grid_weight, head.hidden)
    for part, chunk in head.chunks():
        head.goodness(chunk)
        head.gradients(d[part], chunk, None if grad_x is None else grad_x[part], cells[part])
    return StepResult(losses, g, grad_x, *head.grads, grad_tau).with_hidden(of_hidden, mean, var)


def _joined(chunks):
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)
