"""Time that is saved: targets of latency, and what half of the MACs is worth, beside torch-pruning.

Random weights, images of 224 x 224, float32, eval mode. For each network and batch size, in a
process of its own and all networks timed by turns: `Target(speedup=2)` with what it predicted and
measured; and cuts to half of the MACs, each with widths as they come and with multiples of 16:
torch-pruning's (L1 norm, told the heads and the output layer, its ratio bisected) and ours to the
MACs that torch-pruning reached, half where it fails; and ours by time, as fast as torch-pruning's
with multiples of 16. The share of the ideal is how many times as fast the network became by how
many times fewer MACs it has; behind it half of the range of three rounds. Lines that are there are
not measured again.

    python benchmarks/speed.py [--networks resnet50 ...] [--batches 1 16] [--threads 1]
        [--channels-last] [--compile] [--no-peer] [--seconds 2] [--out FILE]
"""

import argparse
import copy
import statistics
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torchvision
from arms import HERE, Lines, alone
from torch import nn

from fasterai.core.target import Target
from fasterai.coupling.inputs import Inputs
from fasterai.measure.latency import alternating
from fasterai.measure.profile import macs
from fasterai.prune.pruner import Pruner

NETWORKS = ["resnet50", "mobilenet_v2", "vgg16_bn", "vit_b_16", "efficientnet_b0", "convnext_tiny"]
OUT = HERE / "results" / "speed.jsonl"
ROUND_TO = 16
RUNS = 3
BY_TIME = "ours, by time"


def ours(model, x, round_to, share):
    return Pruner(model, x).prune_model(Target(macs=share), round_to=round_to, verify=False)


def faster(model, x, speedup, batch, threads):
    """A copy that is so many times as fast, and what became of the target."""
    fast = copy.deepcopy(model)
    pruner = Pruner(fast, x)
    pruner.prune_model(Target(speedup=speedup, batch=batch, threads=threads), verify=False)
    return fast, pruner.budget


def peer(model, x, round_to, dense):
    """Torch-pruning at the ratio that leaves half of the MACs."""
    import torch_pruning as tp

    low, high = 0.0, 1.0
    for _ in range(8):
        middle, tried = (low + high) / 2, copy.deepcopy(model)
        layers = [m for m in tried.modules() if isinstance(m, nn.Linear)]
        attention = [m for m in tried.modules() if isinstance(m, nn.MultiheadAttention)]
        tp.pruner.BasePruner(
            tried,
            x,
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=middle,
            ignored_layers=layers[-1:],
            num_heads={m: m.num_heads for m in attention},
            round_to=None if round_to == 1 else round_to,
        ).step()
        if macs(tried, x)[""] > dense / 2:
            low = middle
        else:
            high, best = middle, tried
    return best


class Chosen(nn.Module):
    """One of several networks, so that they can be timed by turns."""

    def __init__(self, networks):
        super().__init__()
        self.networks, self.which = nn.ModuleList(networks), 0

    def forward(self, x):
        return self.networks[self.which](x)

    @contextmanager
    def choosing(self, which):
        self.which = which
        yield


def timed(networks, x, args):
    """Milliseconds of each, by medians of ratios to the first; see `alternating`."""
    model = Chosen(networks.values())
    states = [partial(model.choosing, i) for i in range(len(networks))]
    seconds = args.seconds / 5
    found = alternating(model, Inputs.of(x, samples=None), args.threads, states, seconds, 100)
    return dict(zip(networks, found, strict=True))


def measured(name, batch, args):
    """The line of a network and batch size."""
    torch.manual_seed(0)
    model, x = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)
    if args.channels_last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    networks, failed = {"dense": model}, {}
    networks["speedup 2"], met = faster(model, x, 2, batch, args.threads)
    dense = macs(model, x)[""]
    for tail, round_to in (("", 1), (f", x{ROUND_TO}", ROUND_TO)):
        share = 0.5
        if not args.no_peer:
            try:
                cut = peer(copy.deepcopy(model), x, round_to, dense)
                networks[f"torch-pruning{tail}"] = cut
                share = macs(cut, x)[""] / dense
            except Exception as error:
                failed[f"torch-pruning{tail}"] = f"{type(error).__name__}: {error}"[:200]
        networks[f"ours{tail}"] = ours(copy.deepcopy(model), x, round_to, share)
    images = x.repeat(batch, 1, 1, 1)
    best = f"torch-pruning, x{ROUND_TO}"
    if best in networks:
        ms = timed({n: networks[n] for n in ("dense", best)}, images, args)
        gain = max(1.0, ms["dense"] / ms[best])
        networks[BY_TIME] = faster(model, x, gain, batch, args.threads)[0]
    counted = {n: macs(m, x)[""] for n, m in networks.items()}
    if args.compile:
        networks = {n: torch.compile(m) for n, m in networks.items()}
    runs = [timed(networks, images, args) for _ in range(RUNS)]
    gains = {n: [ms["dense"] / ms[n] for ms in runs] for n in networks}
    return {
        "target": {k: getattr(met, k) for k in ("dense", "goal", "predicted", "measured")},
        "ms": {n: statistics.median(ms[n] for ms in runs) for n in networks},
        "gain": {n: statistics.median(found) for n, found in gains.items()},
        "spread": {n: (max(found) - min(found)) / 2 for n, found in gains.items()},
        "macs": counted,
        "failed": failed,
    }


def show(lines):
    """Both tables, in Markdown."""
    lines = [line for line in lines if "ms" in line]
    print("`Target(speedup=2)`: what is left of the time, where 0.5 is asked\n")
    print("| network | batch | predicted | measured while choosing | timed afterwards |")
    print("| --- | --- | --- | --- | --- |")
    for line in lines:
        met, ms = line["target"], line["ms"]
        shares = met["predicted"] / met["dense"], met["measured"] / met["dense"]
        said = [*shares, ms["speedup 2"] / ms["dense"]]
        print(f"| {line['network']} | {line['batch']} | {' | '.join(f'{s:.3f}' for s in said)} |")
    print("\nHalf of the MACs: times as fast, and the share of the ideal\n")
    titles = [
        f"{who}{tail}" for who in ("ours", "torch-pruning") for tail in ("", f", x{ROUND_TO}")
    ] + [BY_TIME]
    print(f"| network | batch | dense, ms | {' | '.join(titles)} |")
    print("| --- " * (3 + len(titles)) + "|")
    for line in lines:
        ms, macs_ = line["ms"], line["macs"]
        cells = [f"{line['network']}", f"{line['batch']}", f"{ms['dense']:.1f}"]
        for title in titles:
            if title not in ms:
                cells.append(line["failed"].get(title, ""))
                continue
            gain = line.get("gain", {}).get(title, ms["dense"] / ms[title])
            ideal = macs_["dense"] / macs_[title]
            spread = line.get("spread", {}).get(title)
            about = "" if spread is None else f" \u00b1{spread / ideal:.2f}"
            cells.append(f"{gain:.2f} of {ideal:.2f}: {gain / ideal:.2f}{about}")
        print(f"| {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--seconds", type=float, default=2, help="on each network, at least")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    lines = Lines(args.out)
    how = {"threads": args.threads, "channels_last": args.channels_last, "compile": args.compile}
    for batch in args.batches:
        for name in args.networks:
            job = {"network": name, "batch": batch, **how}
            if not lines.has(job):
                given = name, batch, args
                lines.add({**job, **alone(measured, *given, threads=args.threads)})
    show([line for line in lines if how.items() <= line.items() and "error" not in line])


if __name__ == "__main__":
    main()
