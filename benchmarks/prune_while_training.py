"""How much faster an epoch gets while a network is pruned, and what that costs in accuracy.

ResNet-20 (0.27M parameters) on CIFAR-10, Adam, one cycle, with fastai: once dense, and with
`PruneCallback` at each sparsity. After each epoch some training steps of the network as it is then
are timed, in turns with a dense one; the ratio is what an epoch takes beside a dense one. The
seconds of the epochs themselves are in the JSON lines, as is the time of the cuts.

    python benchmarks/prune_while_training.py [--data FOLDER] [--epochs 6] [--images 10000]

FOLDER holds cifar10_train_1.webp ... and cifar10_labels.npz (see its README); without it the images
are random, times mean as much and accuracies nothing.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar import Augment, cifar, is_there, loaders
from fastai.callback.core import Callback
from fastai.callback.schedule import minimum  # noqa: F401  (patches Learner)
from fastai.learner import Learner
from fastai.metrics import accuracy
from prune_cost import cifar_resnet
from torch import nn

from fasterai.measure.profile import macs
from fasterai.prune.callback import PruneCallback

HERE = Path(__file__).parent
STEPS, ROUNDS = 4, 5


class Clock(Callback):
    """Seconds of each epoch's training, and a step's time beside a dense network's."""

    order = 99

    def __init__(self, batch):
        self.batch, self.seconds, self.ratios = batch, [], []
        self.dense = trainer(cifar_resnet(20).to(batch[0].device), batch)

    def before_train(self):
        self.begin = time.perf_counter()

    def after_train(self):
        self.seconds.append(time.perf_counter() - self.begin)

    def after_epoch(self):
        now = trainer(self.learn.model, self.batch)
        pairs = [(now(), self.dense()) for _ in range(ROUNDS)]
        self.ratios.append(statistics.median(a / b for a, b in pairs))


def trainer(model, batch):
    """A function that times forward and backward passes of copies of a model."""
    x, y = batch

    def run():
        state = {k: v.clone() for k, v in model.state_dict().items()}
        mode = model.training
        model.train()
        begin = time.perf_counter()
        for _ in range(STEPS):
            F.cross_entropy(model(x), y).backward()
            model.zero_grad()
        if x.is_cuda:
            torch.cuda.synchronize()
        taken = time.perf_counter() - begin
        model.train(mode)
        model.load_state_dict(state)  # the norms' statistics
        return taken

    run()
    return run


class Timed(PruneCallback):
    """Notes how long its cuts take."""

    cuts = 0.0

    def go(self, share, before):
        begin = time.perf_counter()
        super().go(share, before)
        self.cuts += time.perf_counter() - begin


def train(sparsity, data, args):
    torch.manual_seed(0)
    x, y = data[0]
    dls = loaders(data, args.batch, args.device)
    model = cifar_resnet(20).train().to(args.device)
    learn = Learner(dls, model, nn.CrossEntropyLoss(), metrics=accuracy)
    clock = Clock((x[: args.batch].to(args.device), y[: args.batch].to(args.device)))
    cbs = [Augment(), clock]
    if sparsity:
        cbs.append(Timed(sparsity, args.context))
    learn.logger = lambda _: None
    with learn.no_bar():
        learn.fit_one_cycle(args.epochs, args.lr, cbs=cbs)
    column = list(learn.recorder.metric_names).index("accuracy") - 1  # values have no epoch
    record = {"sparsity": sparsity, "accuracy": learn.recorder.values[-1][column]}
    record |= {"epochs": clock.seconds, "ratios": clock.ratios}
    record["parameters"] = sum(p.numel() for p in model.parameters())
    record["macs"] = macs(model, clock.batch[0])[""]
    if sparsity:
        record |= {"cuts": cbs[-1].cuts, "updates": len(cbs[-1].history)}
    return record


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.0, 0.5, 0.65, 0.8])
    parser.add_argument("--context", default="local")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "prune_while_training.jsonl")
    args = parser.parse_args()
    if args.data is not None and not is_there(args.data):
        parser.error(f"no CIFAR-10 in {args.data}: cifar10_labels.npz is missing")
    data = cifar(args.data, args.images)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    what = "CIFAR-10" if args.data else "random images"
    print(f"{machine}, {args.device}; {args.images} {what}, batch {args.batch}")
    print(f"{'sparsity':>8} {'accuracy':>8} {'parameters':>10} {'MACs':>10} {'cuts':>7}   an epoch")
    args.out.parent.mkdir(exist_ok=True)
    with args.out.open("w") as file:
        for sparsity in args.sparsity:
            record = train(sparsity, data, args)
            record |= {"machine": machine, "data": what, "images": args.images}
            file.write(json.dumps(record) + "\n")
            file.flush()
            ratios = " ".join(f"{r:.2f}" for r in record["ratios"])
            share = record.get("cuts", 0.0) / sum(record["epochs"])
            print(
                f"{sparsity:8} {record['accuracy']:8.3f} {record['parameters']:10} "
                f"{record['macs']:10} "
                f"{share:7.1%}   {ratios}",
                flush=True,
            )
    print("MACs of one sample; cuts: their share of the training time; an epoch: its time beside a")
    print("dense one's, after each epoch")


if __name__ == "__main__":
    main()
