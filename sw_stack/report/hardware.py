"""What the report says of the RTL beyond exactness: cycles against their bounds, and resources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sw_stack.report import resources
from sw_stack.report.page import Column, field, figure, section, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS = "Llama-2-7B, "
"""Of the table of decoder layers, the shape that the published engine runs."""
WHAT = {
    "mv_core": "matrix unit",
    "engine_layer": "decoder layer",
    "attention_head": "attention kernel",
    "storage_unit": "in-storage unit",
    "storage_unit_sparf": "in-storage unit",
}


def facts() -> dict[str, Any]:
    """Plain data for summary.json: measured cycles beside their bounds, resources beside published ones."""
    return {"bounds": bounds(), "resources": resources.compared(resources.stored())}


def bounds() -> list[dict[str, Any]]:
    """Every measured shape of sim/calibration: cycles, the cycles that its bytes need, and the rate reached."""
    from sim.measured import CALIBRATION, read_table

    rows = []
    for path in sorted(CALIBRATION.glob("*.json")):
        table = read_table(path)
        for row in table["rows"]:
            if table["block"] == "engine_layer" and not row["name"].startswith(LAYERS):
                continue
            seconds = row["cycles"] / (table["clock_mhz"] * 1e6)
            rows.append(
                {
                    "block": f"{WHAT[table['block']]} ({table['config']})",
                    "shape": row["name"],
                    "cycles": row["cycles"],
                    "bound_cycles": row["bound_cycles"],
                    "gb_per_s": row["bytes"] / seconds / 1e9,
                }
            )
    return rows


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Share of the bound by shape, as SVG."""
    return {"bounds": svg(_shares(rows))}


def _shares(rows: Sequence[Mapping[str, Any]]) -> Figure:
    from matplotlib.figure import Figure as NewFigure

    drawn = NewFigure(figsize=(7.0, 0.6 + 0.2 * len(rows)))
    axes = drawn.subplots()
    for block in dict.fromkeys(row["block"] for row in rows):
        shares = {n: r["bound_cycles"] / r["cycles"] for n, r in enumerate(rows) if r["block"] == block}
        axes.barh(list(shares), list(shares.values()), label=block)
    axes.set_yticks(range(len(rows)), [row["shape"] for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.axvline(1 / 1.1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("cycles that the bytes need / cycles taken; dashed: 1 / 1.10")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.08), ncols=2, fontsize=7)
    return drawn


def sections(told: Mapping[str, Any], drawn: Mapping[str, str]) -> list[dict[str, Any]]:
    """The page's sections, from `facts` and `figures`."""
    near = (
        "Cycles of sim/calibration, runs of the RTL or recurrences that tests hold to it, beside the cycles that the "
        "bytes alone need: words of all channels for the matrix unit, the HBM's peak for decoder layers of decode, the "
        "rate of the flash channels (11.2 GB/s together) for the in-storage unit. Short shapes pay their latency."
    )
    sums = (
        "Sums of blocks that Yosys maps to the device, repeated blocks counted; docs/engine.md and docs/storage.md "
        "have the rule and what it leaves out. Nothing is shown where nothing was published."
    )
    caption = "Share of the bound that each shape reaches."
    return [
        section(
            "How close is the RTL to its bounds?",
            near,
            told["bounds"],
            BOUNDS,
            [figure(drawn, "bounds", caption)],
        ),
        section("What does it take?", sums, told["resources"], RESOURCES),
    ]


def _count(title: str, key: str) -> Column:
    return Column(title, lambda row: "" if row[key] is None else row[key], numeric=True)


BOUNDS = [
    field("Block", "block"),
    field("Shape", "shape"),
    field("Cycles", "cycles", numeric=True),
    Column("Bound", lambda row: round(row["bound_cycles"]), numeric=True),
    Column("Cycles / bound", lambda row: f"{row['cycles'] / row['bound_cycles']:.3f}", numeric=True),
    field("GB/s", "gb_per_s", numeric=True),
]
RESOURCES = [
    field("Design", "design"),
    field("Part", "part"),
    field("Source", "source"),
    _count("LUT", "lut"),
    _count("FF", "ff"),
    _count("BRAM36", "bram"),
    _count("URAM", "uram"),
    _count("DSP", "dsp"),
    _count("Levels", "logic_levels"),
]
