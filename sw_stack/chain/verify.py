"""Hardware that a sweep's points name, measured on RTL in its own configuration and held against the system model.

A point on a computational drive names flash channels, their rate, the model's head size and the page layout; a point on
an FPGA names the engine's channels, lanes and weight format. Each distinct one is built, run on a shape that fits a
simulation, and its cycles are compared with what the system model charges for the same work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from golden.spec import KVStrataError

HEADS, TOKENS = 8, 1024
"""Dense heads and cached tokens of the drive's run."""
ENGINE_CHANNELS = 4
"""Weight channels of the engine's run: rows of a product divide over channels, so a slice behaves as the whole."""
ROWS_PER_LANE, INNER = 16, 2048
Row = Mapping[str, Any]


@dataclass(frozen=True)
class DriveConfig:
    """The unit behind flash channels."""

    channels: int
    channel_gb_per_s: float
    clock_mhz: float
    head_size: int
    channels_per_page: int

    def describe(self) -> str:
        """One line."""
        return f"drive: {self.channels} channels of {self.channel_gb_per_s:g} GB/s, heads of {self.head_size}"


@dataclass(frozen=True)
class CardConfig:
    """The engine on a card."""

    port_bytes_per_cycle: float
    macs_per_cycle: float
    weight_format: str

    def describe(self) -> str:
        """One line."""
        ports, macs = self.port_bytes_per_cycle, self.macs_per_cycle
        return f"engine: {ports:g} B and {macs:g} MAC per cycle, {self.weight_format} weights"


def configurations(rows: Iterable[Row], axes: Sequence[str]) -> list[DriveConfig | CardConfig | str]:
    """Distinct hardware that rests on this repository's RTL, and a sentence for a published one."""
    found: dict[DriveConfig | CardConfig | str, None] = {}
    for row in rows:
        found.update(dict.fromkeys(_of_point(row, axes)))
    return list(found)


def _of_point(row: Row, axes: Sequence[str]) -> Iterable[DriveConfig | CardConfig | str]:
    from sim.api import split_overrides
    from sim.describe.machine import load_machine
    from sim.describe.model import load_model
    from sim.schemes import scheme_class

    named = {k: row[k] for k in axes if k not in ("machine", "model", "scheme")}
    machine = load_machine(row["machine"], split_overrides(named)[0])
    needs = scheme_class(row["scheme"]).needs
    csd, card = machine.csd, machine.fpga
    if "csd" in needs and csd:
        if csd.engine == "rtl":
            size = load_model(row["model"]).head_size
            rate, clock = csd.channel_gb_per_s, csd.unit_mhz
            yield DriveConfig(csd.channels, rate, clock, size, csd.channels_per_page)
        else:
            yield f"{csd.name} is a published unit, whose RTL is not here"
    if "fpga" in needs and card:
        if card.engine == "rtl":
            yield CardConfig(card.port_bytes_per_cycle, card.macs_per_cycle, card.weight_format)
        else:
            yield f"{card.name} is a published engine, whose RTL is not here"


def measure(config: DriveConfig | CardConfig | str) -> dict[str, Any]:
    """{hardware, run, rtl_cycles, model_cycles, difference_pct}; a configuration that the RTL does not have says so
    under `run`, without numbers."""
    if isinstance(config, str):
        return _row(config, "not measured")
    try:
        run, rtl, model = _drive(config) if isinstance(config, DriveConfig) else _card(config)
    except (KVStrataError, ValueError) as error:
        return _row(config.describe(), f"not measured: {error}")
    return _row(config.describe(), run, rtl, model)


def _row(hardware: str, run: str, rtl: float | None = None, model: float | None = None) -> dict[str, Any]:
    difference = 100 * (model / rtl - 1) if rtl and model else None
    values = {"rtl_cycles": rtl, "model_cycles": model, "difference_pct": difference}
    return {"hardware": hardware, "run": run, **values}


def _drive(config: DriveConfig) -> tuple[str, float, float]:
    import numpy as np

    from golden.spec.storage import PAGE_BYTES, token_pages
    from golden.storage.layout import Geometry
    from sim import measured
    from sim.devices.csd import UNIT_BLOCKS
    from sw_stack.rtl.calibrate import READ_NS
    from sw_stack.rtl.storage import Cache, Job, UnitConfig, run

    if config.head_size not in (64, 128):
        raise KVStrataError(f"the unit has heads of 64 or 128, not {config.head_size}")
    random, jobs = np.random.default_rng(1), []
    geometry = Geometry(channels=config.channels)
    cache = Cache(config.head_size, config.channels_per_page, geometry, tail_in_dram=False)
    for head in range(HEADS):
        shapes = (1, TOKENS, TOKENS)
        q, k, v = (random.standard_normal((n, config.head_size)).astype(np.float16) for n in shapes)
        cache.add(0, head, k, v)
        jobs.append(Job(0, head, q, TOKENS))
    rate = round(1e3 * config.channel_gb_per_s)
    unit = UnitConfig(channels=config.channels)
    result = run(cache, jobs, unit, read_ns=READ_NS, channel_mb_per_s=rate, clock_mhz=round(config.clock_mhz))
    size = 2 * token_pages(TOKENS, config.head_size) * PAGE_BYTES * HEADS
    channels = size / (config.channels * rate / config.clock_mhz)
    charged = max(channels, measured.fit(UNIT_BLOCKS, "bytes").cycles(size, HEADS))
    return f"dense, {HEADS} heads, {TOKENS} tokens", result.cycles, charged


def _card(config: CardConfig) -> tuple[str, float, float]:
    import numpy as np

    from golden.spec.engine import SMALL, STEP, WORD_BYTES
    from golden.spec.formats import WEIGHT_FORMATS
    from sim import measured
    from sim.devices.fpga import MATRIX_BLOCKS
    from sw_stack.rtl.matvec import random_codes, run_matvec

    channels = config.port_bytes_per_cycle / WORD_BYTES
    lanes = config.macs_per_cycle / STEP / channels
    if channels != int(channels) or lanes != int(lanes):
        raise KVStrataError(
            f"the engine is built of channels of {WORD_BYTES} bytes with whole lanes of {STEP}, "
            f"not {channels:g} channels with {lanes:g} lanes each"
        )
    part = min(int(channels), ENGINE_CHANNELS)
    engine = replace(SMALL, name=f"{part}x{lanes:g}", channels=part, lanes_per_channel=int(lanes))
    fmt, random, rows = (
        WEIGHT_FORMATS[config.weight_format],
        np.random.default_rng(1),
        ROWS_PER_LANE * engine.lanes,
    )
    codes = random_codes(random, fmt, rows, INNER)
    scales = random.uniform(0.001, 0.02, (rows, INNER // fmt.group))
    minima = -2 * scales if fmt.asymmetric else None
    vector = random.integers(-127, 128, INNER).astype(np.int8)
    result = run_matvec(codes, scales, minima, vector, (20000, -20), fmt, engine)
    charged = measured.fit(MATRIX_BLOCKS).cycles(result.bound_cycles, 1)
    slice_of = "" if part == channels else f", {part} of {channels:g} channels"
    return f"product {rows} x {INNER}{slice_of}", result.cycles, charged
