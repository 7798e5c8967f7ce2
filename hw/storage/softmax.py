"""Online softmax of one query, 16 tokens at a time (docs/formats-storage.md, section 4).

Scores of a group come one by one; the probabilities leave one by one, a group behind. The running maximum is in whole
log2 units, so that the only rescaling is a shift of the sum here and an exponent subtraction of the outputs elsewhere.
"""

from amaranth import Array, Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from golden.spec.storage import (
    EXP2_TABLE,
    GROUP_TOKENS,
    L_BITS,
    L_EXTRA_FRAC,
    MAXIMUM_BITS,
    SCORE_BITS,
    SCORE_FRAC,
)
from hw.storage.fp import SCORE_FLAGS, _registered, pipe

RING = 8
"""Groups between the first score of a group and the last use of its probabilities: from an approximate score to the
last probability of its group about 100 cycles pass, in which six more groups are scored."""
SHIFT_MAX = 255
"""Rescaling by 2**-255 or more leaves no binary32 number."""


class Exp2(wiring.Component):
    """binary16 of 2**-x for unsigned Q16 x, and the same as a multiple of 2**-24; +0 where not `live`. Free-running."""

    x: In(SCORE_BITS + 2)
    live: In(1)
    p: Out(16)
    integer: Out(25)
    latency = 7

    def elaborate(self, platform):
        m = Module()

        def reg(name, value):
            return _registered(m, name, value)

        segment, u = self.x[10:16], self.x[:10]
        table = Array(EXP2_TABLE[:64])
        slope = Array(a - b for a, b in zip(EXP2_TABLE, EXP2_TABLE[1:]))
        base_1 = Signal(16, reset_less=True)
        slope_1 = Signal(9, reset_less=True)
        m.d.sync += [base_1.eq(table[segment]), slope_1.eq(slope[segment])]
        u_1 = reg("u_1", u)
        i_1 = reg("i_1", self.x[16:21])
        alive_1 = reg("alive_1", self.live & (self.x[16:] <= 25))
        product_2 = reg("product_2", slope_1 * u_1)
        product_3 = reg("product_3", product_2)
        base_3 = pipe(m, base_1, 2, "base")
        p0_4 = reg("p0_4", (base_3 - ((product_3 + 512) >> 10))[:16])
        i_4 = pipe(m, i_1, 3, "i")
        alive_4 = pipe(m, alive_1, 3, "alive")
        # shift by max(4, i - 9), one bit less so that the rounding bit stays
        extra = Mux(i_4 > 13, i_4 - 13, 0)[:4]
        half_5 = reg("half_5", Mux(alive_4, p0_4[3:] >> extra, 0)[:13])
        up_5 = reg("up_5", Mux(alive_4 & (i_4 < 13), 13 - i_4, 0)[:4])
        rounded_6 = reg("rounded_6", ((half_5 >> 1) + half_5[0])[:12])
        up_6 = reg("up_6", up_5)
        m.d.sync += [
            self.p.eq((up_6 << 10) + rounded_6),
            self.integer.eq(rounded_6 << up_6),
        ]
        return m


class SoftmaxLane(wiring.Component):
    """Ports:

    - `start`: forget everything (a new head); nothing may be in flight.
    - `valid`, `score`, `slot`, `last`: a present token's score and its place in the group; `last` with the group's
      last. At most `RING` groups may be between here and the last use of their probabilities.
    - `p_valid`, `p`, `p_integer`, `p_slot`, `p_bank`, `p_last`: all 16 probabilities of a group, in slot order.
    - `shift`: what this group's rescaling is, `maximum`: its running maximum; both valid with `p_valid`.
    - `sum`, `poisoned`: state after the last group, `settle` cycles after its `p_last`.

    Timing: a group leaves at one probability per cycle; the first `latency` cycles after the `last` score of an idle
    unit.
    """

    latency = 7 + Exp2.latency
    settle = 5

    start: In(1)
    valid: In(1)
    score: In(SCORE_FLAGS)
    slot: In(4)
    last: In(1)
    p_valid: Out(1)
    p: Out(16)
    p_integer: Out(25)
    p_slot: Out(4)
    p_bank: Out(range(RING))
    p_last: Out(1)
    shift: Out(8)
    maximum: Out(signed(MAXIMUM_BITS))
    sum: Out(L_BITS)
    poisoned: Out(1)

    def elaborate(self, platform):
        m = Module()
        m.submodules.scores = scores = Memory(shape=signed(SCORE_BITS), depth=RING * GROUP_TOKENS, init=[])
        write, read = scores.write_port(), scores.read_port()

        # --- collect: the group's scores and its maximum
        bank = Signal(range(RING))
        fresh = Signal(init=1)
        best, some = Signal(signed(SCORE_BITS)), Signal()
        lives = Array(Signal(GROUP_TOKENS, name=f"lives_{n}") for n in range(RING))
        bests = Array(Signal(signed(SCORE_BITS), name=f"best_{n}") for n in range(RING))
        somes = Array(Signal(name=f"some_{n}") for n in range(RING))
        live = ~self.score.dead
        best_now, some_now = Signal(signed(SCORE_BITS)), Signal()
        known = Signal()
        m.d.comb += [
            known.eq(some & ~fresh),
            best_now.eq(Mux(live & (~known | (self.score.z > best)), self.score.z, best)),
            some_now.eq(known | live),
            write.addr.eq(Cat(self.slot, bank)),
            write.data.eq(self.score.z),
            write.en.eq(self.valid),
        ]
        pushed, taken = Signal(), Signal()
        pending = Signal(range(RING + 1))
        m.d.comb += pushed.eq(self.valid & self.last)
        m.d.sync += pending.eq(pending + pushed - taken)
        with m.If(self.valid):
            marks = Mux(fresh, 0, lives[bank]) | Mux(live, 1 << self.slot, 0)
            m.d.sync += [
                best.eq(best_now),
                some.eq(some_now),
                fresh.eq(self.last),
                lives[bank].eq(marks),
                self.poisoned.eq(self.poisoned | self.score.poison),
            ]
            with m.If(self.last):
                m.d.sync += [bests[bank].eq(best_now), somes[bank].eq(some_now), bank.eq(bank + 1)]

        # --- running maximum: M' = max(M, ceil(best)), one group ahead of the exponentials
        maximum, seen = Signal(signed(MAXIMUM_BITS)), Signal()
        ahead = Signal(range(RING))
        top, top_some = Signal(signed(MAXIMUM_BITS)), Signal()
        rise = Signal(signed(MAXIMUM_BITS + 1))
        next_valid, next_taken = Signal(), Signal()
        next_shift, next_bank = Signal(8), Signal(range(RING))
        with m.If(next_taken):
            m.d.sync += next_valid.eq(0)
        with m.FSM(name="maximum"):
            with m.State("wait"), m.If((pending != 0) & ~next_valid):
                m.d.comb += taken.eq(1)
                m.d.sync += [
                    top.eq((bests[ahead] + ((1 << SCORE_FRAC) - 1)) >> SCORE_FRAC),
                    top_some.eq(somes[ahead]),
                    next_bank.eq(ahead),
                    ahead.eq(ahead + 1),
                ]
                m.next = "compare"
            with m.State("compare"):
                m.d.sync += rise.eq(top - maximum)
                m.next = "raise"
            with m.State("raise"):
                m.d.sync += [next_valid.eq(1), next_shift.eq(0)]
                with m.If(top_some & (~seen | (rise > 0))):
                    m.d.sync += maximum.eq(top)
                    with m.If(seen):
                        m.d.sync += next_shift.eq(Mux(rise > SHIFT_MAX, SHIFT_MAX, rise[:8]))
                m.d.sync += seen.eq(seen | top_some)
                m.next = "wait"

        # --- exponentials: 16 cycles per group
        issuing, count = Signal(), Signal(4)
        current_bank, current_shift = Signal(range(RING)), Signal(8)
        current_maximum = Signal(signed(MAXIMUM_BITS))
        done = issuing & (count == GROUP_TOKENS - 1)
        m.d.comb += next_taken.eq(next_valid & (~issuing | done))
        with m.If(issuing):
            m.d.sync += count.eq(count + 1)
        with m.If(next_taken):
            m.d.sync += [
                issuing.eq(1),
                count.eq(0),
                current_bank.eq(next_bank),
                current_shift.eq(next_shift),
                current_maximum.eq(maximum),
            ]
        with m.Elif(done):
            m.d.sync += issuing.eq(0)
        m.d.comb += [read.addr.eq(Cat(count, current_bank)), read.en.eq(1)]
        live_0 = _registered(m, "live_0", lives[current_bank].bit_select(count, 1))
        tags_0 = _registered(
            m, "tags_0", Cat(issuing, done, count, current_bank, current_shift, current_maximum)
        )
        tags_1 = _registered(m, "tags_1", tags_0)
        offset = Cat(tags_0[-MAXIMUM_BITS:]).as_signed() << SCORE_FRAC
        x_1 = _registered(m, "x_1", (offset - read.data)[: SCORE_BITS + 2])
        m.submodules.exp2 = exp2 = Exp2()
        m.d.comb += [exp2.x.eq(x_1), exp2.live.eq(_registered(m, "live_1", live_0))]
        tags = pipe(m, tags_1, Exp2.latency, "tags")
        m.d.comb += [
            Cat(self.p_valid, self.p_last, self.p_slot, self.p_bank, self.shift, self.maximum).eq(tags),
            self.p.eq(exp2.p),
            self.p_integer.eq(exp2.integer),
        ]

        # --- sum: of the group, then l = (l >> d) + (sum << 16)
        group_sum = Signal(30)
        m.d.sync += group_sum.eq(Mux(self.p_slot == 0, 0, group_sum) + self.p_integer)
        summed = _registered(m, "summed", self.p_valid & self.p_last)
        shift_a = _registered(m, "shift_a", Mux(self.shift > 63, 63, self.shift[:6]))
        coarse = _registered(m, "coarse", self.sum >> shift_a[:3])
        fine = _registered(m, "fine", coarse >> Cat(Const(0, 3), _registered(m, "shift_b", shift_a[3:])))
        sum_b = pipe(m, group_sum, 2, "group_sum")
        ready = pipe(m, summed, 2, "ready")
        with m.If(ready):
            m.d.sync += self.sum.eq(fine + (sum_b << L_EXTRA_FRAC))

        with m.If(self.start):
            m.d.sync += [self.sum.eq(0), maximum.eq(0), seen.eq(0), fresh.eq(1), bank.eq(0), ahead.eq(0)]
            m.d.sync += self.poisoned.eq(0)
        return m
