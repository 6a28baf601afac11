"""What one update of the masks costs: seconds against torch.kthvalue, bytes against the weights.

Linear layers of 1 to 100 million weights, one of which holds a quarter of them; weight granularity,
global. An update is scores, selection, masks and zeros (`Sparsifier.sparsify_model`): the first one
to half of the weights, and a next one to a thousandth more. It takes turns in one process with
`torch.kthvalue` on the concatenated magnitudes, already there; medians of the ratios in each turn.
Memory is the peak of the resident set during the call over what was there before, in a process of
its own for each; model and masks are there before. Linux only.

    python benchmarks/select_cost.py [--millions 1 10 100] [--rounds 7] [--out FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
CALLS = ("first", "next", "kthvalue")


def sparsifier_of(millions):
    import torch
    from torch import nn

    from fasterai.sparse.sparsifier import Sparsifier

    torch.manual_seed(0)
    width = round((millions * 1e6 / 16) ** 0.5)
    model = nn.Sequential(
        *(nn.Linear(width, width, bias=False) for _ in range(12)),
        nn.Linear(width, 4 * width, bias=False),
        nn.Linear(4 * width, 1),
    )
    return Sparsifier(model, "weight", "global")


def calls_of(sparsifier):
    """The calls, and what puts the weights back."""
    import torch

    weights = [p.data for p in sparsifier._covered.values()]
    before = [w.clone() for w in weights]
    every = torch.cat([w.flatten() for w in weights]).abs_()
    return (
        {
            "first": lambda: sparsifier.sparsify_model(0.5),
            "next": lambda: sparsifier.sparsify_model(0.501),
            "kthvalue": lambda: every.kthvalue(every.numel() // 2),
        },
        lambda: [w.copy_(b) for w, b in zip(weights, before, strict=True)],
    )


def times(millions, rounds):
    calls, restore = calls_of(sparsifier_of(millions))
    taken = {name: [] for name in CALLS}
    for _ in range(rounds + 1):  # the first round warms up
        restore()
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - begin)
    return {name: seconds[1:] for name, seconds in taken.items()}


def peak(millions, name):
    """Bytes a weight at the peak of one call."""
    calls, _ = calls_of(sparsifier_of(0.1))
    for call in calls.values():
        call()  # code and libraries are loaded
    sparsifier = sparsifier_of(millions)
    calls, _ = calls_of(sparsifier)
    if name == "next":
        calls["first"]()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    calls[name]()
    return (memory("VmHWM") - before) / sum(p.numel() for p in sparsifier._covered.values())


def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def in_a_process(*args):
    command = [sys.executable, "-W", "ignore", __file__, "--serve", *map(str, args)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 10, 100])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "out" / "select_cost.jsonl")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        what, millions, more = args.serve
        serve = {"times": lambda: times(float(millions), int(more))}
        print(json.dumps(serve.get(what, lambda: peak(float(millions), more))()))
        return
    args.out.parent.mkdir(exist_ok=True)
    print(f"{'weights':>9} {'call':10} {'seconds':>8} {'/kthvalue':>10} {'range':>13} {'bytes':>6}")
    with args.out.open("w") as file:
        for millions in args.millions:
            taken = in_a_process("times", millions, args.rounds)
            for name in CALLS:
                pairs = zip(taken[name], taken["kthvalue"], strict=True)
                ratios = sorted(a / b for a, b in pairs)
                seconds, ratio = statistics.median(taken[name]), statistics.median(ratios)
                extra = in_a_process("peak", millions, name)
                record = {"millions": millions, "call": name, "seconds": taken[name]}
                file.write(json.dumps({**record, "ratio": ratio, "bytes": extra}) + "\n")
                span = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
                print(
                    f"{millions:8g}M {name:10} {seconds:8.3f} {ratio:10.2f} {span:>13} {extra:6.2f}"
                )


if __name__ == "__main__":
    main()
