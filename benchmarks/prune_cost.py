"""What it costs to find the channel groups of a network and to cut half of them, beside
torch-pruning's graph and groups alone and its pruner, which also cuts half of them; how it grows
with depth; and a transformer of a billion parameters that exists as shapes only.

    python benchmarks/prune_cost.py [--networks resnet50 ...] [--depths 20 56 110 ...] [--billion]
"""

import argparse
import math
import multiprocessing
import queue
import resource
import time

import torch
import torchvision
from torch import nn

from fasterai.coupling.couple import couple
from fasterai.coupling.inputs import Inputs
from fasterai.prune.pruner import Pruner

NETWORKS = ["resnet50", "resnet152", "densenet201", "vit_b_16", "swin_t"]
DEPTHS = [20, 56, 110, 302, 602, 1202]


def seconds(work, *args):
    """Of the processor: what else the machine does, does not count."""
    begin = time.process_time()
    work(*args)
    return time.process_time() - begin


def ours(model, x, verify):
    return seconds(lambda: Pruner(model, x).prune_model(0.5, verify=verify))


def fresh(name):
    """A network that ran once, and an image."""
    x, model = torch.randn(1, 3, 224, 224), torchvision.models.get_model(name, weights=None).eval()
    with torch.no_grad():
        model(x)
    return model, x


def peer(name, results):
    """Torch-pruning's graph and all its groups; and its pruner, told the output layer and heads."""
    import torch_pruning as tp

    def groups(model, x):
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
        for _ in graph.get_all_groups():
            pass

    def whole(model, x):
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        attention = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
        tp.pruner.BasePruner(
            model,
            x,
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=0.5,
            ignored_layers=layers[-1:],
            num_heads={m: m.num_heads for m in attention},
        ).step()

    found = []
    for work in (groups, whole):
        try:
            work(*fresh("resnet18"))  # warm, as ours
            found.append(f"{seconds(work, *fresh(name)):.2f} s")
        except Exception as error:
            found.append(type(error).__name__)
    results.put(" | ".join(found))


def limited(work, limit, *args):
    """What `work` puts into its queue, in a process of its own, or that it took too long."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=work, args=(*args, results))
    process.start()
    try:
        return results.get(timeout=limit)
    except queue.Empty:
        return f"> {limit:.0f} s | "
    finally:
        process.kill()


class Block(nn.Module):
    """The block of the CIFAR ResNets (He et al. 2015, section 4.2), with a 1x1 shortcut."""

    def __init__(self, i, o, stride):
        super().__init__()
        self.a, self.na = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.b, self.nb = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.skip = nn.Conv2d(i, o, 1, stride) if i != o else nn.Identity()

    def forward(self, x):
        return (self.nb(self.b(self.na(self.a(x)).relu())) + self.skip(x)).relu()


def cifar_resnet(depth):
    n = (depth - 2) // 6
    widths = [16] * n + [32] * n + [64] * n
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(i, o, 1 if i == o else 2) for i, o in zip([16, *widths], widths, strict=False)]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*stem, *blocks, *tail).eval()


def billion():
    """A GPT-2 of 1.5 billion parameters' width, on the meta device."""
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(2048, 16, 8192, batch_first=True, norm_first=True)
        model = nn.TransformerEncoder(layer, 24, enable_nested_tensor=False)
        model = nn.Sequential(nn.Linear(512, 2048), model, nn.Linear(2048, 512)).eval()
    found = []
    took = seconds(lambda: found.append(couple(model, Inputs.of(torch.randn(2, 64, 512)))))
    size = sum(p.numel() for p in model.parameters())
    free = sum(a.bundles for a in found[0].axes)
    print(f"{size / 1e9:.2f} billion parameters on the meta device: {took:.1f} s, {free} bundles")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--depths", nargs="*", type=int, default=DEPTHS)
    parser.add_argument("--billion", action="store_true")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--limit", type=float, default=60, help="seconds for the peer")
    args = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, one image of 224 x 224; CPU seconds")
    print(
        "| network | cut, wiring proved | cut, numbers too "
        "| torch-pruning, graph and groups | torch-pruning, cut |"
    )
    print("| --- | --- | --- | --- | --- |")
    ours(*fresh("resnet18"), verify=True)  # the first run loads and compiles
    for name in args.networks:
        theirs = " | " if args.no_peer else limited(peer, args.limit, name)
        wired, proved = ours(*fresh(name), verify=False), ours(*fresh(name), verify=True)
        print(f"| {name} | {wired:.2f} s | {proved:.2f} s | {theirs} |", flush=True)
    took = {}
    for depth in args.depths:
        took[depth] = ours(cifar_resnet(depth), torch.randn(1, 3, 32, 32), verify=False)
        print(f"CIFAR ResNet-{depth}: {took[depth]:.2f} s", flush=True)
    if len(took) > 1:
        (d, t), (e, u) = list(took.items())[0], list(took.items())[-1]
        print(f"slope from {d} to {e}: {math.log(u / t) / math.log(e / d):.2f}")
    if args.billion:
        billion()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process: {peak:.1f} GB")


if __name__ == "__main__":
    main()
