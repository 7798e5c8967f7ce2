"""What every part of a decoder emits: reads, norms, products in pieces, rotations, gates, and the state they share."""

from __future__ import annotations

from golden.attention import ScoreScale
from golden.spec.engine import Op
from sw_stack.compile.buffers import Block, Buffers, attention_tokens
from sw_stack.compile.builder import Builder, Span
from sw_stack.compile.program import R
from sw_stack.pack.memory_map import Matrix, MemoryMap, Region
from sw_stack.pack.stream import stream_fields

Exponents = tuple[tuple[int, int], ...]
"""(f, En) per RMSNorm weight: attention and FFN norm of each layer, then the final one."""
EXPONENT_MASK = 63
GROUPS_PER_WORD = 2
ROW_PIECES = 4
"""Pieces of a product at most that the vector unit takes up piece by piece."""
TAIL_SHARE = 16
"""Part of the rows, at least one row block, in the last piece: what the vector unit does with it is not hidden."""


class Emitter:
    """Shared state of one program (map, places, builder) and what every part of a layer emits."""

    def __init__(
        self, memory_map: MemoryMap, norms: Exponents, tokens: int, sinks: bool = False, together: int = 0
    ) -> None:
        self.map, self.norms, self.tokens, self.sinks = memory_map, norms, tokens, sinks
        self.sequence, self.rows = 0, range(tokens)
        """Whose cache attention uses, and the vectors that attend."""
        self.model, self.engine = memory_map.model, memory_map.engine
        self.lanes = memory_map.engine.vector_lanes
        self.head_words = self.model.head_size // self.lanes
        fit = attention_tokens(memory_map, tokens)
        self.attention_tokens = min(together or fit, fit)
        self.at = Buffers(memory_map, tokens, self.attention_tokens)
        self.builder = Builder()
        self.fresh = 0
        """Whether the vector unit holds the extremes of the residual stream."""
        self._codes_coming = 0
        """Whether the next product takes its vector's codes as they are written."""
        self.score_scale = ScoreScale.of(self.model.head_size)

    def read_rope(self) -> None:
        """RoPE rows of the pass's positions, where there are any."""
        if not self.model.rotates:
            return
        rope, width = self.map.regions["rope"], self.model.head_size
        self.read("rope rows", rope, self.at.rope, width, addr_reg=R.ROPE_BYTES)

    @property
    def far(self) -> bool:
        """Whether sinks are kept again, un-rotated, and scored at a limit distance (Lambda)."""
        return self.map.sink_slots > 0

    def read_far_rope(self) -> None:
        """The RoPE row of the distance at which sinks are scored."""
        if self.far and self.model.rotates:
            assert self.map.ring is not None
            rope, block = self.map.regions["rope"], self.at.far_rope
            self.builder.emit(
                Op.READ, "rope row of sinks", writes=[block.span()], addr=rope.at(self.map.ring.limit),
                count=self.head_words, vectors=1, dst=block.base,
            )  # fmt: skip

    def read(self, note: str, region: Region, block: Block, width: int, addr_reg: int = 0) -> None:
        """One vector of `width` elements per vector of the block."""
        self.builder.emit(
            Op.READ, note, writes=[block.span()],
            addr=region.base, count=width // self.lanes, vectors=block.count, stride=region.stride,
            dst=block.base, dst_stride=block.words, addr_reg=addr_reg,
        )  # fmt: skip

    def _read_bias(self, layer: int, name: str, block: Block, copies: int) -> None:
        """A bias to the place of its product, once per token; nothing for a model without biases."""
        if not self.model.biases:
            return
        region = self.map.regions[f"{name}_bias"]
        width = self.model.linear_shapes()[name][0]
        self.builder.emit(
            Op.READ, f"layer {layer} {name} bias", writes=[block.span(count=copies)],
            addr=region.at(layer), count=width // self.lanes, vectors=copies, dst=block.base, dst_stride=block.words,
        )  # fmt: skip

    def _bias_residual(self, layer: int, name: str) -> None:
        """The bias of a product onto the residual stream while the array works on what the norm before left."""
        if not self.model.biases:
            return
        x, bias = self.at.x, self.at.bias
        self._read_bias(layer, name, bias, 1)
        self.builder.emit(
            Op.ADD, f"layer {layer} add {name} bias", [x.span(), bias.span()], [x.span()],
            addr=x.base, stride=x.words, addr_b=bias.base, count=self.model.hidden, vectors=self.tokens,
            dst=x.base, dst_stride=x.words,
        )  # fmt: skip

    def _residual(self, matrix: Matrix, note: str) -> None:
        """A product added to the residual stream in the drain, which collects the stream's extremes for the norm behind
        it. Rows of a token that do not fill their last row block are added by the vector unit, piece by piece."""
        self.fresh = int(self.tokens == 1)
        if not self.fresh or matrix.rows % self.engine.lanes == 0:
            self._product(matrix, self.at.x, note, accumulate=1, collect=self.fresh)
            return
        for index, rows in enumerate(self._row_pieces(matrix.rows)):
            self._product(matrix, self.at.normed, note, rows=rows)
            (x,), (y,) = (self._part(block, rows) for block in (self.at.x, self.at.normed))
            self.builder.emit(
                Op.ADD, f"{note} residual", [x, y], [x],
                addr=x.start, addr_b=y.start, count=len(rows), vectors=1, dst=x.start, fresh=int(index > 0),
            )  # fmt: skip

    def _part(self, block: Block, rows: range) -> list[Span]:
        """Words that hold some rows of each token."""
        offset, width = rows.start // self.lanes, -(-len(rows) // self.lanes)
        firsts = [block.at(t, offset=offset) for t in range(self.tokens)]
        return [Span(block.space, first, first + width) for first in firsts]

    def _row_pieces(self, rows: int) -> list[range]:
        """Rows in pieces of whole row blocks, the last one short: what the vector unit does with all but the last piece
        hides behind the array's work on the next."""
        lanes = self.engine.lanes
        blocks = -(-rows // lanes)
        tail = -(-blocks // TAIL_SHARE)
        size = max(1, -(-(blocks - tail) // (ROW_PIECES - 1)))
        starts = [*range(0, blocks - tail, size), blocks - tail]
        return [
            range(i * lanes, min(j * lanes, rows)) for i, j in zip(starts, [*starts[1:], blocks]) if i < j
        ]

    def _norm(self, index: int, note: str) -> None:
        buffer = index % 2
        weight = self.at.norm
        self.builder.emit(
            Op.READ, f"{note} weight", writes=[weight.span(first=buffer, count=1)],
            addr=self.map.regions["norms"].at(index), count=self.model.hidden // self.lanes, vectors=1,
            dst=weight.at(buffer),
        )  # fmt: skip
        exponent, epsilon = self.norms[index]
        x, y = self.at.x, self.at.normed
        self.builder.emit(
            Op.NORM, note, [x.span(), weight.span(first=buffer, count=1)], [y.span()],
            addr=x.base, stride=x.words, addr_b=weight.at(buffer), count=self.model.hidden, vectors=self.tokens,
            fresh=self.fresh,
            dst=y.base, dst_stride=y.words, exponent=exponent & EXPONENT_MASK, epsilon=epsilon,
        )  # fmt: skip

    def _quantise(self, source: Block, width: int, note: str, fresh: int = 0, rectify: int = 0) -> None:
        a8, scale = self.at.a8, self.at.linear_scale
        self._codes_coming = int(self.tokens == 1)
        self.builder.emit(
            Op.QUANT, note, [source.span()], [a8.span(), scale.span()],
            addr=source.base, stride=source.words, count=width, vectors=self.tokens, fresh=fresh, rectify=rectify,
            counted=self._codes_coming,
            dst=a8.base * GROUPS_PER_WORD, dst_stride=a8.words * GROUPS_PER_WORD, table=scale.base,
        )  # fmt: skip

    def _product(
        self,
        matrix: Matrix,
        dst: Block,
        note: str,
        accumulate: int = 0,
        rows: range | None = None,
        collect: int = 0,
    ) -> None:
        """A product, or some of its rows, from whole row blocks on, into their places of `dst`."""
        total = -(-matrix.rows // self.engine.lanes)
        rows = rows or range(matrix.rows)
        start, blocks = rows.start // self.engine.lanes, -(-len(rows) // self.engine.lanes)
        per_block = matrix.words // total
        offset, size = rows.start // self.lanes, blocks * self.engine.lanes // self.lanes
        out = [
            Span("vb", dst.at(t, offset=offset), dst.at(t, offset=offset) + size) for t in range(self.tokens)
        ]
        self.builder.emit(
            Op.LOAD, f"{note} weights", addr=matrix.base + start * per_block, count=blocks * per_block, runs=1
        )
        self.builder.emit(
            Op.MATRIX, note,
            [self.at.a8.span(), self.at.linear_scale.span(), *(out if accumulate else [])], out,
            **stream_fields(matrix.stream), accumulate=accumulate, follows=self._codes_coming,
            collect=collect,
            count=blocks, steps=matrix.inner // matrix.stream.codes.step, vectors=self.tokens,
            addr=self.at.a8.base, stride=self.at.a8.words, table=self.at.linear_scale.base,
            dst=dst.at(offset=offset), dst_stride=dst.words,
        )  # fmt: skip
        self._codes_coming = 0

    def _rope(
        self, source: Block, target: Block, first: int, heads: int, name: str, rows: Block | None = None
    ) -> None:
        """Rotate `heads` heads of every token, from head `first` on, to the token's position or by a row of `rows`; a
        model with learned positions turns nothing."""
        if not self.model.rotates:
            return
        rope, offset, words = rows or self.at.rope, first * self.head_words, heads * self.head_words
        for t in self.rows:
            at, to = source.at(t, offset=offset), target.at(t, offset=offset)
            self.builder.emit(
                Op.ROPE, f"{name} rope of token {t}", [Span("vb", at, at + words), rope.span(first=t, count=1)],
                [Span("vb", to, to + words)], addr=at, stride=self.head_words, addr_b=rope.at(t),
                count=self.model.head_size, vectors=heads, dst=to, dst_stride=self.head_words,
            )  # fmt: skip

    def _gate(self, name: str, rows: range, joins: int) -> None:
        """Gate and up of some rows to their product; its extremes join those of the rows before."""
        gate, up, gated = self.at.gate, self.at.up, self.at.gated
        g, u, y = (self._part(block, rows) for block in (gate, up, gated))
        self.builder.emit(
            Op.GATE, f"{name} gate", [*g, *u], y,
            addr=g[0].start, stride=gate.words, addr_b=u[0].start, stride_b=up.words,
            count=len(rows), vectors=self.tokens, dst=y[0].start, dst_stride=gated.words, fresh=joins,
        )  # fmt: skip
