"""On-chip places of one program: regions of the vector buffer, the A8 buffer and the scale table.

Regions prefer a bank of their own, so that operands of concurrent operations do not meet. KVStrataError when a
pass of that many tokens does not fit the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from golden.spec import KVStrataError
from golden.spec.engine import STEP, VB_BANKS, EngineConfig
from golden.spec.formats import ATTN_TILE
from sw_stack.compile.builder import Span
from sw_stack.pack.memory_map import MemoryMap

SOFTMAX_AHEAD = 4
"""SOFTMAXes at most whose scores the array computes before it waits for the one at hand: as many as have places for
scores and for scales."""
ACT_CODES = 64
"""A8 codes per word."""


@dataclass(frozen=True)
class Block:
    """`count` vectors of `words` words each, from `base`; buffers of the same block follow each other."""

    space: str
    base: int
    words: int
    count: int
    buffers: int = 1

    @property
    def buffer_words(self) -> int:
        """Words of one buffer."""
        return self.words * self.count

    def at(self, vector: int = 0, buffer: int = 0, offset: int = 0) -> int:
        """First word of a vector, plus `offset` words."""
        return self.base + (buffer % self.buffers) * self.buffer_words + vector * self.words + offset

    def span(self, buffer: int = 0, first: int = 0, count: int | None = None) -> Span:
        """Vectors [first, first + count) of one buffer."""
        start = self.at(first, buffer)
        return Span(self.space, start, start + self.words * (self.count - first if count is None else count))


class Allocator:
    """Places blocks into banks; the bank named first is tried first."""

    def __init__(self, space: str, banks: int, bank_words: int) -> None:
        self._space, self._bank_words = space, bank_words
        self._used = [0] * banks

    def block(self, name: str, words: int, count: int = 1, bank: int = 0, buffers: int = 1) -> Block:
        """A block inside one bank where possible, else over neighbouring empty ones."""
        size = words * count * buffers
        banks = len(self._used)
        for i in range(banks):
            b = (bank + i) % banks
            if self._used[b] + size <= self._bank_words:
                base = b * self._bank_words + self._used[b]
                self._used[b] += size
                return Block(self._space, base, words, count, buffers)
        need = -(-size // self._bank_words)
        for b in range(banks - need + 1):
            if not any(self._used[b : b + need]):
                self._used[b : b + need] = [self._bank_words] * (need - 1) + [
                    size - (need - 1) * self._bank_words
                ]
                return Block(self._space, b * self._bank_words, words, count, buffers)
        raise KVStrataError(
            f"{name} takes {size} of {banks * self._bank_words} words of the {self._space} buffer, "
            f"of which {sum(self._used)} are taken: compile fewer tokens per pass or a shorter context"
        )


class Buffers:
    """All blocks of a pass of `tokens` tokens, `attention_tokens` of them at a time in attention."""

    def __init__(self, memory_map: MemoryMap, tokens: int, attention_tokens: int) -> None:
        model, engine, layout = memory_map.model, memory_map.engine, memory_map.kv_layout
        lanes = engine.vector_lanes
        self.queries = attention_tokens * model.group
        per_block = layout.heads_per_block
        self.softmax_heads = per_block if tokens == 1 and model.group == 1 else 1
        """KV heads of one SOFTMAX: their scores and their V scales are a stride apart."""
        vb = Allocator("vb", VB_BANKS, engine.vb_words // VB_BANKS)
        hidden, head = memory_map.row_words(model.hidden), model.head_size // lanes
        q_rows = model.heads * model.head_size
        kv_rows = model.kv_heads * model.head_size
        slot_words, ring = memory_map.row_words(memory_map.slots), memory_map.ring
        self.x = vb.block("the residual stream", hidden, tokens, bank=0)
        if model.gated:
            self.gate = vb.block("gate", memory_map.row_words(model.ffn), tokens, bank=2)
        score_words = memory_map.score_words * self.queries * self.softmax_heads
        scales = engine.table_entries - model.heads * (2 if memory_map.sink_slots else 1) - 1
        places = min(engine.vb_words // VB_BANKS // 4 // score_words, scales // (self.queries * per_block))
        self.softmax_ahead = max(1, min(SOFTMAX_AHEAD, places - 1)) if tokens == 1 else 1
        turns = self.softmax_ahead + 1
        probabilities = self.queries * per_block
        self.scores = vb.block(
            "attention scores", memory_map.score_words, self.queries, bank=3,
            buffers=turns * self.softmax_heads,
        )  # fmt: skip
        self.up = vb.block("up", memory_map.row_words(model.ffn), tokens, bank=1)
        self.value_scales = vb.block("V scales", slot_words, model.kv_heads, bank=0)
        self.q = vb.block("q", memory_map.row_words(q_rows), tokens, bank=2)
        self.k = vb.block("k", memory_map.row_words(kv_rows), tokens, bank=1)
        self.v = vb.block("v", memory_map.row_words(kv_rows), tokens, bank=3)
        self.mixed = vb.block("the attention output", memory_map.row_words(q_rows), tokens, bank=0)
        self.normed = vb.block("the normalised input", hidden, tokens, bank=1)
        if model.gated:
            self.gated = vb.block("the gated product", model.ffn // lanes, tokens, bank=0)
        if model.biases:
            self.bias = vb.block("a bias of the residual stream", hidden, 1, bank=3)
        self.norm = vb.block("norm weights", hidden, 2, bank=3)
        if model.rotates:
            self.rope = vb.block("RoPE rows", head, tokens, bank=3)
        self.zeros = vb.block("zeros", model.group * head, 1, bank=3)
        value_words = head if per_block > 1 else layout.value_blocks * engine.lanes // lanes
        self.values = vb.block("value products", value_words, self.queries * per_block, bank=2, buffers=2)
        # What a ring needs besides: softmax states for a drive's partials, or queries at the sinks' distance.
        self.states = vb.block("softmax states", 1, model.heads if ring and not ring.limit else 0, bank=2)
        self.far_rope = vb.block("the sinks' RoPE row", head, 1 if memory_map.sink_slots else 0, bank=1)
        act = Allocator("act", 1, engine.act_words)
        widest = max(model.hidden, model.ffn, q_rows)
        self.a8 = act.block("activations", _act_words(widest), tokens)
        all_queries = model.heads if tokens == 1 else self.queries
        self.q8 = act.block(
            "queries", _act_words(model.head_size), all_queries, buffers=1 if tokens == 1 else 2
        )
        far_queries = all_queries if memory_map.sink_slots else 0
        self.far_q8 = act.block("queries to sinks", _act_words(model.head_size), far_queries)
        tiles = memory_map.slots // ATTN_TILE
        self.p8 = act.block("probabilities", -(-tiles // 2), probabilities, buffers=turns)
        table = Allocator("table", 1, engine.table_entries)
        self.linear_scale = table.block("activation scales", 1, tokens)
        self.p_scale = table.block("softmax scales", 1, probabilities, buffers=turns)
        self.q_scale = table.block("query scales", 1, all_queries)
        self.far_scale = table.block("scales of queries to sinks", 1, far_queries)


def logits_block(engine: EngineConfig, start: int, room: int, rows: int, vectors: int = 1) -> Block:
    """Places for logits of `vectors` vectors from VB word `start` on, `room` words each: whole row blocks, as many as
    fit and are needed."""
    block_words = engine.lanes // engine.vector_lanes
    fit = min(room // block_words, -(-rows // engine.lanes))
    if fit < 1:
        raise KVStrataError(f"logits need {block_words} words of the vb buffer; got {max(0, room)}")
    return Block("vb", start, fit * block_words, vectors)


def attention_tokens(memory_map: MemoryMap, tokens: int) -> int:
    """Tokens whose queries of one block of KV heads pass the array together."""
    per_token = memory_map.model.group * memory_map.kv_layout.heads_per_block
    fit = memory_map.engine.tokens // per_token
    if not fit:
        raise KVStrataError(
            f"the array passes {memory_map.engine.tokens} vectors; the query heads of one value block are {per_token}"
        )
    limit = min(tokens, fit)
    return max(n for n in range(1, limit + 1) if tokens % n == 0 or n == limit)


def _act_words(codes: int) -> int:
    assert codes % STEP == 0
    return -(-codes // ACT_CODES)
