"""Cycles measured on the RTL (sim/calibration/*.json, written by `make calibrate`) as closed forms.

A file holds {"spec_version", "block", "config", "clock_mhz", "rows": [{"name", "shape", "cycles", "bound_cycles",
"bytes", "commands" (1 where left out), ...}]}, one block and configuration each. `bound_cycles` is what the block's
memory or channel rate allows, so `cycles = slope * bound_cycles + fixed` separates what scales with traffic from what
is paid per command. The fit's residual is reported with every result that uses it; nothing here is typed in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from golden.spec import SPEC_VERSION, KVStrataError

CALIBRATION = Path(__file__).resolve().parent / "calibration"
ROW_FIELDS = ("name", "cycles", "bound_cycles", "bytes")


class CalibrationError(KVStrataError):
    """Measured cycles are missing, stale or malformed; the message names the verb that measures them."""


@dataclass(frozen=True)
class CycleFit:
    """cycles = slope * x + fixed_cycles, x being "bound_cycles" or "bytes", fitted on `points` shapes of `block`."""

    block: str
    config: str
    x: str
    slope: float
    fixed_cycles: float
    points: int
    worst_residual: float

    def cycles(self, amount: float, commands: float) -> float:
        """Cycles of `commands` commands that move `amount` (bytes or bound cycles) in all."""
        return self.slope * amount + commands * self.fixed_cycles

    def provenance(self) -> dict[str, Any]:
        """Row for the list of assumptions and sources of a result."""
        value = f"cycles = {self.slope:.5g} * {self.x} + {self.fixed_cycles:.1f} per command"
        source = f"measured on RTL: {self.points} shapes, worst residual {100 * self.worst_residual:.2f}%"
        return {
            "device": f"rtl/{self.block}/{self.config}",
            "field": "cycles",
            "value": value,
            "source": source,
        }


def fit(blocks: tuple[str, ...], x: str = "bound_cycles", directory: Path | None = None) -> CycleFit:
    """The fit of the first of `blocks` that has been measured, of its fastest configuration.

    Raises CalibrationError where none of them has been measured, or a table is stale or malformed.
    """
    return _fit(blocks, x, directory or CALIBRATION)


@lru_cache(maxsize=64)
def _fit(blocks: tuple[str, ...], x: str, directory: Path) -> CycleFit:
    tables = [_table(path) for path in sorted(directory.glob("*.json"))]
    for block in blocks:
        chosen = [_least_squares(t, x) for t in tables if t["block"] == block]
        if chosen:
            return min(chosen, key=lambda f: f.slope)
    raise CalibrationError(
        f"no measured cycles of {' or '.join(blocks)} under sim/calibration: "
        "run `make calibrate` to measure them on the RTL"
    )


def _table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path.name} is not valid JSON ({error}): run `make calibrate`") from None
    for field in ("spec_version", "block", "config", "clock_mhz", "rows"):
        if field not in table:
            raise CalibrationError(f"{path.name} lacks the field {field}: run `make calibrate`")
    if table["spec_version"] != SPEC_VERSION:
        got = table["spec_version"]
        raise CalibrationError(
            f"{path.name} was measured at spec {got!r}, not {SPEC_VERSION!r}: run `make calibrate`"
        )
    for row in table["rows"]:
        if missing := [f for f in ROW_FIELDS if f not in row]:
            raise CalibrationError(
                f"{path.name} row {row.get('name', '?')} lacks {missing[0]}: run `make calibrate`"
            )
        if not 0 < row["bound_cycles"] <= row["cycles"]:
            raise CalibrationError(
                f"{path.name} row {row['name']}: 0 < bound_cycles <= cycles must hold, "
                f"got {row['bound_cycles']} and {row['cycles']}: run `make calibrate`"
            )
    return table


def _least_squares(table: dict[str, Any], x: str) -> CycleFit:
    """Weighted by 1/cycles, so that the residual is relative and short shapes count as much as long ones."""
    # A row that batches several commands counts per command: what a batch overlaps is not paid twice.
    points = sorted(
        {(r[x] / r.get("commands", 1), r["cycles"] / r.get("commands", 1)) for r in table["rows"]}
    )
    if len({amount for amount, _ in points}) < 2:
        raise CalibrationError(
            f"a closed form of {table['block']} needs two measured shapes, got {len(points)}: run `make calibrate`"
        )
    s = sx = sxx = sy = sxy = 0.0
    for amount, y in points:
        w = 1 / y**2
        s, sx, sxx = s + w, sx + w * amount, sxx + w * amount * amount
        sy, sxy = sy + w * y, sxy + w * amount * y
    slope = (s * sxy - sx * sy) / (s * sxx - sx * sx)
    fixed = (sy - slope * sx) / s
    # No block beats its bound or its own start: noise that says so is projected on the nearest legal form.
    if fixed < 0:
        slope, fixed = sxy / sxx, 0.0
    if x == "bound_cycles" and slope < 1:
        slope, fixed = 1.0, (sy - sx) / s
    worst = max(abs(slope * amount + fixed - y) / y for amount, y in points)
    return CycleFit(table["block"], table["config"], x, slope, fixed, len(points), worst)
