"""From where zeros pay on the CPU: linear layers and 1x1 convs with torch's sparse matrices.

    python benchmarks/sparse_execution.py [--threads 1] [--rounds 15] [--out FILE]

Each number says how many times as fast as the dense layer: CSR with zeros at random places (as in
`fasterai.deploy.sparse_layers`, the better of its ways; 64: with 64-bit indices, as torch's
`to_sparse_csr` makes them), and BSR whose zeros are whole blocks of 8x8, 16x16 or 32x32 (MKL takes
square blocks only). Dense and sparse take turns for some milliseconds each; the times are the
smallest of all rounds, which others on the machine disturb least.
"""

import argparse
import json
import os
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fasterai.deploy.sparse_layers import SparseConv, SparseLinear

LINEAR = [(1024, 1024), (768, 3072)]
CONVS = [(64, 256, 28), (256, 1024, 14), (2048, 512, 7)]
SHARES = [0.5, 0.7, 0.8, 0.9, 0.95, 0.99]
BATCHES = [1, 4, 16, 64]
BLOCKS = [8, 16, 32]


def zeroed(layer, share, block=1):
    """A layer with that share of its weights, or of blocks of them, zero."""
    with torch.no_grad():
        flat = layer.weight.flatten(1)
        keep = torch.rand(flat.shape[0] // block, flat.shape[1] // block) >= share
        keep = keep.repeat_interleave(block, 0).repeat_interleave(block, 1)
        layer.weight.mul_(keep.view_as(layer.weight))
    return layer


def blocked(weight, bias, size):
    """A function that multiplies with a weight (out, in) in blocks."""
    blocks = weight.flatten(1).to_sparse_bsr((size, size))
    return lambda x: F.linear(x, blocks, bias)


def linear(inside, out, share):
    torch.manual_seed(0)
    layer = zeroed(nn.Linear(inside, out), share)
    csr64 = layer.weight.detach().to_sparse_csr()
    arms = {"dense": layer, "rows": SparseLinear(layer, "rows"), "columns": SparseLinear(layer)}
    arms["CSR 64"] = lambda x: F.linear(x, csr64, layer.bias)
    for size in BLOCKS:
        block = zeroed(nn.Linear(inside, out), share, size)
        arms[f"BSR {size}"] = blocked(block.weight.detach(), block.bias, size)
    return arms


def conv(inside, out, share):
    torch.manual_seed(0)
    layer = zeroed(nn.Conv2d(inside, out, 1), share)
    arms = {"dense": layer, "samples": SparseConv(layer)}
    for size in BLOCKS:
        block = zeroed(nn.Conv2d(inside, out, 1), share, size)
        multiply = blocked(block.weight.detach(), block.bias, size)
        arms[f"BSR {size}"] = lambda x, m=multiply: m(x.permute(0, 2, 3, 1).flatten(0, 2))
    return arms


def timed(arms, x, rounds, seconds=0.003):
    """The seconds of one run of each arm, the smallest of all rounds."""
    taken = dict.fromkeys(arms, float("inf"))
    for run in arms.values():
        run(x)
    for _ in range(rounds):
        for arm, run in arms.items():
            count, spent, start = 0, 0.0, time.perf_counter()
            while spent < seconds:
                run(x)
                count, spent = count + 1, time.perf_counter() - start
            taken[arm] = min(taken[arm], spent / count)
    return taken


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("sparse_execution.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    cells = [("linear", size, linear, (lambda n, s=size: torch.randn(n, s[0]))) for size in LINEAR]
    cells += [
        ("1x1 conv", size, conv, (lambda n, s=size: torch.randn(n, s[0], s[2], s[2])))
        for size in CONVS
    ]
    print("| layer | zeros | batch | dense ms | CSR | CSR 64 | BSR 8 | BSR 16 | BSR 32 |")
    print(f"{'| --- ' * 9}|")
    with args.out.open("w") as file, torch.inference_mode():
        for kind, size, make, inputs in cells:
            for share in SHARES:
                arms = make(*size[:2], share)
                for batch in BATCHES:
                    seconds = timed(arms, inputs(batch), args.rounds)
                    record = {"layer": kind, "size": size, "zeros": share, "batch": batch}
                    record |= {"threads": args.threads, "cores": os.cpu_count()}
                    record |= {"torch": torch.__version__, "seconds": seconds}
                    file.write(json.dumps(record) + "\n")
                    print(row(kind, size, share, batch, seconds), flush=True)


def row(kind, size, share, batch, seconds):
    ratios = {arm: seconds["dense"] / s for arm, s in seconds.items()}
    best = max(ratios[arm] for arm in ("rows", "columns", "samples") if arm in ratios)
    others = ["CSR 64", *(f"BSR {b}" for b in BLOCKS)]
    cells = [f"{best:.2f}", *(f"{ratios[a]:.2f}" if a in ratios else "" for a in others)]
    name = f"{kind} {' x '.join(map(str, size))}"
    return (
        f"| {name} | {share:.0%} | {batch} | {seconds['dense'] * 1e3:.3f} | {' | '.join(cells)} |"
    )


if __name__ == "__main__":
    main()
