"""Tiles outside sinks and window cost nothing: a program names the row blocks to read, and no other is computed."""

import dataclasses

import numpy as np
import pytest

from golden.spec.engine import INSTRUCTION_BYTES, TINY, WORD_BYTES, Op, Unit, encode
from golden.spec.memory import MemoryModel
from sw_stack.device.golden import GoldenDevice
from sw_stack.device.rtl import RtlDevice
from sw_stack.rtl.layer import llama_2_7b, random_layer

pytestmark = pytest.mark.rtl

SHAPE = dataclasses.replace(llama_2_7b(context=96), hidden=128, heads=4, kv_heads=4, head_size=32, ffn=64)
BLOCKS = 96 // TINY.lanes
SCORES = 100
"""VB word of the first score."""


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    return random_layer(tmp_path_factory.mktemp("lambda") / "image", SHAPE, TINY, "w4")


def scores_of(device, layer, runs):
    """Scores of one query with the row blocks of `runs`, (first, count) each, and what the run counted."""
    memory_map = layer.map
    words = memory_map.kv_layout.key_block_words
    total = sum(count for _, count in runs)
    program = [
        encode(Op.READ, addr=memory_map.regions["input"].base, count=4, vectors=1, signal=1 << Unit.VECTOR),
        encode(Op.QUANT, count=32, vectors=1, wait=1 << Unit.DMA, signal=1 << Unit.MATRIX),
        *(
            encode(Op.LOAD, addr=memory_map.key_base(0, 1) + first * words, count=count * words, runs=1)
            for first, count in runs
        ),
        encode(Op.MATRIX, codes=1, scaled=1, minimum=1, group_steps=1, count=total, steps=1, vectors=1,
               dst=SCORES, wait=1 << Unit.VECTOR),
        encode(Op.HALT, interrupt=1),
    ]  # fmt: skip
    query = np.random.default_rng(3).integers(-(1 << 16), 1 << 16, 32).astype("<i4").view(np.uint8)
    device.write_aux(memory_map.regions["input"].base, query)
    raw = np.frombuffer(b"".join(word.to_bytes(INSTRUCTION_BYTES, "little") for word in program), np.uint8)
    place = memory_map.regions["program"].base
    device.write_aux(place, raw)
    result = device.run(place // WORD_BYTES, {})
    return np.asarray(device.read_vb(SCORES, total * TINY.lanes)), result.counters


def test_blocks_between_sinks_and_window_are_neither_read_nor_computed(layer):
    device = RtlDevice(layer.image, MemoryModel("fixed", latency_cycles=20))
    try:
        every, all_counters = scores_of(device, layer, [(0, BLOCKS)])
        sinks, window = (0, 1), (BLOCKS - 4, 4)
        kept, counters = scores_of(device, layer, [sinks, window])
    finally:
        device.close()
    rows = every.reshape(BLOCKS, TINY.lanes)
    assert np.array_equal(kept.reshape(5, TINY.lanes), rows[[0, *range(BLOCKS - 4, BLOCKS)]])
    assert np.array_equal(every, scores_of(GoldenDevice(layer.image), layer, [(0, BLOCKS)])[0])
    words = layer.map.kv_layout.key_block_words
    assert (all_counters["weight_words"], counters["weight_words"]) == (BLOCKS * words, 5 * words)
    assert (all_counters["array_steps"], counters["array_steps"]) == (BLOCKS, 5)
