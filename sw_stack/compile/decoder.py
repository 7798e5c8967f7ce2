"""A Llama decoder as instruction streams: a pass of T tokens through all layers, and the head.

One stream serves every sequence length: what grows with the context (slots, tiles, row blocks, addresses of the
new token) comes from scalar registers (`program.R`). Activations stay on chip from the embedding row to the
hidden state; off chip go weights, KV, norm weights, RoPE rows and V scales alone.

Fusion: q, k, v are one product, gate and up another; o and down accumulate onto the residual in the drain; scores
never leave the chip. Order: keys of KV head h + 1 stream while the vector unit takes the softmax of head h.
"""

from __future__ import annotations

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
HEAD_PIECES = 8
"""Pieces of the logits that fit the vector buffer."""


@dataclass(frozen=True)
class Layers:
    """Emits a pass of `tokens` tokens through `layers` layers."""

    map: MemoryMap
    norms: Exponents
    tokens: int

    def build(self, layers: range | None = None) -> list[Instruction]:
        """The instructions of the pass; KVStrataError when the pass does not fit the engine."""
        model = self.map.model
        if not 1 <= self.tokens <= min(self.map.engine.tokens, CHUNK_TOKENS):
            raise KVStrataError(
                f"a pass has 1 to {min(self.map.engine.tokens, CHUNK_TOKENS)} tokens; got {self.tokens}"
            )
        emitter = Emitter(self.map, self.norms, self.tokens)
        emitter.read_inputs()
        for layer in layers if layers is not None else range(model.layers):
            emitter.layer(layer)
        return emitter.builder.finish()


class Emitter:
    """Shared state of one program: map, places, builder."""

    def __init__(self, memory_map: MemoryMap, norms: Exponents, tokens: int) -> None:
        self.map, self.norms, self.tokens = memory_map, norms, tokens
        self.model, self.engine = memory_map.model, memory_map.engine
        self.lanes = memory_map.engine.vector_lanes
        self.head_words = self.model.head_size // self.lanes
        self.attention_tokens = attention_tokens(memory_map, tokens)
        self.at = Buffers(memory_map, tokens, self.attention_tokens)
        self.builder = Builder()
        self.score_scale = ScoreScale.of(self.model.head_size)

    # --- once per pass
    def read_inputs(self) -> None:
        """Embedding rows, RoPE rows and zeros from auxiliary memory."""
        inputs, zeros = (self.map.regions[n] for n in ("input", "zeros"))
        self.read("embedding", inputs, self.at.x, self.model.hidden)
        self.read_rope()
        if self._copies_values:
            self.read("zeros", zeros, self.at.zeros, self.model.group * self.model.head_size)

    def read_rope(self) -> None:
        """RoPE rows of the pass's positions."""
        rope, width = self.map.regions["rope"], self.model.head_size
        self.read("rope rows", rope, self.at.rope, width, addr_reg=R.ROPE_BYTES)

    def write_qkv(self, layer: int) -> None:
        """q, then k and v, of every token to memory, for attention elsewhere."""
        region, width = self.map.regions["qkv"], self.model.heads * self.model.head_size
        kv_width = 2 * self.model.kv_heads * self.model.head_size
        for block, first, count in ((self.at.q, 0, width), (self.at.kv, width, kv_width)):
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
        """One decoder layer on the residual stream; k and v are stored while q is computed."""
        self._key_value(layer)
        self._append(layer)
        self._query(layer)
        for first in range(0, self.tokens, self.attention_tokens):
            self._attention(layer, first, min(self.attention_tokens, self.tokens - first))
        self.after_attention(layer)

    def before_attention(self, layer: int) -> None:
        """Norm, q, k and v, and their rotation, for attention elsewhere."""
        self._key_value(layer)
        self._query(layer)

    def _key_value(self, layer: int) -> None:
        name = f"layer {layer}"
        self._norm(layer * 2, f"{name} attention norm")
        self._quantise(self.at.normed, self.model.hidden, f"{name} qkv input", fresh=1)
        self._product(self.map.matrices[f"layers.{layer}.kv"], self.at.kv, f"{name} k and v")
        self._rope(self.at.kv, self.model.kv_heads, f"{name} k")

    def _query(self, layer: int) -> None:
        self._product(self.map.matrices[f"layers.{layer}.q"], self.at.q, f"layer {layer} q")
        self._rope(self.at.q, self.model.heads, f"layer {layer} q")

    def after_attention(self, layer: int) -> None:
        """Output projection and feed-forward network, from `mixed` on."""
        name = f"layer {layer}"
        self._quantise(self.at.mixed, self.model.heads * self.model.head_size, f"{name} o input")
        self._product(self.map.matrices[f"layers.{layer}.o"], self.at.x, f"{name} o", accumulate=1)
        self._norm(layer * 2 + 1, f"{name} ffn norm")
        self._quantise(self.at.normed, self.model.hidden, f"{name} gate and up input", fresh=1)
        self._product(self.map.matrices[f"layers.{layer}.gateup"], self.at.gateup, f"{name} gate and up")
        self._gate(name)
        self._quantise(self.at.gated, self.model.ffn, f"{name} down input", fresh=1)
        self._product(self.map.matrices[f"layers.{layer}.down"], self.at.x, f"{name} down", accumulate=1)

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
            dst=y.base, dst_stride=y.words, exponent=exponent & EXPONENT_MASK, epsilon=epsilon,
        )  # fmt: skip

    def _quantise(self, source: Block, width: int, note: str, fresh: int = 0) -> None:
        a8, scale = self.at.a8, self.at.linear_scale
        self.builder.emit(
            Op.QUANT, note, [source.span()], [a8.span(), scale.span()],
            addr=source.base, stride=source.words, count=width, vectors=self.tokens, fresh=fresh,
            dst=a8.base * GROUPS_PER_WORD, dst_stride=a8.words * GROUPS_PER_WORD, table=scale.base,
        )  # fmt: skip

    def _product(self, matrix: Matrix, dst: Block, note: str, accumulate: int = 0) -> None:
        blocks = -(-matrix.rows // self.engine.lanes)
        out = [dst.span()]
        self.builder.emit(Op.LOAD, f"{note} weights", addr=matrix.base, count=matrix.words, runs=1)
        self.builder.emit(
            Op.MATRIX, note,
            [self.at.a8.span(), self.at.linear_scale.span(), *(out if accumulate else [])], out,
            **_stream_fields(matrix.stream), accumulate=accumulate,
            count=blocks, steps=matrix.inner // matrix.stream.codes.step, vectors=self.tokens,
            addr=self.at.a8.base, stride=self.at.a8.words, table=self.at.linear_scale.base,
            dst=dst.base, dst_stride=dst.words,
        )  # fmt: skip

    def _rope(self, block: Block, heads: int, name: str) -> None:
        """Rotate the first `heads` heads of every token in place."""
        rope = self.at.rope
        for t in range(self.tokens):
            turned = Span("vb", block.at(t), block.at(t) + heads * self.head_words)
            self.builder.emit(
                Op.ROPE, f"{name} rope of token {t}", [turned, rope.span(first=t, count=1)], [turned],
                addr=block.at(t), stride=self.head_words, addr_b=rope.at(t), count=self.model.head_size,
                vectors=heads, dst=block.at(t), dst_stride=self.head_words,
            )  # fmt: skip

    def _gate(self, name: str) -> None:
        gateup, gated = self.at.gateup, self.at.gated
        half = self.model.ffn // self.lanes
        self.builder.emit(
            Op.GATE, f"{name} gate", [gateup.span()], [gated.span()],
            addr=gateup.base, stride=gateup.words, addr_b=gateup.base + half, stride_b=gateup.words,
            count=self.model.ffn, vectors=self.tokens, dst=gated.base, dst_stride=gated.words,
        )  # fmt: skip

    # --- KV cache
    def _append(self, layer: int) -> None:
        """Quantise and store k, then v, of all KV heads; then fetch the V scales that attention needs."""
        model = self.model
        for kind in ("k", "v"):
            if self.tokens == 1:
                self._kv_quantise(layer, kind, 0, model.kv_heads, self.head_words)
            for head in range(model.kv_heads):
                if self.tokens > 1:
                    self._kv_quantise(layer, kind, head, self.tokens, self.at.kv.words)
                self._append_head(layer, kind, head)
        block = self.at.value_scales
        self.builder.emit(
            Op.READ, f"layer {layer} V scales", [Span(f"scales{layer}", 0, model.kv_heads)], [block.span()],
            addr=self.map.value_scales(layer, 0), count=0, count_reg=R.SCALE_WORDS, vectors=model.kv_heads,
            stride=self.map.regions["value_scales"].stride, dst=block.base, dst_stride=block.words,
        )  # fmt: skip

    def _append_head(self, layer: int, kind: str, head: int) -> None:
        """Take the pass's tokens of one head from the stream of quantised vectors."""
        layout, size = self.map.kv_layout, self.model.head_size
        note = f"layer {layer} append {kind}{head}"
        if kind == "k":
            self.builder.emit(
                Op.APPEND_K, note, writes=[self._kv_span(layer, "k", head)],
                addr=0, addr_reg=R.POSITION, count=self.tokens, bits=layout.bits, head_size=size,
                base=self.map.key_base(layer, head),
            )  # fmt: skip
            return
        group, place = divmod(head, layout.heads_per_block)
        self.builder.emit(
            Op.APPEND_V, note, writes=[self._kv_span(layer, "v", group), Span(f"scales{layer}", head, head + 1)],
            addr=0, addr_reg=R.POSITION, count=self.tokens, bits=layout.bits, head_size=size,
            base=self.map.value_base(layer, group), block_words=layout.value_block_words, row=place * size,
            scale_base=self.map.value_scales(layer, head),
        )  # fmt: skip

    def _kv_span(self, layer: int, kind: str, index: int) -> Span:
        return Span(f"{kind}{layer}", index, index + 1)

    def _kv_quantise(self, layer: int, kind: str, head: int, vectors: int, stride: int) -> None:
        """`vectors` vectors from a head of the first token on, `stride` words apart, into the append stream."""
        kv = self.at.kv
        place = head + (self.model.kv_heads if kind == "v" else 0)
        self.builder.emit(
            Op.KVQUANT, f"layer {layer} quantise {kind}", [kv.span()],
            addr=kv.at(offset=place * self.head_words), stride=stride, count=self.model.head_size,
            vectors=vectors, bits=self.map.kv_layout.bits,
        )  # fmt: skip

    # --- attention
    @property
    def _copies_values(self) -> bool:
        """True where value products land in a place of their own first: no single stride reaches `mixed`."""
        ragged = self.map.kv_layout.heads_per_block == 1 and self.model.head_size % self.engine.lanes
        several = self.model.group > 1 or self.map.kv_layout.heads_per_block > 1
        return bool(ragged) or self.attention_tokens > 1 and several

    def _attention(self, layer: int, first: int, count: int) -> None:
        """Attention of tokens [first, first + count) of the pass, block of KV heads by block."""
        if self.tokens == 1:
            self._quantise_all_queries(layer)
        per_block = self.map.kv_layout.heads_per_block
        heads = range(self.model.kv_heads)
        blocks = [heads[i : i + per_block] for i in range(0, len(heads), per_block)]
        pending: tuple[int, range] | None = None
        for index, block in enumerate(blocks):
            for place, head in enumerate(block):
                if self.tokens > 1:
                    self._quantise_queries(layer, head, first, count)
                self._keys(layer, head, count)
                if place == 0 and pending is not None:
                    self._values(layer, *pending, first, count)
                self._softmax(layer, head, first, count, index, place)
            pending = index, block
        assert pending is not None
        self._values(layer, *pending, first, count)

    def _quantise_all_queries(self, layer: int) -> None:
        """Behind the rotation that wrote the same vectors."""
        self._emit_query(
            f"layer {layer} queries", self.at.q.base, self.head_words, self.model.heads, self.at.q8.base,
            self.at.q_scale.base, fresh=1,
        )  # fmt: skip

    def _quantise_queries(self, layer: int, head: int, first: int, count: int) -> None:
        """Queries of one KV head, ordered token, then query head, as the array passes them."""
        q, q8, scale, group = self.at.q, self.at.q8, self.at.q_scale, self.model.group
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
        self.builder.emit(
            Op.QUANT, note, [self.at.q.span()],
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
        self.builder.emit(
            Op.LOAD, f"{note} from cache", [self._kv_span(layer, "k", head)],
            addr=self.map.key_base(layer, head), count=0, count_reg=R.KEY_WORDS, runs=1,
        )  # fmt: skip
        self.builder.emit(
            Op.MATRIX, note, [q8.span(buffer, first, vectors), scale.span(0, first, vectors)], [scores.span(head)],
            codes=self._kv_codes, scaled=1, minimum=1, group_steps=steps,
            count=0, count_reg=R.KEY_BLOCKS, steps=steps, vectors=vectors,
            addr=q8.at(first, buffer), stride=q8.words, table=scale.at(first),
            dst=scores.at(buffer=head), dst_stride=scores.words,
        )  # fmt: skip

    @property
    def _kv_codes(self) -> int:
        return int(Codes.U4 if self.map.kv_layout.bits == 4 else Codes.U8)

    def _softmax(self, layer: int, head: int, first: int, count: int, block: int, place: int) -> None:
        """Token by token: each sees the slots up to its own."""
        group, scores, p8, scale = self.model.group, self.at.scores, self.at.p8, self.at.p_scale
        for t in range(count):
            vector = (place * count + t) * group
            self.builder.emit(
                Op.SOFTMAX, f"layer {layer} softmax of head {head}, token {first + t}",
                [scores.span(head, t * group, group), self.at.value_scales.span(first=head, count=1)],
                [p8.span(block, vector, group), scale.span(block, vector, group)],
                addr=scores.at(t * group, head), stride=scores.words, addr_b=self.at.value_scales.at(head),
                count=first + t + 1, count_reg=R.POSITION, vectors=group,
                dst=p8.at(vector, block) * GROUPS_PER_WORD, dst_stride=p8.words * GROUPS_PER_WORD,
                table=scale.at(vector, block), vec_group=group, high=EVERY_SLOT,
            )  # fmt: skip

    def _values(self, layer: int, block: int, heads: range, first: int, count: int) -> None:
        layout, group, p8, scale = self.map.kv_layout, self.model.group, self.at.p8, self.at.p_scale
        per_head = count * group
        vectors = len(heads) * per_head
        note = f"layer {layer} values of heads {heads[0]} to {heads[-1]}"
        dst, stride, out = self._value_destination(block, heads, first, count)
        self.builder.emit(
            Op.LOAD, f"{note} from cache", [self._kv_span(layer, "v", block)],
            addr=self.map.value_base(layer, block), count=0, count_reg=R.VALUE_WORDS,
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
        return mixed.at(first, offset=offset), stride, mixed.span(first=first, count=count)

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


def head_program(memory_map: MemoryMap, norms: Exponents, tokens: int) -> list[Instruction]:
    """Final norm and LM head of one row (LAST_ROW) of the residual stream that a pass of up to `tokens` left."""
    model, engine = memory_map.model, memory_map.engine
    hidden = memory_map.row_words(model.hidden)
    matrix = memory_map.matrices["head"]
    builder = Builder()
    x = Block("vb", 0, hidden, tokens)
    weight = Block("vb", tokens * hidden, hidden, 1)
    normed = Block("vb", (tokens + 1) * hidden, hidden, 1)
    logits = logits_block(engine, (tokens + 2) * hidden, matrix.rows)
    a8 = Block("act", 0, -(-model.hidden // 64), 1)
    table = Span("table", 0, 1)
    final = 2 * model.layers
    builder.emit(
        Op.READ, "final norm weight", writes=[weight.span()],
        addr=memory_map.regions["norms"].at(final), count=model.hidden // engine.vector_lanes, vectors=1,
        dst=weight.base,
    )  # fmt: skip
    exponent, epsilon = norms[final]
    builder.emit(
        Op.NORM, "final norm", [x.span(), weight.span()], [normed.span()], addr=x.base, addr_reg=R.LAST_ROW,
        addr_b=weight.base, count=model.hidden, vectors=1, dst=normed.base, exponent=exponent & EXPONENT_MASK,
        epsilon=epsilon,
    )  # fmt: skip
    builder.emit(
        Op.QUANT, "head input", [normed.span()], [a8.span(), table], addr=normed.base, count=model.hidden,
        vectors=1, fresh=1, dst=a8.base,
    )  # fmt: skip
    block_words = engine.lanes // engine.vector_lanes
    total = -(-matrix.rows // engine.lanes)
    per_block = matrix.words // total
    held = logits.words // block_words
    aligned = max(1, WORD_BYTES // (4 * engine.lanes))
    piece = min(held, -(-held // HEAD_PIECES // aligned) * aligned or held)
    for start in range(0, total, piece):
        count = min(piece, total - start)
        rows = min(matrix.rows - start * engine.lanes, count * engine.lanes)
        # Pieces go round the buffer, so that one is written out while the next is computed.
        dst = logits.base + start // piece % (held // piece) * piece * block_words
        out = Span("vb", dst, dst + count * block_words)
        builder.emit(
            Op.LOAD, "head weights", addr=matrix.base + start * per_block, count=count * per_block, runs=1
        )
        builder.emit(
            Op.MATRIX, "head", [a8.span(), table], [out], **_stream_fields(matrix.stream),
            count=count, steps=matrix.inner // matrix.stream.codes.step, vectors=1, addr=a8.base, dst=dst,
        )  # fmt: skip
        builder.emit(
            Op.WRITE, "logits", [out], [Span("logits", start, start + count)],
            addr=memory_map.regions["logits"].base + 4 * start * engine.lanes,
            count=-(-rows // engine.vector_lanes), vectors=1, dst=dst,
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


def compile_split(memory_map: MemoryMap, norms: Exponents, tokens: int = 1) -> Programs:
    """Programs for attention elsewhere: `split{i}` ends layer i - 1 (from `mixed` in memory) and begins layer i
    (leaving q, k and v, rotated, in memory); the residual stream stays on chip between them. And the head."""
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
            emitter.before_attention(i)
            emitter.write_qkv(i)
        streams[f"split{i}"] = (tokens, emitter.builder.finish())
    streams["head"] = (0, head_program(memory_map, norms, tokens))
    return _placed(memory_map, streams, tokens)


def compile_model(memory_map: MemoryMap, norms: Exponents, chunk: int | None = None) -> Programs:
    """Decode, prefill and head programs.

    The prefill chunk is the greatest power of two up to the engine's tokens whose programs fit the chip and the
    program region, unless `chunk` fixes it. KVStrataError when not even one token at a time fits.
    """
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
            return _placed(memory_map, streams, tokens)
        except KVStrataError as refused:
            error = refused
    assert error is not None
    raise error


def _placed(memory_map: MemoryMap, streams: dict[str, tuple[int, list[Instruction]]], chunk: int) -> Programs:
    programs: dict[str, Program] = {}
    base = memory_map.regions["program"].base
    for name, (tokens, instructions) in streams.items():
        programs[name] = Program(name, tokens, base, tuple(instructions))
        base += -(-programs[name].size_bytes // 64) * 64
    if base > PROGRAM_BYTES:
        raise KVStrataError(f"instructions have {PROGRAM_BYTES} bytes; passes of {chunk} tokens take {base}")
    return Programs(memory_map, programs, chunk)
