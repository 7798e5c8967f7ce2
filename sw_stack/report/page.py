"""The HTML page: tables and figures around the numbers of summary.json, with nothing loaded from outside."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).parent / "template.html.j2"


@dataclass(frozen=True)
class Column:
    """A table column: where its value stands in a row and how it is written."""

    title: str
    value: Callable[[Mapping[str, Any]], Any]
    numeric: bool = False
    mark: Callable[[Mapping[str, Any]], str] = lambda _: ""

    def text(self, row: Mapping[str, Any]) -> str:
        """The cell's text; numbers with four significant digits and separators."""
        value = self.value(row)
        if value is None:
            return "none"
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.4g}"
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

    def tone(self, row: Mapping[str, Any]) -> str:
        """CSS class of the cell: "good", "bad" or nothing."""
        return self.mark(row)


def field(title: str, key: str, *, numeric: bool = False) -> Column:
    """A column that shows one field as it is."""
    return Column(title, lambda row: row[key], numeric)


def _exactness(row: Mapping[str, Any]) -> str:
    return "bit-exact" if row["bit_exact"] else f"differs: {row['first_difference']}"


COLUMNS: dict[str, list[Column]] = {
    "accuracy": [field("Level", "level"), field("Perplexity", "perplexity", numeric=True)],
    "rtl": [
        field("Block", "name"),
        field("Shape", "shape"),
        Column("Against golden", _exactness, mark=lambda row: "good" if row["bit_exact"] else "bad"),
        field("Elements", "elements", numeric=True),
        field("Cycles", "cycles", numeric=True),
        field("Bound", "bound_cycles", numeric=True),
        Column("Of bound", lambda row: f"{100 * row['bound_cycles'] / row['cycles']:.1f}%", numeric=True),
    ],
    "system": [
        field("Model", "model"),
        field("Scheme", "scheme"),
        field("Machine", "machine"),
        field("Batch", "batch", numeric=True),
        field("Token/s", "tokens_per_s", numeric=True),
        field("TTFT s", "time_to_first_token_s", numeric=True),
        field("TPOT s", "time_per_output_token_s", numeric=True),
        field("Bottleneck", "bottleneck"),
        Column("Breakdown of decode", lambda row: shares(row["breakdown"])),
    ],
    "assumptions": [
        field("Where", "device"),
        field("Field", "field"),
        field("Value", "value"),
        field("Source", "source"),
    ],
    "provenance": [field("What", "what"), field("Value", "value")],
}


def shares(breakdown: Mapping[str, float]) -> str:
    """Categories of at least half a percent, largest first."""
    found = sorted(((share, name) for name, share in breakdown.items() if share >= 0.005), reverse=True)
    return ", ".join(f"{name} {100 * share:.0f}%" for share, name in found)


def svg(figure: Figure) -> str:
    """The figure as an inline SVG element, with text kept as text and no time stamp."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kvstrata"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def section(
    title: str,
    text: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    figures: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """A section of the page: a title, a text, notes, a table and figures."""
    return {
        "title": title,
        "text": text,
        "rows": rows,
        "columns": columns,
        "figures": figures,
        "notes": notes,
    }


def figure(drawn: Mapping[str, str], name: str, caption: str) -> dict[str, Any]:
    """The figure `name` of `drawn` with its caption, as a section shows it."""
    return {"svg": Markup(drawn[name]), "caption": caption}


def render(context: Mapping[str, Any], chain: Sequence[Mapping[str, str]]) -> str:
    """The whole page. `context` holds what the template names; a missing name is an error, not a blank."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=True)
    figures = {name: Markup(text) for name, text in context["figures"].items()}
    template = environment.from_string(TEMPLATE.read_text())
    return template.render({**context, "figures": figures, "chain": chain, "columns": COLUMNS})
