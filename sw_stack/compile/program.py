"""Encoded programs and the scalar registers that fit one program to every sequence length."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from golden.spec import KVStrataError
from golden.spec.engine import INSTRUCTION_BYTES, WORD_BYTES, value_stream
from golden.spec.formats import ATTN_TILE
from sw_stack.compile.builder import Instruction
from sw_stack.pack.memory_map import MemoryMap


class R(IntEnum):
    """Scalar registers that the host writes before a run (0 reads as zero)."""

    ZERO = 0
    POSITION = 1
    """Slot of the first new token; of a ring, counted from the end of the sinks' tile."""
    KEY_BLOCKS = 2
    """Row blocks of keys up to and with the new tokens."""
    KEY_WORDS = 3
    TILES = 4
    """Attention tiles of 32 slots."""
    VALUE_WORDS = 5
    """Words of a value row block that hold those tiles."""
    SCALE_WORDS = 6
    """VB words of V scale records."""
    ROPE_BYTES = 7
    """Offset of the first token's RoPE row."""
    LAST_ROW = 8
    """VB words from the first hidden row to the one whose logits are wanted."""
    LIVE = 9
    """Slots that attention of a ring spans: the sinks' tile and the ring as far as it is filled."""
    SINKS = 10
    """Live slots of the sinks' tile."""


@dataclass(frozen=True)
class Program:
    """An instruction stream at a place in auxiliary memory, for `tokens` tokens per run (0: any)."""

    name: str
    tokens: int
    base: int
    """Byte address in auxiliary memory, 64-byte aligned."""
    instructions: tuple[Instruction, ...]

    def encoded(self) -> np.ndarray:
        """uint8 [n * 32], what lies in memory."""
        raw = b"".join(i.word().to_bytes(INSTRUCTION_BYTES, "little") for i in self.instructions)
        return np.frombuffer(raw, np.uint8)

    @property
    def size_bytes(self) -> int:
        """Bytes of the stream."""
        return len(self.instructions) * INSTRUCTION_BYTES

    @property
    def word(self) -> int:
        """Value for the PROGRAM register."""
        return self.base // WORD_BYTES


def step_registers(memory_map: MemoryMap, start: int, tokens: int) -> dict[R, int]:
    """Registers of a run that appends `tokens` tokens at slot `start`.

    KVStrataError when they leave the map's context, or when a pass of several tokens straddles an attention tile, or
    meets a ring, where each token takes the place of another.
    """
    end = start + tokens
    if start < 0 or end > memory_map.context:
        raise KVStrataError(f"the memory map holds a context of {memory_map.context} tokens; got {end}")
    if memory_map.ring and tokens > 1:
        raise KVStrataError(f"a pass over a ring has one token; got {tokens}")
    if start // ATTN_TILE != (end - 1) // ATTN_TILE:
        raise KVStrataError(
            f"a pass of several tokens stays inside one tile of {ATTN_TILE} slots; got {start} to {end - 1}"
        )
    engine, layout, ring = memory_map.engine, memory_map.kv_layout, memory_map.ring
    behind = ring.live(end) if ring else end
    live = memory_map.sink_slots + behind
    tiles = -(-live // ATTN_TILE)
    blocks = -(-behind // engine.lanes)
    hidden_words = memory_map.row_words(memory_map.model.hidden)
    return {
        R.POSITION: ring.place(start) if ring else start,
        R.KEY_BLOCKS: blocks,
        R.KEY_WORDS: blocks * layout.key_block_words,
        R.TILES: tiles,
        R.VALUE_WORDS: value_stream(layout.bits).words_per_block(engine, tiles),
        R.SCALE_WORDS: -(-live // engine.vector_lanes),
        R.ROPE_BYTES: start * memory_map.regions["rope"].stride if memory_map.model.rotates else 0,
        R.LAST_ROW: (tokens - 1) * hidden_words,
        R.LIVE: live,
        R.SINKS: ring.live_sinks(end) if ring else 0,
    }
