"""CIFAR-10 from sheets of images, with fastai; and the ResNets of He et al. 2015 for it.

A folder holds cifar10_train_1.webp ... cifar10_train_5.webp, cifar10_test.webp (100 x 100 images of
32 x 32 each, row by row) and cifar10_labels.npz ('train' and 'test', in that order).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from torch import nn
from torch.utils.data import TensorDataset

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def is_there(folder: Path) -> bool:
    return (folder / "cifar10_labels.npz").exists()


def sheet(file: Path) -> torch.Tensor:
    """(10000, 3, 32, 32) normalised images."""
    from PIL import Image

    pixels = np.asarray(Image.open(file).convert("RGB"))
    tiles = pixels.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    x = torch.from_numpy(tiles.copy()).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def cifar(folder: Path | None, images: int):
    """Training and test images and labels; without a folder random ones."""
    if folder is None:
        random = torch.Generator().manual_seed(0)
        x, y = torch.randn(images, 3, 32, 32, generator=random), torch.arange(images) % 10
        return (x, y), (x[:1000], y[:1000])
    labels = np.load(folder / "cifar10_labels.npz")
    files = [folder / f"cifar10_train_{i + 1}.webp" for i in range(-(-images // 10000))]
    x = torch.cat([sheet(file) for file in files])[:images]
    y = torch.from_numpy(labels["train"][: len(x)].astype(np.int64))
    test = sheet(folder / "cifar10_test.webp")
    return (x, y), (test, torch.from_numpy(labels["test"].astype(np.int64)))


class Items(TensorDataset):
    def new_empty(self):
        return Items(*(t[:0] for t in self.tensors))


def loaders(data, batch: int, device: str = "cpu") -> DataLoaders:
    train, test = data
    made = [
        DataLoader(Items(*train), bs=batch, shuffle=True, drop_last=True, num_workers=0),
        DataLoader(Items(*test), bs=500, num_workers=0),
    ]
    return DataLoaders(*made, device=device)


class Augment(Callback):
    """Flips and shifts, the shift the same for a batch."""

    run_valid = False

    def before_batch(self):
        x = self.learn.xb[0]
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
        i, j = torch.randint(9, (2,)).tolist()
        self.learn.xb = (F.pad(x, (4, 4, 4, 4))[..., i : i + 32, j : j + 32],)


class Block(nn.Module):
    """Two convs and a shortcut without parameters: every second pixel, zeros for new channels."""

    def __init__(self, i, o, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.shortcut = nn.Sequential() if i == o else Shortcut(o // 4)

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class Shortcut(nn.Module):
    def __init__(self, pad):
        super().__init__()
        self.pad = pad

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class ResNet(nn.Module):
    """ResNet-20, 32, 44, 56, ... of section 4.2, with shortcuts of option A."""

    def __init__(self, depth: int):
        super().__init__()
        n = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32, 1) for _ in range(n - 1)))
        self.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64, 1) for _ in range(n - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def pretrained(depth: int, weights: Path) -> nn.Module:
    """One whose weights lie in cifar10_resnet20_akamaster.pt, say."""
    model = ResNet(depth)
    file = weights / f"cifar10_resnet{depth}_akamaster.pt"
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()
