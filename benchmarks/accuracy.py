"""Accuracy that is left when a trained network loses MACs: criteria, contexts, ways of going there.

ResNet-20 on CIFAR-10 from pretrained weights. Each arm prunes to the same share of the MACs, trains
for the same number of epochs with the same batches, optimizer and learning rates, and is tested. An
arm runs in a process of its own and leaves a JSON line; arms that have one are not run again.

    python benchmarks/accuracy.py --data FOLDER [--arms criteria ways] [--macs 0.5 0.3 0.2]
        [--epochs 3] [--images 10000] [--seeds 0] [--minutes 60]

one shot: all units go at once, then all epochs train. gradual: `PruneCallback` with its own
schedule over the first half. iterative: three cuts over the first 60%. slimming, sparse: the
norms' scales, or what torch-pruning's sparse learning takes, are penalised for the first half of
the epochs, then units go at once. distilled: with `DistillCallback`, the teacher is the dense
network. inner: only channels inside the blocks go.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from pathlib import Path

import pandas as pd
from arms import HERE, Lines, alone

CRITERIA = ("large_final", "squared_final", "random_scores", "fpgm", "norm_scale", "taylor")
CRITERIA += ("taylor_filter", "taylor_maps")


def arms(kind: str) -> list[dict]:
    """What to run: dictionaries of criterion, context, way, distilled, layers."""
    both = "local", "global"
    if kind == "criteria":
        return [arm(c, context) for c in CRITERIA for context in both]
    if kind == "ways":
        chosen = "large_final", "fpgm", "taylor_maps"
        ways = [arm(c, context, way) for c in chosen for context in both for way in WAYS[1:3]]
        return [*ways, *(arm("norm_scale", context, "slimming") for context in both)]
    if kind == "labels":
        return [
            arm(c, context, way, distilled=False)
            for c in ("large_final", "taylor_maps")
            for context in both
            for way in WAYS[:2]
        ]
    if kind == "peers":
        return [arm(f"torch-pruning, {name}", "local", way) for name, way in PEERS.items()]
    if kind == "rates":
        return [arm("large_final", "local")]
    return [arm(c, context, inner=True) for c in ("large_final", "taylor_maps") for context in both]


KINDS = ["ways", "labels", "peers", "criteria", "inner"]
WAYS = "one shot", "gradual", "iterative", "slimming"
PEERS = {"L1": "one shot", "Taylor": "one shot", "BN scale": "sparse", "group norm": "sparse"}


def arm(criterion, context, way="one shot", *, distilled=True, inner=False) -> dict:
    return dict(criterion=criterion, context=context, way=way, distilled=distilled, inner=inner)


def run(arm: dict, share: float, seed: int, args: argparse.Namespace) -> dict:
    """Prune to a share of the MACs, train, test."""
    from tuning import learner, tune

    from fasterai.deploy.fold import fold_batchnorm
    from fasterai.distill.callback import DistillCallback
    from fasterai.measure.profile import macs
    from fasterai.regularize.callback import RegularizeCallback

    learn = learner(20, args.data, args.images, args.batch, seed)
    dense = copy.deepcopy(learn.model)
    x = learn.dls.train_ds[:2][0]
    extra = [DistillCallback(fold_batchnorm(dense, x))] if arm["distilled"] else []
    begin, epochs = time.perf_counter(), args.epochs
    theirs = arm["criterion"].startswith("torch-pruning")
    if arm["way"] in ("slimming", "sparse"):
        some = epochs // 2
        penalty = sparse_learning if theirs else lambda *_: RegularizeCallback(1e-4, "slimming")
        tune(learn, some, args.lr, [*extra, penalty(learn.model, x, arm)], flat=True)
        epochs -= some
    cbs = (cut_by_peer if theirs else cut)(arm, share, learn, x)
    learn.opt = None  # it knows the dense network
    accuracy = tune(learn, epochs, args.lr, [*extra, *cbs])
    seconds = time.perf_counter() - begin
    return {
        "accuracy": accuracy,
        "macs": macs(learn.model, x)[""] / macs(dense, x)[""],
        "parameters": sum(p.numel() for p in learn.model.parameters()),
        "seconds": round(seconds, 1),
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
    exclude = ["conv1", *RESIDUAL] if arm["inner"] else []
    scored = criterion
    if arm["criterion"].startswith("taylor") and arm["way"] in ("one shot", "slimming"):
        scored = of_data.score(
            learn.model, learn.dls.train, criterion, loss_func=learn.loss_func, progress=False
        )
    target, where = Target(macs=share), arm["context"]
    if arm["way"] in ("one shot", "slimming"):
        pruner = Pruner(learn.model, x, exclude=exclude)
        pruner.prune_model(target, context=where, criteria=scored)
        return []
    schedule = agp.over(0, 0.5, n_steps=10) if arm["way"] == "gradual" else iterative.over(0, 0.6)
    return [PruneCallback(target, where, criterion, schedule, exclude=exclude, example_inputs=x)]


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


RESIDUAL = [f"layer{i}.{j}.conv2" for i in (1, 2, 3) for j in range(3)]


def table(lines: list[dict]) -> pd.DataFrame:
    """Accuracy in percent by arm and share, the mean over seeds, the best first."""
    found = pd.DataFrame([line for line in lines if "accuracy" in line])
    found["accuracy"] *= 100
    found["arm"] = [named(line) for line in lines if "accuracy" in line]
    found = found.pivot_table("accuracy", "arm", "share").sort_index(axis=1, ascending=False)
    return found.sort_values(list(found.columns), ascending=False)


def show(found: pd.DataFrame) -> None:
    print(f"| arm | {' | '.join(f'{share:.0%} of the MACs' for share in found.columns)} |")
    print("| --- " * (1 + len(found.columns)) + "|")
    for name, row in found.iterrows():
        print(f"| {name} | {' | '.join('' if pd.isna(x) else f'{x:.1f}%' for x in row)} |")


def picture(lines: list[dict], file: Path) -> None:
    """A row an arm, the best at the top; a mark for each share of the MACs."""
    import matplotlib.pyplot as plt

    found = table(lines)[::-1]
    names = found.index
    _, ax = plt.subplots(figsize=(7, 1.2 + 0.22 * len(names)), layout="constrained")
    for share, marker, colour in zip(
        found.columns, "os^", ("#0072B2", "#D55E00", "#555555"), strict=False
    ):
        ax.plot(found[share], range(len(names)), marker, color=colour, label=f"{share:.0%} of MACs")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.grid(axis="x", color="#DDDDDD")
    ax.set(xlabel="accuracy, %", title="CIFAR-10, ResNet-20: accuracy after the same training")
    ax.legend(fontsize=8, loc="lower right")
    ax.figure.savefig(file, dpi=110)


def named(arm: dict) -> str:
    extra = "" if arm["distilled"] else ", labels only"
    inner = ", inner channels" if arm["inner"] else ""
    return f"{arm['criterion']}, {arm['context']}, {arm['way']}{inner}{extra}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="has cifar10/ and weights/")
    parser.add_argument(
        "--arms", nargs="+", default=["ways", "labels", "peers", "criteria", "inner"]
    )
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.3, 0.2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no arm after that")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "accuracy.jsonl")
    args = parser.parse_args()
    lines = Lines(args.out)
    budget = {k: getattr(args, k) for k in ("epochs", "images", "batch", "lr")}
    begin = time.monotonic()
    for seed in args.seeds:
        for each in (one for kind in args.arms for one in arms(kind)):
            for share in args.macs:
                job = {**each, "share": share, "seed": seed, **budget}
                if not lines.has(job) and time.monotonic() - begin < 60 * args.minutes:
                    lines.add({**job, **alone(run, each, share, seed, args)})
    found = [line for line in lines if budget.items() <= line.items()]
    show(table(found))
    picture(found, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
