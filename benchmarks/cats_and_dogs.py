"""Prune, train, repeat: cats and dogs, after a story told in 2017.

Jacob Gildenblat pruned a VGG-16 that told cats from dogs, by the Taylor criterion of Molchanov et
al. (2017) on feature maps: the 512 lowest-ranking of its 4,224 filters, over all layers, then ten
epochs of training, five times. This does the same with a pretrained SqueezeNet, at a size that a
CPU can bear, and prints the three numbers of the original beside ours. Seconds are those of one
photograph of 224 x 224 on the device.

    python benchmarks/cats_and_dogs.py --data FOLDER [--epochs 2] [--images 2000] [--size 96]

FOLDER holds cats_vs_dogs/cats_vs_dogs_160.tar and weights/imagenet_squeezenet1_0_*.pt; without
weights the network starts at random.
"""

import argparse
import io
import json
import platform
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import minimum  # noqa: F401  (patches Learner)
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models import squeezenet1_0

from fasterai.core.schedule import iterative
from fasterai.deploy.files import save_pruned
from fasterai.measure.profile import compare
from fasterai.prune.amounts import Units
from fasterai.prune.callback import PruneCallback
from fasterai.prune.history import History
from fasterai.prune.pruner import Pruner
from fasterai.score.criteria import taylor_maps

HERE = Path(__file__).parent
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TIMES, SHARE = 5, 512 / 4224  # as in the original
ORIGINAL = {"accuracy": (0.987, 0.975), "MB": (538, 150), "seconds": (0.78, 0.277)}


class Items(TensorDataset):
    def new_empty(self):
        return Items(*(t[:0] for t in self.tensors))


class Flip(Callback):
    """Half of the training images, mirrored."""

    run_valid = False

    def before_batch(self):
        x = self.learn.xb[0]
        flipped = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        self.learn.xb = (torch.where(flipped, x.flip(3), x),)


def photographs(folder, images, size):
    """Training and validation photographs (N, 3, size, size) and their classes, as many of each."""
    found = {"train": ([], []), "valid": ([], [])}
    counts = {}
    with tarfile.open(folder / "cats_vs_dogs" / "cats_vs_dogs_160.tar") as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            if not member.isfile():
                continue
            _, part, name, _ = member.name.split("/")
            counts[part, name] = counts.get((part, name), 0) + 1
            if counts[part, name] > (images // 2 if part == "train" else 500):
                continue
            photo = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
            side = min(photo.size)
            left, top = (photo.width - side) // 2, (photo.height - side) // 2
            square = photo.crop((left, top, left + side, top + side)).resize((size, size))
            found[part][0].append(np.asarray(square))
            found[part][1].append(int(name == "dog"))
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
    for part, (x, y) in found.items():
        x = torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2).float() / 255
        found[part] = (x - mean) / deviation, torch.tensor(y)
    return found["train"], found["valid"]


def network(folder):
    """SqueezeNet for two classes, with ImageNet weights where they are."""
    torch.manual_seed(0)
    model = squeezenet1_0(weights=None)
    file = next((folder / "weights").glob("imagenet_squeezenet1_0*.pt"), None)
    if file is not None:
        model.load_state_dict(torch.load(file, weights_only=True))
    model.classifier[1] = nn.Conv2d(512, 2, 1)
    nn.init.normal_(model.classifier[1].weight, std=0.01)
    return model, file is not None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2, help="between cuts (original: 10)")
    parser.add_argument("--images", type=int, default=2000, help="for training, of 2000")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "cats_and_dogs")
    args = parser.parse_args()
    if not (args.data / "cats_vs_dogs" / "cats_vs_dogs_160.tar").exists():
        parser.error(f"no cats_vs_dogs/cats_vs_dogs_160.tar in {args.data}")
    begin = time.perf_counter()
    train, valid = photographs(args.data, args.images, args.size)
    loaders = [
        DataLoader(Items(*part), bs=args.batch, shuffle=i == 0, drop_last=i == 0, num_workers=0)
        for i, part in enumerate((train, valid))
    ]
    dls = DataLoaders(*loaders, device=args.device)
    model, pretrained = network(args.data)
    model.to(args.device)
    learn = Learner(dls, model, nn.CrossEntropyLoss(), opt_func=Adam, metrics=accuracy)
    learn.add_cb(Flip())
    learn.logger = lambda _: None
    x = torch.zeros(1, 3, args.size, args.size, device=args.device)
    args.out.parent.mkdir(exist_ok=True)
    with learn.no_bar():
        learn.fit_one_cycle(2 * args.epochs, args.lr)
        dense = squeezenet1_0(num_classes=2).to(args.device)
        dense.load_state_dict(model.state_dict())
        before = learn.validate()[1]
        filters = int(Pruner(model, x).axes()["free"].sum())
        each = round(SHARE * filters)
        epoch = len(dls.train)
        last = TIMES * args.epochs * epoch
        # a cut behind the first step of its epochs, which are seen whole then
        way = iterative.over(1, last + 1, n_steps=TIMES)
        cb = PruneCallback(Units(TIMES * each), "global", taylor_maps, way)
        learn.fit(TIMES * args.epochs, args.lr / 2, cbs=cb)
        after = learn.validate()[1]
    replayed = cb.history.replay(squeezenet1_0(num_classes=2))
    replayed.load_state_dict({k: v.cpu() for k, v in model.state_dict().items()})
    files = [args.out.with_suffix(f".{name}.safetensors") for name in ("dense", "pruned")]
    save_pruned(dense, files[0])
    save_pruned(model, files[1], cb.plan)
    photo = torch.zeros(1, 3, 224, 224, device=args.device)
    costs = compare({"dense": dense, "pruned": model}, photo, seconds=3.0)
    args.out.with_suffix(".json").write_text(cb.history.to_json())
    assert History.from_json(args.out.with_suffix(".json").read_text()) == cb.history
    table = cb.history.table()
    columns = ["step", "reached", "removed", "units", "parameters", "macs", "accuracy"]
    print(table[columns].round(3).to_string())
    cb.history.plot().figure.savefig(args.out.with_suffix(".png"), dpi=100)
    threads = f"{torch.get_num_threads()} threads" if args.device == "cpu" else args.device
    print(
        f"{'pretrained' if pretrained else 'random'} SqueezeNet, {len(train[0])} images of "
        f"{args.size} x {args.size}, {args.epochs} epochs between {TIMES} cuts of {each} of "
        f"{filters} filters; {platform.machine()}, {threads}, torch {torch.__version__}; "
        f"{time.perf_counter() - begin:.0f} s in all"
    )
    ours = {
        "accuracy": (before, after),
        "MB": tuple(f.stat().st_size / 1e6 for f in files),
        "seconds": tuple(costs["latency_ms"] / 1e3),
    }
    print(f"{'':10} {'here':>19}   {'Gildenblat, VGG-16':>19}")
    for name, pair in ours.items():
        here, there = (f"{a:8.4g} -> {b:8.4g}" for a, b in (pair, ORIGINAL[name]))
        print(f"{name:10} {here}   {there}")
    record = {"ours": ours, "original": ORIGINAL, "cuts": table[columns].values.tolist()}
    args.out.with_suffix(".table.json").write_text(json.dumps(record, default=float))


if __name__ == "__main__":
    main()
