"""What comparisons have in common: arms in processes of their own, whose lines are kept."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
FORMER = HERE / "out" / "fasterai-0.4.1"


def alone(work: Callable[..., dict], *args, threads: int = 1, first: Path | None = None) -> dict:
    """What `work` returns in a process of its own; where it fails, an 'error'.

    Args:
        work: a function of a module.
        args: its arguments.
        threads: of torch.
        first: a folder of packages that go before those that are installed.
    """
    context = multiprocessing.get_context("spawn" if first else "forkserver")
    if first is None:
        context.set_forkserver_preload(["tuning", "fasterai.all"])  # seconds each time
    receive, send = context.Pipe(duplex=False)
    module = Path(sys.modules[work.__module__].__file__).stem
    given = module, work.__name__, args, threads, first, send
    process = context.Process(target=_child, args=given)
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return {"error": "died"}
    finally:
        process.join()


def _child(module, name, args, threads, first, send):
    warnings.simplefilter("ignore")
    if first is not None:
        sys.path.insert(0, str(first))
    import torch

    torch.set_num_threads(threads)
    try:
        found = getattr(importlib.import_module(module), name)(*args)
    except Exception as error:  # a line of its own, and the next arm
        found = {"error": f"{type(error).__name__}: {error}"[:300]}
    send.send(found)


class Lines(list):
    """JSON lines in a file; those that failed are measured again."""

    def __init__(self, file: Path):
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(map(json.loads, file.open()) if file.exists() else ())

    def has(self, job: dict) -> bool:
        return any(job.items() <= line.items() and "error" not in line for line in self)

    def add(self, line: dict) -> None:
        import torch

        self.append(line | {"machine": f"{platform.machine()}, torch {torch.__version__}"})
        with self.file.open("a") as file:
            file.write(json.dumps(self[-1]) + "\n")


def install_former() -> Path:
    """The folder of fasterai 0.4.1, without its dependencies, which are ours too."""
    if not FORMER.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*command, str(FORMER), "fasterai==0.4.1", "einops"], check=False)
    return FORMER
