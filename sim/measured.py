"""Cycles measured on the RTL (sim/calibration/*.json, written by `make calibrate`) as closed forms.

A file holds {"spec_version", "block", "config", "clock_mhz", "rows": [{"name", "shape", "cycles", "bound_cycles",
"bytes", ...}]}, one block and configuration each. `bound_cycles` is what the block's memory or channel rate allows, so
`cycles = slope * bound_cycles + fixed` separates what scales with traffic from what is paid per command. The fit's
residual is reported with every result that uses it; nothing here is typed in.
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
    """cycles = slope * bound_cycles + fixed_cycles, fitted on `points` measurements of `block`."""

    block: str
    config: str
    slope: float
    fixed_cycles: float
    points: int
    worst_residual: float

    def seconds(self, bound_s: float, commands: float, clock_mhz: float) -> float:
        """Time of `commands` commands whose traffic takes `bound_s` at the block's full rate."""
        return self.slope * bound_s + commands * self.fixed_cycles / (clock_mhz * 1e6)

    def provenance(self) -> dict[str, Any]:
        """Row for the list of assumptions and sources of a result."""
        value = f"cycles = {self.slope:.4f} * bound + {self.fixed_cycles:.1f}"
        source = f"measured on RTL: {self.points} shapes, worst residual {100 * self.worst_residual:.2f}%"
        return {
            "device": f"rtl/{self.block}/{self.config}",
            "field": "cycles",
            "value": value,
            "source": source,
        }


def fit(blocks: tuple[str, ...], directory: Path | None = None) -> CycleFit:
    """The fit of the first of `blocks` that has been measured; raises CalibrationError where none has."""
    return _fit(blocks, directory or CALIBRATION)


@lru_cache(maxsize=64)
def _fit(blocks: tuple[str, ...], directory: Path) -> CycleFit:
    tables = [_table(path) for path in sorted(directory.glob("*.json"))]
    for block in blocks:
        chosen = [t for t in tables if t["block"] == block]
        if chosen:
            return _least_squares(chosen[0])
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


def _least_squares(table: dict[str, Any]) -> CycleFit:
    """Weighted by 1/cycles, so that the residual is relative and short shapes count as much as long ones."""
    points = sorted({(float(r["bound_cycles"]), float(r["cycles"])) for r in table["rows"]})
    if len({x for x, _ in points}) < 2:
        raise CalibrationError(
            f"a closed form of {table['block']} needs two measured shapes, got {len(points)}: run `make calibrate`"
        )
    s = sx = sxx = sy = sxy = 0.0
    for x, y in points:
        w = 1 / y**2
        s, sx, sxx, sy, sxy = s + w, sx + w * x, sxx + w * x * x, sy + w * y, sxy + w * x * y
    slope = (s * sxy - sx * sy) / (s * sxx - sx * sx)
    fixed = (sy - slope * sx) / s
    # No block beats its bound or its own start: noise that says so is projected on the nearest legal form.
    if fixed < 0:
        slope, fixed = sxy / sxx, 0.0
    if slope < 1:
        slope, fixed = 1.0, (sy - sx) / s
    worst = max(abs(slope * x + fixed - y) / y for x, y in points)
    return CycleFit(table["block"], table["config"], slope, fixed, len(points), worst)
