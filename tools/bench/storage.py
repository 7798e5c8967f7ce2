"""Benchmarks of the in-storage attention unit: RTL behind 8 channels of 1.4 GB/s at 285 MHz, and its resources."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from golden.spec.storage import PAGE_BYTES, PAGE_CHANNEL_BEATS, Status, token_pages
from golden.storage.layout import Geometry
from hw.storage.compose import resource_groups
from sw_stack.report.resources import table_ii_sum
from sw_stack.rtl import selections
from sw_stack.rtl.storage import BatchRun, Cache, Job, UnitConfig
from sw_stack.rtl.storage import run as run_batch

UNIT = UnitConfig(channels=8, lanes=1, max_tokens=4096)
"""The published drive; OPT-13B has no grouped queries, so one query lane per kernel."""
HEAD = 128
FLASH = {"read_ns": 50_000}
BYTES_PER_CYCLE = 8 * 1400 / 285
HEADS = 40
SPARF_TOKENS, SPARF = 4096, selections.Selection(r=16, m=2, window=64)


def _row(name: str, value: float, unit: str, target: float | None, better: str) -> dict[str, Any]:
    return {"id": name, "value": value, "unit": unit, "target": target, "better": better}


def _checked(result: BatchRun, jobs: int) -> BatchRun:
    bad = [n for n in range(jobs) if result.completions[n].status != Status.OK]
    assert not bad, f"jobs {bad} did not complete"
    return result


@cache
def dense() -> float:
    """Fraction of the aggregate channel rate, first command to last completion: S = 1536, 40 heads."""
    rng = np.random.default_rng(1)
    cache, jobs = Cache(HEAD, tail_in_dram=False), []
    for head in range(HEADS):
        q, k, v = selections.head(rng, 1536, clustered=False)
        cache.add(0, head, k, v)
        jobs.append(Job(0, head, q, 1536))
    result = _checked(run_batch(cache, jobs, UNIT, **FLASH), HEADS)
    pages = 2 * token_pages(1536, HEAD) * HEADS
    return pages * PAGE_BYTES / BYTES_PER_CYCLE / result.cycles


@cache
def _sparf(clustered: bool, dies: int) -> tuple[selections.Batch, int]:
    """The batch, and its cycles on the RTL."""
    batch = selections.batch(
        np.random.default_rng(2),
        HEADS,
        SPARF_TOKENS,
        clustered=clustered,
        selection=SPARF,
        geometry=Geometry(dies=dies),
    )
    return batch, _checked(run_batch(batch.cache, batch.jobs, UNIT, dies=dies, **FLASH), HEADS).cycles


def bound_ratio(clustered: bool, dies: int = Geometry().dies) -> float:
    """Time over that of streaming the touched pages."""
    batch, cycles = _sparf(clustered, dies)
    return cycles / (batch.page_bytes / BYTES_PER_CYCLE)


def speedup(clustered: bool) -> float:
    """Dense time of the same heads over SparF time."""
    batch, cycles = _sparf(clustered, Geometry().dies)
    every = _checked(run_batch(batch.cache, batch.dense()[:8], UNIT, **FLASH), 8)
    return every.cycles * HEADS / 8 / cycles


def filter_beat_fraction(pages: int = 12) -> float:
    """Raw beats per cycle into a page filter, over random marks of all page kinds, from the first beat to the last: a
    page starts once it is granted, and the kernel never stalls."""
    from amaranth.sim import Simulator

    from golden.spec.storage import PageKind
    from golden.storage.layout import PageMark, filtered_beats
    from hw.storage.nfc.filter import PageFilter

    rng, dut = np.random.default_rng(4), PageFilter()
    granted: list[int] = []
    busy, first = 0, True
    marks = [
        PageMark(kind, 0, 1 + int(rng.integers(0, 3 if kind is PageKind.K_CHANNEL else 0xFFFF)))
        for kind in map(PageKind, rng.integers(0, 3, pages).tolist())
    ]

    async def describe(ctx: Any) -> None:
        for mark in marks:
            rows = filtered_beats(mark, HEAD, 2)
            fields = {"kind": mark.kind, "wide_head": 1, "m_log2": 1, "mask": mark.mask, "last_row": rows - 1}
            ctx.set(dut.desc[0].payload, fields)
            ctx.set(dut.desc[0].valid, 1)
            await ctx.tick().until(dut.desc[0].ready)
        ctx.set(dut.desc[0].valid, 0)

    async def watch(ctx: Any) -> None:
        async for _, _, valid, slot in ctx.tick().sample(dut.grant[0].valid, dut.grant[0].payload):
            granted.extend([int(slot)] * valid)

    async def stream(ctx: Any) -> None:
        nonlocal busy, first
        ctx.set(dut.o[0].ready, 1)
        for _ in range(pages):
            while not granted:
                busy += not first
                await ctx.tick()
            slot, first = granted.pop(0), False
            for beat in range(PAGE_CHANNEL_BEATS):
                last = beat == PAGE_CHANNEL_BEATS - 1
                ctx.set(dut.i.payload, {"data": beat, "first": beat == 0, "last": last, "slot": slot})
                ctx.set(dut.i.valid, 1)
                await ctx.tick()
                busy += 1
            ctx.set(dut.i.valid, 0)

    simulator = Simulator(dut)
    simulator.add_clock(1 / 285e6)
    simulator.add_testbench(describe)
    simulator.add_testbench(stream)
    simulator.add_testbench(watch, background=True)
    simulator.run()
    return pages * PAGE_CHANNEL_BEATS / busy


def topk_share_32k() -> float:
    """Time that argtopk adds to a lone SparF step at S = 32768, over the step's time at the flash bound.

    Both parts are closed forms that tests hold against the RTL; nothing hides the selection in a lone step, and the
    step is taken without array time, so the share is the most it can be.
    """
    from hw.storage.topk.timing import digits_used, select_cycles

    tokens = 32768
    batch = selections.batch(np.random.default_rng(3), 1, tokens, clustered=True, selection=SPARF)
    keys = [int(key) + (1 << 31) for key in batch.traces[0].scores]
    added = select_cycles(tokens, digits_used(keys, tokens // 8, window=SPARF.window))
    return added / (added + batch.page_bytes / BYTES_PER_CYCLE)


def run() -> list[dict[str, Any]]:
    """All rows of this area."""
    rows = [_row("storage.dense.flash_fraction", dense(), "ratio", 0.95, "higher")]
    for name in ("clustered", "random"):
        clustered = name == "clustered"
        rows.append(_row(f"storage.sparf.bound_ratio.{name}", bound_ratio(clustered), "ratio", 1.10, "lower"))
        rows.append(
            _row(f"storage.sparf.speedup_over_dense.{name}", speedup(clustered), "ratio", None, "higher")
        )
    half = Geometry().dies // 2  # arrays, not the bus, then set the pace of clustered selections
    rows.append(
        _row(
            f"storage.sparf.bound_ratio.clustered.{half}_dies",
            bound_ratio(True, half),
            "ratio",
            None,
            "lower",
        )
    )
    rows.append(_row("storage.filter.beat_fraction", filter_beat_fraction(), "beats/cycle", 1.0, "higher"))
    rows.append(_row("storage.topk.step_share_32k", topk_share_32k(), "ratio", 0.10, "lower"))
    total, published = resource_groups()["sum"], table_ii_sum()
    for name in ("lut", "ff", "bram", "dsp"):
        rows.append(_row(f"storage.z7045.{name}", getattr(total, name), "count", published[name], "lower"))
    rows.append(_row("storage.z7045.logic_levels", total.logic_levels, "levels", 6, "lower"))
    return rows
