"""CIFAR-10 from sheets of 100 x 100 images, and the ResNets of its weights; for benchmarks."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the pretrained weights expect


def sheet(file, mean=MEAN, deviation=DEVIATION):
    """(10000, 3, 32, 32) images from a sheet of 100 x 100."""
    from PIL import Image

    pixels = np.asarray(Image.open(file).convert("RGB"))
    tiles = pixels.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    x = torch.from_numpy(tiles.copy()).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]


def cifar(folder, images, mean=MEAN, deviation=DEVIATION):
    """Training and test images and labels; random ones without a folder."""
    if folder is None:
        random = torch.Generator().manual_seed(0)
        x, y = torch.randn(images, 3, 32, 32, generator=random), torch.arange(images) % 10
        return (x, y), (x[:1000], y[:1000])
    labels = np.load(folder / "cifar10_labels.npz")
    files = [folder / f"cifar10_train_{i + 1}.webp" for i in range(-(-images // 10000))]
    x = torch.cat([sheet(file, mean, deviation) for file in files])[:images]
    y = torch.from_numpy(labels["train"][: len(x)].astype(np.int64))
    test = sheet(folder / "cifar10_test.webp", mean, deviation)
    return (x, y), (test, torch.from_numpy(labels["test"].astype(np.int64)))


class Block(nn.Module):
    """Two convs and a shortcut without parameters (He et al. 2015, section 4.2, option A)."""

    def __init__(self, i, o, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.more = o - i

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.more:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return (y + x).relu()


class ResNet(nn.Module):
    """A CIFAR ResNet, named as its published weights are."""

    def __init__(self, depth):
        super().__init__()
        n = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for k, (i, o) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            blocks = [Block(i if j == 0 else o, o, 1 + (i != o and j == 0)) for j in range(n)]
            self.add_module(f"layer{k}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def pretrained(file, depth=20):
    """A CIFAR ResNet with published weights, in eval mode."""
    model = ResNet(depth)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()
