"""cocotb: the default top-k unit on up to 32K scores against golden, in the closed form's cycles."""

import json
import os
import random
from pathlib import Path

import cocotb
import torch
from cocotb.clock import Clock
from cocotb.triggers import ReadOnly, RisingEdge

from golden.storage.topk import argtopk
from hw.storage.topk.timing import digits_used, first_row_cycles, select_cycles

IN_LANES = 4
COUNT_BITS = 16
LEAST, MOST = -(8 * (2**28 - 1)), 8 * (2**28 - 1)
"""Pooled scores of eight saturated queries."""


def score_lists(n, rng):
    """Scores as softmax inputs make them, and as nobody would."""
    gauss = [int(rng.gauss(0, 3) * 65536) for _ in range(n)]
    return {
        "gauss": gauss,
        "equal": [12345] * n,
        "rising": sorted(gauss),
        "falling": sorted(gauss, reverse=True),
        "two values": [rng.choice((-1, 0)) for _ in range(n)],
        "saturated": [rng.choice((LEAST, MOST)) for _ in range(n)],
        "low digit": [65536 + rng.randrange(5) for _ in range(n)],
        "outliers": [MOST if rng.random() < 0.001 else int(rng.gauss(0, 100)) for _ in range(n)],
    }


async def reset(dut):
    dut.rst.value = 1
    for name in ("cmd__valid", "i__valid", "o__ready"):
        getattr(dut, name).value = 0
    await RisingEdge(dut.clk)
    await RisingEdge(dut.clk)
    dut.rst.value = 0


async def transfer(dut, port, value, rng, pause):
    while pause and rng.random() < pause:
        await RisingEdge(dut.clk)
    getattr(dut, f"{port}__payload").value = value
    getattr(dut, f"{port}__valid").value = 1
    while True:
        await ReadOnly()
        ready = int(getattr(dut, f"{port}__ready").value)
        await RisingEdge(dut.clk)
        if ready:
            break
    getattr(dut, f"{port}__valid").value = 0


def packed(keys):
    for n in range(0, len(keys), IN_LANES):
        yield sum((key & 0xFFFFFFFF) << 32 * j for j, key in enumerate(keys[n : n + IN_LANES]))


async def select(dut, keys, k, window, rng, pause):
    """(selected indices, cycles from the last key to the first row, to the last row)."""
    command = len(keys) | k << COUNT_BITS | window << 2 * COUNT_BITS
    await transfer(dut, "cmd", command, rng, 0)
    for beat in packed(keys):
        await transfer(dut, "i", beat, rng, pause)
    marks, cycle, first = [], 0, None
    while True:
        ready = not pause or rng.random() >= pause
        dut.o__ready.value = ready
        await ReadOnly()
        valid, row = int(dut.o__valid.value), int(dut.o__payload.value)
        await RisingEdge(dut.clk)
        cycle += 1
        if not (valid and ready):
            continue
        first = first or cycle
        index, mask = row & 0x7FF, row >> 11 & 0xFFFF
        marks += [16 * index + lane for lane in range(16) if mask >> lane & 1]
        if row >> 27:
            return marks, first, cycle


async def compare(dut, name, keys, k, window, rng, pause):
    marks, first, last = await select(dut, keys, k, window, rng, pause)
    want = argtopk(torch.tensor(keys), k, window=window).tolist()
    wrong = sorted(set(marks) ^ set(want))[:4]
    assert marks == want, f"{name}, n {len(keys)}, k {k}, window {window}: differs at {wrong}"
    if not pause:
        digits = digits_used([key + 2**31 for key in keys], k, window=window)
        assert (first, last) == (first_row_cycles(len(keys), digits), select_cycles(len(keys), digits)), name
    return first


@cocotb.test(timeout_time=60, timeout_unit="ms")
@cocotb.parametrize(pause=[0.0, 0.3])
async def equals_golden(dut, pause):
    Clock(dut.clk, 10, unit="ns").start()
    await reset(dut)
    rng = random.Random(f"{pause}{os.environ.get('TOPK_SEED', 1)}")
    chosen = os.environ.get("TOPK_LISTS", "").split(",")
    for n in map(int, os.environ["TOPK_SIZES"].split()):
        lists = score_lists(n, rng)
        for name, keys in lists.items() if chosen == [""] else [(name, lists[name]) for name in chosen]:
            k = rng.choice([1, max(1, n // 8), n // 2, n])
            await compare(dut, name, keys, k, rng.choice([0, min(k, 4), k]), rng, pause)


@cocotb.test(timeout_time=60, timeout_unit="ms")
async def a_reset_at_any_time_leaves_nothing_behind(dut):
    Clock(dut.clk, 10, unit="ns").start()
    await reset(dut)
    rng = random.Random(4)
    keys = score_lists(500, rng)["gauss"]
    for cycles in (10, 150, 300, 420, 600, 1100):
        task = cocotb.start_soon(select(dut, keys, 60, 4, rng, 0.0))
        for _ in range(cycles):
            await RisingEdge(dut.clk)
        task.cancel()
        await RisingEdge(dut.clk)
        await reset(dut)
        await compare(dut, f"after {cycles} cycles", keys, 60, 4, rng, 0.0)


@cocotb.test(skip="TOPK_CYCLES" not in os.environ, timeout_time=60, timeout_unit="ms")
async def an_eighth_of_32k(dut):
    """Writes the cycles from the last score to the first selected row for real-looking and for worst keys."""
    Clock(dut.clk, 10, unit="ns").start()
    await reset(dut)
    rng = random.Random(2)
    lists = score_lists(32768, rng)
    cycles = {name: await compare(dut, name, lists[name], 4096, 64, rng, 0.0) for name in ("gauss", "equal")}
    Path(os.environ["TOPK_CYCLES"]).write_text(json.dumps(cycles))
