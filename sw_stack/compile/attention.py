"""Attention of a pass as instructions: KV quantised and stored, queries, keys, softmax, values.

Keys of KV head h + 1 stream while the vector unit takes the softmax of head h; scores never leave the chip.
"""

from __future__ import annotations

from collections.abc import Sequence

from golden.spec.engine import STEP, Codes, Op
from sw_stack.compile.buffers import Block
from sw_stack.compile.builder import Span
from sw_stack.compile.emitter import GROUPS_PER_WORD, Emitter
from sw_stack.compile.program import R

EVERY_SLOT = 0xFFFF
SOFTMAXES_BEFORE_LATE = 2
"""Softmaxes at most before the queries that are computed inside attention are rotated and quantised."""


class AttentionEmitter(Emitter):
    """Emits queries, the KV cache's appends, and attention over it."""

    @property
    def _queries(self) -> Block:
        """Where queries are ready for attention."""
        return self.at.mixed if self.model.rotates else self.at.q

    def _turn(self, heads: range, note: str) -> None:
        """Rotated queries lie where attention will leave its output, out of the way of the array, which writes q."""
        group = self.model.group
        self._rope(self.at.q, self.at.mixed, heads.start * group, len(heads) * group, note)

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
                turn=layout.turn(head),
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
        addr = block.at(token, offset=head * self.head_words)
        self.builder.emit(
            Op.KVQUANT, f"layer {layer} quantise {kind}",
            [Span("vb", addr + v * stride, addr + v * stride + self.head_words) for v in range(vectors)],
            addr=addr, stride=stride, count=self.model.head_size,
            vectors=vectors, bits=self.map.kv_layout.bits, fresh=fresh,
        )  # fmt: skip

    @property
    def _copies_values(self) -> bool:
        """True where value products land in a place of their own first: no single stride reaches `mixed`."""
        ragged = self.map.kv_layout.heads_per_block == 1 and self.model.head_size % self.engine.lanes
        several = self.model.group > 1 or self.map.kv_layout.heads_per_block > 1
        return bool(ragged) or self.attention_tokens > 1 and several

    @property
    def _collects(self) -> bool:
        """Whether the extremes of the attention output are known when its last head is: one token's, in its place."""
        return self.tokens == 1 and not self._copies_values

    def _attention(self, layer: int, first: int, count: int, late: Sequence[range] = ()) -> None:
        """Attention of tokens [first, first + count) of the pass, block of KV heads by block: keys of the next softmax
        stream while the vector unit works on this one.

        `late`: heads whose queries are still to be computed. A piece of them streams behind each turn's scores, which
        take the drain longer than the array; they are rotated and quantised between softmaxes, and only then do values
        begin, since they collect their extremes, beside which only softmaxes may run.
        """
        per_block, turns, ahead = self.map.kv_layout.heads_per_block, self._turns, self.at.softmax_ahead
        last = self._softmaxes_before(late[0].start) if late else 0
        for n in range(ahead):
            self._turn_scores(layer, n, first, count, late)
        for n, turn in enumerate(turns):
            if late and n == last:
                self._turn_queries(layer, range(late[0].start, late[-1].stop))
            self._turn_scores(layer, n + ahead, first, count, late)
            # The last one takes each head as soon as its scores are there.
            for part in [turn] if turn is not turns[-1] else [range(h, h + 1) for h in turn]:
                self._softmax(layer, part, first, count, *divmod(part[0], per_block))
            for done in turns[: n + 1] if n == last else [turn] if n > last else []:
                if done[-1] % per_block == per_block - 1 or done is turns[-1]:
                    block = done[0] // per_block
                    self._values(layer, block, range(block * per_block, done[-1] + 1), first, count)

    @property
    def _turns(self) -> list[range]:
        """KV heads of each softmax."""
        heads, together = self.model.kv_heads, self.at.softmax_heads
        return [range(i, min(i + together, heads)) for i in range(0, heads, together)]

    def _softmaxes_before(self, late: int) -> int:
        """Softmaxes in front of the rotation of late queries, of which head `late` is the first: while they run, the
        queries are computed. Values wait as long, for whose probabilities there are places."""
        ahead = self.at.softmax_ahead
        return min(SOFTMAXES_BEFORE_LATE, ahead, late // self.at.softmax_heads - ahead)

    def _turn_scores(self, layer: int, turn: int, first: int, count: int, late: Sequence[range]) -> None:
        """Scores of a softmax, if there is one more, and the queries that are computed behind them."""
        for head in self._turns[turn] if turn < len(self._turns) else ():
            self._scores(layer, head, first, count)
        for heads in late[turn : turn + 1]:
            self._query_product(layer, heads)

    def _query_product(self, layer: int, heads: range) -> None:
        """Queries of some KV heads."""
        per_head = self.model.group * self.model.head_size
        rows = range(heads.start * per_head, heads.stop * per_head)
        self._product(
            self.map.matrices[f"layers.{layer}.q"], self.at.q, f"layer {layer} q",
            accumulate=int(self.model.biases), rows=rows,
        )  # fmt: skip

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
            turn=self.map.kv_layout.turn(head),
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
            dst=scores.at(buffer=head), dst_stride=scores.words, turn=self.map.kv_layout.turn(head),
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
        # While values collect extremes the vector unit may run SOFTMAX alone: no query is still to be quantised.
        quantised = [self.at.q8.span()] if self._collects else []
        self.builder.emit(
            Op.LOAD, f"{note} from cache", [self._kv_span(layer, "v", block)],
            addr=self.map.value_base(layer, block, self.sequence), count=0, count_reg=R.VALUE_WORDS,
            runs=layout.value_blocks, stride=layout.value_block_words,
        )  # fmt: skip
        self.builder.emit(
            Op.MATRIX, note, [p8.span(block, 0, vectors), scale.span(block, 0, vectors), *quantised],
            [out],
            codes=self._kv_codes, values=1, group_steps=1, count=0, count_reg=R.TILES, steps=layout.value_blocks,
            vectors=vectors, addr=p8.at(0, block), stride=p8.words, table=scale.at(0, block),
            dst=dst, dst_stride=stride, collect=int(self._collects), joins=int(self._collects and block > 0),
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
