"""Whether two models, or one before and after, are the same."""

import torch


def plain(value):
    return type(value) in (int, float, str, bool) or isinstance(value, tuple | list)


def contents(model):
    """All that a cut may change: tensors, the modules' classes and plain attributes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    modules = dict(model.named_modules())
    return (
        {n: (id(x), x.detach().clone(), x.stride()) for n, x in tensors.items()},
        {n: (type(m), {k: v for k, v in vars(m).items() if plain(v)}) for n, m in modules.items()},
    )


def same(before, after, *, objects=True):
    """Whether two models, or one before and after, agree bit for bit."""
    (a, b), (c, d) = (x if isinstance(x, tuple) else contents(x) for x in (before, after))
    b, d = ({n: (t, _no_weights(v)) for n, (t, v) in x.items()} for x in (b, d))
    return (
        b == d
        and a.keys() == c.keys()
        and all(torch.equal(a[n][1], c[n][1]) and a[n][2] == c[n][2] for n in a)
        and (not objects or all(a[n][0] == c[n][0] for n in a))
    )


def _no_weights(attributes):
    return {k: v for k, v in attributes.items() if k not in ("_flat_weights", "training")}


def state(model):
    """All that looking at a model must leave alone: also modes, attributes and chance."""
    return (
        {k: (id(v), v.clone()) for k, v in [*model.named_parameters(), *model.named_buffers()]},
        [m.training for m in model.modules()],
        {n: dict(vars(m)) for n, m in model.named_modules()},
        torch.get_rng_state(),
    )


def assert_unchanged(before, after):
    tensors, modes, attributes, rng = before
    assert modes == after[1] and torch.equal(rng, after[3]) and list(tensors) == list(after[0])
    for k, (i, v) in tensors.items():
        assert i == after[0][k][0] and torch.equal(v, after[0][k][1]), k
    assert {n: list(v) for n, v in attributes.items()} == {n: list(v) for n, v in after[2].items()}
    for n, own in attributes.items():
        assert all(after[2][n][k] == v for k, v in own.items() if isinstance(v, int)), n
