"""A Llama-2-7B-shaped decoder layer on the engine's RTL: one token behind 1,023, every bit of the residual stream."""

import dataclasses

import numpy as np
import pytest

from golden.spec.engine import SMALL, TINY, EngineConfig, Op
from golden.spec.memory import MemoryModel
from sw_stack.compile.memory import MemoryTiming
from sw_stack.compile.schedule import schedule
from sw_stack.device.golden import GoldenDevice
from sw_stack.device.rtl import RtlDevice
from sw_stack.rtl.layer import llama_2_7b, random_hidden, random_layer

pytestmark = pytest.mark.rtl

FIXED = MemoryModel("fixed", latency_cycles=20)
QUICK = MemoryModel("fixed", latency_cycles=2)
HBM = MemoryModel()
RANDOM = MemoryModel("random", latency_cycles=120, stall_percent=20, seed=3)
FOUR_TURNS = EngineConfig("four turns", 4, 4, 4, 16, 256, 4096, 64, 64)
NARROW_TOLERANCE, WHOLE_TOLERANCE = 0.02, 0.01
"""Behind the HBM model: the prediction knows neither which rows are open nor the phase of the first refresh."""


def on_rtl(layer, memory, hidden):
    device = RtlDevice(layer.image, memory)
    try:
        return layer.step(device, hidden)
    finally:
        device.close()


def check(layer, memories, tolerance):
    """Equal bits on every memory; cycles equal to the prediction at a fixed latency; nothing predicts a random one."""
    engine, program = layer.map.engine, layer.programs.programs["decode"]
    hidden = random_hidden(layer.map.model)
    expected, _ = layer.step(GoldenDevice(layer.image), hidden)
    assert not np.array_equal(expected, hidden)
    for memory in memories:
        got, run = on_rtl(layer, memory, hidden)
        assert np.array_equal(got, expected), memory.mode
        if memory is RANDOM:
            continue
        predicted = schedule(program, engine, layer.registers, MemoryTiming.of(memory)).cycles
        if memory.mode == "fixed":
            assert run.cycles == predicted
        else:
            assert run.cycles == pytest.approx(predicted, rel=tolerance)


@pytest.mark.parametrize("weights", ["w4", "w2s24"])
def test_a_narrow_layer_is_exact_and_as_long_as_predicted(tmp_path, weights):
    shape = dataclasses.replace(llama_2_7b(context=96), hidden=512, heads=4, kv_heads=4, ffn=1024)
    check(random_layer(tmp_path / "image", shape, TINY, weights), (FIXED, HBM), NARROW_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["w4", "w2s24"])
def test_turned_keys_and_queries_between_scores_are_exact_and_as_long_as_predicted(tmp_path, weights):
    """Eight heads: keys lie turned four ways, queries of the last three are computed inside attention."""
    shape = dataclasses.replace(
        llama_2_7b(context=72), hidden=256, heads=8, kv_heads=8, head_size=32, ffn=384
    )
    layer = random_layer(tmp_path / "image", shape, FOUR_TURNS, weights)
    products = [i for i in layer.programs.programs["decode"].instructions if i.op is Op.MATRIX]
    notes = [i.note for i in products]
    assert notes.index("layer 0 keys of head 2") < len(notes) - notes[::-1].index("layer 0 q") - 1
    assert {i.values["turn"] for i in products if "keys" in i.note} == {0, 1, 2, 3}
    check(layer, (QUICK, FIXED, HBM, RANDOM), NARROW_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["w4", "w2s24"])
def test_the_whole_layer_is_exact_and_as_long_as_predicted(tmp_path, weights):
    """True widths, 32 heads, 1,024 slots, behind the HBM model."""
    check(random_layer(tmp_path / "image", llama_2_7b(), SMALL, weights), (HBM,), WHOLE_TOLERANCE)
