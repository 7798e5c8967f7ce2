"""Closed-form cycles of the vector unit: equal to the RTL when no port stalls, and held by a test.

A time that depends on the vector index v is a max-plus linear sequence, `max_i(start_i + step_i * v)`. Such sequences
are closed under what the unit does: a fixed delay shifts them, a server of S cycles per request replaces each step b
by max(b, S), and waiting for two things joins them.
"""

from dataclasses import dataclass

from golden.spec.engine import Op
from golden.spec.formats import ATTN_TILE
from hw.engine.sfu.fetch import Fetch, Reducer
from hw.engine.sfu.lanes import LaneArray
from hw.engine.sfu.scalars import ScalarKind, ScalarUnit
from hw.engine.sfu.softmax import DIVIDE_PERIOD, SoftmaxUnit
from hw.engine.sfu.unit import SCANNING, SETTLE_GROUPS, SETTLE_WORDS
from hw.engine.sfu.walker import Walker
from hw.lib.streams import PipeStage

FIRST_WORD = Walker.latency + PipeStage.latency + Fetch.latency
"""From the transfer of an instruction to its first word in the lanes or the softmax unit."""


@dataclass(frozen=True)
class Times:
    """When something happens for vector v: the largest of `start + step * v` over `lines`, in cycles."""

    lines: tuple[tuple[int, int], ...]

    def after(self, cycles: int) -> "Times":
        """The same, `cycles` later."""
        return Times(tuple((start + cycles, step) for start, step in self.lines))

    def served(self, cycles: int) -> "Times":
        """Start of service by a server that needs `cycles` per request, in order."""
        return Times(tuple((start, max(step, cycles)) for start, step in self.lines))

    def joined(self, other: "Times") -> "Times":
        """When both have happened."""
        return Times(self.lines + other.lines)

    def of(self, v: int) -> int:
        """The time of vector v."""
        return max(start + step * v for start, step in self.lines)


def reduction_latency(lanes: int) -> int:
    """From the entry of a vector's last word into the lanes to the cycle in which the feeder may request its scalar."""
    return LaneArray.latency + Reducer.latency_of(lanes) + 1


def instruction_cycles(op: Op, lanes: int, count: int, vectors: int = 1, *, fresh: bool = False) -> int:
    """Cycles from the transfer of a vector instruction to its `done`, no port stalling.

    `lanes` elements per VB word, `count` elements per vector, `vectors` vectors.
    """
    first = FIRST_WORD
    if op is Op.SOFTMAX:
        words = -(-count // ATTN_TILE) * (ATTN_TILE // lanes)
        written = first + words - 1 + SoftmaxUnit.vector_latency_of(lanes)
        return written + (vectors - 1) * max(words, DIVIDE_PERIOD) + 1 + SETTLE_GROUPS
    words = -(-count // lanes)
    entry = Times(((first, words),))
    if op in SCANNING:
        entry = _reduced(op, lanes, words, vectors, entry, fresh)
    ended = entry.of(vectors - 1) + words - 1 + LaneArray.latency
    return ended + (SETTLE_GROUPS if op is Op.QUANT else SETTLE_WORDS)


def _reduced(op: Op, lanes: int, words: int, vectors: int, entry: Times, fresh: bool) -> Times:
    """When each vector's first word enters the lanes in the last pass, after the reductions before it."""
    reduce = words - 1 + reduction_latency(lanes)
    kind = {Op.NORM: ScalarKind.SQUARE_SHIFT, Op.QUANT: ScalarKind.A8, Op.KVQUANT: ScalarKind.KV}[op]
    free = 0
    if fresh:
        requested, following = Times(((Walker.latency, 0),)), entry
    else:
        requested, following = entry.after(reduce), _next_pass(entry, words, vectors)
    kinds = [kind, ScalarKind.NORM] if op is Op.NORM else [kind]
    for index, one in enumerate(kinds):
        if index:
            requested, following = following.after(reduce), _next_pass(following, words, vectors)
        # The unit is free for this pass once it has served the whole pass before.
        request = requested.joined(Times(((free, 0),))).served(ScalarUnit.period(one))
        free = request.of(vectors - 1) + ScalarUnit.period(one)
        following = following.joined(request.after(ScalarUnit.latency(one) + 1)).served(words)
    return following


def _next_pass(entry: Times, words: int, vectors: int) -> Times:
    """The earliest entry of the next pass: right behind the last word of this one."""
    return Times(((entry.of(vectors - 1) + words, words),))
