"""Memory masters as Verilog under Verilator, against the HBM model and a third-party AXI model."""

from dataclasses import replace
from functools import partial

import pytest

from golden.spec.engine import TINY
from golden.spec.memory import MemoryModel
from hw.engine.mem.stream import stream
from hw.engine.mem.striped import StripedReader
from hw.flow import cocotb_run
from sw_stack.compile.cycles import WordStream
from sw_stack.compile.memory import MemoryPort, MemoryTiming
from tests.rtl.mem_duts import Copier, striped_reader
from tools.bench.mem import limit_beats_per_cycle

pytestmark = pytest.mark.rtl


def test_striped_reader():
    assert cocotb_run.run(partial(striped_reader), "striped_reader", "tests.rtl.mem_reader_bench") > 20


def test_read_and_write_path():
    assert cocotb_run.run(partial(Copier), "copier", "tests.rtl.mem_copier_bench") > 20


@pytest.mark.parametrize("idle_percent", [0, 30])
@pytest.mark.parametrize("latency", [2, 20, 60])
def test_streams_of_whole_words_at_any_latency(latency, idle_percent):
    """Full-width channels in the C++ harness, which compares every beat with the memory."""
    counts = stream(
        2, 128, beats=3000, rows=2, idle_percent=idle_percent, model=MemoryModel("fixed", latency)
    )
    assert counts["beats"] == 6000
    assert counts["first_beat_cycles"] >= StripedReader.first_beat(latency)
    if not idle_percent:
        assert counts["first_beat_cycles"] == StripedReader.first_beat(latency)
        assert counts["cycles"] == counts["beats"]


def test_the_prefetch_fifo_hides_hbm_latency_and_refresh():
    """At least 95% of what the HBM model itself can stream; the rest is the model's refresh."""
    counts = stream(2, 128, beats=12_000)
    fraction = counts["beats"] / counts["cycles"]
    limit = limit_beats_per_cycle(MemoryModel())
    assert 0.95 * limit <= fraction <= limit * 1.005
    assert counts["refreshes"] > 10
    assert counts["mean_latency_cycles"] > 30


@pytest.mark.parametrize(("fifo", "beats"), [(128, 100), (128, 300), (128, 1000), (128, 3000), (1024, 3000)])
def test_a_stretch_waits_for_whole_refreshes_as_predicted(fifo, beats):
    """Channels in lock step: a short stretch loses whole refreshes, not their mean share. A deep FIFO has no more
    bursts on their way than `BURSTS_AHEAD`, and streams as fast."""
    memory = MemoryModel()
    port = MemoryPort(MemoryTiming.of(memory), 2)
    words = WordStream(replace(TINY, fifo_words=fifo), port)
    words.load(0, 0, beats, 1, 0)
    for _ in range(beats):
        words.take(words.taken[-1] + 1 if words.taken else 0)
    predicted = words.taken[-1] - words.taken[0] + 1
    assert stream(2, fifo, beats=beats, model=memory)["cycles"] == pytest.approx(predicted, rel=0.015)


def test_too_shallow_a_fifo_shows():
    """32 beats in flight cannot cover the latency: the measurement would tell."""
    deep, shallow = stream(2, 128, beats=6000), stream(2, 32, beats=6000)
    assert shallow["cycles"] > 1.05 * deep["cycles"]
