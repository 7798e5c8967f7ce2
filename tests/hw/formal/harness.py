"""Shared parts of the proofs: stream environments, stability monitors and a watched payload.

Reset is a free input throughout, so every property holds under any reset pattern; a monitor's registers reset with
the design.
"""

from amaranth import Module, ResetSignal, Signal, Value
from amaranth.hdl import Assert, Assume
from amaranth.lib import wiring
from amaranth.lib.wiring import In


class Proof(wiring.Component):
    """A design under proof with free inputs: `free` maps a name to a shape."""

    def __init__(self, free: dict | None = None):
        super().__init__({name: In(shape) for name, shape in (free or {}).items()})


def without_reset(m: Module) -> None:
    """For bounded proofs: a run after a reset is a shorter run from the initial values, which the bound covers too."""
    m.d.comb += Assume(~ResetSignal())


def past(m: Module, *values) -> tuple[Signal, list[Signal]]:
    """(live, values of the cycle before); `live` is low in the first cycle after a reset."""
    live = Signal(name="live")
    m.d.sync += live.eq(1)
    before = []
    for value in values:
        register = Signal(len(Value.cast(value)), name="before")
        m.d.sync += register.eq(value)
        before.append(register)
    return live, before


def producer(m: Module, port, valid, payload) -> None:
    """Drive an input stream from free inputs, obeying the stream rule: valid and payload hold until the transfer."""
    m.d.comb += [port.valid.eq(valid), Value.cast(port.payload).eq(payload)]
    live, (was_valid, was_ready, was_payload) = past(m, port.valid, port.ready, port.payload)
    with m.If(live & was_valid & ~was_ready):
        m.d.comb += [Assume(port.valid), Assume(Value.cast(port.payload) == was_payload)]


def stable(m: Module, valid, ready, *payload) -> None:
    """Assert the stream rule of an output: valid and payload hold until the transfer."""
    live, (was_valid, was_ready, *were) = past(m, valid, ready, *payload)
    with m.If(live & was_valid & ~was_ready):
        m.d.comb += Assert(valid)
        for value, before in zip(payload, were):
            m.d.comb += Assert(Value.cast(value) == before)


class Watch:
    """Follows one freely chosen payload through a queue: it leaves once, unchanged, after those before it.

    `position` counts the payloads still ahead of it; proofs tie it to the design's registers.
    """

    def __init__(self, m: Module, i, o, pick, depth: int):
        self.inside = Signal(range(depth + 1))
        self.watching = Signal()
        self.position = Signal(range(depth + 1))
        self.value = Signal(len(Value.cast(i.payload)))
        pushed, popped = i.valid & i.ready, o.valid & o.ready
        m.d.sync += self.inside.eq(self.inside + pushed - popped)
        ahead = Signal(range(depth + 2))
        m.d.comb += ahead.eq(self.inside - popped)
        with m.If(pushed & pick & ~self.watching):
            m.d.sync += [self.watching.eq(1), self.position.eq(ahead), self.value.eq(i.payload)]
        with m.Elif(self.watching & popped):
            m.d.sync += self.position.eq(self.position - 1)
            with m.If(self.position == 0):
                m.d.sync += self.watching.eq(0)
        m.d.comb += Assert(self.inside <= depth)
        m.d.comb += Assert(~popped | (self.inside != 0))
        with m.If(self.watching):
            m.d.comb += Assert(self.position < self.inside)
        with m.If(self.watching & (self.position == 0) & o.valid):
            m.d.comb += Assert(Value.cast(o.payload) == self.value)
