"""How well criteria rank the filters of a trained network: their rank correlation with the oracle.

The pretrained ResNet-20 on CIFAR-10. The oracle cuts each unit out alone and measures the loss
on training images; criteria of data see the same images. It takes a few minutes, and may be
stopped: what was measured is in the file of JSON lines beside the results.

    python benchmarks/criteria.py --data FOLDER [--images 1000] [--device cuda]

FOLDER holds cifar10/cifar10_train_1.webp, cifar10/cifar10_labels.npz and
weights/cifar10_resnet20_akamaster.pt; what they are is in its README.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from cifar import cifar, pretrained

from fasterai.core.criteria import (
    fpgm,
    large_final,
    norm_scale,
    random_scores,
    snip,
    squared_final,
)
from fasterai.measure.pictures import plot_correlations
from fasterai.score.criteria import (
    apoz,
    mean_activation,
    obd,
    taylor,
    taylor_filter,
    taylor_maps,
    wanda,
)
from fasterai.score.oracle import oracle
from fasterai.score.report import criteria_report
from fasterai.score.score import score

HERE = Path(__file__).parent
WEIGHTS, LABELS = "weights/cifar10_resnet20_akamaster.pt", "cifar10/cifar10_labels.npz"
MAPS = {"none": "no norm", "l2": "L2 norm", "mean": "mean norm"}
CRITERIA = {
    **{f"taylor_maps, {said}": taylor_maps.normalised(norm) for norm, said in MAPS.items()},
    "taylor_filter, no norm": taylor_filter.normalised("none"),
    "taylor_filter, mean norm": taylor_filter,
    "taylor, mean norm": taylor,
    "obd, mean norm": obd,
    "snip, mean norm": snip,
    "L1, no norm": large_final.normalised("none"),
    "L1, mean norm": large_final,
    "L2, mean norm": squared_final,
    "fpgm, mean norm": fpgm,
    "norm_scale, mean norm": norm_scale,
    "wanda, mean norm": wanda,
    "apoz, mean norm": apoz,
    "mean_activation, no norm": mean_activation.normalised("none"),
    "mean_activation, L2 norm": mean_activation.normalised("l2"),
    "random": random_scores,
}


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10 and weights")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    args = parser.parse_args()
    for name in (WEIGHTS, LABELS, "cifar10/cifar10_train_1.webp"):
        if not (args.data / name).exists():
            parser.error(f"{name} is missing in {args.data}")
    return args


def main():
    args = arguments()
    torch.manual_seed(0)
    (x, y), _ = cifar(args.data / "cifar10", args.images)
    batches = list(zip(x.split(args.batch), y.split(args.batch), strict=True))
    model = pretrained(20, args.data / "weights").to(args.device)
    options = {"loss_func": F.cross_entropy, "n_batches": None, "progress": sys.stdout.isatty()}
    args.out.mkdir(exist_ok=True)
    begin = time.perf_counter()
    measured = oracle(model, batches, file=args.out / f"oracle_{args.images}.jsonl", **options)
    taken = time.perf_counter() - begin
    names = [name for name, c in CRITERIA.items() if c.wants and c is not norm_scale]
    scored = score(model, batches, [CRITERIA[name] for name in names], **options)
    criteria = CRITERIA | dict(zip(names, scored, strict=True))
    signed, absolute = (
        criteria_report(model, batches, criteria, measured=measured, absolute=a, **options)
        for a in (False, True)
    )
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"ResNet-20, {args.images} training images, loss {measured.loss:.4f}, {machine}")
    print(f"oracle: {len(measured.changes)} units, {taken:.0f} s in this run")
    last = ["mean of layers", "all layers"]
    tables = [signed.loc[last].T, absolute.loc[last].T]
    heads = ["change of the loss", "its absolute value"]
    print(pd.concat(tables, axis=1, keys=heads).round(2).to_string())
    absolute.to_csv(args.out / "criteria.csv")
    plot_correlations(absolute).figure.savefig(args.out / "criteria.png", dpi=120)


if __name__ == "__main__":
    main()
