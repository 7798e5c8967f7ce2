"""How every verb shows its results: a rich table for people, JSON on standard output for programs."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track as rich_track
from rich.table import Table

from golden.spec import KVStrataError

T = TypeVar("T")
console = Console(stderr=True)
"""Progress and notes go to standard error, so that standard output stays parseable."""


def note(text: str) -> None:
    """A line of progress."""
    console.print(text, highlight=False)


def track(items: Iterable[T], description: str) -> Iterable[T]:
    """Iterate with a progress bar on standard error."""
    return rich_track(list(items), description=description, console=console)


def write_file(path: Path, text: str) -> None:
    """Write a file that the user asked for, whole or not at all; raises KVStrataError where it cannot be written."""
    from hw.flow.cache import write_atomically

    try:
        write_atomically(path, text)
    except OSError as error:
        raise KVStrataError(f"{path} cannot be written ({error.strerror})") from None


def show_json(value: Any) -> None:
    """Print `value` as JSON on standard output."""
    Console().print_json(json.dumps(value))


def show_rows(title: str, rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print rows that share their keys, as a table or as a JSON list."""
    if as_json:
        show_json(list(rows))
        return
    table = Table(title=title, title_justify="left")
    for key in rows[0] if rows else ():
        numeric = isinstance(rows[0][key], int | float)
        table.add_column(key.replace("_", " "), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(v) for v in row.values()))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else f"{value}"
