"""A unit's instruction queue: waits for tokens, hands operations to the unit, gives tokens when they are done."""

from amaranth import Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import UNITS
from hw.engine.interfaces import unit_port
from hw.lib.streams import PipeStage, StreamFIFO, connect

PC_BITS = 24
QUEUE_DEPTH = 32
"""A LUT RAM is 32 deep anyway; a short queue that fills holds up the instructions of every other unit."""
IN_FLIGHT = 8


def queued(op) -> data.StructLayout:
    """An operation on its way to a unit: tokens to take before it starts, tokens to give after it ends."""
    return data.StructLayout({"op": op, "wait": UNITS, "signal": UNITS, "pc": PC_BITS})


class UnitQueue(wiring.Component):
    """`QUEUE_DEPTH` operations in front of a unit, at most `IN_FLIGHT` inside it.

    The head takes all its tokens at once (`wait`) and goes to the unit in the same cycle if that is ready. `done`
    releases the tokens of the oldest operation inside, in order (`release`). `pc` is the oldest instruction that has
    not finished; `waiting` counts as a stall for tokens, `busy` as work.

    The head and the oldest operation inside stand in registers behind their LUT RAMs, and `i.ready` comes from one:
    what starts hangs on the head's tokens, what ends on room for those given, and the fetcher on every queue's room.
    """

    latency = 2
    """From the transfer at `i` to the head of an empty queue."""

    def __init__(self, op):
        self._op = op
        super().__init__(
            {
                "i": In(stream.Signature(queued(op))),
                "unit": Out(unit_port(op)),
                "wait": Out(stream.Signature(UNITS)),
                "release": Out(stream.Signature(UNITS)),
                "hold": In(1),
                "empty": Out(1),
                "busy": Out(1),
                "waiting": Out(1),
                "pc": Out(PC_BITS),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.behind = behind = StreamFIFO(queued(self._op), QUEUE_DEPTH - 1)
        m.submodules.queue = queue = PipeStage(queued(self._op))
        connect(m, behind.o, queue.i)
        room = Signal(init=1)
        pushed, popped = behind.i.valid & behind.i.ready, behind.o.valid & behind.o.ready
        full, nearly = behind.level == behind.depth, behind.level == behind.depth - 1
        m.d.sync += room.eq(popped | ~(full | (nearly & pushed)))
        inside = data.StructLayout({"signal": UNITS, "pc": PC_BITS})
        m.submodules.inside = started = StreamFIFO(inside, IN_FLIGHT - 1)
        m.submodules.oldest = flying = PipeStage(inside)
        connect(m, started.o, flying.i)
        m.d.comb += [
            Value.cast(behind.i.payload).eq(Value.cast(self.i.payload)),
            behind.i.valid.eq(self.i.valid & room),
            self.i.ready.eq(room),
        ]
        head, taken, finished = queue.o.p, Signal(), Signal(range(IN_FLIGHT + 1))
        starting = Signal()
        able = queue.o.valid & started.i.ready & ~self.hold
        m.d.comb += [
            self.wait.payload.eq(head.wait),
            self.wait.valid.eq(able & ~taken),
            self.unit.op.valid.eq(able & (taken | self.wait.ready)),
            Value.cast(self.unit.op.payload).eq(Value.cast(head.op)),
            starting.eq(self.unit.op.valid & self.unit.op.ready),
            queue.o.ready.eq(starting),
            started.i.valid.eq(starting),
            started.i.p.signal.eq(head.signal),
            started.i.p.pc.eq(head.pc),
        ]
        with m.If(starting):
            m.d.sync += taken.eq(0)
        with m.Elif(self.wait.valid & self.wait.ready):
            m.d.sync += taken.eq(1)
        released = Signal()
        m.d.comb += [
            self.release.payload.eq(flying.o.p.signal),
            self.release.valid.eq(flying.o.valid & ((finished != 0) | self.unit.done)),
            released.eq(self.release.valid & self.release.ready),
            flying.o.ready.eq(released),
            self.empty.eq(~behind.o.valid & ~queue.o.valid & ~self.busy),
            self.busy.eq(started.o.valid | flying.o.valid),
            self.waiting.eq(self.wait.valid & ~self.wait.ready),
        ]
        m.d.sync += finished.eq(finished + self.unit.done - released)
        with m.If(flying.o.valid):
            m.d.comb += self.pc.eq(flying.o.p.pc)
        with m.Elif(started.o.valid):
            m.d.comb += self.pc.eq(started.o.p.pc)
        with m.Else():
            m.d.comb += self.pc.eq(Mux(queue.o.valid, head.pc, behind.o.p.pc))
        return m
