"""docs/benchmarks.md, written from the rows that `make bench` measured, so that no figure in it is typed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from golden.spec import KVStrataError
from hw.flow.cache import write_atomically

HEADER = """\
# Benchmarks

Written by `make bench` from build/bench/*.json. Times depend on the machine and on what else it does; cycles, ratios
and errors do not. A row without a target is for information. What the rows of the system model mean stands in
[metrics.md](metrics.md)."""


def measured(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by area of every benchmark file in `directory`; `KVStrataError` for one that is not such a file."""
    areas: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(directory.glob("*.json")):
        try:
            areas[path.stem] = json.loads(path.read_text())
        except json.JSONDecodeError:
            raise KVStrataError(
                f"benchmark file {path.name} is not valid JSON: run `make bench` again"
            ) from None
    return areas


def markdown(areas: Mapping[str, Sequence[Mapping[str, Any]]], previous: str = "") -> str:
    """The page: a table per area with value, unit, target and whether it is met; areas that were not measured this
    time keep what the `previous` page says."""
    sections = {
        text.split("\n", 1)[0]: text.split("\n", 1)[1].strip() for text in previous.split("\n## ")[1:]
    }
    for area, rows in areas.items():
        lines = ["| id | value | unit | target | met |", "|---|---|---|---|---|", *map(_line, rows)]
        sections[area] = "\n".join(lines)
    return "\n\n".join([HEADER, *(f"## {area}\n\n{sections[area]}" for area in sorted(sections))]) + "\n"


def write(directory: Path, page: Path) -> None:
    """Write `page` from the benchmark files in `directory`."""
    write_atomically(page, markdown(measured(directory), page.read_text() if page.is_file() else ""))


def _line(row: Mapping[str, Any]) -> str:
    target, value = row["target"], row["value"]
    met = "" if target is None else "yes" if _met(row) else "no"
    sign = "" if target is None else f"{'at most' if row['better'] == 'lower' else 'at least'} {target:.4g}"
    return f"| `{row['id']}` | {value:,.4g} | {row['unit']} | {sign} | {met} |"


def _met(row: Mapping[str, Any]) -> bool:
    value, target = row["value"], row["target"]
    return bool(value <= target if row["better"] == "lower" else value >= target)
