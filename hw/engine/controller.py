"""The controller: host registers, fetch, dispatch, queues with dependency tokens, counters, errors and abort."""

from amaranth import Cat, Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import REGISTERS, UNITS, WORD_BITS, Counter, EngineConfig, Error, Reg, State
from hw.engine.dispatch import UNIT_OPS, Dispatch
from hw.engine.fetch import ADDR_BITS, Fetcher
from hw.engine.interfaces import unit_port
from hw.engine.mem.axi import axi_read
from hw.engine.queue import PC_BITS, UnitQueue
from hw.lib.streams import connect
from hw.lib.tokens import TokenNetwork

TOKENS = 127
"""Of one dependency counter. A decode step may append the K and V of every KV head before the first key is loaded; a
full counter would then hold the appends that its own consumer waits behind."""
HOST_ADDR_BITS = 6
EVENTS = (
    Counter.ARRAY_STEPS,
    Counter.ARRAY_NO_WEIGHTS,
    Counter.ARRAY_NO_BANK,
    Counter.WEIGHT_WORDS,
    Counter.AUX_READ_WORDS,
    Counter.AUX_WRITE_WORDS,
)


def host_port() -> wiring.Signature:
    """Register port, seen from the host: 32-bit words at `golden.spec.engine.Reg`.

    Reads are combinational; a write takes effect one cycle later, so that nothing of the engine hangs on these pins.
    """
    return wiring.Signature({"addr": Out(HOST_ADDR_BITS), "write": Out(1), "wdata": Out(32), "rdata": In(32)})


class Controller(wiring.Component):
    """Runs a program from start to HALT, error or abort.

    A run: RUNNING while instructions flow; HALT waits for every unit and every queue, then DONE. An error of the
    fetcher, the dispatcher, a unit or the watchdog, or an abort, stops everything: `abort` is high until the memory
    units are `quiet`, then `reset` pulses and the state is STOPPED with ERROR and ERROR_PC. Both end states raise the
    interrupt and accept another start, which resets counters and units (`reset`).

    `events`: one bit per counter of `EVENTS`; `active`: any progress outside the queues, for the watchdog.
    `started`, `finished`: bit u is high in the cycle in which unit u takes an operation, or ends its oldest: a profile.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {
                "host": In(host_port()),
                "interrupt": Out(1),
                "axi": Out(axi_read(ADDR_BITS, WORD_BITS)),
                **{u.name.lower(): Out(unit_port(op)) for u, op in UNIT_OPS.items()},
                "abort": Out(1),
                "reset": Out(1),
                "quiet": In(1),
                "events": In(len(EVENTS)),
                "active": In(1),
                "started": Out(UNITS),
                "finished": Out(UNITS),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.fetcher = fetcher = Fetcher()
        dispatch, tokens = Dispatch(self._config), TokenNetwork(UNITS, TOKENS)
        cleared = ResetInserter(self.reset)
        m.submodules.dispatch, m.submodules.tokens = cleared(dispatch), cleared(tokens)
        connect(m, fetcher.o, dispatch.i)
        for name, member in self.axi.signature.members.items():
            ours, theirs = getattr(self.axi, name), getattr(fetcher.axi, name)
            m.d.comb += ours.eq(theirs) if member.flow is wiring.Out else theirs.eq(ours)
        queues = {}
        for unit, op in UNIT_OPS.items():
            name = unit.name.lower()
            queues[unit] = queue = UnitQueue(op)
            m.submodules[f"queue_{name}"] = cleared(queue)
            connect(m, getattr(dispatch, name), queue.i)
            connect(m, queue.unit, wiring.flipped(getattr(self, name)))
            connect(m, queue.wait, tokens.wait[unit])
            connect(m, queue.release, tokens.release[unit])
            m.d.comb += [
                self.started[unit].eq(queue.unit.op.valid & queue.unit.op.ready),
                self.finished[unit].eq(queue.unit.done),
            ]
        state, run = self._registers(m, dispatch, fetcher, queues)
        self._run(m, state, run, fetcher, dispatch, queues)
        return m

    def _registers(self, m, dispatch, fetcher, queues):
        """Host writes, host reads and counters."""
        host = self.host
        state, error, error_pc = Signal(4), Signal(4), Signal(PC_BITS)
        program, watchdog, cycles = Signal(32), Signal(32), Signal(32)
        scalars = Signal(data.ArrayLayout(32, REGISTERS))
        counters = {c: Signal(32, name=f"counter_{c.name.lower()}") for c in Counter}
        start, abort, clear = Signal(), Signal(), Signal()
        write, address_written, written = Signal(), Signal(HOST_ADDR_BITS), Signal(32)
        m.d.sync += [write.eq(host.write), address_written.eq(host.addr), written.eq(host.wdata)]
        with m.If(write), m.Switch(address_written):
            with m.Case(Reg.CONTROL):
                m.d.comb += Cat(start, abort, clear).eq(written)
            with m.Case(Reg.PROGRAM):
                m.d.sync += program.eq(written)
            with m.Case(Reg.WATCHDOG):
                m.d.sync += watchdog.eq(written)
            for r in range(1, REGISTERS):
                with m.Case(Reg.SCALAR + r):
                    m.d.sync += scalars[r].eq(written)
        status = Cat(state, self.interrupt)
        readable = {Reg.STATUS: status, Reg.ERROR: error, Reg.ERROR_PC: error_pc, Reg.CYCLES: cycles}
        with m.Switch(host.addr):
            for address, value in readable.items():
                with m.Case(address):
                    m.d.comb += host.rdata.eq(value)
            for counter, value in counters.items():
                with m.Case(Reg.COUNTERS + counter):
                    m.d.comb += host.rdata.eq(value)
        m.d.comb += [Value.cast(dispatch.registers).eq(Value.cast(scalars)), fetcher.program.eq(program)]
        self._count(m, counters, queues, dispatch, state == State.RUNNING)
        with m.If(clear):
            m.d.sync += self.interrupt.eq(0)
        run = {
            "start": start, "abort": abort, "error": error, "error_pc": error_pc,
            "cycles": cycles, "watchdog": watchdog, "counters": counters,
        }  # fmt: skip
        return state, run

    def _count(self, m, counters, queues, dispatch, running):
        moved = dispatch.i.valid & dispatch.i.ready
        increments = {Counter.INSTRUCTIONS: moved}
        for unit, queue in queues.items():
            increments[Counter(Counter.LOAD_BUSY + unit)] = queue.busy
            increments[Counter(Counter.LOAD_WAIT + unit)] = queue.waiting
        for i, counter in enumerate(EVENTS):
            increments[counter] = self.events[i]
        for counter, now in increments.items():
            event = Signal(name=f"event_{counter.name.lower()}")
            m.d.sync += event.eq(running & now)
            with m.If(event):
                m.d.sync += counters[counter].eq(counters[counter] + 1)

    def _fault(self, m, fetcher, dispatch, queues, expired, aborted):
        """First cause of a stop, a cycle later, in a fixed order: units, dispatcher, fetcher, watchdog, abort."""
        code, pc = Signal(4), Signal(PC_BITS)
        m.d.sync += [code.eq(0), pc.eq(0)]
        oldest = dispatch.i.p.pc
        for queue in reversed(queues.values()):
            oldest = Mux(queue.empty, oldest, queue.pc)
        causes = [(aborted, Error.ABORTED, oldest), (expired, Error.WATCHDOG, oldest)]
        causes += [(fetcher.error != 0, fetcher.error, fetcher.pc)]
        causes += [(dispatch.error != 0, dispatch.error, dispatch.error_pc)]
        causes += [(q.unit.error != 0, q.unit.error, q.pc) for q in reversed(queues.values())]
        for condition, value, where in causes:
            with m.If(condition):
                m.d.sync += [code.eq(value), pc.eq(where)]
        return code, pc

    def _run(self, m, state, run, fetcher, dispatch, queues):
        idle, raised = Signal(32), Signal()
        moving = Cat(q.unit.done | (q.unit.op.valid & q.unit.op.ready) for q in queues.values()).any()
        moved, expired = Signal(), Signal()
        m.d.sync += [
            moved.eq(moving | self.active | (dispatch.i.valid & dispatch.i.ready)),
            expired.eq((run["watchdog"] != 0) & (idle == run["watchdog"])),
        ]
        code, pc = self._fault(m, fetcher, dispatch, queues, expired, run["abort"])
        drained = Cat(q.empty for q in queues.values()).all() & dispatch.empty
        counted = [run["cycles"], *run["counters"].values()]
        with m.FSM(name="control"):
            for rest in (State.IDLE, State.DONE, State.STOPPED):
                with m.State(rest.name):
                    m.d.comb += state.eq(rest)
                    with m.If(run["start"]):
                        m.d.comb += self.reset.eq(1)
                        m.d.sync += [
                            x.eq(0) for x in (idle, run["error"], run["error_pc"], self.interrupt, *counted)
                        ]
                        m.next = "START"
            with m.State("START"):
                m.d.comb += [state.eq(State.RUNNING), fetcher.start.eq(1)]
                m.next = "RUN"
            with m.State("RUN"):
                m.d.comb += state.eq(State.RUNNING)
                m.d.sync += [run["cycles"].eq(run["cycles"] + 1), idle.eq(Mux(moved, 0, idle + 1))]
                with m.If(code != Error.NONE):
                    m.d.sync += [run["error"].eq(code), run["error_pc"].eq(pc)]
                    m.next = "ABORT"
                with m.Elif(dispatch.halt & drained):
                    m.d.sync += raised.eq(dispatch.interrupt)
                    m.next = "HALT"
            with m.State("HALT"):
                m.d.comb += [state.eq(State.RUNNING), fetcher.stop.eq(1)]
                with m.If(fetcher.idle):
                    m.d.sync += self.interrupt.eq(raised)
                    m.next = State.DONE.name
            with m.State("ABORT"):
                m.d.comb += [state.eq(State.RUNNING), fetcher.stop.eq(1), self.abort.eq(1)]
                with m.If(fetcher.idle & self.quiet):
                    m.d.comb += self.reset.eq(1)
                    m.d.sync += self.interrupt.eq(1)
                    m.next = State.STOPPED.name
        for queue in queues.values():
            m.d.comb += queue.hold.eq(self.abort)
