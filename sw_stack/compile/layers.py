"""A pass of T tokens through decoder layers (Llama or OPT) as one instruction stream.

Activations stay on chip from the embedding row to the hidden state; off chip go weights, KV, norm weights, RoPE rows
and V scales alone. Fusion: products of several tokens add to the residual, of one token the vector unit does, piece by
piece behind the array; q and up accumulate onto their biases, which lie there before; a ReLU is part of the
quantisation behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from golden.spec import KVStrataError
from golden.spec.engine import Op
from sw_stack.compile.attention import AttentionEmitter
from sw_stack.compile.builder import Instruction, Span
from sw_stack.compile.emitter import Exponents
from sw_stack.pack.memory_map import CHUNK_TOKENS, MemoryMap

LATE_PIECES = 3
"""Pieces of queries at most that are computed inside attention: more of them, and the vector unit, which rotates and
quantises them between softmaxes, is what attention waits for."""
LATE_SHARE = 8
"""Part of the heads at most in such a piece."""
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
        emitter = LayerEmitter(self.map, self.norms, self.tokens, self.sinks)
        emitter.read_inputs()
        for layer in layers if layers is not None else range(model.layers):
            emitter.layer(layer)
        return emitter.builder.finish()


class LayerEmitter(AttentionEmitter):
    """Emits whole layers, or their halves around an attention that is done elsewhere."""

    def read_inputs(self) -> None:
        """Embedding rows, RoPE rows and zeros from auxiliary memory."""
        inputs, zeros = (self.map.regions[n] for n in ("input", "zeros"))
        self.read("embedding", inputs, self.at.x, self.model.hidden)
        self.read_rope()
        self.read_far_rope()
        if self._copies_values:
            self.read("zeros", zeros, self.at.zeros, self.model.group * self.model.head_size)

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

    def layer(self, layer: int) -> None:
        """One decoder layer on the residual stream; k and v are stored while what follows them is computed."""
        late = self._late_queries if self.tokens == 1 else []
        self._until_attention(layer, late)
        for first in range(0, self.tokens, self.attention_tokens):
            self._attention(layer, first, min(self.attention_tokens, self.tokens - first), late)
        self.after_attention(layer, fresh=int(self._collects))

    def share(self, layer: int) -> None:
        """Attention of one token over what the ring holds, exported for the rest to be added; q, k and v as well."""
        self._until_attention(layer, [])
        self.write_qkv(layer)
        self._attention(layer, 0, 1)
        self.write_share(layer)

    def _until_attention(self, layer: int, late: Sequence[range]) -> None:
        self._enter(layer)
        if self.tokens == 1:
            self._projections(layer, late)
        else:
            self._key(layer)
            self._append(layer, "k", range(self.model.kv_heads))
            self._value(layer)
            self._append(layer, "v", range(self.model.kv_heads))
            self._read_value_scales(layer, range(self.model.kv_heads))
            self._query(layer, range(self.model.kv_heads))

    def _projections(self, layer: int, late: Sequence[range]) -> None:
        """k, v and q of one token, but for `late` queries. V goes first, since it is the longest on its way to memory;
        while the array computes what follows, the vector unit quantises it, then turns and quantises k, then the
        queries of every piece but the last."""
        pieces, halves = self._query_pieces(late), self._halves
        for heads in halves:
            self._value(layer, heads)
        for heads in halves:
            self._key_product(layer, heads)
        for heads in pieces:
            self._query_product(layer, heads)
        for heads in self._pieces(-(-self.model.kv_heads // PIECE_HEADS)):
            self._append(layer, "v", heads)
            self._read_value_scales(layer, heads)
        if self.sinks:
            self._append_sinks(layer)
        for heads in halves:
            self._turn_key(layer, heads)
            self._append(layer, "k", heads)
        for heads in pieces:
            self._turn_queries(layer, heads)

    def _pieces(self, most: int) -> list[range]:
        """KV heads in at most so many equal pieces."""
        heads = self.model.kv_heads
        size = -(-heads // most)
        return [range(i, min(i + size, heads)) for i in range(0, heads, size)]

    @property
    def _halves(self) -> list[range]:
        """KV heads in two pieces of whole row blocks of k and v: the first is quantised while the array computes the
        second."""
        heads = self.model.kv_heads
        return _halves(heads, self._tail(heads, self.model.head_size))

    def _query_pieces(self, late: Sequence[range]) -> list[range]:
        """KV heads whose queries are computed together before attention, in whole row blocks. The last piece is short,
        since the first keys wait for it, unless `late` queries and the first keys hide it."""
        tail, heads = self._query_tail, late[0].start if late else self.model.kv_heads
        if late:
            return _halves(heads, tail)
        starts = [0, *(heads - n * tail for n in (4, 1) if 2 * n * tail <= heads), heads]
        return [range(i, j) for i, j in zip(starts, starts[1:])]

    @property
    def _late_queries(self) -> list[range]:
        """KV heads whose queries are computed inside attention, a row block behind each turn's scores: as many pieces
        as are there before they are rotated, which is before the first of them is scored; none of long pieces."""
        heads, tail = self.model.kv_heads, self._query_tail
        for n in range(LATE_PIECES if LATE_SHARE * tail <= heads else 0, 0, -1):
            before = self._softmaxes_before(heads - n * tail)
            if before >= 0 and n <= before + self.at.softmax_ahead:
                return [range(i, i + tail) for i in range(heads - n * tail, heads, tail)]
        return []

    @property
    def _query_tail(self) -> int:
        return self._tail(self.model.kv_heads, self.model.group * self.model.head_size)

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

    def _key(self, layer: int) -> None:
        self._key_product(layer)
        self._turn_key(layer)

    def _key_product(self, layer: int, heads: range | None = None) -> None:
        """k of some KV heads, or of all."""
        self._product(
            self.map.matrices[f"layers.{layer}.k"], self.at.k, f"layer {layer} k", rows=self._kv_rows(heads)
        )

    def _turn_key(self, layer: int, heads: range | None = None) -> None:
        first, count = (heads.start, len(heads)) if heads else (0, self.model.kv_heads)
        self._rope(self.at.k, self.at.k, first, count, f"layer {layer} k")

    def _value(self, layer: int, heads: range | None = None) -> None:
        """v of some KV heads, or of all."""
        self._product(
            self.map.matrices[f"layers.{layer}.v"], self.at.v, f"layer {layer} v", rows=self._kv_rows(heads)
        )

    def _kv_rows(self, heads: range | None) -> range | None:
        size = self.model.head_size
        return range(heads.start * size, heads.stop * size) if heads else None

    def _query(self, layer: int, heads: range) -> None:
        self._query_product(layer, heads)
        self._turn(heads, f"layer {layer} q")

    def after_attention(self, layer: int, fresh: int = 0) -> None:
        """Output projection and feed-forward network, from `mixed` on; `fresh`: its extremes were collected."""
        name = f"layer {layer}"
        self._quantise(self.at.mixed, self.model.heads * self.model.head_size, f"{name} o input", fresh=fresh)
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


def _halves(heads: int, tail: int) -> list[range]:
    """Heads in two ranges of whole tails, the second one not the longer."""
    half = -(-heads // (2 * tail)) * tail
    return [r for r in (range(half), range(half, heads)) if r]
