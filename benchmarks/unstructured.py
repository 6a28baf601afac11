"""Accuracy with most weights at zero: gradually and at once, beside fasterai 0.4.1.

The pretrained CIFAR-10 ResNet-20; single weights of all convs go, least magnitude first over all
layers. Every arm trains for the same epochs on the same images with the same rates; each library's
schedules are its own defaults. An arm runs in a process of its own and leaves a JSON line; arms
that have one are not run again. Zeros are counted in the trained network, and shown where they are
not what was asked.

    python benchmarks/unstructured.py --data FOLDER [--sparsity 0.8 0.9 0.95 0.98] [--epochs 3]
        [--images 10000] [--seeds 0] [--lr 0.1] [--out FILE]
"""

import argparse
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from arms import HERE, Lines, alone, install_former

ARMS = "agp", "one_shot", "agp, fasterai 0.4.1", "one_shot, fasterai 0.4.1"


def trained(arm, sparsity, seed, data, epochs, images, batch, lr):
    from torch import nn
    from tuning import learner, tune

    learn = learner(20, data, images, batch, seed)
    from fasterai.core import schedule as schedules
    from fasterai.core.criteria import large_final

    schedule, _, former = arm.partition(", ")
    if former:
        from fasterai.sparse.sparsify_callback import SparsifyCallback
    else:
        from fasterai.sparse.callback import SparsifyCallback
    given = sparsity, "weight", "global", large_final, getattr(schedules, schedule)
    where = {"layer_type" if former else "layers": nn.Conv2d}
    with redirect_stdout(StringIO()):  # the former one prints
        reached = tune(learn, epochs, lr, [SparsifyCallback(*given, **where)])
    weights = [m.weight for m in learn.model.modules() if isinstance(m, nn.Conv2d)]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    return {"accuracy": reached, "zeros": zeros}


def show(lines):
    import pandas as pd

    found = pd.DataFrame(lines)
    found["accuracy"] *= 100
    shares = found["sparsity"].unique()
    table = found.pivot_table(["accuracy", "zeros"], "arm", "sparsity", sort=False)
    print(f"| arm | {' | '.join(f'{s:.0%} zeros' for s in shares)} |")
    print("| --- " * (1 + len(shares)) + "|")
    for arm in table.index:
        cells = []
        for s in shares:
            reached, zeros = table.loc[arm, ("accuracy", s)], table.loc[arm, ("zeros", s)]
            cells.append(f"{reached:.1f}%" + (f" ({zeros:.1%})" if abs(zeros - s) > 1e-3 else ""))
        print(f"| {arm} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="has cifar10/ and weights/")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "unstructured.jsonl")
    args = parser.parse_args()
    lines, former = Lines(args.out), install_former()
    budget = {k: getattr(args, k) for k in ("epochs", "images", "batch", "lr")}
    for seed in args.seeds:
        for sparsity in args.sparsity:
            for arm in ARMS:
                job = {"arm": arm, "sparsity": sparsity, "seed": seed, **budget}
                if not lines.has(job):
                    given = arm, sparsity, seed, args.data, *budget.values()
                    first = former if "0.4.1" in arm else None
                    lines.add({**job, **alone(trained, *given, first=first)})
    show([line for line in lines if "accuracy" in line and budget.items() <= line.items()])


if __name__ == "__main__":
    main()
