"""Run the benchmarks one after the other and write RESULTS.md from what they print.

    python benchmarks/run.py [--full] [--data FOLDER] [--only exactness ...] [--again]

Quick (the default) takes less than 15 minutes on two cores, full takes hours. FOLDER holds
cifar10/, cats_vs_dogs/ and weights/; without it what needs real data is left out, by name. What a
benchmark printed is kept, of a full run in benchmarks/results, and not run again unless `--again`
says so: RESULTS.md can be written anew at any time, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).parent
KEPT = {"quick": HERE / "out" / "results", "full": HERE / "results"}
VERSIONS = "torch", "torchvision", "timm", "transformers", "fastai", "torch-pruning"


@dataclass(frozen=True)
class Benchmark:
    """A script: its arguments for a quick and for a full run; `data` is the folder it needs."""

    name: str
    quick: str | None
    full: str
    data: str = ""


ALL = [
    Benchmark("exactness", "--networks resnet18 mobilenet_v2", ""),
    Benchmark("constants", "--networks resnet18 mobilenet_v2", ""),
    Benchmark("coverage", "--libraries fastai --seconds 60 --out coverage.jsonl", "--seconds 400"),
    Benchmark("round_trips", None, "--seconds 600"),
    Benchmark("prune_cost", "--networks resnet50 --depths 20 56", "--billion"),
    Benchmark("select_cost", "--millions 1 10 --rounds 3", ""),
    Benchmark("step_cost", "--rounds 2", ""),
    Benchmark("speed", "--networks mobilenet_v2 --batches 1 --out speed.jsonl", ""),
    Benchmark("budgets", "--networks resnet18 mobilenet_v2", ""),
    Benchmark("sparse_files", "--numbers 10000000 --rounds 3", ""),
    Benchmark("sparse_execution", None, ""),
    Benchmark("semi_structured", None, ""),
    Benchmark("prune_while_training", "--images 512 --epochs 3 --sparsity 0 0.5", "", "?cifar10"),
    Benchmark("criteria", "--images 100", "", "."),
    Benchmark("accuracy", None, "", "."),
    Benchmark("unstructured", None, "", "."),
    Benchmark("cats_and_dogs", None, "", "."),
    Benchmark("deploy", None, "", "cats_vs_dogs"),
]


def command(each: Benchmark, full: bool, data: Path | None) -> list[str] | str:
    """What to run, or why it is left out."""
    asked = each.full if full else each.quick
    if asked is None:
        return "in the full run only"
    given = [str(HERE / f"{each.name}.py"), *asked.split()]
    folder = each.data.removeprefix("?")
    if folder and data is None and each.data[0] != "?":
        return "needs --data"
    if folder and data is not None:
        if not (data / folder).exists():
            return f"needs {folder} in --data"
        given += ["--data", str(data / folder)]
    return given


def run(name: str, given: list[str], kind: str) -> None:
    """Run a script and keep what it printed, with when, where and on what."""
    load, begin = os.getloadavg()[0], time.monotonic()
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *given],
        capture_output=True,
        text=True,
        env=env,
        cwd=KEPT["quick"],
    )
    record = {
        "command": ["python", f"benchmarks/{name}.py", *shown(given[1:])],
        "seconds": round(time.monotonic() - begin),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "failed": done.returncode != 0,
        "printed": done.stdout,
        "error": done.stderr[-2000:] if done.returncode else "",
        **machine(),
    }
    kept_in(name, kind).write_text(json.dumps(record, indent=1) + "\n")


def shown(arguments: list[str]) -> list[str]:
    """Without the folders of this machine."""
    return ["FOLDER" if before == "--data" else each for before, each in pairwise(["", *arguments])]


def kept_in(name: str, kind: str) -> Path:
    return KEPT[kind] / f"{name}.json"


def machine() -> dict:
    """The hardware and the versions."""
    found = {}
    for package in VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {processor()}",
        "threads": os.environ.get("OMP_NUM_THREADS", "1"),
        "versions": {"python": platform.python_version(), **found},
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def section(each: Benchmark, kind: str) -> str:
    """The part of RESULTS.md on a benchmark that was run."""
    about = (HERE / f"{each.name}.py").read_text().split('"""')[1].strip().split("\n\n")[0]
    record = json.loads(kept_in(each.name, kind).read_text())
    text = record["error"] if record["failed"] else record["printed"].strip()
    if "| --- |" not in text or record["failed"]:
        text = f"```\n{text}\n```"
    load = " to ".join(map(str, record["load"]))
    took = f"{record['seconds']} s{', failed' * record['failed']}"
    now = machine()["versions"]
    other = [f", {n} {v}" for n, v in record["versions"].items() if v != now.get(n)]
    return (
        f"## {each.name}\n\n{about}\n\n`{' '.join(record['command'])}`: {took}; "
        f"{record['machine']}, {record['threads']} thread{''.join(other)}, load {load}\n\n{text}\n"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", nargs="+", choices=[each.name for each in ALL])
    parser.add_argument("--again", action="store_true", help="also what was run before")
    parser.add_argument("--render", action="store_true", help="run nothing")
    args = parser.parse_args()
    kind = "full" if args.full else "quick"
    data = args.data and args.data.resolve()
    for folder in KEPT.values():
        folder.mkdir(parents=True, exist_ok=True)
    parts, left_out = [], []
    for each in ALL:
        given = command(each, args.full, data)
        known = kept_in(each.name, kind).exists()
        wanted = (args.only is None or each.name in args.only) and (args.again or not known)
        if isinstance(given, list) and wanted and not args.render:
            print(f"{each.name} ...", flush=True)
            run(each.name, given, kind)
        if kept_in(each.name, kind).exists():
            parts.append(section(each, kind))
        else:
            left_out.append(f"{each.name} ({given if isinstance(given, str) else 'not run'})")
    versions = ", ".join(f"{n} {v}" for n, v in machine()["versions"].items())
    file = (HERE if args.full else KEPT[kind]) / "RESULTS.md"
    intro = (
        f"# Results\n\nWritten by `python benchmarks/run.py{' --full' * args.full}`, from what the "
        f"benchmarks print. Times are ratios within a run.\n\n{versions}\n"
    )
    if left_out:
        intro += f"\nLeft out: {', '.join(left_out)}.\n"
    file.write_text("\n".join([intro, *parts]))
    print(file)


if __name__ == "__main__":
    main()
