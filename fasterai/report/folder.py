"""A folder in which a sweep keeps what is done, so that one that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.writing import replacing

__all__ = ["Folder", "file_name", "said"]

_FORMAT = 1
_NAME = "sweep.jsonl"
_AGAIN = "name another folder, or delete it"

Row = dict[str, Any]


class Folder:
    """What a sweep has done: a line of JSON for each target, and the files of the networks.

    The first line says of which network and with which arguments, and what the dense network
    costs. A line that was not finished, at the end, is left out.

    Args:
        folder: where it is kept; None for nowhere.
        network: a fingerprint of the checkpoint.
        arguments: those that all targets share, as text.
        dense: the costs and metrics of the checkpoint.

    Raises:
        ValueError: the folder belongs to something else, or is damaged. Nothing is written then.

    Attributes:
        dense: the costs and metrics of the checkpoint, as first measured.
        rows: label of a target -> what became of it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        network: str,
        arguments: Mapping[str, str],
        dense: Row,
    ) -> None:
        self.dense, self.rows = dense, dict[str, Row]()
        self._asked: dict[str, str] = {}
        self.path = None if folder is None else Path(folder)
        if self.path is None:
            return
        first = {
            "fasterai sweep": _FORMAT,
            "network": network,
            "arguments": dict(arguments),
            "dense": dense,
        }
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: name a folder")
        if (self.path / _NAME).exists():
            self._read(first)
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            with replacing(self.path / _NAME) as part:
                part.write_bytes(json.dumps(first).encode() + b"\n")

    def file(self, label: str) -> Path | None:
        """Where the network of a target is kept; None where there is no folder."""
        return None if self.path is None else self.path / file_name(label)

    def must_ask(self, targets: Mapping[str, str]) -> None:
        """Raise a ValueError where a label stands for another target, as text, than it did."""
        for label, asked in targets.items():
            before = self._asked.get(label, asked)
            if before != asked and label in self.rows:
                raise ValueError(
                    f"{label!r} was {before} in {self.path} and is {asked} now: give it another "
                    f"name, or {_AGAIN}"
                )

    def add(self, label: str, row: Row, asked: str) -> None:
        """Note what became of a target, and what it was."""
        self.rows[label] = row
        if self.path is not None:
            with (self.path / _NAME).open("ab") as opened:
                line = {"target": label, "asked": asked, "row": row}
                opened.write(json.dumps(line).encode() + b"\n")
                opened.flush()
                os.fsync(opened.fileno())

    # --- inside --------------------------------------------------------------------------------

    def _read(self, expected: Mapping[str, Any]) -> None:
        path = self.path / _NAME
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        lines = [self._parsed(i, line) for i, line in enumerate(whole[:end].splitlines(), 1)]
        self._must_be_of(lines[0] if lines else {}, expected)
        for i, line in enumerate(lines[1:], 2):
            label, row = line.get("target"), line.get("row")
            if not isinstance(label, str) or not isinstance(row, dict):
                raise self._damaged(i)
            if row.get("file") in (None, file_name(label)):  # it names no other file
                self.rows[label] = row
                self._asked[label] = str(line.get("asked", ""))
        gone = [k for k, row in self.rows.items() if row.get("file") and not self.file(k).exists()]
        for label in gone:
            del self.rows[label]
        self.dense = lines[0]["dense"]
        if end < len(whole):
            os.truncate(path, end)

    def _must_be_of(self, first: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        where = self.path / _NAME
        if first.get("fasterai sweep") != _FORMAT:
            raise ValueError(f"{where} holds something else than a sweep: {_AGAIN}")
        if first.get("network") != expected["network"]:
            raise ValueError(
                f"{self.path} belongs to a sweep of another network or other weights: load the "
                f"checkpoint it began with, {_AGAIN}"
            )
        before, now = first.get("arguments"), expected["arguments"]
        if before != now:
            before = before if isinstance(before, dict) else {}
            names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
            differ = "; ".join(f"{n} was {before.get(n)} and is {now.get(n)} now" for n in names)
            raise ValueError(
                f"{self.path} belongs to a sweep with other arguments: {differ}; {_AGAIN}"
            )
        was, loss = (x.get("dense", {}).get("valid_loss") for x in (first, expected))
        if (was is None) != (loss is None) or (loss is not None and not _close(was, loss)):
            raise ValueError(
                f"{self.path} belongs to a sweep on other data, or with another loss: that of the "
                f"checkpoint on the validation set was {was} and is {loss} now; {_AGAIN}"
            )

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise self._damaged(number) from error
        if not isinstance(found, dict):
            raise self._damaged(number)
        return found

    def _damaged(self, number: int) -> ValueError:
        return ValueError(
            f"line {number} of {self.path / _NAME} is not of a sweep: the file is damaged, or "
            f"another; {_AGAIN}"
        )


def file_name(label: str) -> str:
    """A file name for the network of a target: what can be read of it, and a checksum."""
    readable = re.sub(r"[^A-Za-z0-9_=.-]+", "_", label).strip("._")[:40]
    return f"{readable}-{hashlib.sha256(label.encode()).hexdigest()[:8]}.safetensors"


def said(value: Any) -> str:
    """A value as text that is the same in another process: without addresses."""
    name = getattr(value, "__qualname__", None)
    text = f"{value.__module__}.{name}" if name is not None else repr(value)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _close(a: Any, b: float) -> bool:
    return isinstance(a, int | float) and math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6)
