"""What keeping weights at zero costs a training step, ours and the peers', in one run.

resnet18, 64 x 64 images, batch 32, SGD with momentum, weight granularity, global, half the weights.
Every arm is a process of its own that holds its model; they take turns, a block of steps each, and
a block's time is divided by that of the dense arm in the same round. Medians and ranges of these
ratios are printed as a table and written as JSON lines.

    python benchmarks/step_cost.py [--rounds 12] [--out FILE]

The peer fasterai 0.4.1 is installed into benchmarks/out on first use (without its dependencies,
which are ours too); without a connection that arm is left out, and the table says so.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from arms import FORMER, install_former

HERE = Path(__file__).parent
STEPS = 6
FIT_STEPS = 20  # a fit begins by looking at the model once

ARMS = {
    "dense": "a training loop of its own",
    "masks": "Sparsifier.apply() after each step",
    "update": "Sparsifier.sparsify_model() and apply() after each step",
    "masks alone": "the call of apply() by itself",
    "update alone": "the call of sparsify_model() by itself",
    "torch prune": "torch.nn.utils.prune, pruned once",
    "torch prune, again": "torch.nn.utils.prune, pruned again before each step",
    "fit": "fastai's Learner.fit",
    "fit, agp": "Learner.fit with SparsifyCallback, an update each step",
    "fit, fasterai 0.4.1": "Learner.fit with fasterai 0.4.1's SparsifyCallback, agp",
}
BASE = {arm: "fit" if arm.startswith("fit") else "dense" for arm in ARMS}


# --- in the arms' processes ------------------------------------------------------------------


def block(arm):
    """A function that trains STEPS steps of this arm."""
    import torch
    import torch.nn.functional as F
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).train()
    x, y = torch.randn(32, 3, 64, 64), torch.randint(10, (32,))
    if arm.startswith("fit"):
        return fit(arm, model, x, y)
    extra = between(arm, model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def run():
        for step in range(STEPS):
            if arm.endswith("alone"):
                extra(step)
                continue
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            extra(step)

    return run


def between(arm, model):
    """What an arm does after each step."""
    import torch
    from torch import nn
    from torch.nn.utils import prune

    if arm.startswith(("masks", "update")):
        from fasterai.sparse.sparsifier import Sparsifier

        x = torch.randn(1, 3, 64, 64)
        sparsifier = Sparsifier(model, "weight", "global", example_inputs=x)
        sparsifier.sparsify_model(0.5)
        if arm.startswith("masks"):
            return lambda step: sparsifier.apply()
        # a little more each time, so that no update is skipped; it applies the masks itself
        state = {"sparsity": 0.5}

        def update(step):
            state["sparsity"] = min(0.95, state["sparsity"] + 1e-3)
            sparsifier.sparsify_model(state["sparsity"])

        return update
    if arm.startswith("torch prune"):
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        weights = [(m, "weight") for m in layers]
        prune.global_unstructured(weights, prune.L1Unstructured, amount=0.5)
        if arm.endswith("again"):
            return lambda step: prune.global_unstructured(
                weights, prune.L1Unstructured, amount=1e-3
            )
    return lambda step: None


def fit(arm, model, x, y):
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from torch import nn

    batches = [(x, y)] * FIT_STEPS

    class Batches(list):
        device = None

    dls = DataLoaders(Batches(batches), Batches(batches[:0]), device="cpu")
    learn = Learner(dls, model, nn.CrossEntropyLoss(), lr=1e-3)
    learn.remove_cbs(learn.cbs[-1:])
    learn.logger = lambda _: None
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def run():
        model.load_state_dict(before, strict=False)  # else what was zeroed is held
        callbacks = []
        if arm == "fit, agp":
            from fasterai.core.schedule import agp
            from fasterai.sparse.callback import SparsifyCallback

            span = agp.over(start=0.0, end=1.0)
            callbacks = [SparsifyCallback((0.0, 0.5), "weight", "global", schedule=span)]
        elif arm != "fit":
            sys.path.insert(0, str(FORMER))
            from fasterai.sparse.sparsify_callback import SparsifyCallback

            from fasterai.core.criteria import large_final
            from fasterai.core.schedule import Schedule, sched_agp

            schedule = Schedule(sched_agp, start_pct=0.0, end_pct=1.0)
            callbacks = [SparsifyCallback(0.5, "weight", "global", large_final, schedule)]
        learn.fit(1, cbs=callbacks)

    return run


def serve(arm):
    talk = sys.stdout
    sys.stdout = sys.stderr  # peers print
    run = block(arm)
    run()
    print("ready", file=talk, flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        run()
        steps = FIT_STEPS if arm.startswith("fit") else STEPS
        print((time.perf_counter() - begin) / steps, file=talk, flush=True)


# --- in the process that asks ----------------------------------------------------------------


def start(arm):
    root = str(HERE.parent)
    env = {**os.environ, "PYTHONPATH": str(FORMER) if "0.4.1" in arm else root}
    command = [sys.executable, "-W", "ignore", __file__, "--serve", arm]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
    )
    return process if process.stdout.readline().strip() == "ready" else None


def ask(process):
    process.stdin.write("go\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=HERE / "out" / "step_cost.jsonl")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    import torch

    install_former()
    running = {arm: start(arm) for arm in ARMS}
    taken = {arm: [] for arm, process in running.items() if process}
    for _ in range(args.rounds):
        for arm in taken:
            taken[arm].append(ask(running[arm]))
    args.out.parent.mkdir(exist_ok=True)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}; seconds a step, and ratios to the same round's dense step")
    print(f"{'arm':22} {'s/step':>8} {'ratio':>7} {'range':>15}   what")
    with args.out.open("w") as file:
        for arm, what in ARMS.items():
            if arm not in taken:
                print(f"{arm:22} could not be started")
                continue
            pairs = zip(taken[arm], taken[BASE[arm]], strict=True)
            ratios = sorted(a / b for a, b in pairs)
            middle = statistics.median(ratios)
            record = {"arm": arm, "machine": machine, "seconds": taken[arm], "ratio": middle}
            file.write(json.dumps(record) + "\n")
            span = f"{ratios[0]:.3f}-{ratios[-1]:.3f}"
            seconds = statistics.median(taken[arm])
            print(f"{arm:22} {seconds:8.3f} {middle:7.3f} {span:>15}   {what}")
    for process in running.values():
        if process:
            process.stdin.close()
            process.wait()
    return None


if __name__ == "__main__":
    main()
