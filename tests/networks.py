"""Small networks, each wired in another way, and what the tests do with networks."""

import torch
import torch.nn.functional as F
from torch import nn

from fasterai.sparse.sparsifier import Sparsifier

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def conv(i, o, k=3, **kwargs):
    return nn.Conv2d(i, o, k, padding=k // 2, **kwargs)


class Plain(nn.Module):
    """Convs with biases, a pooling and a flatten: M * N columns a channel."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 12)
        self.fc1, self.fc2 = nn.Linear(12 * 4 * 4, 10), nn.Linear(10, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = F.adaptive_avg_pool2d(F.relu(self.b(x)), 4)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Residual(nn.Module):
    """A chain of sums: all their filters go together."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = conv(3, 8, bias=False), nn.BatchNorm2d(8)
        self.c1, self.bn1 = conv(8, 16, bias=False), nn.BatchNorm2d(16)
        self.c2, self.bn2 = conv(16, 8, bias=False), nn.BatchNorm2d(8)
        self.c3, self.bn3 = conv(8, 8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.bn0(self.stem(x)))
        x = x + self.bn2(self.c2(F.relu(self.bn1(self.c1(x)))))
        x = F.relu(x) + self.bn3(self.c3(x))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Concatenations of concatenations, with a norm over the whole of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(7, 6), conv(13, 8)
        self.norm = nn.BatchNorm2d(21)
        self.head = conv(21, 5, 1)

    def forward(self, x):
        x = torch.cat([x, F.relu(self.a(x))], 1)
        x = torch.cat([x, F.relu(self.b(x))], 1)
        x = torch.cat([self.c(x), x], 1)
        return self.head(F.relu(self.norm(x))).mean((2, 3))


class Depthwise(nn.Module):
    """Inverted residuals with a depthwise conv, and one that makes two maps of each channel."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.up, self.bn1 = conv(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.dw, self.bn2 = conv(16, 16, groups=16, bias=False), nn.BatchNorm2d(16)
        self.down = conv(16, 8, 1)
        self.twice = conv(8, 16, groups=8)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu6(self.stem(x))
        y = F.relu6(self.bn1(self.up(x)))
        x = x + self.down(F.relu6(self.bn2(self.dw(y))))
        return self.head(F.relu(self.twice(x)).mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excitation: the gate's rows go with the channels they gate."""

    def __init__(self):
        super().__init__()
        self.a, self.bn = conv(3, 8, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.excite = conv(8, 4, 1), conv(4, 8, 1)
        self.spatial = conv(8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.hardswish(self.bn(self.a(x)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = x * gate
        return self.head((x * torch.sigmoid(self.spatial(x))).mean((2, 3)))


class Reused(nn.Module):
    """A conv that runs twice, and a norm of its own each time."""

    def __init__(self):
        super().__init__()
        self.a, self.twice = conv(3, 8), conv(8, 8, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.b = conv(8, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(self.bn1(self.twice(x)))
        x = F.relu(self.bn2(self.twice(x)))
        return self.head(F.relu(self.b(x)).mean((2, 3)))


class TwoHeads(nn.Module):
    """Two outputs, registered before what feeds them, and a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.boxes, self.classes = conv(12, 4, 1), nn.Linear(12, 6)
        self.never = conv(10, 10)
        self.b, self.bn = conv(8, 12), nn.BatchNorm2d(12)
        self.a = conv(3, 8)

    def forward(self, x):
        x = F.leaky_relu(self.bn(self.b(F.leaky_relu(self.a(x)))))
        return {"boxes": self.boxes(x), "classes": self.classes(x.mean((2, 3)))}


class Upsampled(nn.Module):
    """An encoder and decoder with a skip: pooling, transposed conv, concatenation."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = conv(3, 8), conv(8, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.mix, self.out = conv(16, 8), conv(8, 2, 1)

    def forward(self, x):
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(F.avg_pool2d(a, 2)))
        x = torch.cat([F.relu(self.up(b)), F.interpolate(b, scale_factor=2)[:, :8] * 0 + a], 1)
        return self.out(F.relu(self.mix(x)))


class Mlp(nn.Module):
    """Linear layers on vectors, a norm, a sum."""

    def __init__(self):
        super().__init__()
        self.a, self.bn = nn.Linear(12, 16), nn.BatchNorm1d(16)
        self.b, self.c = nn.Linear(16, 20), nn.Linear(20, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.a(x.mean(3).flatten(1)[:, :12])))
        return self.head(F.relu(x + self.c(torch.tanh(self.b(x)))))


class Parted(nn.Module):
    """A chunk in the middle: what it touches stays, the rest is free."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 8)
        self.left, self.right = conv(4, 6), conv(4, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        left, right = F.relu(self.b(F.relu(self.a(x)))).chunk(2, 1)
        return self.head(F.relu(self.left(left) + self.right(right)).mean((2, 3)))


class Attention(nn.Module):
    """Heads from one packed layer; the scale is read from the width of a head."""

    def __init__(self, width=24, heads=3):
        super().__init__()
        self.stem, self.heads, self.head_dim = nn.Linear(10, width), heads, width // heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 40), nn.Linear(40, width)
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x):
        x = self.stem(x)
        n, t, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(n, t, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(out)
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(self.last(x).mean(1))


class Heads(nn.Module):
    """Attention whose packed layer has the same shape for any number of heads."""

    def __init__(self, heads):
        super().__init__()
        self.heads, self.head_dim = heads, 24 // heads
        self.qkv, self.proj = nn.Linear(10, 72), nn.Linear(24, 4)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Normed(nn.Module):
    """A norm of one's choice between two convs."""

    def __init__(self, norm, width=8):
        super().__init__()
        self.a, self.norm, self.b = conv(3, width), norm, conv(width, 4)

    def forward(self, x):
        x = self.a(x)
        if isinstance(self.norm, nn.GroupNorm):
            return self.b(F.relu(self.norm(x)))
        return self.b(F.relu(self.norm(x.movedim(1, -1)).movedim(-1, 1)))


class Tied(nn.Module):
    """An output layer with the weight of the embedding, or with one of its own."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed, self.mid = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.mid(self.embed(x)).relu())


TOKENS = torch.arange(10).view(2, 5)
ALL = [Plain, Residual, Dense, Depthwise, Gated, Reused, TwoHeads, Upsampled, Mlp, Parted]


def make(kind, dtype=torch.float32, seed=0):
    """A network with random norm statistics and affine values, in eval mode."""
    torch.manual_seed(seed)
    model = kind().to(dtype)
    return shake(model).eval()


def shake(model):
    """Give every norm statistics and affine values that are not those of a fresh one."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(m.running_mean, 0, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.3)
    return model


def lively(model):
    """Weights large enough for attention to look somewhere."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, 0.2, 0.5)
    return model.double().eval()


def zeroed(model, x, **kwargs):
    Sparsifier(model, "filter", example_inputs=x, **kwargs).sparsify_model(0.5)
    return model


def eagerly(model):
    return torch.compile(model, backend="eager")


def wrapped(kind):
    model = make(Residual)
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "part":
        model.c1 = torch.compile(model.c1, backend="eager")
        return model
    return torch.compile(model, backend=kind)


def images(n=2, size=16, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, dtype=dtype, generator=generator)


def sequences(n=2, t=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, t, 10, generator=generator, dtype=torch.float64)


def tensors(out):
    return list(out.values()) if isinstance(out, dict) else [out]


def loss_of(out):
    return sum(o.square().mean() for o in tensors(out))


def size(model):
    return sum(p.numel() for p in model.parameters())


def widths(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def apart(before, after):
    """The largest difference, relative to the largest output."""
    pairs = list(zip(tensors(before), tensors(after), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float(((a - b).abs().max() / a.abs().max()).detach()) for a, b in pairs)
