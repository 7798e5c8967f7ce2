"""cocotb tests of the vector unit: random instructions under random stalls and resets, with functional coverage."""

import os
import random
from collections import Counter

import cocotb
from amaranth.lib import data
from cocotb.clock import Clock
from cocotb.triggers import RisingEdge

from golden.spec.engine import ENGINE_CONFIGS, Op
from hw.engine.interfaces import GroupSide, OutputScale, VectorOp
from tests.hw.sfu.bench import instruction, signed8
from tests.hw.sfu.scenarios import Case

OPS = (Op.NORM, Op.QUANT, Op.ROPE, Op.GATE, Op.ADD, Op.SOFTMAX, Op.KVQUANT)
CONFIG = ENGINE_CONFIGS[os.environ.get("SFU_CONFIG", "tiny")]
CASES = int(os.environ.get("SFU_CASES", "35"))
COVERED: Counter = Counter()


def pack(layout, values: dict) -> int:
    """Fields as one integer, in the layout's order."""
    word = 0
    for name, field in data.Layout.cast(layout):
        word |= (int(values[name]) & ((1 << field.width) - 1)) << field.offset
    return word


def unpack(layout, word: int) -> dict:
    """One integer as fields."""
    fields = {}
    for name, field in data.Layout.cast(layout):
        value = word >> field.offset & ((1 << field.width) - 1)
        signed = getattr(field.shape, "signed", False)
        fields[name] = value - (1 << field.width) if signed and value >> (field.width - 1) else value
    return fields


class Machine:
    """Buffers around the Verilated unit; the interface that `Case` prepares and checks."""

    def __init__(self, dut, seed: int, stall: float):
        self.dut, self.config, self.lanes = dut, CONFIG, CONFIG.vector_lanes
        self.rng, self.stall = random.Random(seed), stall
        self.vb = [0] * (CONFIG.vb_words * self.lanes)
        self.groups: dict[int, dict] = {}
        self.table: dict[int, dict] = {}
        self.kv: list[dict] = []

    def load(self, word: int, values: list[int]) -> None:
        at = word * self.lanes
        self.vb[at : at + len(values)] = values

    def read(self, word: int, count: int) -> list[int]:
        return self.vb[word * self.lanes :][:count]

    async def start(self) -> None:
        self.dut.unit__op__valid.value = 0
        Clock(self.dut.clk, 10, unit="ns").start()
        cocotb.start_soon(self._memory())
        await self.reset()

    async def reset(self) -> None:
        self.dut.rst.value = 1
        await RisingEdge(self.dut.clk)
        await RisingEdge(self.dut.clk)
        self.dut.rst.value = 0

    async def execute(self, op: dict, cut: int | None = None) -> int:
        """Issue an instruction; returns its error code after `done` or an error, or after `cut` cycles."""
        dut = self.dut
        dut.unit__op__payload.value = pack(VectorOp, op)
        dut.unit__op__valid.value = 1
        await RisingEdge(dut.clk)
        while not dut.unit__op__ready.value:
            await RisingEdge(dut.clk)
        dut.unit__op__valid.value = 0
        for cycle in range(20_000):
            if cycle == cut:
                return 0
            await RisingEdge(dut.clk)
            if error := int(dut.unit__error.value):
                return error
            if dut.unit__done.value:
                return 0
        raise AssertionError(f"{op} hangs")

    def _word(self, address: int) -> int:
        part = self.vb[address * self.lanes : (address + 1) * self.lanes]
        return sum((v & 0xFFFFFFFF) << 32 * k for k, v in enumerate(part))

    async def _memory(self) -> None:
        d, rng = self.dut, self.rng
        readies = [d.a__rdy, d.b__rdy, d.y__rdy, d.kv__ready]
        while True:
            for ready in readies:
                ready.value = rng.random() >= self.stall
            await RisingEdge(d.clk)
            for port, address, out in ((d.a__en, d.a__addr, d.a__data), (d.b__en, d.b__addr, d.b__data)):
                ready = d.a__rdy if port is d.a__en else d.b__rdy
                granted = port.value and ready.value
                out.value = self._word(int(address.value)) if granted else rng.getrandbits(32 * self.lanes)
            if d.y__en.value and d.y__rdy.value:
                self._store(int(d.y__addr.value), int(d.y__data.value), int(d.y__mask.value))
            if d.act__en.value:
                codes = {"codes": signed8(int(d.act__codes.value), 32)}
                self.groups[int(d.act__addr.value)] = codes | unpack(GroupSide, int(d.act__side.value))
            if d.table__en.value:
                self.table[int(d.table__addr.value)] = unpack(OutputScale, int(d.table__entry.value))
            if d.kv__valid.value and d.kv__ready.value:
                record = int(d.kv__payload.value)
                codes = [record >> 8 * k & 255 for k in range(self.lanes)]
                rest = record >> 8 * self.lanes
                fields = {"scale": rest & 0xFFFF, "minimum": rest >> 16 & 0xFFFF, "last": rest >> 32 & 1}
                self.kv.append({"codes": codes} | fields)

    def _store(self, address: int, value: int, mask: int) -> None:
        for k in range(self.lanes):
            if mask >> k & 1:
                v = value >> 32 * k & 0xFFFFFFFF
                self.vb[address * self.lanes + k] = v - (1 << 32) if v >> 31 else v


def cover(case: Case) -> None:
    """What this instruction exercised."""
    op = case.op.name
    whole = "whole" if case.count % CONFIG.vector_lanes == 0 else "partial"
    COVERED[op, "vectors", "one" if case.vectors == 1 else "many"] += 1
    COVERED[op, "b", "shared" if case.shared_b else "own"] += 1
    if op != "KVQUANT":
        COVERED[op, "last word", whole] += 1
    values = [v for row in case.x for v in row]
    for name, hit in (
        ("zero", not any(values)),
        ("extreme", -(1 << 31) in values or (1 << 31) - 1 in values),
        ("negative", min(values) < 0),
    ):
        COVERED[op, "operand", name] += hit
    for field in ("bits", "factor", "rectify", "sinks", "export", "vec_group"):
        if field in case.fields:
            COVERED[op, field, case.fields[field] if field == "bits" else bool(case.fields[field])] += 1


BINS = [
    *((op.name, "vectors", n) for op in OPS for n in ("one", "many")),
    *((op.name, "operand", n) for op in OPS for n in ("zero", "extreme", "negative")),
    *((op.name, "last word", n) for op in OPS if op is not Op.KVQUANT for n in ("whole", "partial")),
    *((op.name, "b", n) for op in (Op.NORM, Op.ROPE, Op.GATE, Op.ADD) for n in ("shared", "own")),
    *(("KVQUANT", "bits", n) for n in (4, 8)),
    *(("QUANT", field, n) for field in ("factor", "rectify") for n in (False, True)),
    *(("SOFTMAX", field, n) for field in ("sinks", "export") for n in (False, True)),
]


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.15, 0.5], seed=[1, 2])
async def random_instructions(dut, stall, seed):
    machine, rng = Machine(dut, seed, stall), random.Random(seed * 1000 + int(stall * 100))
    await machine.start()
    machine.load(0, [rng.randint(-(1 << 31), (1 << 31) - 1) for _ in range(len(machine.vb))])
    for index in range(CASES):
        case = Case(OPS[index % len(OPS)], rng, machine.lanes)
        op = case.prepare(machine)
        assert await machine.execute(op) == 0, f"{op}"
        await RisingEdge(dut.clk)
        case.check(machine)
        cover(case)


@cocotb.test()
async def reset_in_mid_traffic(dut):
    machine, rng = Machine(dut, 5, 0.3), random.Random(5)
    await machine.start()
    for _ in range(25):
        op = Case(rng.choice(OPS), rng, machine.lanes).prepare(machine)
        await machine.execute(op, cut=rng.randint(1, 120))
        await machine.reset()
        for log in (machine.groups, machine.table, machine.kv):
            log.clear()
        case = Case(rng.choice(OPS), rng, machine.lanes)
        assert await machine.execute(case.prepare(machine)) == 0
        await RisingEdge(dut.clk)
        case.check(machine)


@cocotb.test()
async def illegal_instructions_stop_until_reset(dut):
    machine = Machine(dut, 6, 0.0)
    await machine.start()
    for op in (
        instruction(0x99, count=32),
        instruction(Op.ADD, count=0),
        instruction(Op.ADD, count=8, addr=1 << 19),
    ):
        assert await machine.execute(op) in (1, 2, 3)
        for _ in range(20):
            await RisingEdge(dut.clk)
            assert not dut.unit__op__ready.value, "a stopped unit accepts nothing"
        await machine.reset()


@cocotb.test()
async def every_bin_was_covered(_):
    missed = [bin for bin in BINS if not COVERED[bin]]
    assert not missed, f"never exercised: {missed}"
