"""The sweep of operators on the RTL: all bytes equal, all cycles predicted."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest

from golden.spec import KVStrataError
from golden.spec.engine import SMALL, TINY
from golden.spec.memory import MemoryModel
from sw_stack.device import sweep
from sw_stack.device.cells import Cell, build, cells
from sw_stack.device.golden import GoldenDevice
from sw_stack.device.state import EngineState

QUICK = (
    Cell("linear", (96, 128), 2, 0, "w4 group 32"),
    Cell("linear onto residual", (32, 128), 3, 0, "w8 group 64"),
    Cell("norm and linear", (64, 128), 1, 0, "w2 group 64"),
    Cell("gate", (96,), 3, 0, "q16"),
    Cell("rope", (3, 64), 1, 0, "q16"),
    Cell("attention", (3, 64), 1, 33, "kv4"),
    Cell("append k", (64,), 3, 8, "kv8"),
    Cell("append v", (64,), 3, 8, "kv4"),
    Cell("read and write", (7,), 4, 0, "q16"),
)


def test_the_sweep_is_large_and_varied() -> None:
    found = list(cells())
    assert len(set(found)) == len(found) >= 960
    assert len({c.operator for c in found}) == 11
    assert len({c.batch for c in found}) >= 6
    assert len({c.sequence for c in found}) >= 20


def test_operators_are_exact_and_predicted() -> None:
    runner = sweep.Runner(TINY, MemoryModel("fixed", latency_cycles=20))
    try:
        results = [runner.run(cell) for cell in QUICK]
    finally:
        runner.close()
    assert [r.predicted for r in results] == [r.measured for r in results]


def test_a_wrong_byte_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden side is computed from other weights: the report names the first byte that differs."""
    cell = QUICK[0]

    def other(chosen: Cell, config: object) -> object:
        work = build(chosen, TINY)
        rtl = work.channels.copy()
        work.channels[1, 3, 5] ^= 0xFF
        monkeypatch.setattr(
            sweep.Runner, "load", lambda self, work: load(self, dataclasses.replace(work, channels=rtl))
        )
        return work

    load = sweep.Runner.load
    monkeypatch.setattr(sweep, "build", other)
    runner = sweep.Runner(TINY, MemoryModel("fixed", latency_cycles=2))
    try:
        with pytest.raises(
            KVStrataError, match=r"linear 96 x 128.*: byte 0x[0-9a-f]+ of channel 1 is \d+ on the RTL"
        ):
            runner.run(cell)
    finally:
        runner.close()


def test_cells_depend_on_their_data() -> None:
    """A result that a device does not compute would be zero: every cell writes something."""
    for cell in list(cells())[::37]:
        work = build(cell, SMALL)
        state = EngineState(SMALL, work.channels.copy(), work.aux.copy(), 0)
        GoldenDevice(state).run(0, {})
        same = np.array_equal(state.aux, work.aux) and np.array_equal(state.channels, work.channels)
        assert not same, cell.name
        assert build(dataclasses.replace(cell), SMALL).instructions == work.instructions


@pytest.mark.slow
def test_every_cell_is_exact_and_predicted_within_two_percent() -> None:
    results = sweep.run(SMALL, workers=os.cpu_count() or 1)
    assert len(results) >= 960
    worst = max(results, key=lambda r: abs(r.error_pct))
    assert abs(worst.error_pct) <= 2, (
        f"{worst.cell.name}: {worst.predicted} predicted, {worst.measured} measured"
    )
