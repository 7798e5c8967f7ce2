"""Properties of the special-function unit's operand fetch: every request gets its own words, once and in order."""

from dataclasses import replace

from amaranth import Module, Mux, Signal, Value, unsigned
from amaranth.hdl import Assert

from golden.spec.engine import TINY
from hw.engine.sfu.fetch import PREFETCH, Fetch
from tests.hw.formal.harness import Proof, producer, stable

TAG_BITS = 1
ADDRESS_BITS = 2
"""Enough to tell four words apart; the other address bits only make the solver slow."""


class FetchProof(Proof):
    """Two ports that grant at will and show the granted address as data for the one cycle after the grant.

    A freely picked request must leave with its own two addresses and its tag, behind exactly those before it; no
    word ever meets a full queue.
    """

    def __init__(self):
        free = {
            "valid": 1,
            "a": ADDRESS_BITS,
            "b": ADDRESS_BITS,
            "use_b": 1,
            "tag": TAG_BITS,
            "ready": 1,
            "pick": 1,
        }
        super().__init__(free | {f"{port}_{what}": 1 for port in "ab" for what in ("rdy", "noise")})

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = Fetch(replace(TINY, vector_lanes=1), unsigned(TAG_BITS))
        request = Signal(dut.i.p.shape())
        m.d.comb += [
            request.a.eq(self.a),
            request.b.eq(self.b),
            request.use_b.eq(self.use_b),
            request.tag.eq(self.tag),
        ]
        producer(m, dut.i, self.valid, request)
        m.d.comb += dut.o.ready.eq(self.ready)
        for name, port, rdy, noise in (
            ("a", dut.a, self.a_rdy, self.a_noise),
            ("b", dut.b, self.b_rdy, self.b_noise),
        ):
            granted, address = Signal(name=f"granted_{name}"), Signal(20, name=f"address_{name}")
            m.d.sync += [granted.eq(port.en & port.rdy), address.eq(port.addr)]
            m.d.comb += [port.rdy.eq(rdy), port.data.eq(Mux(granted, address, noise.replicate(ADDRESS_BITS)))]
        stable(m, dut.o.valid, dut.o.ready, dut.o.p.a, dut.o.p.tag)
        self._watch(m, dut)
        return m

    def _watch(self, m: Module, dut) -> None:
        pushed, popped = dut.i.valid & dut.i.ready, dut.o.valid & dut.o.ready
        inside, ahead = Signal(range(PREFETCH + 1)), Signal(range(PREFETCH + 1))
        watching, request = Signal(), Signal(dut.i.p.shape())
        m.d.sync += inside.eq(inside + pushed - popped)
        with m.If(pushed & self.pick & ~watching):
            m.d.sync += [watching.eq(1), ahead.eq(inside - popped), request.eq(dut.i.payload)]
        with m.Elif(watching & popped):
            m.d.sync += [ahead.eq(ahead - 1), watching.eq(ahead != 0)]
        m.d.comb += [Assert(inside <= PREFETCH), Assert(~popped | (inside != 0))]
        with m.If(watching & (ahead == 0) & dut.o.valid):
            m.d.comb += [
                Assert(Value.cast(dut.o.p.a) == request.a),
                Assert(~request.use_b | (Value.cast(dut.o.p.b) == request.b)),
                Assert(dut.o.p.tag == request.tag),
            ]
