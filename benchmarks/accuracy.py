"""Accuracy that is left when a trained network loses MACs: criteria, contexts, ways of going there.

A ResNet on CIFAR-10 from pretrained weights. Each arm prunes to the same share of the MACs, trains
for the same number of epochs with the same batches, optimizer and learning rates, and is tested. An
arm runs in a process of its own and leaves a JSON line; arms that have one are not run again.

    python benchmarks/accuracy.py --data FOLDER [--budgets short deep long] [--arms criteria ways]
        [--macs 0.5 0.3 0.2] [--seeds 0] [--minutes 60]

short: a ResNet-20, few images, many arms. deep: the same for a ResNet-56, at the MACs for which
papers give accuracies. long: ten epochs of all images. These two run what we advise, and what
torch-pruning does.

one shot: all units go at once, then all epochs train. gradual: `PruneCallback` with its own
schedule over the first half. iterative: three cuts over the first 60%. slimming, sparse: the
norms' scales, or what torch-pruning's sparse learning takes, are penalised for the first half of
the epochs, then units go at once. distilled: with `DistillCallback`, the teacher is the dense
network.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from pathlib import Path

import pandas as pd
from arms import HERE, Lines, alone

CRITERIA = (
    *("large_final", "squared_final", "random_scores", "fpgm"),
    *("norm_scale", "taylor", "taylor_maps"),
)


def arms(kind: str) -> list[dict]:
    """What to run: dictionaries of criterion, context, way, distilled."""
    both = "local", "global"
    if kind == "criteria":
        return [arm(c, context) for c in CRITERIA for context in both]
    if kind == "ways":
        chosen = "large_final", "fpgm", "taylor_maps"
        ways = [arm(c, context, way) for c in chosen for context in both for way in WAYS[1:3]]
        return [*ways, *(arm("norm_scale", context, "slimming") for context in both)]
    if kind == "labels":
        ways = itertools.product(both, WAYS[:2])
        return [arm("large_final", where, way, distilled=False) for where, way in ways]
    if kind == "peers":
        return [arm(f"torch-pruning, {name}", "local", way) for name, way in PEERS.items()]
    ours = arm("large_final", "local"), arm("large_final", "global", "gradual")
    theirs = arm("torch-pruning, L1", "local"), arm("torch-pruning, group norm", "local", "sparse")
    return [*ours, *theirs]  # "advice", and what the peer's is


KINDS = ["ways", "labels", "peers", "criteria"]
SHORT = {"depth": 20, "epochs": 3, "images": 10000, "batch": 128, "lr": 0.1}
LONG = SHORT | {"epochs": 10, "images": 50000}
BUDGETS = {  # how to train, which arms, which shares of the MACs
    "short": (SHORT, KINDS, [0.5, 0.3, 0.2]),
    "deep": (SHORT | {"depth": 56}, ["advice"], [1 / 2.11, 1 / 2.57]),
    "long": (LONG, ["advice"], [0.5]),
}
WAYS = "one shot", "gradual", "iterative", "slimming"
PEERS = {"L1": "one shot", "Taylor": "one shot", "BN scale": "sparse", "group norm": "sparse"}


def arm(criterion, context, way="one shot", *, distilled=True) -> dict:
    return dict(criterion=criterion, context=context, way=way, distilled=distilled)


def run(arm: dict, share: float, seed: int, budget: dict, data: Path) -> dict:
    """Prune to a share of the MACs, train, test."""
    from tuning import learner, quick_type, tune

    from fasterai.deploy.fold import fold_batchnorm
    from fasterai.distill.callback import DistillCallback
    from fasterai.measure.profile import macs
    from fasterai.regularize.callback import RegularizeCallback

    learn = learner(budget["depth"], data, budget["images"], budget["batch"], seed)
    dense = copy.deepcopy(learn.model)
    x = learn.dls.train_ds[:2][0]
    extra = [DistillCallback(fold_batchnorm(dense, x))] if arm["distilled"] else []
    begin, epochs, lr = time.perf_counter(), budget["epochs"], budget["lr"]
    theirs = arm["criterion"].startswith("torch-pruning")
    if arm["way"] in ("slimming", "sparse"):
        some = epochs // 2
        penalty = sparse_learning if theirs else lambda *_: RegularizeCallback(1e-4, "slimming")
        tune(learn, some, lr, [*extra, penalty(learn.model, x, arm)], flat=True)
        epochs -= some
    cbs = (cut_by_peer if theirs else cut)(arm, share, learn, x)
    learn.opt = None  # it knows the dense network
    accuracy = tune(learn, epochs, lr, [*extra, *cbs])
    seconds = time.perf_counter() - begin
    return {
        "accuracy": accuracy,
        "macs": macs(learn.model, x)[""] / macs(dense, x)[""],
        "parameters": sum(p.numel() for p in learn.model.parameters()),
        "seconds": round(seconds, 1),
        "type": str(quick_type()).removeprefix("torch."),
    }


def cut(arm: dict, share: float, learn, x) -> list:
    """Cut at once, or return the callback that will."""
    import fasterai.core.criteria as of_weights
    import fasterai.score.all as of_data
    from fasterai.core.schedule import agp, iterative
    from fasterai.core.target import Target
    from fasterai.prune.callback import PruneCallback
    from fasterai.prune.pruner import Pruner

    criterion = getattr(of_data, arm["criterion"], None) or getattr(of_weights, arm["criterion"])
    scored = criterion
    if arm["criterion"].startswith("taylor") and arm["way"] in ("one shot", "slimming"):
        scored = of_data.score(
            learn.model, learn.dls.train, criterion, loss_func=learn.loss_func, progress=False
        )
    target, where = Target(macs=share), arm["context"]
    if arm["way"] in ("one shot", "slimming"):
        Pruner(learn.model, x).prune_model(target, context=where, criteria=scored)
        return []
    schedule = agp.over(0, 0.5, n_steps=10) if arm["way"] == "gradual" else iterative.over(0, 0.6)
    return [PruneCallback(target, where, criterion, schedule, example_inputs=x)]


def peer_of(model, x, arm: dict, ratio: float = 0.5):
    """Torch-pruning's pruner for that method, told the output layer."""
    import torch_pruning as tp

    made, how = tp.pruner, tp.importance
    kind, importance = {
        "L1": (made.BasePruner, lambda: how.GroupMagnitudeImportance(p=1)),
        "Taylor": (made.BasePruner, how.GroupTaylorImportance),
        "BN scale": (made.BNScalePruner, how.BNScaleImportance),
        "group norm": (made.GroupNormPruner, lambda: how.GroupMagnitudeImportance(p=2)),
    }[arm["criterion"].removeprefix("torch-pruning, ")]
    return kind(model, x, importance(), pruning_ratio=ratio, ignored_layers=[model.linear])


def cut_by_peer(arm: dict, share: float, learn, x) -> list:
    """Cut at once by torch-pruning, at the ratio that leaves that share of the MACs."""
    from fasterai.measure.profile import macs

    model = learn.model.eval()
    if arm["criterion"].endswith("Taylor"):
        for images, labels in itertools.islice(learn.dls.train, 4):
            learn.loss_func(model(images), labels).backward()
    gradients = [p.grad for p in model.parameters()]
    low, high, dense = 0.0, 1.0, macs(model, x)[""]
    for _ in range(9):
        ratio, tried = (low + high) / 2, copy.deepcopy(model)
        for p, gradient in zip(tried.parameters(), gradients, strict=True):
            p.grad = gradient
        peer_of(tried, x, arm, ratio).step()
        if macs(tried, x)[""] > share * dense:
            low = ratio
        else:
            high, learn.model = ratio, tried
    learn.model.zero_grad()
    return []


def sparse_learning(model, x, arm: dict):
    """Torch-pruning's sparse learning: its pruner adds to the gradients."""
    from fastai.callback.core import Callback

    class SparseLearning(Callback):
        pruner = peer_of(model, x, arm)

        def before_epoch(self):
            self.pruner.update_regularizer()

        def before_step(self):
            self.pruner.regularize(self.model)

    return SparseLearning()


def table(lines: list[dict]) -> pd.DataFrame:
    """Accuracy in percent by arm and share: the mean over seeds, the best first, and its range;
    and `half`, whether some of it was trained in bfloat16.
    """
    found = pd.DataFrame(lines)
    half = found.assign(arm=[named(line) for line in lines], half=found["type"] == "bfloat16")
    half = half.pivot_table("half", "arm", "share", aggfunc="max")
    found["accuracy"] *= 100
    found["arm"] = [named(line) for line in lines]
    found = found.pivot_table("accuracy", "arm", "share", aggfunc=["mean", "min", "max"])
    found = found.sort_index(axis=1, ascending=False, level=1)
    found = found.sort_values([("mean", share) for share in found["mean"]], ascending=False)
    return found.join(pd.concat({"half": half}, axis=1))


def show(found: pd.DataFrame) -> None:
    shares = list(found["mean"])
    print(f"| arm | {' | '.join(f'{share:.0%} of the MACs' for share in shares)} |")
    print("| --- " * (1 + len(shares)) + "|")
    for name, row in found.iterrows():
        kinds = ("mean", "min", "max", "half")
        cells = [cell(*(row[what, share] for what in kinds)) for share in shares]
        print(f"| {name} | {' | '.join(cells)} |")


def cell(mean: float, low: float, high: float, half: bool) -> str:
    if pd.isna(mean):
        return ""
    spread = f" ({low:.1f} to {high:.1f})" if high > low else ""
    return f"{mean:.1f}%{'*' * bool(half)}{spread}"


def picture(found: pd.DataFrame, title: str, file: Path) -> None:
    """A row an arm, the best at the top; a mark for each share of the MACs."""
    import matplotlib.pyplot as plt

    found = found["mean"][::-1]
    names = found.index
    _, ax = plt.subplots(figsize=(7, 1.2 + 0.22 * len(names)), layout="constrained")
    for share, marker, colour in zip(
        found.columns, "os^", ("#0072B2", "#D55E00", "#555555"), strict=False
    ):
        ax.plot(found[share], range(len(names)), marker, color=colour, label=f"{share:.0%} of MACs")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.grid(axis="x", color="#DDDDDD")
    ax.set(xlabel="accuracy, %", title=title)
    ax.legend(fontsize=8, loc="upper left")
    ax.figure.savefig(file, dpi=110)


def named(arm: dict) -> str:
    extra = "" if arm["distilled"] else ", labels only"
    return f"{arm['criterion']}, {arm['context']}, {arm['way']}{extra}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="has cifar10/ and weights/")
    parser.add_argument("--budgets", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--arms", nargs="+", help="instead of those of the budget")
    parser.add_argument("--macs", type=float, nargs="+", help="the same")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no arm after that")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "accuracy.jsonl")
    args = parser.parse_args()
    lines = Lines(args.out)
    begin = time.monotonic()
    for name in args.budgets:
        budget, kinds, shares = BUDGETS[name]
        budget = budget | {"lr": args.lr}
        wanted = [one for kind in args.arms or kinds for one in arms(kind)]
        for seed, each, share in itertools.product(args.seeds, wanted, args.macs or shares):
            job = {**each, "share": share, "seed": seed, **budget}
            if not lines.has(job) and time.monotonic() - begin < 60 * args.minutes:
                lines.add({**job, **alone(run, each, share, seed, budget, args.data)})
    report(lines, args.out)


def report(lines: list[dict], file: Path) -> None:
    """A table for each way of training, and a picture of the first."""
    kinds = {}
    for line in lines:
        if "accuracy" in line:
            kinds.setdefault(tuple(line[k] for k in SHORT), []).append(line)
    for (depth, epochs, images, batch, lr), own in kinds.items():
        trained = f"{epochs} epochs of {images:,} images in batches of {batch}, rate {lr}"
        hours = sum(line["seconds"] for line in own) / 3600
        print(f"\nResNet-{depth}, {trained}: {len(own)} runs, {hours:.1f} hours\n")
        shown = table(own)
        show(shown)
        if shown["half"].fillna(False).to_numpy().any():
            print("\n\\* some or all of it in bfloat16, the others in float32")
        if (depth, epochs, images, batch, lr) == tuple(SHORT.values()):
            title = "CIFAR-10, ResNet-20: accuracy after the same training"
            picture(table(own), title, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
