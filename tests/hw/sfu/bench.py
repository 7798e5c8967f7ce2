"""A vector unit with a memory model around it: buffers as Python lists, grants and readiness at random."""

import random
from collections.abc import Callable, Iterable

from amaranth import ResetInserter, Signal
from amaranth.lib import data
from amaranth.sim import Simulator

from golden.spec.engine import EngineConfig, Op
from hw.engine.interfaces import VectorOp
from hw.engine.sfu.unit import VectorUnit
from hw.lib.testing import CLOCK_SECONDS

FIELDS = tuple(name for name, _ in data.Layout.cast(VectorOp))


RESET = object()


def instruction(op: Op | int, **fields: int) -> dict:
    """A `VectorOp` payload; fields not named are zero, `vectors` is one."""
    values = dict.fromkeys(FIELDS, 0) | {"vectors": 1} | fields
    values["exponent"] &= 63
    values["low"] &= 0xFFFF
    return values | {"op": int(op)}


def signed8(bits: int, count: int) -> list[int]:
    codes = [bits >> 8 * k & 255 for k in range(count)]
    return [c - 256 if c > 127 else c for c in codes]


class Machine:
    """Buffers and a log: `vb` elements, `groups` and `table` by address, `kv` records, cycles per instruction."""

    def __init__(self, config: EngineConfig, seed: int = 0, stall: float = 0.0):
        self.config, self.lanes = config, config.vector_lanes
        self.rng, self.stall = random.Random(seed), stall
        self.vb = [0] * (config.vb_words * self.lanes)
        self.groups: dict[int, dict] = {}
        self.table: dict[int, dict] = {}
        self.kv: list[dict] = []
        self.cycles: list[int] = []
        self.error = 0
        self.dut = VectorUnit(config)
        self.reset = Signal()

    def load(self, word: int, values: list[int]) -> None:
        at = word * self.lanes
        self.vb[at : at + len(values)] = values

    def read(self, word: int, count: int) -> list[int]:
        return self.vb[word * self.lanes :][:count]

    def run(self, ops: Iterable[dict | Callable], limit: int = 200_000) -> None:
        """Execute `ops` in order, with callables and RESETs in between.

        An instruction ends when it is done, when the unit reports an error, or at its field `cut`, in cycles.
        """
        simulator = Simulator(ResetInserter(self.reset)(self.dut))
        simulator.add_clock(CLOCK_SECONDS)

        async def issue(ctx):
            for op in ops:
                if op is RESET:
                    await self._reset(ctx)
                elif callable(op):
                    op()
                else:
                    await self._issue(ctx, op, limit)
            await ctx.tick().repeat(4)

        simulator.add_testbench(issue)
        simulator.add_testbench(self._memory, background=True)
        simulator.run()

    async def _reset(self, ctx) -> None:
        ctx.set(self.reset, 1)
        await ctx.tick()
        ctx.set(self.reset, 0)
        # The memory model still stores what was on the ports when reset came.
        await ctx.tick()
        self.error = 0

    async def _issue(self, ctx, op: dict, limit: int) -> None:
        port, cycles = self.dut.unit, 0
        op, cut = {k: v for k, v in op.items() if k != "cut"}, op.get("cut")
        ctx.set(port.op.payload, op)
        ctx.set(port.op.valid, 1)
        await ctx.tick().until(port.op.ready)
        ctx.set(port.op.valid, 0)
        done = 0
        while not (done or self.error or cycles == cut):
            _, _, done, self.error = await ctx.tick().sample(port.done, port.error)
            cycles += 1
            assert cycles < limit, f"{op} did not finish in {limit} cycles"
        if done:
            self.cycles.append(cycles)

    def _word(self, address: int) -> int:
        part = self.vb[address * self.lanes : (address + 1) * self.lanes]
        return sum((v & 0xFFFFFFFF) << 32 * k for k, v in enumerate(part))

    def _store(self, address: int, value: int, mask: int) -> None:
        for k in range(self.lanes):
            if mask >> k & 1:
                v = value >> 32 * k & 0xFFFFFFFF
                self.vb[address * self.lanes + k] = v - (1 << 32) if v >> 31 else v

    async def _memory(self, ctx):
        d = self.dut
        garbage = int("5a" * (4 * self.lanes), 16)
        while True:
            for ready in (d.a.rdy, d.b.rdy, d.y.rdy, d.kv.ready):
                ctx.set(ready, self.rng.random() >= self.stall)
            sample = await ctx.tick().sample(
                *(d.a.en, d.a.rdy, d.a.addr, d.b.en, d.b.rdy, d.b.addr),
                *(d.y.en, d.y.rdy, d.y.addr, d.y.data, d.y.mask),
                *(d.act.en, d.act.addr, d.act.codes, d.act.side, d.table.en, d.table.addr, d.table.entry),
                *(d.kv.valid, d.kv.ready, d.kv.payload),
            )
            a_en, a_rdy, a_addr, b_en, b_rdy, b_addr, y_en, y_rdy, y_addr, y_data, y_mask = sample[2:13]
            act_en, act_addr, codes, side, table_en, table_addr, entry, kv_valid, kv_ready, kv = sample[13:]
            # Data holds for the one cycle after the grant; otherwise the port shows rubbish.
            ctx.set(d.a.data, self._word(a_addr) if a_en and a_rdy else garbage)
            ctx.set(d.b.data, self._word(b_addr) if b_en and b_rdy else garbage)
            if y_en and y_rdy:
                self._store(y_addr, y_data, y_mask)
            if act_en:
                sidecar = {"addend": side.addend, "shift": side.shift, "decay": side.decay}
                self.groups[act_addr] = {"codes": signed8(codes, 32)} | sidecar
            if table_en:
                self.table[table_addr] = {"pre": entry.pre, "mult": entry.mult, "post": entry.post}
            if kv_valid and kv_ready:
                codes_out = [kv.codes[k] for k in range(self.lanes)]
                self.kv.append(
                    {"codes": codes_out, "scale": kv.scale, "minimum": kv.minimum, "last": kv.last}
                )
