"""Pieces of a page that needs nothing beside itself: escaped text, tables, embedded pictures."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import pandas as pd

from ..core.checks import is_number, is_whole

__all__ = ["heading", "page", "pairs", "paragraph", "picture", "section", "table"]

_LONG = 30  # rows; longer tables are folded
_WORDY = 60  # characters; longer cells get some width
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; }
p { max-width: 46rem; white-space: pre-line; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0; }
th, td { padding: .2rem .6rem; text-align: left; vertical-align: top;
         border-bottom: 1px solid #e4e4e4; }
thead th { border-bottom: 1px solid #666; white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.t { max-width: 26rem; overflow-wrap: break-word; }
td.long { min-width: 18rem; }
tbody th { font-weight: 600; }
img { max-width: 100%; height: auto; }
summary { cursor: pointer; color: #0059b3; }
"""
# nothing on the page may be loaded or run, whatever names of layers hold
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, parts: list[str]) -> bytes:
    """The whole page."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    body = "\n".join(parts)
    whole = (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    )
    return whole.encode("utf-8", "backslashreplace")


def heading(title: str, notes: str = "") -> str:
    """The title, and a text below it."""
    return f"<header><h1>{escape(title)}</h1>{paragraph(notes)}</header>"


def section(title: str, *parts: str) -> str:
    """A heading and what is below it; nothing where that is nothing."""
    content = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>" if content else ""


def paragraph(text: str) -> str:
    """A paragraph; line breaks stay."""
    return f"<p>{escape(text)}</p>" if text else ""


def pairs(values: Mapping[str, Any]) -> str:
    """A table of two columns, names and values."""
    rows = "".join(f"<tr><th>{escape(name)}</th>{_cell(x)}</tr>" for name, x in values.items())
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'


def table(frame: pd.DataFrame, index: bool = False) -> str:
    """A table; long ones are folded.

    Args:
        frame: with columns of any types.
        index: show the index, too.
    """
    if index:
        frame = frame.reset_index()
    if not len(frame):
        return ""
    numbers = [pd.api.types.is_numeric_dtype(frame.iloc[:, i]) for i in range(frame.shape[1])]
    names = zip(frame.columns, numbers, strict=True)
    head = "".join(f"<th{' class=n' if n else ''}>{escape(_text(name))}</th>" for name, n in names)
    rows = [
        f"<tr>{''.join(_cell(x, n) for x, n in zip(row, numbers, strict=True))}</tr>"
        for row in frame.itertuples(index=False, name=None)
    ]
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    whole = f'<div class="wide"><table>{inside}</table></div>'
    if len(rows) > _LONG:
        return f"<details><summary>{len(rows)} rows</summary>{whole}</details>"
    return whole


def picture(draw: Callable[[], Any], alt: str) -> str:
    """A picture, embedded as PNG.

    Args:
        draw: draws it and returns the matplotlib axes.
        alt: what it shows, for those who cannot see it.
    """
    import matplotlib.pyplot as plt

    before = set(plt.get_fignums())
    file = io.BytesIO()
    try:
        with plt.rc_context({"text.parse_math": False}), warnings.catch_warnings():
            # a name in letters that the font lacks, or longer than a picture
            warnings.filterwarnings("ignore", "Glyph|constrained_layout")
            figure = draw().figure
            figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    finally:
        for number in set(plt.get_fignums()) - before:  # else a notebook shows it, too
            plt.close(number)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<p><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></p>'


def _cell(value: Any, number: bool = False) -> str:
    text = _text(value)
    kind = "n" if number else "t long" if len(text) > _WORDY else "t"
    return f'<td class="{kind}">{escape(text)}</td>'


def _text(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "\u2013"
    if not is_number(value):
        return str(value)
    whole = is_whole(value) or 1e4 <= abs(value) < 1e15
    return f"{value:,.0f}" if whole else f"{float(value):.4g}"
