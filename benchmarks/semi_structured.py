"""2:4 zeros on a GPU: linear layers at the sizes of transformers, dense and semi-structured.

In bfloat16 through `semi_structured`, in int8 as torch multiplies it, without scales. Medians of
torch.utils.benchmark, synchronised. Where no GPU can do it, it says what is missing.

    python benchmarks/semi_structured.py [--seconds 0.5]
"""

import argparse

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured
from torch.utils.benchmark import Timer

from fasterai.deploy.semi_structured import semi_structured

SIZES = [(768, 3072), (1024, 4096), (4096, 4096), (4096, 11008)]  # ViT-B and BERT, L, LLaMA 7B
TOKENS = [64, 512, 4096]


def two_of_four(weight):
    """The weight without the two smallest of each four inputs."""
    fours = weight.unflatten(1, (-1, 4))
    return fours.scatter(2, fours.abs().topk(2, largest=False).indices, 0).flatten(1)


def bfloat16(inside, out, tokens):
    """What runs the dense layer and the sparse one."""
    layer = nn.Linear(inside, out, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.copy_(two_of_four(layer.weight))
    (sparse,), said = semi_structured(nn.Sequential(layer))
    if said["reason"].any():
        raise RuntimeError(said["reason"].iloc[0])
    x = torch.randn(tokens, inside, device="cuda", dtype=torch.bfloat16)
    return lambda: layer(x), lambda: sparse(x)


def int8(inside, out, tokens):
    weight = torch.randint(-128, 128, (out, inside), device="cuda")
    weight = two_of_four(weight.float()).to(torch.int8)
    sparse = to_sparse_semi_structured(weight)
    x = torch.randint(-128, 128, (tokens, inside), device="cuda", dtype=torch.int8)
    return lambda: torch._int_mm(x, weight.t()), lambda: torch.mm(sparse, x.t())


def milliseconds(run, seconds):
    timer = Timer("run()", globals={"run": run})
    return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="on each layer")
    args = parser.parse_args()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        semi_structured(nn.Sequential(nn.Linear(64, 64, device=where, dtype=torch.bfloat16)))
    except RuntimeError as missing:
        print(missing)
        return
    print(f"{torch.cuda.get_device_name()}\n")
    print("| layer | tokens | numbers | dense, ms | 2:4, ms | times as fast |")
    print("| --- " * 6 + "|")
    for inside, out in SIZES:
        for tokens in TOKENS:
            for make in bfloat16, int8:
                cells = f"{inside} x {out}", str(tokens), make.__name__
                try:
                    dense, sparse = (
                        milliseconds(f, args.seconds) for f in make(inside, out, tokens)
                    )
                except RuntimeError as error:
                    print(f"| {' | '.join(cells)} | | | {str(error).splitlines()[0][:80]} |")
                    continue
                numbers = f"{dense:.4f}", f"{sparse:.4f}", f"{dense / sparse:.2f}"
                print(f"| {' | '.join((*cells, *numbers))} |")


if __name__ == "__main__":
    main()
