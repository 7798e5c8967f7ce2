"""Cycles of the engine's blocks, in closed form; tests hold each against the RTL.

All counts are clock cycles of the engine with no memory stall and no conflict in the vector buffer.
"""

from dataclasses import dataclass

from golden.spec.engine import Codes, EngineConfig, StreamFormat
from hw.engine.decoder import PATTERN_WORDS, Decoder
from hw.engine.drain import Drain
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


def words_until(config: EngineConfig, stream: StreamFormat, step: int) -> int:
    """Words of a row block up to and with the last one that step `step` needs."""
    words = (step // stream.steps_per_word(config) + 1) * stream.words_per_step(config)
    if stream.scaled:
        words += step // stream.scale_period(config) + 1
    if stream.codes is Codes.S24:
        words += PATTERN_WORDS * (step // stream.pattern_period(config) + 1)
    return words


def matrix_cycles(config: EngineConfig, product: Product) -> int:
    """Cycles from an operation's acceptance to `done`, both counted, when words arrive at one per cycle and channel.

    Three resources in a chain, each in order: words (one per cycle), the array (`vectors` cycles per step) and the
    drain (`vectors * groups` cycles per row block), with two accumulator banks between the last two. Per row block
    the array waits for the latest of: its predecessor, the words of the step that is the tightest, and the drain of
    the row block before last.
    """
    stream, steps, vectors = product.stream, product.steps, product.vectors
    groups = product.groups or config.lanes // config.vector_lanes
    per_block, array, drain = stream.words_per_block(config, steps), steps * vectors, vectors * groups
    tightest = max(words_until(config, stream, s) - s * vectors for s in range(steps))
    fired, drained = [0, 0], [0, 0]
    for block in range(product.blocks):
        words = block * per_block + tightest + Decoder.latency
        start = max(fired[-1] + 1, words, drained[-2] + 1)
        fired.append(start + array - 1)
        drained.append(max(fired[-1] + DRAIN_START, drained[-1] + 1) + drain - 1)
    return drained[-1] + DRAIN_END + 1
