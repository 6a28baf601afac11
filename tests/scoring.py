"""Batches with targets, a loss over them, and what the tests compare scores with."""

import numpy as np
import torch
from networks import tensors

from fasterai.score.oracle import oracle


def batches(n=3, size=4, dtype=torch.float64, pixels=16):
    """Batches of another size each, with targets."""
    found = []
    for i in range(n):
        generator = torch.Generator().manual_seed(10 + i)
        x = torch.randn(size + i, 3, pixels, pixels, dtype=dtype, generator=generator)
        found.append((x, torch.randn(size + i, 4, dtype=dtype, generator=generator)))
    return found


def loss_func(out, y):
    """A mean over the examples, for outputs of any shape."""
    return sum((o.flatten(1).mean(1) * y.sum(1)).mean() + o.square().mean() for o in tensors(out))


def mean_of(model, data, func=loss_func):
    """The loss over all examples, batch by batch, as a loop of one's own computes it."""
    with torch.no_grad():
        each = [(float(func(model.eval()(x), y)), len(x)) for x, y in data]
    return sum(loss * n for loss, n in each) / sum(n for _, n in each)


def measure(model, data=None, **kwargs):
    kwargs = {"loss_func": loss_func, "progress": False, **kwargs}
    return oracle(model, batches() if data is None else data, **kwargs)


class Stop:
    """A loss that raises in its n-th call."""

    def __init__(self, n, error):
        self.left, self.error = n, error

    def __call__(self, out, y):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return loss_func(out, y)


def lowest(scores, n):
    """The n lowest of a list of arrays, in the order of the arrays where equal, as bool arrays."""
    flat = np.concatenate([s.ravel() for s in scores])
    gone = np.zeros(flat.size, dtype=bool)
    gone[np.argsort(flat, kind="stable")[:n]] = True
    ends = np.cumsum([s.size for s in scores])[:-1]
    return [g.reshape(s.shape) for g, s in zip(np.split(gone, ends), scores, strict=True)]
