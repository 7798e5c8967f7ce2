"""Scenario helpers for simulator tests of stream blocks: a producer, a consumer, data and pauses.

A pause pattern is a function that returns the idle cycles before the next transfer; `pauses(seed, p)` makes
the usual ones. The same scenario under several patterns is how handshake faults are found.
"""

import random
from collections.abc import Callable, Iterable
from typing import NamedTuple

from amaranth import ClockDomain, Module
from amaranth.sim import Simulator

CLOCK_SECONDS = 1e-8

Pause = Callable[[], int]


def no_pause() -> int:
    """Never idle."""
    return 0


def pauses(seed: int, probability: float, longest: int = 4) -> Pause:
    """Idle for 1 to `longest` cycles with `probability` before a transfer, reproducibly by `seed`."""
    source = random.Random(seed)
    return lambda: source.randint(1, longest) if source.random() < probability else 0


async def put(ctx, stream, items: Iterable, pause: Pause = no_pause) -> None:
    """Send `items` into an input stream; `valid` holds until the transfer."""
    for item in items:
        idle = pause()
        if idle:
            await ctx.tick().repeat(idle)
        ctx.set(stream.payload, item)
        ctx.set(stream.valid, 1)
        await ctx.tick().until(stream.ready)
        ctx.set(stream.valid, 0)


async def get(ctx, stream, count: int, pause: Pause = no_pause, out: list | None = None) -> list:
    """Take `count` payloads from an output stream; `out` sees them as they come."""
    taken = [] if out is None else out
    for _ in range(count):
        idle = pause()
        if idle:
            await ctx.tick().repeat(idle)
        ctx.set(stream.ready, 1)
        (payload,) = await ctx.tick().sample(stream.payload).until(stream.valid)
        taken.append(payload)
        ctx.set(stream.ready, 0)
    return taken


async def assert_stable(ctx, stream) -> None:
    """Background monitor of the stream rule: once valid, `valid` and the payload hold until the transfer."""
    before = None
    async for _clk_edge, rst_active, valid, ready, payload in ctx.tick().sample(
        stream.valid, stream.ready, stream.payload
    ):
        if rst_active:
            before = None
            continue
        if before is not None:
            assert valid, f"valid fell before the transfer of {before!r}"
            assert payload == before, f"payload changed from {before!r} to {payload!r} before its transfer"
        before = payload if valid and not ready else None


def simulate(dut, *benches: Callable, monitors: Iterable[Callable] = (), vcd: str | None = None) -> None:
    """Run testbenches until all end; `monitors` run in the background and fail the run by raising."""
    top = Module()
    top.domains.sync = (
        ClockDomain()
    )  # a combinational block has none of its own, and benches count in its cycles
    top.submodules.dut = dut
    simulator = Simulator(top)
    simulator.add_clock(CLOCK_SECONDS)
    for bench in benches:
        simulator.add_testbench(bench)
    for monitor in monitors:
        simulator.add_testbench(monitor, background=True)
    if vcd is None:
        simulator.run()
    else:
        with simulator.write_vcd(vcd):
            simulator.run()


class Passage(NamedTuple):
    """What went through a block: payloads taken, and the cycle in which each entered and left."""

    taken: list
    entered: list[int]
    left: list[int]


def through(
    dut, items: Iterable, pause_in: Pause = no_pause, pause_out: Pause = no_pause, *, o=None, top=None
) -> Passage:
    """Send `items` into `dut.i`, take as many from `o` (`dut.o`), hold the output to the stream rule.

    `top` is what the simulator runs when it is more than `dut`. Cycles count from the first clock edge.
    """
    items, out = list(items), dut.o if o is None else o
    passage = Passage([], [], [])

    async def produce(ctx):
        await put(ctx, dut.i, items, pause_in)

    async def consume(ctx):
        await get(ctx, out, len(items), pause_out, passage.taken)

    async def stable(ctx):
        await assert_stable(ctx, out)

    async def clocked(ctx):
        cycle = 0
        watched = (dut.i.valid, dut.i.ready, out.valid, out.ready)
        async for _clk_edge, _rst_active, enters, taken_in, leaves, taken_out in ctx.tick().sample(*watched):
            if enters and taken_in:
                passage.entered.append(cycle)
            if leaves and taken_out:
                passage.left.append(cycle)
            cycle += 1

    simulate(dut if top is None else top, produce, consume, monitors=[stable, clocked])
    return passage
