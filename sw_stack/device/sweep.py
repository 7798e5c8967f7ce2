"""The sweep: every cell on the golden device and on the RTL, every byte compared, every cycle predicted.

One simulation per worker runs all its cells: memories are files that are mapped again, so nothing is built or started
per cell.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from golden.spec import KVStrataError
from golden.spec.engine import EngineConfig, State
from golden.spec.memory import MemoryModel
from sw_stack.compile.memory import MemoryTiming
from sw_stack.compile.program import Program
from sw_stack.compile.schedule import schedule
from sw_stack.device.cells import Cell, Work, build, cells
from sw_stack.device.golden import GoldenDevice
from sw_stack.device.state import EngineState
from sw_stack.rtl.engine import EngineProcess, EngineRun, engine_program

LATENCIES = (2, 20)
"""Cells alternate between these fixed memory latencies."""
BATCH = 40
"""Cells that a worker takes at a time."""


@dataclass(frozen=True)
class Result:
    """A cell that gave equal bytes."""

    cell: Cell
    latency_cycles: int
    predicted: int
    measured: int

    @property
    def error_pct(self) -> float:
        """Predicted against measured cycles."""
        return 100 * (self.predicted / self.measured - 1)

    def to_json(self) -> dict[str, Any]:
        """A flat row."""
        return {**asdict(self.cell), **{k: v for k, v in asdict(self).items() if k != "cell"}}


class Runner:
    """One simulation of an engine over memories that answer like `memory`."""

    def __init__(self, config: EngineConfig, memory: MemoryModel) -> None:
        self.config, self.memory = config, memory
        self.process = EngineProcess(config, memory)
        self._folder = tempfile.TemporaryDirectory()

    def close(self) -> None:
        """End the simulation."""
        self.process.close()
        self._folder.cleanup()

    def run(self, cell: Cell) -> Result:
        """A cell on both devices. KVStrataError naming the cell and the first byte that differs."""
        work = build(cell, self.config)
        run = self.execute(cell.name, work)
        program = Program(cell.operator, 0, 0, work.instructions)
        predicted = schedule(program, self.config, {}, MemoryTiming.of(self.memory)).cycles
        return Result(cell, self.memory.latency_cycles, predicted, run.cycles)

    def execute(self, name: str, work: Work, registers: dict[int, int] | None = None) -> EngineRun:
        """Any program with its memories on both devices, likewise."""
        golden = GoldenDevice(EngineState(self.config, work.channels.copy(), work.aux.copy(), 0))
        golden.run(0, registers or {})
        self.load(work)
        run = self.process.run(0, registers or {})
        if run.state is not State.DONE:
            raise KVStrataError(f"{name}: the engine stopped with {run.error.name.lower()}")
        self._compare(name, golden.state)
        return run

    def load(self, work: Work) -> None:
        """Its memories into the simulation."""
        for c, words in enumerate([*work.channels, work.aux]):
            path = Path(self._folder.name) / f"{c}.bin"
            path.unlink(missing_ok=True)
            path.write_bytes(words.tobytes())
            if c < len(work.channels):
                self.process.map_channel(c, path)
            else:
                self.process.map_aux(path)

    def _compare(self, name: str, state: EngineState) -> None:
        for c, words in enumerate(state.channels):
            self._equal(name, f"channel {c}", self.process.read_channel(c, 0, words.size), words.reshape(-1))
        self._equal(name, "auxiliary memory", self.process.read_aux(0, len(state.aux)), state.aux)

    @staticmethod
    def _equal(name: str, where: str, rtl: np.ndarray, golden: np.ndarray) -> None:
        if not np.array_equal(rtl, golden):
            i = int((rtl != golden).argmax())
            raise KVStrataError(f"{name}: byte {i:#x} of {where} is {rtl[i]} on the RTL, {golden[i]} golden")


def _batch(config: EngineConfig, latency: int, part: Sequence[Cell]) -> list[Result]:
    import torch

    torch.set_num_threads(1)
    runner = Runner(config, MemoryModel("fixed", latency_cycles=latency))
    try:
        return [runner.run(cell) for cell in part]
    finally:
        runner.close()


def run(
    config: EngineConfig,
    chosen: Sequence[Cell] | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Result]:
    """Run cells (default: all) in parallel. KVStrataError for the first cell that differs."""
    engine_program(config)
    todo = list(cells() if chosen is None else chosen)
    parts = [(latency, todo[i :: len(LATENCIES)]) for i, latency in enumerate(LATENCIES)]
    tasks = [(latency, part[i : i + BATCH]) for latency, part in parts for i in range(0, len(part), BATCH)]
    results: list[Result] = []
    with ProcessPoolExecutor(workers) as pool:
        jobs = [pool.submit(_batch, config, latency, part) for latency, part in tasks]
        for job in jobs:
            results += job.result()
            progress(len(results), len(todo))
    return results


def table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Per operator: cells, cycles from least to most, and the prediction's error in percent."""
    rows = []
    for operator in dict.fromkeys(r.cell.operator for r in results):
        found = [r for r in results if r.cell.operator == operator]
        errors = [abs(r.error_pct) for r in found]
        rows.append(
            {
                "operator": operator,
                "cells": len(found),
                "least_cycles": min(r.measured for r in found),
                "most_cycles": max(r.measured for r in found),
                "exact_cells": sum(r.predicted == r.measured for r in found),
                "mean_error_pct": round(sum(errors) / len(errors), 3),
                "worst_error_pct": round(max(errors), 3),
            }
        )
    return rows


def page(results: Sequence[Result], engine: str) -> str:
    """docs/cells.md."""
    rows = table(results)
    head = [
        "# Every operator on the RTL: bits and cycles",
        "",
        f"Written by `kvstrata cells --page docs/cells.md`: {len(results):,} cells, operator x shape x batch x",
        f"sequence x format, on the Verilated `{engine}` engine, memory latencies {LATENCIES[0]} and {LATENCIES[1]} in",
        "turn. In every cell all bytes of all memories equal the golden device's. `exact` counts cells whose predicted",
        "cycles (`sw_stack/compile/cycles.py`: recurrences of the RTL's own structure, nothing fitted) equal the",
        "measured ones.",
        "",
        "| operator | cells | cycles from | to | exact | mean error | worst error |",
        "|---|---|---|---|---|---|---|",
    ]
    body = [
        f"| {r['operator']} | {r['cells']} | {r['least_cycles']:,} | {r['most_cycles']:,} | {r['exact_cells']} | "
        f"{r['mean_error_pct']:.3f}% | {r['worst_error_pct']:.3f}% |"
        for r in rows
    ]
    worst = max(results, key=lambda r: abs(r.error_pct))
    tail = f"Worst cell: {worst.cell.name}: {worst.predicted:,} predicted, {worst.measured:,} measured."
    return "\n".join([*head, *body, "", tail, ""])
