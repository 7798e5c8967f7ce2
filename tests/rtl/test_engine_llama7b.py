"""A Llama-2-7B-shaped decoder layer on the engine's RTL: one token behind 1,023, every bit of the residual stream."""

import dataclasses

import numpy as np
import pytest

from golden.spec.engine import SMALL, TINY
from golden.spec.memory import MemoryModel
from sw_stack.compile.memory import MemoryTiming
from sw_stack.compile.schedule import schedule
from sw_stack.device.golden import GoldenDevice
from sw_stack.device.rtl import RtlDevice
from sw_stack.rtl.layer import llama_2_7b, random_hidden, random_layer

pytestmark = pytest.mark.rtl

FIXED = MemoryModel("fixed", latency_cycles=20)
HBM = MemoryModel()
NARROW_TOLERANCE, WHOLE_TOLERANCE = 0.02, 0.01
"""Behind the HBM model: the prediction knows neither which rows are open nor the phase of the first refresh."""


def on_rtl(layer, memory, hidden):
    device = RtlDevice(layer.image, memory)
    try:
        return layer.step(device, hidden)
    finally:
        device.close()


def check(layer, memories, tolerance):
    """Equal bits on every memory; cycles equal to the prediction at a fixed latency."""
    engine, program = layer.map.engine, layer.programs.programs["decode"]
    hidden = random_hidden(layer.map.model)
    expected, _ = layer.step(GoldenDevice(layer.image), hidden)
    assert not np.array_equal(expected, hidden)
    for memory in memories:
        got, run = on_rtl(layer, memory, hidden)
        assert np.array_equal(got, expected), memory.mode
        predicted = schedule(program, engine, layer.registers, MemoryTiming.of(memory)).cycles
        if memory is FIXED:
            assert run.cycles == predicted
        else:
            assert run.cycles == pytest.approx(predicted, rel=tolerance)


@pytest.mark.parametrize("weights", ["w4", "w2s24"])
def test_a_narrow_layer_is_exact_and_as_long_as_predicted(tmp_path, weights):
    shape = dataclasses.replace(llama_2_7b(context=96), hidden=512, heads=4, kv_heads=4, ffn=1024)
    check(random_layer(tmp_path / "image", shape, TINY, weights), (FIXED, HBM), NARROW_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["w4", "w2s24"])
def test_the_whole_layer_is_exact_and_as_long_as_predicted(tmp_path, weights):
    """True widths, 32 heads, 1,024 slots, behind the HBM model."""
    check(random_layer(tmp_path / "image", llama_2_7b(), SMALL, weights), (HBM,), WHOLE_TOLERANCE)
