"""Train a small residual network, sparsify it while it trains, prune it, train on; one table.

python demo/demo.py                     scikit-learn's handwritten digits
python demo/demo.py --data FOLDER       any images, in one subfolder a class
"""

import argparse
import copy
import time
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.vision.all import (
    DataLoader,
    DataLoaders,
    ImageDataLoaders,
    Learner,
    Normalize,
    Resize,
    accuracy,
    aug_transforms,
    imagenet_stats,
    nn,
    set_seed,
    xresnet18,
)
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from fasterai.all import Pruner, SparsifyCallback, agp, compare, plot_training, plot_widths

OUT = Path(__file__).parent / "out"


def digits(size: int) -> DataLoaders:
    """1,797 handwritten digits of 8 x 8, enlarged; a fifth of them for validation."""
    found = load_digits()
    x = torch.tensor(found.images / 16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    x, y = F.interpolate(x, size=(size, size), mode="bilinear"), torch.tensor(found.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    cut = len(y) // 5
    parts = [TensorDataset(x[i], y[i]) for i in (order[cut:], order[:cut])]
    train = DataLoader(parts[0], bs=64, shuffle=True, drop_last=True, num_workers=0)
    loaders = DataLoaders(train, DataLoader(parts[1], bs=128, num_workers=0), device="cpu")
    loaders.c = 10
    return loaders


def folder(path: str, size: int) -> DataLoaders:
    """Images by class; folders `train` and `valid` are used where there are such."""
    root = Path(path)
    if not root.is_dir():
        raise SystemExit(f"no folder {root}: --data takes a folder with one subfolder a class")
    split = (root / "train").is_dir() and (root / "valid").is_dir()
    where = {"train": "train", "valid": "valid"} if split else {"valid_pct": 0.2, "seed": 0}
    return ImageDataLoaders.from_folder(
        root,
        **where,
        item_tfms=Resize(size),
        batch_tfms=[*aug_transforms(size=size), Normalize.from_stats(*imagenet_stats)],
        bs=64,
        num_workers=2,
        device="cpu",
    )


_COLUMNS = ("epoch", "train_loss", "valid_loss", "accuracy", "sparsity", "time")


class Diary:
    """What the pictures show: the accuracy after each epoch, and each change of the sparsity."""

    def __init__(self, learn: Learner) -> None:
        self.learn, self.epochs, self.accuracy, self.steps = learn, [], [], []

    def fit(self, epochs: int, lr: float, cb: SparsifyCallback | None = None, **kwargs) -> None:
        begin, now = len(self.epochs), self.steps[-1][1] if self.steps else 0.0
        self.learn.logger = self._row
        print("  ".join(f"{n:>10}" for n in _COLUMNS))
        with self.learn.no_bar():
            self.learn.fit_one_cycle(epochs, lr, cbs=cb, **kwargs)
        column = list(self.learn.recorder.metric_names).index("accuracy") - 1
        for k, values in enumerate(self.learn.recorder.values):
            self.epochs.append(begin + k + 1)
            self.accuracy.append(values[column])
        each = len(self.learn.dls.train)
        changes = cb.history if cb else [(0, now)]
        self.steps.extend((begin + t / each, s) for t, s in changes)

    def _row(self, log: list) -> None:
        row = dict(zip(self.learn.recorder.metric_names, log, strict=True))
        shown = [row.get(name, "") for name in _COLUMNS]
        print("  ".join(f"{v:10.4f}" if isinstance(v, float) else f"{v:>10}" for v in shown))


def table(networks: dict, accuracies: dict, x: torch.Tensor) -> pd.DataFrame:
    costs = compare(networks, x, batch_sizes=(1, 64), seconds=2.0)
    one, many = costs[costs["batch"] == 1], costs[costs["batch"] == 64]
    shown = one[["parameters", "macs", "bytes"]].copy()
    shown.insert(0, "accuracy", pd.Series(accuracies))
    for name, rows in (("ms, batch 1", one), ("ms, batch 64", many)):
        shown[name] = [
            f"{m:.2f} ±{i / 2:.2f}" for m, i in zip(rows.latency_ms, rows.iqr_ms, strict=True)
        ]
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="a folder of images, one subfolder a class")
    parser.add_argument("--size", type=int, default=None, help="side of the images")
    parser.add_argument(
        "--sparsity", type=float, default=0.5, help="share of the filters to remove"
    )
    parser.add_argument("--epochs", type=int, nargs=2, default=None, metavar=("DENSE", "SPARSE"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    started = time.time()
    set_seed(0, reproducible=True)
    dls = folder(args.data, args.size or 64) if args.data else digits(args.size or 32)
    dense_epochs, sparse_epochs = args.epochs or ((8, 8) if args.data else (3, 6))
    model = xresnet18(n_out=dls.c)
    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), metrics=accuracy)
    diary, networks, accuracies = Diary(learn), {}, {}

    def note(name: str) -> None:
        networks[name] = copy.deepcopy(learn.model)
        with learn.no_bar():
            accuracies[name] = float(learn.validate()[1])

    print("Train dense")
    diary.fit(dense_epochs, 4e-3)
    note("dense")
    print(f"\nTrain on while {args.sparsity:.0%} of the filters go to zero")
    cb = SparsifyCallback(args.sparsity, "filter", schedule=agp)
    diary.fit(sparse_epochs, 2e-3, cb)
    note("sparse")

    x = dls.one_batch()[0]
    pruner = Pruner(learn.model, x)
    pruner.prune_model()
    note("pruned")
    print("\nTrain one epoch more, pruned")
    diary.fit(1, 5e-4, reset_opt=True)
    note("pruned and tuned")

    print(f"\n{table(networks, accuracies, x).to_string()}")
    print(
        f"\nLargest difference between the outputs of sparse and pruned: {pruner.max_abs_diff:.2g} "
        f"({pruner.max_rel_diff:.1g} of the largest output)"
    )
    print(f"{torch.get_num_threads()} CPU threads, float32; ± is half the interquartile range")
    OUT.mkdir(exist_ok=True)
    ax = plot_training(diary.epochs, diary.accuracy, diary.steps)
    ax.axvline(dense_epochs + sparse_epochs, color="black", linestyle=":", label="pruned here")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, frameon=False)
    ax.figure.savefig(OUT / "training.png", dpi=120)
    plot_widths(pruner.report()).figure.savefig(OUT / "channels.png", dpi=120)
    plt.close("all")
    print("Pictures: demo/out/training.png, demo/out/channels.png")
    print(f"{time.time() - started:.0f} s in all")


if __name__ == "__main__":
    main()
