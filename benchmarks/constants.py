"""Filters zeroed layer by layer, with nothing coupled, as masks on weights leave them: how many
can be removed, and what the smaller network computes. Random norm statistics; a table.

    python benchmarks/constants.py [--networks resnet18 ...] [--size 64]

"compact": what stays, because a sum or a split needs the width, is not computed either, by
`CompactLayer` in each conv with rows or columns of zeros, whether or not that is faster. Beside
it torch-simplify 1.1.4 (`pip install --no-deps torch-simplify==1.1.4`), where it is installed. It
adds operations that spread narrow outputs over the width that sums expect, and biases as large as
a map, which fit one resolution.
"""

import argparse
import copy

import torch
import torchvision
from exactness import build
from torch import nn

from fasterai.deploy.compact_layers import CompactLayer, can_be_compact, saving
from fasterai.prune.pruner import Pruner

NETWORKS = ["resnet18", "vgg16_bn", "mobilenet_v2", "densenet121"]
NETWORKS += ["efficientnet_b0", "shufflenet_v2_x1_0"]


def convs(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


@torch.no_grad()
def zero_half(model):
    for conv in convs(model):
        rows = torch.randperm(conv.out_channels)[: conv.out_channels // 2]
        for tensor in conv.parameters():
            tensor[rows] = 0
    return sum(conv.out_channels // 2 for conv in convs(model))


def ours(model, size):
    Pruner(model, torch.randn(2, 3, size, size)).prune_model()
    return model


def compact(model, size):
    for module in list(ours(model, size).modules()):
        for child, layer in module.named_children():
            if can_be_compact(layer) and saving(layer):
                setattr(module, child, CompactLayer(layer))
    return model


def torch_simplify(model, size):
    from simplify import simplify

    return simplify(model, torch.zeros(1, 3, size, size), fuse_bn=False)


def numbers(model):
    return sum(x.numel() for x in [*model.parameters(), *model.buffers()] if x is not None)


def cell(remove, model, size):
    """Filters that are not computed, the share of the numbers that is left, and differences."""
    before = sum(conv.out_channels for conv in convs(model)), numbers(model)
    try:
        small = remove(copy.deepcopy(model), size)
    except Exception as error:
        return f"{type(error).__name__} |  | "
    removed = before[0] - sum(len(conv.weight) for conv in convs(small))
    apart = []
    for s in (size, size + 32):
        x = torch.randn(1, 3, s, s)
        try:
            with torch.no_grad():
                a, b = model(x), small(x)
            apart.append(f"{float((a - b).abs().max() / a.abs().max()):.0e}")
        except RuntimeError:
            apart.append("breaks")
    return f"{removed} | {numbers(small) / before[1]:.1%} | {', '.join(apart)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--size", type=int, default=64)
    args = parser.parse_args()
    columns = ["network", "zero filters"]
    for who in ("removed", "compact", "torch-simplify"):
        columns += [who, "numbers left", f"apart at {args.size}, {args.size + 32}"]
    print(f"| {' | '.join(columns)} |")
    print("|" + " --- |" * len(columns))
    for name in args.networks:
        torch.manual_seed(0)
        model = build(name, torch.float32)
        zero = zero_half(model)
        cells = (cell(remove, model, args.size) for remove in (ours, compact, torch_simplify))
        print(f"| {name} | {zero} | {' | '.join(cells)} |", flush=True)
    print(f"torchvision {torchvision.__version__}")


if __name__ == "__main__":
    main()
