"""Cycles of the engine's blocks, in closed form; tests hold each against the RTL.

All counts are clock cycles of the engine with no memory stall and no conflict in the vector buffer.
"""

from dataclasses import dataclass
from functools import lru_cache

from golden.spec.engine import Codes, EngineConfig, StreamFormat
from hw.engine.decoder import PATTERN_WORDS
from hw.engine.drain import Drain
from hw.engine.lane import accumulator_banks
from hw.engine.matrix import ISSUE_TO_FINAL

DRAIN_START = ISSUE_TO_FINAL + 1
"""From the last step and vector of a row block to the first accumulator read."""
DRAIN_END = Drain.latency + 1
"""From the last accumulator read of an operation to `done`."""


@dataclass(frozen=True)
class Product:
    """A matrix operation: `blocks` row blocks of `steps` steps, `vectors` activation vectors."""

    stream: StreamFormat
    blocks: int
    steps: int
    vectors: int = 1
    groups: int = 0
    """VB words drained per vector and row block; 0: all of a row block."""


@dataclass
class _Kind:
    """A kind of word in the decoder: one place to wait, one in use. Both values are cycles."""

    used: int = -1
    """When the last word that was taken comes into use."""
    dropped: int = -1
    """When the word in use was last given up."""

    def take(self, earliest: int) -> int:
        """The cycle in which the next word of this kind is taken: as soon as it can wait."""
        return max(earliest, self.used)

    def arrived(self, taken: int) -> None:
        """The kind's next word, or the last of its three, was taken."""
        self.used = max(taken + 1, self.dropped)


def _periods(config: EngineConfig, stream: StreamFormat) -> tuple[int, int, int]:
    """Steps between scale words, between pattern words (0: none), and between code words."""
    scale = stream.scale_period(config) if stream.scaled else 0
    return (
        scale,
        stream.pattern_period(config) if stream.codes is Codes.S24 else 0,
        stream.steps_per_word(config),
    )


@lru_cache(maxsize=4096)
def matrix_cycles(config: EngineConfig, product: Product) -> int:
    """Cycles from an operation's acceptance to `done`, both counted, when words arrive at one per cycle and channel.

    Words, steps and row blocks follow each other by these rules, each an earliest cycle:

    - a word is taken in the cycle after the one before it, once the waiting place of its kind is free;
    - it comes into use in the next cycle, or when the word of its kind in use is given up;
    - a piece of a step is emitted one cycle later, one per cycle, once the step before has left for the array;
    - a step enters the array one cycle later, `vectors` cycles after the step before; the first step of a row block
      also waits for the drain of the row block that had its accumulators (`accumulator_banks`);
    - a row block drains `vectors * groups` cycles, from `DRAIN_START` after its last issue, one block after another.
    """
    stream, steps, vectors = product.stream, product.steps, product.vectors
    drain = vectors * (product.groups or config.lanes // config.vector_lanes)
    scale_period, pattern_period, code_period = _periods(config, stream)
    scale, pattern, code = _Kind(), _Kind(), _Kind()
    word = emitted = 0
    banks = accumulator_banks(config, vectors)
    entered, left = -vectors, [0] * banks
    for _ in range(product.blocks):
        for step in range(steps):
            needed = [code]
            for kind, period, words in ((scale, scale_period, 1), (pattern, pattern_period, PATTERN_WORDS)):
                if not period:
                    continue
                needed.append(kind)
                if step % period == 0:
                    for _ in range(words):
                        word = kind.take(word + 1)
                    kind.arrived(word)
            pieces = stream.words_per_step(config)
            for piece in range(pieces):
                if step % code_period == 0:
                    word = code.take(word + 1)
                    code.arrived(word)
                ready = max(kind.used + 1 for kind in needed)
                emitted = max(emitted + 1, ready, entered)
                last = step == steps - 1
                if piece < pieces - 1 or last or step % code_period == code_period - 1:
                    code.dropped = emitted
                if piece == pieces - 1:
                    for kind, period in ((scale, scale_period), (pattern, pattern_period)):
                        if period and (last or step % period == period - 1):
                            kind.dropped = emitted
            start = left[-banks] + 1 if step == 0 else 0
            entered = max(entered + vectors, emitted + 1, start)
        left.append(max(entered + vectors - 1 + DRAIN_START, left[-1] + 1) + drain - 1)
    return left[-1] + DRAIN_END + 1


def systolic_cycles(size: int, rows: int, inner: int, vectors: int) -> int:
    """Cycles of a plain output-stationary systolic array of `size` x `size` for `vectors` x `inner` x `rows`.

    The closed form of SCALE-Sim: ceil(M / R) ceil(N / C) (K + R + C - 2) - 1.
    """
    return -(-vectors // size) * -(-rows // size) * (inner + 2 * size - 2) - 1


def systolic_utilisation(size: int, rows: int, inner: int, vectors: int) -> float:
    """Multiply-accumulates done over those that `systolic_cycles` has room for."""
    return vectors * rows * inner / (size * size * systolic_cycles(size, rows, inner, vectors))


def array_utilisation(
    config: EngineConfig, stream: StreamFormat, rows: int, inner: int, vectors: int
) -> float:
    """The same of this engine's array: steps over `matrix_cycles`, with a word per cycle and channel."""
    blocks, steps = -(-rows // config.lanes), -(-inner // stream.codes.step)
    return blocks * steps * vectors / matrix_cycles(config, Product(stream, blocks, steps, vectors))
