"""Half of every free axis zeroed, all of it removed: how far the outputs are apart, and how long
it takes. Random weights, norm statistics and affine values; float32 and float64; a table.

    python benchmarks/exactness.py [--networks resnet18 vgg16 ...]
"""

import argparse
import copy
import time

import torch
import torchvision
from torch import nn

from fasterai.measure.profile import macs
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier

NETWORKS = ["resnet18", "resnet50", "vgg16", "vgg16_bn", "mobilenet_v2", "densenet121", "xresnet18"]


def build(name, dtype):
    torch.manual_seed(0)
    if name.startswith("xresnet"):
        from fastai.vision.models import xresnet

        model = getattr(xresnet, name)(n_out=1000)
    else:
        model = getattr(torchvision.models, name)(weights=None)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)
    return model.to(dtype).eval()


def measure(name, dtype):
    model = build(name, dtype)
    x, other = (torch.randn(2, 3, 64, 64, dtype=dtype) for _ in range(2))
    before = sum(p.numel() for p in model.parameters()), macs(model, x)[""]
    begin = time.perf_counter()
    Sparsifier(model, "filter", example_inputs=x).sparsify_model(0.5)
    zeroed = time.perf_counter() - begin
    sparse = copy.deepcopy(model)
    begin = time.perf_counter()
    pruner = Pruner(model, x)
    pruner.prune_model()
    removed = time.perf_counter() - begin
    with torch.no_grad():
        a, b = sparse(other), model(other)
    apart = float((a - b).abs().max() / a.abs().max())
    after = sum(p.numel() for p in model.parameters()), macs(model, x)[""]
    left = len(pruner.kept())
    return [after[0] / before[0], after[1] / before[1], left, apart, zeroed, removed]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, 64 x 64 images")
    print("| network | dtype | parameters | MACs | zeros left | apart | zeroing | removing |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in args.networks:
        for dtype in (torch.float32, torch.float64):
            p, m, left, apart, zeroed, removed = measure(name, dtype)
            row = [name, str(dtype).removeprefix("torch."), f"{p:.1%}", f"{m:.1%}", f"{left}"]
            row += [f"{apart:.0e}", f"{zeroed:.1f} s", f"{removed:.1f} s"]
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
