"""A decoder (Llama or OPT) as instruction streams: a pass of T tokens through all layers, and the head.

One stream serves every sequence length: what grows with the context (slots, tiles, row blocks, addresses of the
new token) comes from scalar registers (`program.R`). Activations stay on chip from the embedding row to the
hidden state; off chip go weights, KV, norm weights, RoPE rows and V scales alone.

Fusion: products of several tokens add to the residual, of one token the vector unit does, piece by piece behind the
array; q and up accumulate onto their biases, which lie there before; a ReLU is part of the quantisation behind it;
scores never leave the chip.
Order: keys of KV head h + 1 stream while the vector unit takes the softmax of head h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from golden.attention import ScoreScale
from golden.spec import KVStrataError
from golden.spec.engine import STEP, WORD_BYTES, Codes, Op, StreamFormat
from sw_stack.compile.buffers import Block, Buffers, attention_tokens, logits_block
from sw_stack.compile.builder import Builder, Instruction, Span
from sw_stack.compile.program import Program, R
from sw_stack.pack.memory_map import CHUNK_TOKENS, PROGRAM_BYTES, Matrix, MemoryMap, Region

Exponents = tuple[tuple[int, int], ...]
"""(f, En) per RMSNorm weight: attention and FFN norm of each layer, then the final one."""
EXPONENT_MASK = 63
EVERY_SLOT = 0xFFFF
GROUPS_PER_WORD = 2
HEAD_PIECES = 32
"""Pieces of the logits, at least: the last one's way to memory is not hidden by another's product."""
HEAD_RING = 8
"""Places that the pieces take in turn: the tokens of as many fit both counters between array and DMA, else each unit
could wait for the other to take one."""
ROW_PIECES = 4
"""Pieces of a product at most that the vector unit takes up piece by piece."""
TAIL_SHARE = 16
"""Part of the rows, at least one row block, in the last piece: what the vector unit does with it is not hidden."""
PIECE_HEADS = 8
"""KV heads at most whose V is quantised at once: their scales are read back while the next are stored."""


@dataclass(frozen=True)
class Layers:
    """Emits a pass of `tokens` tokens through `layers` layers."""

    map: MemoryMap
    norms: Exponents
    tokens: int
    sinks: bool = False
    """The tokens are sinks of a Lambda window, which are stored twice."""

    def build(self, layers: range | None = None) -> list[Instruction]:
        """The instructions of the pass; KVStrataError when the pass does not fit the engine."""
        model = self.map.model
        if not 1 <= self.tokens <= min(self.map.engine.tokens, CHUNK_TOKENS):
            raise KVStrataError(
                f"a pass has 1 to {min(self.map.engine.tokens, CHUNK_TOKENS)} tokens; got {self.tokens}"
            )
        emitter = Emitter(self.map, self.norms, self.tokens, self.sinks)
        emitter.read_inputs()
        for layer in layers if layers is not None else range(model.layers):
            emitter.layer(layer)
        return emitter.builder.finish()


class Emitter:
    """Shared state of one program: map, places, builder."""

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
        self.score_scale = ScoreScale.of(self.model.head_size)

    # --- once per pass
    def read_inputs(self) -> None:
        """Embedding rows, RoPE rows and zeros from auxiliary memory."""
        inputs, zeros = (self.map.regions[n] for n in ("input", "zeros"))
        self.read("embedding", inputs, self.at.x, self.model.hidden)
        self.read_rope()
        self.read_far_rope()
        if self._copies_values:
            self.read("zeros", zeros, self.at.zeros, self.model.group * self.model.head_size)

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

    def write_share(self, layer: int) -> None:
        """The engine's share of attention to memory: its output, and the softmax state of every query head."""
        states, mixed = self.map.regions["states"], self.map.regions["mixed"]
        for block, region, count, vectors in (
            (self.at.mixed, mixed, self.model.heads * self.head_words, 1),
            (self.at.states, states, 1, self.model.heads),
        ):
            self.builder.emit(
                Op.WRITE, f"layer {layer} {region.name}", [block.span()], [Span(region.name, 0, 1)],
                addr=region.base, count=count, vectors=vectors, stride=region.stride, dst=block.base,
                dst_stride=block.words,
            )  # fmt: skip

    def write_qkv(self, layer: int) -> None:
        """q, then k and v, of every token to memory, for attention elsewhere."""
        region, width = self.map.regions["qkv"], self.model.heads * self.model.head_size
        kv_width = self.model.kv_heads * self.model.head_size
        for block, first, count in (
            (self._queries, 0, width),
            (self.at.k, width, kv_width),
            (self.at.v, width + kv_width, kv_width),
        ):
            self.builder.emit(
                Op.WRITE, f"layer {layer} q, k and v", [block.span()], [Span("qkv", first, first + count)],
                addr=region.base + 4 * first, count=count // self.lanes, vectors=self.tokens, stride=region.stride,
                dst=block.base, dst_stride=block.words,
            )  # fmt: skip

    def read(self, note: str, region: Region, block: Block, width: int, addr_reg: int = 0) -> None:
        """One vector of `width` elements per vector of the block."""
        self.builder.emit(
            Op.READ, note, writes=[block.span()],
            addr=region.base, count=width // self.lanes, vectors=block.count, stride=region.stride,
            dst=block.base, dst_stride=block.words, addr_reg=addr_reg,
        )  # fmt: skip

    # --- a layer
    def layer(self, layer: int) -> None:
        """One decoder layer on the residual stream; k and v are stored while what follows them is computed."""
        self._until_attention(layer)
        for first in range(0, self.tokens, self.attention_tokens):
            self._attention(layer, first, min(self.attention_tokens, self.tokens - first))
        self.after_attention(layer)

    def share(self, layer: int) -> None:
        """Attention of one token over what the ring holds, exported for the rest to be added; q, k and v as well."""
        self._until_attention(layer)
        self.write_qkv(layer)
        self._attention(layer, 0, 1)
        self.write_share(layer)

    def _until_attention(self, layer: int) -> None:
        self._enter(layer)
        if self.tokens == 1:
            self._projections(layer)
        else:
            self._key(layer)
            self._append(layer, "k", range(self.model.kv_heads))
            self._value(layer)
            self._append(layer, "v", range(self.model.kv_heads))
            self._read_value_scales(layer, range(self.model.kv_heads))
            self._query(layer, range(self.model.kv_heads))

    def _projections(self, layer: int) -> None:
        """q, k and v of one token. V goes first, since it is the longest on its way to memory; while the array computes
        what follows, the vector unit quantises it, then turns and quantises k, then the queries of every piece but the
        last, which is short, since the first keys wait for it."""
        self._value(layer)
        self._key_product(layer)
        for heads in self._query_pieces:
            self._query_product(layer, heads)
        for heads in self._pieces(-(-self.model.kv_heads // PIECE_HEADS)):
            self._append(layer, "v", heads)
            self._read_value_scales(layer, heads)
        if self.sinks:
            self._append_sinks(layer)
        self._turn_key(layer)
        self._append(layer, "k", range(self.model.kv_heads))
        for heads in self._query_pieces:
            self._turn_queries(layer, heads)

    def _pieces(self, most: int) -> list[range]:
        """KV heads in at most so many equal pieces."""
        heads = self.model.kv_heads
        size = -(-heads // most)
        return [range(i, min(i + size, heads)) for i in range(0, heads, size)]

    @property
    def _query_pieces(self) -> list[range]:
        """KV heads whose queries are computed together: whole row blocks each, the last piece as few as may be."""
        heads, rows = self.model.kv_heads, self.model.group * self.model.head_size
        tail = self._tail(heads, rows)
        starts = [0, *(heads - n * tail for n in (4, 1) if 2 * n * tail <= heads), heads]
        return [range(i, j) for i, j in zip(starts, starts[1:])]

    def _tail(self, parts: int, rows: int) -> int:
        """Fewest parts of so many rows that are whole row blocks and divide all of them; all, if none are."""
        fit = (n for n in range(1, parts + 1) if n * rows % self.engine.lanes == 0 and parts % n == 0)
        return next(fit, parts)

    def before_attention(self, layer: int) -> None:
        """Norm, q, k and v, and their rotation, for attention elsewhere."""
        self._enter(layer)
        self._key(layer)
        self._value(layer)
        self._query(layer, range(self.model.kv_heads))

    def _enter(self, layer: int) -> None:
        self._read_bias(layer, "q", self.at.q, self.tokens)
        self._read_bias(layer, "up", self.at.up, self.tokens)
        self._norm(layer * 2, f"layer {layer} attention norm")
        self._quantise(self.at.normed, self.model.hidden, f"layer {layer} qkv input", fresh=1)
        self._bias_residual(layer, "o")

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

    def _key(self, layer: int) -> None:
        self._key_product(layer)
        self._turn_key(layer)

    def _key_product(self, layer: int) -> None:
        self._product(self.map.matrices[f"layers.{layer}.k"], self.at.k, f"layer {layer} k")

    def _turn_key(self, layer: int) -> None:
        self._rope(self.at.k, self.at.k, 0, self.model.kv_heads, f"layer {layer} k")

    def _value(self, layer: int) -> None:
        self._product(self.map.matrices[f"layers.{layer}.v"], self.at.v, f"layer {layer} v")

    def _query(self, layer: int, heads: range) -> None:
        self._query_product(layer, heads)
        self._turn(heads, f"layer {layer} q")

    @property
    def _queries(self) -> Block:
        """Where queries are ready for attention."""
        return self.at.mixed if self.model.rotates else self.at.q

    def _turn(self, heads: range, note: str) -> None:
        """Rotated queries lie where attention will leave its output, out of the way of the array, which writes q."""
        group = self.model.group
        self._rope(self.at.q, self.at.mixed, heads.start * group, len(heads) * group, note)

    def _query_product(self, layer: int, heads: range) -> None:
        """Queries of some KV heads."""
        per_head = self.model.group * self.model.head_size
        rows = range(heads.start * per_head, heads.stop * per_head)
        self._product(
            self.map.matrices[f"layers.{layer}.q"], self.at.q, f"layer {layer} q",
            accumulate=int(self.model.biases), rows=rows,
        )  # fmt: skip

    def _turn_queries(self, layer: int, heads: range) -> None:
        """Rotate and quantise queries of some KV heads: `fresh`, if a rotation wrote the same vectors just before.
        To sinks that have left a Lambda window, queries are turned to a distance of their own."""
        first, count = heads.start * self.model.group, len(heads) * self.model.group
        at = self._queries.at(offset=first * self.head_words)
        if self.far:
            self._rope(self.at.q, self.at.mixed, first, count, f"layer {layer} far q", self.at.far_rope)
            self._emit_query(
                f"layer {layer} queries to sinks", at, self.head_words, count,
                self.at.far_q8.at(first), self.at.far_scale.at(first), fresh=int(self.model.rotates),
            )  # fmt: skip
        self._turn(heads, f"layer {layer} q")
        self._emit_query(
            f"layer {layer} queries", at, self.head_words, count,
            self.at.q8.at(first), self.at.q_scale.at(first), fresh=int(self.model.rotates),
        )  # fmt: skip

    def after_attention(self, layer: int) -> None:
        """Output projection and feed-forward network, from `mixed` on."""
        name = f"layer {layer}"
        self._quantise(self.at.mixed, self.model.heads * self.model.head_size, f"{name} o input")
        self._residual(self.map.matrices[f"layers.{layer}.o"], f"{name} o")
        self._norm(layer * 2 + 1, f"{name} ffn norm")
        if self.model.gated:
            self._gated_units(layer, name)
        else:
            self._rectified_units(layer, name)
        self._residual(self.map.matrices[f"layers.{layer}.down"], f"{name} down")

    def _gated_units(self, layer: int, name: str) -> None:
        self._quantise(self.at.normed, self.model.hidden, f"{name} gate and up input", fresh=1)
        for index, rows in enumerate(self._row_pieces(self.model.ffn)):
            for part, block in (("gate", self.at.gate), ("up", self.at.up)):
                self._product(self.map.matrices[f"layers.{layer}.{part}"], block, f"{name} {part}", rows=rows)
            self._gate(name, rows, joins=int(index > 0))
        self._quantise(self.at.gated, self.model.ffn, f"{name} down input", fresh=1)

    def _rectified_units(self, layer: int, name: str) -> None:
        self._quantise(self.at.normed, self.model.hidden, f"{name} up input", fresh=1)
        self._bias_residual(layer, "down")
        self._product(
            self.map.matrices[f"layers.{layer}.up"],
            self.at.up,
            f"{name} up",
            accumulate=int(self.model.biases),
        )
        self._quantise(self.at.up, self.model.ffn, f"{name} down input", rectify=1)

    def _residual(self, matrix: Matrix, note: str) -> None:
        """A product added to the residual stream. Of one token by the vector unit, piece by piece behind the array, so
        that the stream's extremes are known when its norm begins; of several in the drain."""
        self.fresh = int(self.tokens == 1)
        if not self.fresh:
            self._product(matrix, self.at.x, note, accumulate=1)
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
        self.builder.emit(
            Op.QUANT, note, [source.span()], [a8.span(), scale.span()],
            addr=source.base, stride=source.words, count=width, vectors=self.tokens, fresh=fresh, rectify=rectify,
            dst=a8.base * GROUPS_PER_WORD, dst_stride=a8.words * GROUPS_PER_WORD, table=scale.base,
        )  # fmt: skip

    def _product(
        self, matrix: Matrix, dst: Block, note: str, accumulate: int = 0, rows: range | None = None
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
            **_stream_fields(matrix.stream), accumulate=accumulate,
            count=blocks, steps=matrix.inner // matrix.stream.codes.step, vectors=self.tokens,
            addr=self.at.a8.base, stride=self.at.a8.words, table=self.at.linear_scale.base,
            dst=dst.at(offset=offset), dst_stride=dst.words,
        )  # fmt: skip

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

    # --- KV cache
    def _append(self, layer: int, kind: str, heads: range) -> None:
        """Quantise and store k or v of some KV heads."""
        block = self.at.k if kind == "k" else self.at.v
        if self.tokens == 1:
            turned = int(kind == "k" and self.model.rotates)
            self._kv_quantise(layer, kind, block, heads.start, len(heads), self.head_words, fresh=turned)
        for head in heads:
            if self.tokens > 1:
                self._kv_quantise(layer, kind, block, head, self.tokens, block.words)
            self._append_head(layer, kind, head)

    def _read_value_scales(self, layer: int, heads: range) -> None:
        """V scales of the whole context, the pass's own included."""
        block = self.at.value_scales
        self.builder.emit(
            Op.READ, f"layer {layer} V scales", [Span(f"scales{layer}", heads.start, heads.stop)],
            [block.span(first=heads.start, count=len(heads))],
            addr=self.map.value_scales(layer, heads.start, self.sequence), count=0, count_reg=R.SCALE_WORDS,
            vectors=len(heads), stride=self.map.regions["value_scales"].stride, dst=block.at(heads.start),
            dst_stride=block.words,
        )  # fmt: skip

    def _append_sinks(self, layer: int) -> None:
        """A sink's k before its rotation, and its v again, into the sinks' tile."""
        for kind, block in (("k", self.at.k), ("v", self.at.v)):
            self._kv_quantise(layer, kind, block, 0, self.model.kv_heads, self.head_words)
            for head in range(self.model.kv_heads):
                self._append_head(layer, kind, head, sink=True)

    def _append_head(self, layer: int, kind: str, head: int, sink: bool = False) -> None:
        """Take the pass's tokens of one head from the stream of quantised vectors; `sink`: to the sinks' tile."""
        layout, size = self.map.kv_layout, self.model.head_size
        note = f"layer {layer} append {kind}{head}"
        if kind == "k":
            self.builder.emit(
                Op.APPEND_K, note, writes=[self._kv_span(layer, "k", head)],
                addr=0, addr_reg=R.POSITION, count=len(self.rows), bits=layout.bits, head_size=size,
                base=self.map.key_base(layer, head, self.sequence) + (0 if sink else self.map.sink_key_words),
            )  # fmt: skip
            return
        group, place = divmod(head, layout.heads_per_block)
        self.builder.emit(
            Op.APPEND_V, note, writes=[self._kv_span(layer, "v", group), Span(f"scales{layer}", head, head + 1)],
            addr=0 if sink else self.map.sink_slots, addr_reg=R.POSITION, count=len(self.rows), bits=layout.bits,
            head_size=size, base=self.map.value_base(layer, group, self.sequence),
            block_words=layout.value_block_words, row=place * size,
            scale_base=self.map.value_scales(layer, head, self.sequence),
        )  # fmt: skip

    def _kv_span(self, layer: int, kind: str, index: int) -> Span:
        return Span(f"{kind}{layer}", index, index + 1)

    def _kv_quantise(
        self,
        layer: int,
        kind: str,
        block: Block,
        head: int,
        vectors: int,
        stride: int,
        token: int = 0,
        fresh: int = 0,
    ) -> None:
        """`vectors` vectors from a head of one token on, `stride` words apart, into the append stream."""
        self.builder.emit(
            Op.KVQUANT, f"layer {layer} quantise {kind}", [block.span()],
            addr=block.at(token, offset=head * self.head_words), stride=stride, count=self.model.head_size,
            vectors=vectors, bits=self.map.kv_layout.bits, fresh=fresh,
        )  # fmt: skip

    # --- attention
    @property
    def _copies_values(self) -> bool:
        """True where value products land in a place of their own first: no single stride reaches `mixed`."""
        ragged = self.map.kv_layout.heads_per_block == 1 and self.model.head_size % self.engine.lanes
        several = self.model.group > 1 or self.map.kv_layout.heads_per_block > 1
        return bool(ragged) or self.attention_tokens > 1 and several

    def _attention(self, layer: int, first: int, count: int) -> None:
        """Attention of tokens [first, first + count) of the pass, block of KV heads by block: keys of the next softmax
        stream while the vector unit works on this one."""
        per_block, heads = self.map.kv_layout.heads_per_block, range(self.model.kv_heads)
        together = self.at.softmax_heads
        turns = [heads[i : i + together] for i in range(0, len(heads), together)]
        for head in turns[0]:
            self._scores(layer, head, first, count)
        for turn, following in zip(turns, [*turns[1:], range(0)]):
            for head in following:
                self._scores(layer, head, first, count)
            block, place = divmod(turn[0], per_block)
            self._softmax(layer, turn, first, count, block, place)
            if turn[-1] % per_block == per_block - 1 or turn[-1] == heads[-1]:
                self._values(layer, block, range(block * per_block, turn[-1] + 1), first, count)

    def _scores(self, layer: int, head: int, first: int, count: int) -> None:
        if self.tokens > 1:
            self._quantise_queries(layer, head, first, count)
        self._keys(layer, head, count)

    def _quantise_queries(self, layer: int, head: int, first: int, count: int) -> None:
        """Queries of one KV head, ordered token, then query head, as the array passes them."""
        q, q8, scale, group = self._queries, self.at.q8, self.at.q_scale, self.model.group
        note = f"layer {layer} queries of head {head}"
        offset = head * group * self.head_words
        if group == 1:
            self._emit_query(note, q.at(first, offset=offset), q.words, count, q8.at(buffer=head), scale.base)
            return
        for t in range(count):
            self._emit_query(
                f"{note}, token {first + t}", q.at(first + t, offset=offset), self.head_words, group,
                q8.at(t * group, head), scale.at(t * group),
            )  # fmt: skip

    def _emit_query(
        self, note: str, addr: int, stride: int, vectors: int, word: int, table: int, fresh: int = 0
    ) -> None:
        words = self.at.q8.words
        read = [Span("vb", addr + v * stride, addr + v * stride + self.head_words) for v in range(vectors)]
        self.builder.emit(
            Op.QUANT, note, read,
            [Span("act", word, word + vectors * words), Span("table", table, table + vectors)],
            addr=addr, stride=stride, count=self.model.head_size, vectors=vectors,
            dst=word * GROUPS_PER_WORD, dst_stride=words * GROUPS_PER_WORD, table=table,
            fresh=fresh, factor=self.score_scale.mantissa, exponent=self.score_scale.exponent,
        )  # fmt: skip

    def _keys(self, layer: int, head: int, count: int) -> None:
        q8, scale, scores = self.at.q8, self.at.q_scale, self.at.scores
        vectors = count * self.model.group
        first = head * self.model.group if self.tokens == 1 else 0
        buffer = 0 if self.tokens == 1 else head
        note = f"layer {layer} keys of head {head}"
        steps = self.model.head_size // STEP
        if self.far:
            self._sink_keys(layer, head)
        self.builder.emit(
            Op.LOAD, f"{note} from cache", [self._kv_span(layer, "k", head)],
            addr=self.map.key_base(layer, head, self.sequence) + self.map.sink_key_words, count=0,
            count_reg=R.KEY_WORDS, runs=1,
        )  # fmt: skip
        self.builder.emit(
            Op.MATRIX, note, [q8.span(buffer, first, vectors), scale.span(0, first, vectors)], [scores.span(head)],
            codes=self._kv_codes, scaled=1, minimum=1, group_steps=steps,
            count=0, count_reg=R.KEY_BLOCKS, steps=steps, vectors=vectors,
            addr=q8.at(first, buffer), stride=q8.words, table=scale.at(first),
            dst=scores.at(buffer=head, offset=self.map.sink_slots // self.lanes), dst_stride=scores.words,
        )  # fmt: skip

    def _sink_keys(self, layer: int, head: int) -> None:
        """Scores of the sinks' tile, by queries of their own; the ring's follow and overwrite what is behind it."""
        group, q8, scale, scores = self.model.group, self.at.far_q8, self.at.far_scale, self.at.scores
        first, steps, words = head * group, self.model.head_size // STEP, self.map.sink_key_words
        note = f"layer {layer} sink keys of head {head}"
        self.builder.emit(
            Op.LOAD, f"{note} from cache", [self._kv_span(layer, "k", head)],
            addr=self.map.key_base(layer, head), count=words, runs=1,
        )  # fmt: skip
        self.builder.emit(
            Op.MATRIX, note, [q8.span(0, first, group), scale.span(0, first, group)], [scores.span(head)],
            codes=self._kv_codes, scaled=1, minimum=1, group_steps=steps,
            count=words // self.map.kv_layout.key_block_words, steps=steps, vectors=group,
            addr=q8.at(first), stride=q8.words, table=scale.at(first),
            dst=scores.at(buffer=head), dst_stride=scores.words,
        )  # fmt: skip

    @property
    def _kv_codes(self) -> int:
        return int(Codes.U4 if self.map.kv_layout.bits == 4 else Codes.U8)

    def _softmax(self, layer: int, heads: range, first: int, count: int, block: int, place: int) -> None:
        """Token by token: each sees the slots up to its own."""
        group, scores, p8, scale = self.model.group, self.at.scores, self.at.p8, self.at.p_scale
        scales, vectors = self.at.value_scales, len(heads) * group
        for t in range(count):
            vector = (place * count + t) * group
            slots, state = self._slots(first + t), self.at.states
            exported = [state.span(first=heads[0] * group, count=vectors)] if state.count else []
            if exported:
                slots |= {"export": 1, "state": state.at(heads[0] * group)}
            self.builder.emit(
                Op.SOFTMAX, f"layer {layer} softmax of heads {heads[0]} to {heads[-1]}, token {first + t}",
                [*(scores.span(h, t * group, group) for h in heads), scales.span(first=heads[0], count=len(heads))],
                [p8.span(block, vector, vectors), scale.span(block, vector, vectors), *exported],
                addr=scores.at(t * group, heads[0]), stride=scores.words, addr_b=scales.at(heads[0]),
                stride_b=scales.words if len(heads) > 1 else 0,
                vectors=vectors, **slots,
                dst=p8.at(vector, block) * GROUPS_PER_WORD, dst_stride=p8.words * GROUPS_PER_WORD,
                table=scale.at(vector, block), vec_group=vectors, high=EVERY_SLOT,
            )  # fmt: skip

    def _slots(self, token: int) -> dict[str, int]:
        """What takes part in the softmax of a token of the pass: every slot up to its own; all that a ring holds."""
        if self.map.ring is None:
            return {"count": token + 1, "count_reg": R.POSITION}
        return {"count": 0, "count_reg": R.LIVE, "low": self.map.sink_slots, "sinks_reg": R.SINKS}

    def _values(self, layer: int, block: int, heads: range, first: int, count: int) -> None:
        layout, group, p8, scale = self.map.kv_layout, self.model.group, self.at.p8, self.at.p_scale
        per_head = count * group
        vectors = len(heads) * per_head
        note = f"layer {layer} values of heads {heads[0]} to {heads[-1]}"
        dst, stride, out = self._value_destination(block, heads, first, count)
        self.builder.emit(
            Op.LOAD, f"{note} from cache", [self._kv_span(layer, "v", block)],
            addr=self.map.value_base(layer, block, self.sequence), count=0, count_reg=R.VALUE_WORDS,
            runs=layout.value_blocks, stride=layout.value_block_words,
        )  # fmt: skip
        self.builder.emit(
            Op.MATRIX, note, [p8.span(block, 0, vectors), scale.span(block, 0, vectors)], [out],
            codes=self._kv_codes, values=1, group_steps=1, count=0, count_reg=R.TILES, steps=layout.value_blocks,
            vectors=vectors, addr=p8.at(0, block), stride=p8.words, table=scale.at(0, block),
            dst=dst, dst_stride=stride,
            vec_group=per_head if layout.heads_per_block > 1 else 0, vec_rows=self.model.head_size,
        )  # fmt: skip
        if self._copies_values:
            self._copy_values(layer, block, heads, first, count)

    def _value_destination(self, block: int, heads: range, first: int, count: int) -> tuple[int, int, Span]:
        """(dst, stride, span written) of a value product: in `mixed` where one stride does it."""
        mixed, values = self.at.mixed, self.at.values
        if self._copies_values:
            return values.at(buffer=block), values.words, values.span(block)
        offset = heads[0] * self.model.group * self.head_words
        stride = self.head_words if count == 1 else mixed.words
        to, width = mixed.at(first, offset=offset), len(heads) * self.model.group * self.head_words
        return to, stride, Span("vb", to, to + width if count == 1 else mixed.at(first + count))

    def _copy_values(self, layer: int, block: int, heads: range, first: int, count: int) -> None:
        """Value products, ordered KV head, token, query head, to their places in `mixed`, by adding zero."""
        values, mixed, zeros, group = self.at.values, self.at.mixed, self.at.zeros, self.model.group
        together = group if values.words == self.head_words else 1
        for place, head in enumerate(heads):
            for g in range(0, group, together):
                query = head * group + g
                self.builder.emit(
                    Op.ADD, f"layer {layer} place output of query head {query}",
                    [values.span(block), zeros.span()], [mixed.span(first=first, count=count)],
                    addr=values.at(place * count * group + g, block), stride=group * values.words,
                    addr_b=zeros.base, count=together * self.model.head_size, vectors=count,
                    dst=mixed.at(first, offset=query * self.head_words), dst_stride=mixed.words,
                )  # fmt: skip


def _stream_fields(stream: StreamFormat) -> dict[str, int]:
    return {
        "codes": int(stream.codes),
        "scaled": int(stream.scaled),
        "minimum": int(stream.minimum),
        "offset": int(stream.offset),
        "group_steps": stream.group_steps,
    }


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
            Op.MATRIX, "head", [a8.span(), table], out, **_stream_fields(matrix.stream),
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


@dataclass(frozen=True)
class Programs:
    """The programs of a model behind each other in the program region: one pass per chunk size, and the head."""

    map: MemoryMap
    programs: dict[str, Program]
    chunk: int
    """Tokens of a full prefill pass."""

    @property
    def size_bytes(self) -> int:
        """Instruction bytes in all."""
        return sum(p.size_bytes for p in self.programs.values())


def _cut(
    memory_map: MemoryMap, norms: Exponents, tokens: int, name: str, begin: Callable[[Emitter, int], None]
) -> Programs:
    """Programs `{name}{i}` that end layer i - 1 (from `mixed` in memory) and begin layer i; the residual stream stays
    on chip between them. And the head."""
    streams: dict[str, tuple[int, list[Instruction]]] = {}
    for i in range(memory_map.model.layers + 1):
        emitter = Emitter(memory_map, norms, tokens)
        if i:
            mixed = memory_map.regions["mixed"]
            width = memory_map.model.heads * memory_map.model.head_size
            emitter.read(f"layer {i - 1} attention output", mixed, emitter.at.mixed, width)
            emitter.after_attention(i - 1)
        else:
            emitter.read_inputs()
        if i < memory_map.model.layers:
            if i:
                emitter.read_rope()
            begin(emitter, i)
        streams[f"{name}{i}"] = (tokens, emitter.builder.finish())
    streams["head"] = (0, head_program(memory_map, norms, tokens))
    return placed(memory_map, streams, tokens)


def compile_split(memory_map: MemoryMap, norms: Exponents, tokens: int = 1) -> Programs:
    """Programs for attention elsewhere: `split{i}` leaves q, k and v of layer i, rotated, in memory."""

    def begin(emitter: Emitter, layer: int) -> None:
        emitter.before_attention(layer)
        emitter.write_qkv(layer)

    return _cut(memory_map, norms, tokens, "split", begin)


def compile_shares(memory_map: MemoryMap, norms: Exponents) -> Programs:
    """Programs for attention split between engine and drive, over a map with the split's ring: `share{i}` leaves q, k
    and v of layer i in memory, and the engine's share of its attention."""
    return _cut(memory_map, norms, 1, "share", Emitter.share)


def check_fits(memory_map: MemoryMap) -> None:
    """KVStrataError when not even one token at a time, of a batch one of each sequence, fits the chip's buffers: to
    know before a model is packed."""
    Emitter(memory_map, (), memory_map.sequences, together=int(memory_map.sequences > 1))


def _compile_ring(memory_map: MemoryMap, norms: Exponents) -> Programs:
    """One token at a time through a Lambda window's ring; `sinks` is `decode` for the tokens that are sinks."""
    streams = {"decode": (1, Layers(memory_map, norms, 1).build())}
    if memory_map.sink_slots:
        streams["sinks"] = (1, Layers(memory_map, norms, 1, sinks=True).build())
    streams["head"] = (0, head_program(memory_map, norms, 1))
    return placed(memory_map, streams, 1)


def compile_model(memory_map: MemoryMap, norms: Exponents, chunk: int | None = None) -> Programs:
    """Decode, prefill and head programs; over a Lambda window's ring decode alone, since each token takes the place of
    another.

    The prefill chunk is the greatest power of two up to the engine's tokens whose programs fit the chip and the
    program region, unless `chunk` fixes it. KVStrataError when not even one token at a time fits.
    """
    if memory_map.ring is not None:
        return _compile_ring(memory_map, norms)
    decode = Layers(memory_map, norms, 1).build()
    candidates = [chunk] if chunk else [2**i for i in range(CHUNK_TOKENS.bit_length() - 1, -1, -1)]
    error: KVStrataError | None = None
    for tokens in candidates:
        if tokens > memory_map.engine.tokens and chunk is None:
            continue
        try:
            streams = {"decode": (1, decode)}
            if tokens > 1:
                streams["prefill"] = (tokens, Layers(memory_map, norms, tokens).build())
            streams["head"] = (0, head_program(memory_map, norms, tokens))
            return placed(memory_map, streams, tokens)
        except KVStrataError as refused:
            error = refused
    assert error is not None
    raise error


def placed(memory_map: MemoryMap, streams: dict[str, tuple[int, list[Instruction]]], chunk: int) -> Programs:
    programs: dict[str, Program] = {}
    base = memory_map.regions["program"].base
    for name, (tokens, instructions) in streams.items():
        programs[name] = Program(name, tokens, base, tuple(instructions))
        base += -(-programs[name].size_bytes // 64) * 64
    if base > PROGRAM_BYTES:
        raise KVStrataError(f"instructions have {PROGRAM_BYTES} bytes; passes of {chunk} tokens take {base}")
    return Programs(memory_map, programs, chunk)
