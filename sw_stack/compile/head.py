"""Final norm and LM head as an instruction stream: pieces of the logits go round a buffer on their way to memory."""

from __future__ import annotations

from golden.spec.engine import WORD_BYTES, Op
from sw_stack.compile.buffers import Block, logits_block
from sw_stack.compile.builder import Builder, Instruction, Span
from sw_stack.compile.emitter import EXPONENT_MASK, GROUPS_PER_WORD, Exponents
from sw_stack.compile.program import R
from sw_stack.pack.memory_map import MemoryMap
from sw_stack.pack.stream import stream_fields

HEAD_PIECES = 32
"""Pieces of the logits, at least: the last one's way to memory is not hidden by another's product."""
HEAD_RING = 8
"""Places that the pieces take in turn: the tokens of as many fit both counters between array and DMA, else each unit
could wait for the other to take one."""


def head_program(memory_map: MemoryMap, norms: Exponents, tokens: int, rows: int = 1) -> list[Instruction]:
    """Final norm and LM head of `rows` rows, from LAST_ROW on, of the residual stream that a pass of `tokens` left."""
    model, engine = memory_map.model, memory_map.engine
    hidden = memory_map.row_words(model.hidden)
    matrix = memory_map.matrices["head"]
    builder = Builder()
    x = Block("vb", 0, hidden, tokens)
    normed = Block("vb", tokens * hidden, hidden, rows)
    weight = Block("vb", engine.vb_words - hidden, hidden, 1)
    bias = Block("vb", engine.vb_words - 2 * hidden, hidden, 1)
    room = (bias if model.biases else weight).base - normed.span().stop
    logits = logits_block(engine, normed.span().stop, room // rows, matrix.rows, rows)
    a8 = Block("act", 0, -(-model.hidden // 64), rows)
    table = Span("table", 0, rows)
    final = 2 * model.layers
    builder.emit(
        Op.READ, "final norm weight", writes=[weight.span()],
        addr=memory_map.regions["norms"].at(final), count=model.hidden // engine.vector_lanes, vectors=1,
        dst=weight.base,
    )  # fmt: skip
    exponent, epsilon = norms[final]
    builder.emit(
        Op.NORM, "final norm", [x.span(), weight.span()], [normed.span()], addr=x.base, addr_reg=R.LAST_ROW,
        addr_b=weight.base, count=model.hidden, vectors=rows, stride=hidden, dst=normed.base, dst_stride=hidden,
        exponent=exponent & EXPONENT_MASK, epsilon=epsilon,
    )  # fmt: skip
    if model.biases:
        builder.emit(
            Op.READ, "final norm bias", writes=[bias.span()], addr=memory_map.regions["norm_bias"].base,
            count=model.hidden // engine.vector_lanes, vectors=1, dst=bias.base,
        )  # fmt: skip
        builder.emit(
            Op.ADD, "final norm bias", [normed.span(), bias.span()], [normed.span()], addr=normed.base, stride=hidden,
            addr_b=bias.base, count=model.hidden, vectors=rows, dst=normed.base, dst_stride=hidden,
        )  # fmt: skip
    builder.emit(
        Op.QUANT, "head input", [normed.span()], [a8.span(), table], addr=normed.base, count=model.hidden,
        vectors=rows, stride=hidden, fresh=1, dst=a8.base, dst_stride=a8.words * GROUPS_PER_WORD,
    )  # fmt: skip
    block_words = engine.lanes // engine.vector_lanes
    total = -(-matrix.rows // engine.lanes)
    per_block = matrix.words // total
    held = logits.words // block_words
    aligned = max(1, WORD_BYTES // (4 * engine.lanes))
    piece = min(held, -(-held // HEAD_PIECES // aligned) * aligned or held)
    ring = min(held // piece, HEAD_RING)
    for start in range(0, total, piece):
        count = min(piece, total - start)
        width = min(matrix.rows - start * engine.lanes, count * engine.lanes)
        # Pieces go round the buffer, so that one is written out while the next is computed.
        offset = start // piece % ring * piece * block_words
        dst = logits.at(offset=offset)
        out = [
            Span("vb", at, at + count * block_words)
            for at in (logits.at(r, offset=offset) for r in range(rows))
        ]
        builder.emit(
            Op.LOAD, "head weights", addr=matrix.base + start * per_block, count=count * per_block, runs=1
        )
        builder.emit(
            Op.MATRIX, "head", [a8.span(), table], out, **stream_fields(matrix.stream),
            count=count, steps=matrix.inner // matrix.stream.codes.step, vectors=rows, addr=a8.base, stride=a8.words,
            dst=dst, dst_stride=logits.words,
        )  # fmt: skip
        builder.emit(
            Op.WRITE, "logits", out, [Span("logits", start, start + count)],
            addr=memory_map.regions["logits"].base + 4 * start * engine.lanes,
            count=-(-width // engine.vector_lanes), vectors=rows, stride=memory_map.regions["logits"].stride,
            dst=dst, dst_stride=logits.words,
        )  # fmt: skip
    return builder.finish()
