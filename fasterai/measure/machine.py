"""On what, and with which versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fasterai

__all__ = ["machine", "processor"]

_PACKAGES = ("fastai", "torchvision", "timm", "transformers", "numpy")


def machine() -> dict[str, str]:
    """The machine and the versions, as far as they are known."""
    found = {
        "processor": processor(),
        "cores, threads torch uses": f"{os.cpu_count()}, {torch.get_num_threads()}",
        "system": platform.platform(terse=True),
    }
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found["GPU"] = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    found |= {"Python": platform.python_version(), "fasterai": fasterai.__version__}
    found["torch"] = torch.__version__
    return found | {name: v for name in _PACKAGES if (v := _version(name)) is not None}


def processor() -> str:
    """The name of the CPU, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
