"""Cycles measured on the RTL (sim/calibration/*.json, written by `make calibrate`) as closed forms.

A file holds {"spec_version", "block", "config", "clock_mhz", "rows": [{"name", "shape", "cycles", "bound_cycles",
"bytes", "commands" (1 where left out), ...}]}, one block and configuration each. `bound_cycles` is what the block's
memory or channel rate allows, so `cycles = slope * bound_cycles + fixed` separates what scales with traffic from what
is paid per command. A table of the block "engine_layer" holds whole decoder layers of a decode step, whose form has
more terms (`fit_layer`). "storage_unit_sparf" holds the "times" of the in-storage unit's blocks, from which SparF
batches follow page by page (`unit_times`), beside runs of the RTL that say how well. A table may say by which "method"
its cycles came, else every row is a run of the RTL. A fit's residual is reported with every result that uses it;
nothing here is typed in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from golden.spec import SPEC_VERSION, KVStrataError
from golden.spec.engine import U280, KVLayout
from golden.storage.batch import UnitTimes

CALIBRATION = Path(__file__).resolve().parent / "calibration"
ROW_FIELDS = ("name", "cycles", "bound_cycles", "bytes")
LAYER_BLOCK = "engine_layer"
LAYER_TERMS = ("kv_words", "drained", "kv_heads", "hidden", "layer")
"""What a layer's cycles beyond its weights grow with: words per channel of keys and values, cycles that scores take the
drain beyond those words (the queries of a group share them), KV heads whose vectors are appended, hidden size (norms,
RoPE, residuals), and what starts once."""
ON_RTL = "measured on RTL"


def cached_token_terms(heads: int, kv_heads: int, head_size: int) -> dict[str, float]:
    """Terms kv_words and drained of one cached token of a layer on `u280`, whose drain takes a vector word a cycle."""
    words = kv_heads * KVLayout(U280, 4, head_size, U280.lanes).words_per_token
    return {"kv_words": words, "drained": max(0.0, heads / U280.vector_lanes - words)}


class CalibrationError(KVStrataError):
    """Measured cycles are missing, stale or malformed; the message names the verb that measures them."""


@dataclass(frozen=True)
class CycleFit:
    """cycles = slope * x + fixed_cycles * commands + start_cycles per batch of commands, x being "bound_cycles" or
    "bytes", fitted on `points` shapes of `block`."""

    block: str
    config: str
    x: str
    slope: float
    fixed_cycles: float
    points: int
    worst_residual: float
    start_cycles: float = 0.0

    def cycles(self, amount: float, commands: float) -> float:
        """Cycles of a batch of `commands` commands that move `amount` (bytes or bound cycles) in all."""
        return self.slope * amount + commands * self.fixed_cycles + self.start_cycles

    def provenance(self) -> dict[str, Any]:
        """Row for the list of assumptions and sources of a result."""
        value = f"cycles = {self.slope:.5g} * {self.x} + {self.fixed_cycles:.1f} per command"
        if self.start_cycles:
            value += f" + {self.start_cycles:.1f} per batch"
        source = f"{ON_RTL}: {self.points} shapes, worst residual {100 * self.worst_residual:.2f}%"
        return _source_row(self.block, self.config, value, source)


@dataclass(frozen=True)
class LayerFit:
    """cycles of a decoder layer = those of its weights at the memory's rate + `per` each of LAYER_TERMS."""

    config: str
    weights: str
    per: dict[str, float]
    points: int
    worst_residual: float
    method: str

    def provenance(self) -> dict[str, Any]:
        """Row for the list of assumptions and sources of a result."""
        value = "cycles = weights at the memory's rate" + "".join(
            f" + {cycles:.4g} {'once' if term == 'layer' else f'* {term}'}"
            for term, cycles in self.per.items()
        )
        source = f"{self.method}: {self.points} layers, worst residual {100 * self.worst_residual:.2f}%"
        return _source_row(LAYER_BLOCK, f"{self.config}, {self.weights}", value, source)


def _source_row(block: str, config: str, value: str, source: str) -> dict[str, Any]:
    return {"device": f"rtl/{block}/{config}", "field": "cycles", "value": value, "source": source}


@dataclass(frozen=True)
class BlockTimes:
    """Cycles of a unit's blocks, from which `golden.storage.batch` follows a batch page by page."""

    block: str
    config: str
    times: tuple[tuple[str, int], ...]
    points: int
    worst_residual: float
    """Of the recurrence against the RTL on the same pages."""

    def provenance(self) -> dict[str, Any]:
        """Row for the list of assumptions and sources of a result."""
        source = f"{ON_RTL}: {self.points} batches, worst residual {100 * self.worst_residual:.2f}%"
        return _source_row(self.block, self.config, "page by page (golden.storage.batch)", source)


def unit_times(block: str, directory: Path | None = None) -> BlockTimes:
    """The block times of a table that holds them.

    Raises CalibrationError where there is none, or it is stale or malformed.
    """
    return _unit_times(block, directory or CALIBRATION)


@lru_cache(maxsize=16)
def _unit_times(block: str, directory: Path) -> BlockTimes:
    for table in map(read_table, sorted(directory.glob("*.json"))):
        if table["block"] == block:
            if not table.get("times"):
                raise CalibrationError(
                    f"the table of {block} lacks times of its blocks: run `make calibrate`"
                )
            if differ := {f.name for f in fields(UnitTimes)} ^ set(table["times"]):
                raise CalibrationError(
                    f"the table of {block} is not of this unit: its times differ in {', '.join(sorted(differ))}: "
                    "run `make calibrate`"
                )
            rows = [r for r in table["rows"] if "recurrence_cycles" in r]
            worst = max((abs(r["recurrence_cycles"] / r["cycles"] - 1) for r in rows), default=0.0)
            return BlockTimes(block, table["config"], tuple(table["times"].items()), len(rows), worst)
    raise CalibrationError(
        f"no block times of {block} under sim/calibration: run `make calibrate` to measure them on the RTL"
    )


def fit(blocks: tuple[str, ...], x: str = "bound_cycles", directory: Path | None = None) -> CycleFit:
    """The fit of the first of `blocks` that has been measured, of its fastest configuration.

    Raises CalibrationError where none of them has been measured, or a table is stale or malformed.
    """
    return _fit(blocks, x, directory or CALIBRATION)


def fit_layer(weights: str, directory: Path | None = None) -> LayerFit:
    """The form of a decode step's layer with weights of format `weights`.

    Raises CalibrationError where no such layer is in a table, or a table is stale or malformed.
    """
    return _fit_layer(weights, directory or CALIBRATION)


@lru_cache(maxsize=64)
def _fit_layer(weights: str, directory: Path) -> LayerFit:
    tables = [t for t in map(read_table, sorted(directory.glob("*.json"))) if t["block"] == LAYER_BLOCK]
    for table in tables:
        if rows := [r for r in table["rows"] if r.get("weights") == weights]:
            return _layer_form(table, weights, rows)
    raise CalibrationError(
        f"no decoder layer of {weights} weights in a table {LAYER_BLOCK} under sim/calibration: "
        "run `make calibrate` to measure it"
    )


def _layer_form(table: dict[str, Any], weights: str, rows: list[dict[str, Any]]) -> LayerFit:
    """Least squares of relative errors; no term is below zero: the least one is left out until none is."""
    if len({tuple(r["shape"]) for r in rows}) <= len(LAYER_TERMS):
        raise CalibrationError(
            f"a closed form of {LAYER_BLOCK} with {weights} weights needs more than {len(LAYER_TERMS)} layers, "
            f"got {len(rows)}: run `make calibrate`"
        )
    terms, per = list(LAYER_TERMS), {}
    while terms:
        columns = [[Fraction(_term(r, t)) / Fraction(r["cycles"]) for t in terms] for r in rows]
        rest = [1 - Fraction(r["weight_cycles"]) / Fraction(r["cycles"]) for r in rows]
        per = dict(zip(terms, _normal_equations(columns, rest)))
        least = min(per, key=lambda term: per[term])
        if per[least] >= 0:
            break
        terms.remove(least)
    worst = max(
        abs((r["weight_cycles"] + sum(v * _term(r, t) for t, v in per.items())) / r["cycles"] - 1)
        for r in rows
    )
    method = table.get("method", ON_RTL)
    return LayerFit(
        table["config"], weights, {t: per.get(t, 0.0) for t in LAYER_TERMS}, len(rows), worst, method
    )


def _term(row: dict[str, Any], term: str) -> float:
    return 1.0 if term == "layer" else float(row[term])


@lru_cache(maxsize=64)
def _fit(blocks: tuple[str, ...], x: str, directory: Path) -> CycleFit:
    tables = [read_table(path) for path in sorted(directory.glob("*.json"))]
    for block in blocks:
        chosen = [_least_squares(t, x) for t in tables if t["block"] == block]
        if chosen:
            return min(chosen, key=lambda f: f.slope)
    raise CalibrationError(
        f"no measured cycles of {' or '.join(blocks)} under sim/calibration: "
        "run `make calibrate` to measure them on the RTL"
    )


def read_table(path: Path) -> dict[str, Any]:
    """A table of measured cycles as its file has it; `CalibrationError` for one that is malformed or stale."""
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
    needed: tuple[str, ...] = ROW_FIELDS
    if table["block"] == LAYER_BLOCK:
        needed = (*ROW_FIELDS, "weights", "shape", "weight_cycles", *LAYER_TERMS[:-1])
    for row in table["rows"]:
        if missing := [f for f in needed if f not in row]:
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
    """Weighted by 1/cycles, so that the residual is relative and short shapes count as much as long ones.

    What a batch of commands pays once is told from what each command pays where batches of several sizes were
    measured. No block beats its bound or its own start: a term that noise makes illegal is fixed at its limit.
    """
    rows = table["rows"]
    points = [(float(r[x]), float(r.get("commands", 1)), float(r["cycles"])) for r in rows]
    if len({amount / commands for amount, commands, _ in points}) < 2:
        shapes = len({amount / commands for amount, commands, _ in points})
        raise CalibrationError(
            f"a closed form of {table['block']} needs two measured shapes, got {shapes}: run `make calibrate`"
        )
    least = 1.0 if x == "bound_cycles" else 0.0
    several = len({c for _, c, _ in points}) > 1 and len(points) > 3
    forms = [
        _solved(points, t, least)
        for t in (("sfb", "sb", "sf", "fb", "b", "s", "f") if several else ("sf", "s", "f"))
    ]
    legal = [form for form in forms if form[0] >= least and form[1] >= 0 and form[2] >= 0]
    slope, fixed, start = min(legal, key=lambda form: sum(_miss(form, p) ** 2 for p in points))
    worst = max(abs(_miss((slope, fixed, start), p)) for p in points)
    return CycleFit(table["block"], table["config"], x, slope, fixed, len(points), worst, start)


def _miss(form: tuple[float, float, float], point: tuple[float, float, float]) -> float:
    """Relative error of (slope, fixed, start) at (amount, commands, cycles)."""
    amount, commands, cycles = point
    return (form[0] * amount + form[1] * commands + form[2]) / cycles - 1


def _solved(points: list[tuple[float, float, float]], terms: str, least: float) -> tuple[float, float, float]:
    """(slope, fixed per command, start per batch); a term that `terms` does not name is at its least."""
    rows: list[list[Fraction]] = []
    rest: list[Fraction] = []
    for amount, commands, cycles in points:
        a, c, y = Fraction(amount), Fraction(commands), Fraction(cycles)
        columns = {"s": a / y, "f": c / y, "b": 1 / y}
        rows.append([columns[t] for t in terms])
        rest.append(1 - Fraction(0.0 if "s" in terms else least) * a / y)
    values = dict(zip(terms, _normal_equations(rows, rest)))
    return values.get("s", least), values.get("f", 0.0), values.get("b", 0.0)


def _normal_equations(rows: list[list[Fraction]], rest: list[Fraction]) -> list[float]:
    """Least squares of rows * x = rest, in rational arithmetic, so that every machine finds the same bits."""
    size = range(len(rows[0]))
    normal = [[sum((r[i] * r[j] for r in rows), Fraction(0)) for j in size] for i in size]
    right = [sum((r[i] * v for r, v in zip(rows, rest)), Fraction(0)) for i in size]
    for i in size:
        for k in range(i + 1, len(size)):
            factor = normal[k][i] / normal[i][i]
            normal[k] = [x - factor * y for x, y in zip(normal[k], normal[i])]
            right[k] -= factor * right[i]
    found = [Fraction(0)] * len(size)
    for i in reversed(size):
        later = sum((normal[i][j] * found[j] for j in size if j > i), Fraction(0))
        found[i] = (right[i] - later) / normal[i][i]
    return list(map(float, found))
