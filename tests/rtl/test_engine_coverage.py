"""Functional coverage of the whole engine: which bins its programs hit on RTL, every result equal to golden's bytes.

`GOALS` is the list. A bin counts when a run ended with the right bytes (or stopped with the right code at the right
instruction) and the instruction words in its memory, the hardware counters or the trace of its units show the bin.
"""

import dataclasses
from collections.abc import Callable
from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch

from golden.spec.engine import (
    INSTRUCTION_BYTES,
    TINY,
    Codes,
    Error,
    Op,
    Reg,
    State,
    Unit,
    decode,
    encode,
)
from golden.spec.memory import MemoryModel
from sw_stack.compile.builder import Instruction
from sw_stack.compile.program import step_registers
from sw_stack.device.cells import INPUT, Cell, Work, build
from sw_stack.device.rtl import RtlDevice
from sw_stack.device.sweep import Runner
from tests.sw_stack.machines import SHAPE, make_machine

pytestmark = [pytest.mark.rtl, pytest.mark.slow]

MEMORIES = {
    "fixed 2": MemoryModel("fixed", latency_cycles=2),
    "fixed 20": MemoryModel("fixed", latency_cycles=20),
    "random": MemoryModel("random", latency_cycles=90, stall_percent=30, seed=5),
    "hbm": MemoryModel(),
}
WEIGHTS = ("w8", "w4", "w2", "w2s24")
MANY = ("one", "many")
MASKS = ("all", "sinks only", "window only", "sinks and window", "empty tile", "nothing")
STALLS = ("no words", "no accumulator bank", "VB bank", "append busy")
AHEAD = ("counted", "follows", "collect", "joins")
"""Flags of instructions that begin before what they need is whole."""
FRESH = (Op.NORM, Op.QUANT, Op.KVQUANT, Op.ROPE, Op.GATE, Op.ADD)

GOALS = frozenset(
    [
        *product(["op"], [op.name for op in Op if op is not Op.HALT], MANY),
        *product(["weights"], WEIGHTS, MANY),
        *product(["keys", "values", "append k", "append v"], [4, 8], MANY),
        *product(["onto residual"], MANY),
        *product(["fresh"], [op.name for op in FRESH]),
        *product(["register"], ["addr", "count", "sinks"]),
        *(("rectify",), ("query scale",), ("export",)),
        *product(AHEAD),
        *product(["mask"], MASKS),
        *(("token", u.name, v.name) for u, v in permutations(Unit, 2)),
        *(("at once", u.name, v.name) for u, v in combinations(Unit, 2)),
        *product(["stall"], STALLS),
        *product(["stall"], ["no token"], [u.name for u in Unit]),
        *product(["error"], [e.name for e in Error if e is not Error.NONE]),
        *product(["memory"], MEMORIES, ["LOAD", "DMA", "APPEND"]),
    ]
)  # fmt: skip
Bins = set[tuple]


# --- what a run shows -------------------------------------------------------------------------------------
def _mask(f: dict[str, int], registers: dict[int, int]) -> Bins:
    """Which slots SOFTMAX lets live, of its first token."""
    slots = np.arange(f["count"] + registers.get(f["count_reg"], 0))
    low = f["low"] - (f["low"] >> 15 << 16)
    sinks = slots < f["sinks"] + registers.get(f["sinks_reg"], 0)
    window = (slots >= low) & (slots < f["high"])
    live = sinks | window
    kinds = {
        "all": live.all(),
        "sinks only": sinks.any() and not live.all() and not window.any(),
        "window only": window.any() and not live.all() and not sinks.any(),
        "sinks and window": sinks.any() and window.any() and not live.all(),
        "empty tile": live.any() and not all(part.any() for part in np.split(live, range(32, len(live), 32))),
        "nothing": not live.any(),
    }
    return {("mask", name) for name, hit in kinds.items() if hit}


def _product(f: dict[str, int], note: str, many: str) -> Bins:
    bits = Codes(f["codes"]).bits
    found: Bins = {("onto residual", many)} if f["accumulate"] else set()
    if f["values"]:
        return found | {("values", bits, many)}
    # Keys of 4 bits are a stream like W4's: what was loaded tells them apart, so the program's own note does.
    if "keys" in note:
        return found | {("keys", bits, many)}
    return found | {("weights", WEIGHTS[f["codes"]], many)}


def instruction_bins(instruction: Instruction, registers: dict[int, int]) -> Bins:
    """Bins of one instruction word."""
    op, f = decode(instruction.word())
    if op is Op.HALT:
        return set()
    size = {Unit.LOAD: "runs", Unit.APPEND: "count"}.get(instruction.unit, "vectors")
    many = "many" if f[size] > 1 else "one"
    found: Bins = {("op", op.name, many)}
    found |= {("token", u.name, instruction.unit.name) for u in Unit if f["wait"] >> u & 1}
    found |= {("fresh", op.name)} if f.get("fresh") else set()
    named = {"rectify": "rectify", "query scale": "factor", "export": "export", **{n: n for n in AHEAD}}
    found |= {(name,) for name, field in named.items() if f.get(field)}
    for name in ("addr", "count", "sinks"):
        found |= {("register", name)} if registers.get(f.get(f"{name}_reg", 0)) else set()
    if op is Op.MATRIX:
        found |= _product(f, instruction.note, many)
    elif op is Op.SOFTMAX:
        found |= _mask(f, registers)
    elif op in (Op.APPEND_K, Op.APPEND_V):
        found.add((op.name.lower().replace("_", " "), f["bits"], many))
    return found


def counter_bins(counters: dict[str, int]) -> Bins:
    """Bins of the hardware counters."""
    names = {"array_no_weights": ("stall", "no words"), "array_no_bank": ("stall", "no accumulator bank")}
    names |= {f"{u.name.lower()}_wait": ("stall", "no token", u.name) for u in Unit}
    return {found for name, found in names.items() if counters[name]}


def trace_bins(events) -> Bins:
    """Pairs of units that work in the same cycle."""
    return {
        ("at once", a.unit.name, b.unit.name)
        for a, b in permutations(events, 2)
        if a.unit < b.unit and a.start <= b.end and b.start <= a.end
    }


class Bench:
    """Engines of each memory; every run is compared with golden before its bins count."""

    def __init__(self) -> None:
        self._runners: dict[str, Runner] = {}
        self.bins: Bins = set()

    def runner(self, memory: str = "fixed 20", model: MemoryModel | None = None) -> Runner:
        if memory not in self._runners:
            self._runners[memory] = Runner(TINY, model or MEMORIES[memory])
            self._runners[memory].process.profile()
        return self._runners[memory]

    def run(self, work: Work, memory: str = "fixed 20", registers: dict[int, int] | None = None) -> list:
        """Run a program; its trace."""
        runner = self.runner(memory)
        result = runner.execute(f"{[i.op.name for i in work.instructions]} on {memory}", work, registers)
        events = runner.process.events()
        for instruction in work.instructions:
            self.bins |= instruction_bins(instruction, registers or {})
        self.bins |= counter_bins(result.counters) | trace_bins(events)
        self.bins |= {("memory", memory, e.unit.name) for e in events}
        return events

    def close(self) -> None:
        for runner in self._runners.values():
            runner.close()


def with_program(work: Work, instructions: list[Instruction]) -> Work:
    raw = b"".join(i.word().to_bytes(INSTRUCTION_BYTES, "little") for i in instructions)
    aux = work.aux.copy()
    aux[: len(raw)] = np.frombuffer(raw, np.uint8)
    return Work(tuple(instructions), work.channels, aux)


def altered(work: Work, op: Op, **fields: int) -> Work:
    """The same program with other fields in its instructions `op`."""
    return with_program(
        work,
        [
            dataclasses.replace(i, values={**i.values, **fields}) if i.op is op else i
            for i in work.instructions
        ],
    )


def cell(operator: str, shape: tuple[int, ...], batch: int = 1, sequence: int = 0, fmt: str = "q16") -> Work:
    return build(Cell(operator, shape, batch, sequence, fmt), TINY)


# --- scenarios --------------------------------------------------------------------------------------------
def products(bench: Bench, _) -> None:
    """Every weight format, one vector and several."""
    for name, batch in product(WEIGHTS, (1, 3)):
        bench.run(cell("linear", (24, 128), batch, 0, f"{name} group 64"))


def caches(bench: Bench, _) -> None:
    """Keys and values of both widths, read and appended."""
    for bits, many in product((4, 8), (1, 3)):
        bench.run(cell("attention", (many, 32), 1, 40, f"kv{bits}"))
        for kind in "kv":
            bench.run(cell(f"append {kind}", (32,), many, 8 + many, f"kv{bits}"))


def vectors(bench: Bench, _) -> None:
    """Each operation of the vector unit on one vector and several, and those that read extremes again."""
    for operator, batch in product(("norm", "gate", "add", "read and write"), (1, 3)):
        bench.run(cell(operator, (64,), batch))
    for heads in (1, 3):
        bench.run(cell("rope", (heads, 32)))
    bench.run(altered(cell("linear", (8, 64), 2, 0, "w4 group 32"), Op.QUANT, rectify=1))


def joined(bench: Bench, _) -> None:
    """A vector written in two pieces whose extremes join: the QUANT behind trusts them."""
    for op in (Op.ROPE, Op.GATE, Op.ADD):
        program: list[Instruction] = []
        work = cell("norm and linear", (8, 64), 3, 0, "w4 group 64")
        for i in work.instructions:
            if i.op is not Op.NORM:
                program.append(i)
                continue
            whole = {k: v for k, v in i.values.items() if k not in ("exponent", "epsilon")} | {"count": 32}
            later = {k: whole[k] + 32 // TINY.vector_lanes for k in ("addr", "addr_b", "dst")}
            program.append(dataclasses.replace(i, op=op, values=whole, signal=0))
            program.append(dataclasses.replace(i, op=op, values={**whole, **later, "fresh": 1}, wait=0))
        bench.run(with_program(work, program))


def masks(bench: Bench, _) -> None:
    """Sinks and window in three tiles, the second of which may be empty, and a softmax without a live slot."""
    work = cell("attention", (1, 32), 1, 90, "kv4")
    for sinks, low, high in (
        (5, 0, 0),
        (0, 30, 70),
        (5, 40, 90),
        (5, 70, 90),
        (0, 0, 0),
        (0, (1 << 16) - 9, 200),
    ):
        bench.run(altered(work, Op.SOFTMAX, sinks=sinks, low=low, high=high))
    # The state goes where the query lay; the result is then two vectors, the first with the state in it.
    work = altered(work, Op.SOFTMAX, export=1, state=0)
    output = next(i.values["dst"] for i in work.instructions if i.op is Op.WRITE)
    bench.run(altered(work, Op.WRITE, vectors=2, dst=0, dst_stride=output))


def registers(bench: Bench, _) -> None:
    """A word of a program that the host's registers complete."""
    work = cell("attention", (1, 32), 1, 90, "kv4")
    work = altered(work, Op.SOFTMAX, count=50, count_reg=1, high=0, sinks=3, sinks_reg=2)
    bench.run(altered(work, Op.WRITE, addr_reg=3), registers={1: 40, 2: 30, 3: 4096})


def tokens(bench: Bench, _) -> None:
    """A token from every unit to every other, and a wait for it."""
    work = cell("append k", (32,), 1, 9, "kv4")
    kvquant, append = (next(i for i in work.instructions if i.op is op) for op in (Op.KVQUANT, Op.APPEND_K))
    load = Instruction(Op.LOAD, {"addr": 0, "count": 2, "runs": 1}, "", (), ())
    matrix = {"codes": 1, "scaled": 1, "minimum": 1, "group_steps": 1, "count": 1, "steps": 1, "vectors": 1}
    units = {
        Unit.LOAD: load,
        Unit.MATRIX: Instruction(Op.MATRIX, matrix | {"dst": TINY.vb_words // 2}, "keys", (), ()),
        Unit.VECTOR: Instruction(
            Op.ADD, {"count": 32, "vectors": 1, "dst": 3 * TINY.vb_words // 4}, "", (), ()
        ),
        Unit.DMA: Instruction(Op.WRITE, {"addr": 1 << 21, "count": 2, "vectors": 1}, "", (), ()),
        Unit.APPEND: append,
    }
    program = [next(i for i in work.instructions if i.op is Op.READ)]
    streams = {Unit.MATRIX: load, Unit.APPEND: kvquant}

    def put(unit: Unit, **tokens: int) -> None:
        if unit in streams:
            program.append(dataclasses.replace(streams[unit], wait=0, signal=0))
        program.append(dataclasses.replace(units[unit], **({"wait": 0, "signal": 0} | tokens)))
        if unit is Unit.LOAD:
            program.append(dataclasses.replace(units[Unit.MATRIX], wait=0, signal=0))

    for giver, taker in permutations(Unit, 2):
        put(giver, signal=1 << taker)
        put(taker, wait=1 << giver)
    program[0] = dataclasses.replace(program[0], wait=0, signal=0)
    program.append(Instruction(Op.HALT, {"interrupt": 1}, "", (), ()))
    bench.run(with_program(work, program))


def decoders(bench: Bench, folder) -> None:
    """A compiled decoder, prefill of a chunk and a step: units at work side by side, logits equal to golden's."""
    shape = dataclasses.replace(SHAPE, layers=1)
    machine = make_machine(folder, shape, TINY)
    device = RtlDevice(machine.image, MEMORIES["hbm"])
    try:
        session, cache = machine.session(device), machine.golden.new_cache()
        device.engine.profile()
        for ids in ([1, 2, 3, 4, 5, 6, 7, 8], [9]):
            start = session.length
            session.runs.clear()
            expected = machine.golden.forward(ids, cache, last_only=True)[0]
            assert torch.equal(session.forward(ids), expected)
            for name, result in session.runs:
                program = machine.programs.programs[name]
                values = step_registers(machine.programs.map, start, max(1, program.tokens))
                for instruction in program.instructions:
                    bench.bins |= instruction_bins(instruction, {int(r): v for r, v in values.items()})
                bench.bins |= counter_bins(result.counters)
        session._run_pass([10])
        bench.bins |= trace_bins(device.engine.events())
    finally:
        device.close()


def stalls(bench: Bench, _) -> None:
    """What no counter shows, by the trace: operands in one bank, and a cache whose memory answers late."""
    taken = {}
    for bank in (0, TINY.vb_words // 4):
        work = cell("add", (256,), 1)
        events = bench.run(altered(work, Op.ADD, addr_b=bank))
        taken[bank] = next(e.end - e.start for e in events if e.unit is Unit.VECTOR)
    assert taken[0] > taken[TINY.vb_words // 4]
    bench.bins.add(("stall", "VB bank"))
    held = {}
    for memory in ("fixed 2", "hbm"):
        events = bench.run(cell("append v", (64,), 8, 16, "kv8"), memory)
        held[memory] = next(e.end - e.start for e in events if e.unit is Unit.VECTOR)
    assert held["fixed 2"] < held["hbm"], "KVQUANT touches no memory: it is held by APPEND alone"
    bench.bins.add(("stall", "append busy"))


def memories(bench: Bench, _) -> None:
    for memory in MEMORIES:
        bench.run(cell("attention", (2, 32), 1, 40, "kv4"), memory)
        bench.run(cell("append v", (32,), 2, 10, "kv4"), memory)


def _stops(bench: Bench, work: Work, error: Error, pc: int | None, memory: str = "fixed 20", **run) -> None:
    """The engine stops with this code at this instruction; callers then run a program that must be exact."""
    runner = bench.runner(memory)
    runner.load(work)
    result = runner.process.run(0, {}, **run)
    assert (result.state, result.error) == (State.STOPPED, error)
    assert pc in (None, result.error_pc)
    bench.bins.add(("error", error.name))


def _words(work: Work, *words: int) -> Work:
    aux = work.aux.copy()
    raw = b"".join(w.to_bytes(INSTRUCTION_BYTES, "little") for w in words)
    aux[: len(raw)] = np.frombuffer(raw, np.uint8)
    return dataclasses.replace(work, aux=aux)


def errors(bench: Bench, _) -> None:
    """Each code, each by the instruction that deserves it."""
    good = cell("add", (32,), 1)
    read = {"addr": 0, "count": 1, "vectors": 1}
    halt, first = encode(Op.HALT, interrupt=1), encode(Op.READ, **read)
    bench.runner().process.set(Reg.WATCHDOG, 500)
    for word, code in (
        (0x99, Error.ILLEGAL_INSTRUCTION),
        (encode(Op.ADD, count=0, vectors=1), Error.SHAPE),
        (encode(Op.READ, **{**read, "addr": 4}), Error.ADDRESS),
        (encode(Op.READ, **read, wait=1 << Unit.LOAD), Error.WATCHDOG),
    ):
        _stops(bench, _words(good, first, word, halt), code, 1)
        bench.run(good)
    bad = cell("linear", (8, 128), 1, 0, "w2s24 group 64")
    bad.channels = bad.channels.copy()
    bad.channels[0, 1:4] = 0xFF
    _stops(bench, bad, Error.PATTERN, next(k for k, i in enumerate(bad.instructions) if i.op is Op.MATRIX))
    bench.run(good)
    broken = MemoryModel("fixed", latency_cycles=9, error_address=INPUT)
    bench.runner("broken", broken)
    _stops(bench, good, Error.BUS, 0, "broken")


def aborts(bench: Bench, _) -> None:
    """The host stops a run at several places of it."""
    work = cell("attention", (3, 32), 1, 90, "kv4")
    for cycle in (3, 60, 150, 250):
        _stops(bench, work, Error.ABORTED, None, abort_at=cycle)
        bench.run(work)


SCENARIOS: tuple[Callable, ...] = (
    products, caches, vectors, joined, masks, registers, tokens, decoders, stalls, memories, errors, aborts,
)  # fmt: skip


def require(covered: Bins) -> None:
    """AssertionError with the bins that nothing hit."""
    empty = sorted(map(str, GOALS - covered))
    assert not empty, f"{len(empty)} bins are empty: {', '.join(empty)}"


@pytest.fixture(scope="module")
def covered(tmp_path_factory) -> dict[str, Bins]:
    """Bins by scenario."""
    torch.set_num_threads(1)
    found, bench = {}, Bench()
    try:
        for scenario in SCENARIOS:
            bench.bins = set()
            scenario(bench, tmp_path_factory.mktemp("image"))
            found[scenario.__name__] = bench.bins
    finally:
        bench.close()
    return found


def test_every_bin_is_hit(covered) -> None:
    require(set().union(*covered.values()))


@pytest.mark.parametrize("name", [s.__name__ for s in SCENARIOS])
def test_without_a_scenario_a_bin_is_empty_and_named(covered, name: str) -> None:
    """No scenario is there for nothing, and the list notices when one is lost."""
    own = GOALS & covered[name]
    others = set().union(*(bins for other, bins in covered.items() if other != name))
    with pytest.raises(AssertionError, match="bins are empty") as lost:
        require(others)
    assert any(str(goal) in str(lost.value) for goal in own)
