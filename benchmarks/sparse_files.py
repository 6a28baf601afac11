"""Files of many zeros: how many bytes, and how long reading takes. A table, and JSON lines.

    python benchmarks/sparse_files.py [--numbers 100_000_000] [--dtypes float32] [--out FILE]

Bytes are those of the file divided by those of plain safetensors; beside it gzip of that file
(level 6) and `torch.save` of torch's own sparse tensors (COO, CSR). Reading is loading and touching
every byte: each by itself (a sum over bytes), eight at a time (a sum over 64-bit words), or with a
copy into memory of one's own before, as a network has it: safetensors only maps a file, and a word
of it that is in memory already costs next to nothing. Times, of processor and clock, are divided by
those of plain safetensors in the same round.
"""

import argparse
import gzip
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fasterai.deploy.sparse_files import load_sparse, save_sparse

SHARES = [0.0, 0.5, 0.8, 0.9, 0.95, 0.99]


def weights(numbers, share, dtype, rows=10_000):
    """(rows, numbers / rows), so many zeros at random places."""
    torch.manual_seed(0)
    x = torch.randn(rows, numbers // rows)
    for row in x:
        row[torch.rand(len(row)) < share] = 0
    return x.to(dtype)


def gzipped(path):
    """The bytes of the first 40 MB, gzipped, as a share of them."""
    with path.open("rb") as file:
        data = file.read(40_000_000)
    return len(gzip.compress(data, 6)) / len(data)


def saved(x, path):
    torch.save(x, path)
    size = path.stat().st_size
    path.unlink()
    return size


def sizes(x, folder):
    """The bytes of each file, as shares of the dense one; leaves both files there."""
    save_file({"x": x}, folder / "dense")
    save_sparse({"x": x}, folder / "sparse")
    dense = (folder / "dense").stat().st_size
    found = {"sparse": (folder / "sparse").stat().st_size / dense}
    found["gzip"] = gzipped(folder / "dense")
    few = x[: len(x) // 10]  # the memory that COO takes
    found["coo"] = saved(few.to_sparse(), folder / "coo") * 10 / dense
    found["csr"] = saved(few.to_sparse_csr().clone(), folder / "csr") * 10 / dense
    return found


def summed(x):
    return int(x.view(-1).view(torch.int64).sum())


def bytewise(x):
    return int(x.view(-1).view(torch.uint8).sum())


def copied(x):
    return summed(x.clone())


def dense(folder):
    return load_file(folder / "dense")["x"]


def sparse(folder):
    return load_sparse(folder / "sparse")["x"]


TOUCHES = {"bytes": (bytewise, bytewise), "words": (summed, summed), "own": (copied, summed)}
ARMS = {f"dense, {k}": (dense, v[0]) for k, v in TOUCHES.items()}
ARMS |= {f"sparse, {k}": (sparse, v[1]) for k, v in TOUCHES.items()}


def times(folder, rounds):
    """Seconds of processor and clock, of each arm in each round."""
    taken = {arm: [] for arm in ARMS}
    for _ in range(rounds):
        for arm, (load, touch) in ARMS.items():
            start = time.process_time(), time.perf_counter()
            touch(load(folder))
            end = time.process_time(), time.perf_counter()
            taken[arm].append([b - a for a, b in zip(start, end, strict=True)])
    return taken


def ratios(taken, kind):
    """Medians of sparse / dense, by processor time and by the clock."""
    pairs = list(zip(taken[f"sparse, {kind}"], taken[f"dense, {kind}"], strict=True))
    return [statistics.median(a[i] / b[i] for a, b in pairs) for i in (0, 1)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numbers", type=int, default=100_000_000)
    parser.add_argument("--dtypes", nargs="*", default=["float32"])
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("sparse_files.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = " | ".join(f"{kind}: processor, clock" for kind in TOUCHES)
    print(f"| type | zeros | sparse | gzip | COO | CSR | {kinds} |\n{'| --- ' * 9}|")
    with args.out.open("w") as out:
        for dtype in args.dtypes:
            for share in args.shares:
                folder = Path(tempfile.mkdtemp())
                size = sizes(weights(args.numbers, share, getattr(torch, dtype)), folder)
                taken = times(folder, args.rounds)
                shutil.rmtree(folder)
                record = {"dtype": dtype, "zeros": share, "numbers": args.numbers, "bytes": size}
                record |= {"seconds": taken, "cores": os.cpu_count(), "torch": torch.__version__}
                out.write(json.dumps(record) + "\n")
                both = [", ".join(f"{r:.1f}" for r in ratios(taken, k)) for k in TOUCHES]
                cells = [f"{v:.3f}" for v in size.values()] + both
                print(f"| {dtype} | {share:.0%} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
