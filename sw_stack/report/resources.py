"""Device resources of the whole engine and the whole in-storage unit, beside those of the published designs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from golden.spec import KVStrataError
from hw.engine.compose import DSP_BUDGET
from hw.flow.cache import ROOT, write_atomically

FILE = ROOT / "docs" / "resources.json"
"""What `kvstrata synth` found last; a test of the regression holds it to synthesis."""
COUNTED = ("lut", "ff", "bram", "uram", "dsp", "logic_levels")
ENGINE, UNIT = "engine, u280 configuration", "in-storage unit, 4 query lanes per kernel"

TABLE_II: dict[str, dict[str, float]] = {
    "Attention kernels": {"lut": 99_200, "ff": 207_300, "bram": 96, "dsp": 768},
    "argtopk": {"lut": 5_830, "ff": 3_870, "bram": 24, "dsp": 0},
    "NFC": {"lut": 58_332, "ff": 27_800, "bram": 96, "dsp": 0},
}
"""The published unit on the Zynq-7045, one query lane per kernel (InstInfer, Table II)."""
ENGINES: dict[str, dict[str, float]] = {
    "published: AccLLM": {"lut": 420_000, "dsp": DSP_BUDGET},
    "published: FlightLLM": {"lut": 574_000, "dsp": 6_345},
    "device: XCU280": {"lut": 1_303_680, "ff": 2_607_360, "bram": 2016, "uram": 960, "dsp": 9024},
}
"""Engines on the U280 as published (AccLLM's and FlightLLM's resource tables), and the device (DS963)."""
ZYNQ: dict[str, float] = {"lut": 218_600, "ff": 437_200, "bram": 545, "dsp": 900}
"""The Zynq-7045 (InstInfer, Table II: available)."""


def table_ii_sum() -> dict[str, float]:
    """The published attention kernels, argtopk and NFC together."""
    return {name: sum(row[name] for row in TABLE_II.values()) for name in ("lut", "ff", "bram", "dsp")}


def synthesised() -> list[dict[str, Any]]:
    """Rows of `design`, `part` and `COUNTED`: the `u280` engine by part and in all, the unit by row of Table II.

    Composed of synthesised blocks by the rules of `hw.engine.compose` and `hw.storage.compose`; minutes per block
    that was not synthesised before.
    """
    from golden.spec.engine import U280
    from hw.engine.compose import compose
    from hw.storage.compose import resource_groups

    found = [(ENGINE, part, row) for part, row in compose(U280).items()]
    found += [(UNIT, "total" if part == "sum" else part, row) for part, row in resource_groups().items()]
    return [
        {"design": design, "part": part, **{name: getattr(row, name) for name in COUNTED}}
        for design, part, row in found
    ]


def store(rows: Sequence[Mapping[str, Any]], path: Path = FILE) -> None:
    """Write `rows`, whole or not at all."""
    write_atomically(path, json.dumps(list(rows), indent=1) + "\n")


def stored(path: Path = FILE) -> list[dict[str, Any]]:
    """What was stored last; `KVStrataError` for a file that is not such a table."""
    try:
        rows = json.loads(path.read_text())
        return [{key: row[key] for key in ("design", "part", *COUNTED)} for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise KVStrataError(
            f"{path.name} must hold the resources that `kvstrata synth` writes: {error!r}"
        ) from None


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`rows` of whole designs beside the published ones and their devices; None where nothing was published."""
    ours = {(row["design"], row["part"]): row for row in rows}

    def line(design: str, part: str, source: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return {"design": design, "part": part, "source": source} | {n: values.get(n) for n in COUNTED}

    table = [line(ENGINE, "total", "here", ours[ENGINE, "total"])]
    table += [line(ENGINE, "total", source, values) for source, values in ENGINES.items()]
    for part, published in (*TABLE_II.items(), ("total", table_ii_sum())):
        table.append(line(UNIT, part, "here", ours[UNIT, part]))
        table.append(line(UNIT, part, "published: InstInfer", published))
    return [*table, line(UNIT, "total", "device: XC7Z045", ZYNQ)]
