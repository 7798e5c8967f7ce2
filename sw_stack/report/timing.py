"""The timing diagram: what the matrix unit's handshakes do, cycle by cycle, in a simulation of the real block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 32
INNER = 128


def record(cycles: int = 56) -> dict[str, list[int]]:
    """Handshakes of a W4 product of `ROWS` x `INNER` on the `tiny` engine, one value per cycle.

    Channel 0's words are withheld for a few cycles in the middle, so that a stall is seen.
    """
    from amaranth.sim import Simulator

    from golden.spec.engine import TINY
    from golden.spec.formats import W4
    from hw.engine.core import MatVecCore
    from sw_stack.rtl.matvec import matrix_operation, weight_stream

    dut = MatVecCore(TINY)
    operation = matrix_operation(TINY, weight_stream("w4", W4.group), ROWS, INNER, 1)
    shown: dict[str, list[int]] = {name: [] for name in SIGNALS}

    async def drive(ctx) -> None:  # type: ignore[no-untyped-def]
        ctx.set(dut.op, operation)
        ctx.set(dut.op_valid, 1)
        accepted = False
        for cycle in range(cycles):
            stalled = 14 <= cycle < 18
            ctx.set(dut.words_valid, 0b10 if stalled else 0b11)
            ready = ctx.get(dut.op_ready)
            for name, read in SIGNALS.items():
                shown[name].append(int(read(ctx, dut)))
            await ctx.tick()
            accepted = accepted or bool(ready)
            ctx.set(dut.op_valid, 0 if accepted else 1)

    simulator = Simulator(dut)
    simulator.add_clock(1e-9)
    simulator.add_testbench(drive)
    simulator.run()
    return shown


SIGNALS = {
    "op accepted": lambda ctx, dut: ctx.get(dut.op_valid) and ctx.get(dut.op_ready),
    "words valid (channel 0)": lambda ctx, dut: ctx.get(dut.words_valid) & 1,
    "words ready (channel 0)": lambda ctx, dut: ctx.get(dut.words_ready) & 1,
    "word taken": lambda ctx, dut: ctx.get(dut.taken),
    "step fired": lambda ctx, dut: ctx.get(dut.fired),
    "output written": lambda ctx, dut: ctx.get(dut.y_en),
    "done": lambda ctx, dut: ctx.get(dut.done),
}


def draw(signals: Mapping[str, Sequence[int]]) -> Figure:
    """Square waves, one row per signal, cycle numbers below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.45 * len(signals) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    cycles = len(next(iter(signals.values())))
    for row, (name, values) in enumerate(signals.items()):
        base = -1.0 * row
        levels = [base + 0.7 * value for value in values]
        axes.step(range(cycles + 1), [*levels, levels[-1]], where="post", color="#00798c", linewidth=1.4)
        axes.fill_between(
            range(cycles + 1), base, [*levels, levels[-1]], step="post", color="#00798c", alpha=0.15
        )
        axes.text(-0.8, base + 0.3, name, ha="right", va="center", fontsize=9)
    axes.set(xlim=(0, cycles), ylim=(-len(signals) + 0.8, 1), xlabel="cycle", yticks=[])
    axes.grid(axis="x", alpha=0.25)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    return figure
