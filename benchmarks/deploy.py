"""Dense, pruned, folded and in 8 bits: bytes, latency and accuracy on photographs. A table.

    python benchmarks/deploy.py --data FOLDER [--size 80] [--epochs 8] [--threads 1]
        [--networks FILE]

FOLDER, or the tar in it, holds train/{cat,dog} and valid/{cat,dog} with images. A resnet18 learns
from them, from random weights; `PruneCallback` removes half of its channels while it learns on.
Bytes are those of the file that is taken out: a state dict, or ONNX. Latency is the median of runs
that take turns. fastai and onnxruntime, no network access.
"""

import argparse
import os
import statistics
import tarfile
import tempfile
import time
from copy import deepcopy
from pathlib import Path

import onnxruntime
import torch
from fastai.vision.all import (
    Callback,
    CancelValidException,
    CrossEntropyLossFlat,
    Flip,
    ImageDataLoaders,
    Learner,
    RandomResizedCrop,
    Resize,
    set_seed,
)
from torchvision.models import resnet18

from fasterai.all import PruneCallback, export_onnx, fold_batchnorm, quantize_onnx

BATCHES = [1, 64]


def folder_of(data, to):
    """The folder that holds `train` and `valid`, unpacked if it is a tar."""
    data = Path(data)
    for tar in [data] if data.suffix == ".tar" else sorted(data.glob("*.tar")):
        with tarfile.open(tar) as file:
            file.extractall(to, filter="data")
        data = to
    found = [p.parent for p in [data / "train", *sorted(data.glob("*/train"))] if p.is_dir()]
    if not found:
        raise SystemExit(f"{data} holds no folder train: pass one with train/ and valid/ in it")
    return found[0]


def loaders(folder, size):
    return ImageDataLoaders.from_folder(
        folder,
        train="train",
        valid="valid",
        item_tfms=[RandomResizedCrop(size, min_scale=0.5)],
        batch_tfms=[Flip()],
        bs=64,
        device="cpu",
        num_workers=0,
    ), ImageDataLoaders.from_folder(
        folder,
        train="train",
        valid="valid",
        item_tfms=Resize(size),
        bs=64,
        device="cpu",
        num_workers=0,
        shuffle=False,
    )


class Untested(Callback):
    """No validation but in the end."""

    def before_validate(self):
        raise CancelValidException


def trained(dls, epochs, more):
    """The dense network, and one half of whose channels went while it learned on."""
    learn = Learner(dls, resnet18(num_classes=2), CrossEntropyLossFlat(), cbs=Untested())
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 4e-3)
        dense = deepcopy(learn.model).eval()
        learn.fit_one_cycle(more, 2e-3, cbs=PruneCallback(0.5))
    return dense, learn.model.eval()


def in_torch(model):
    def run(x):
        with torch.inference_mode():
            return model(x)

    return run


def in_onnxruntime(file, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def saved(model, file):
    torch.save(model.state_dict(), file)
    return file


def milliseconds(runs, x, seconds=3.0):
    """The median of each, by turns."""
    taken = {name: [] for name in runs}
    for run in runs.values():
        run(x)
    end = time.monotonic() + seconds * len(runs)
    while time.monotonic() < end:
        for name, run in runs.items():
            begin = time.perf_counter()
            run(x)
            taken[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def correct(run, batches):
    right = [(run(x).argmax(1) == y).float() for x, y in batches]
    return float(torch.cat(right).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--size", type=int, default=80)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--more", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", type=Path, help="where both are kept, or taken from")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_seed(0, reproducible=True)
    with tempfile.TemporaryDirectory() as to:
        to = Path(to)
        dls, plain = loaders(folder_of(args.data, to), args.size)
        if args.networks and args.networks.exists():
            dense, pruned = torch.load(args.networks, weights_only=False)
        else:
            dense, pruned = trained(dls, args.epochs, args.more)
        if args.networks:
            torch.save((dense, pruned), args.networks)
        calibration = [(x.as_subclass(torch.Tensor), y) for x, y in list(plain.train)[:8]]
        valid = [(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for x, y in plain.valid]
        x = valid[0][0]
        models = {"dense": dense, "pruned": pruned, "folded": fold_batchnorm(pruned, x)}
        files = {name: saved(model, to / f"{name}.pt") for name, model in models.items()}
        runs = {name: in_torch(model) for name, model in models.items()}
        for name, model in (("dense", dense), ("pruned", pruned)):
            for kind in ("ONNX", "int8"):
                key = f"{name}, {kind}"
                files[key] = to / f"{name}_{kind}.onnx"
                if kind == "ONNX":
                    export_onnx(model, x[:2], files[key])
                else:
                    quantize_onnx(files[f"{name}, ONNX"], files[key], calibration)
                runs[key] = in_onnxruntime(files[key], args.threads)
        times = [milliseconds(runs, x[:n]) for n in BATCHES]
        print("| | bytes | " + " | ".join(f"ms, batch {n}" for n in BATCHES) + " | accuracy |")
        print("| --- " * (len(BATCHES) + 3) + "|")
        for name, run in runs.items():
            cells = [f"{os.path.getsize(files[name]):,}", *(f"{t[name]:.1f}" for t in times)]
            print(f"| {name} | {' | '.join(cells)} | {correct(run, valid):.3f} |", flush=True)


if __name__ == "__main__":
    main()
