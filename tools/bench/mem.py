"""Memory system on the HBM model: stream beat fractions measured on RTL, random efficiency of the model, resources."""

import random

from golden.spec.memory import CHANNEL_ADDR_BITS, CHANNEL_BYTES, HbmTiming, MemoryModel
from hw.engine.mem.hbm import MemoryChannel
from hw.engine.mem.reader import ReadChannel
from hw.engine.mem.stream import stream
from hw.flow.synth import resources

BEAT_BYTES = 64
CHANNELS = 8


def model_efficiency(addresses: list[int], nbytes: int, model: MemoryModel, in_flight: int = 64) -> float:
    """Bytes moved over what the data bus could move, with `in_flight` requests outstanding."""
    channel, done = MemoryChannel(model), []
    for n, address in enumerate(addresses):
        done.append(channel.serve(done[n - in_flight] if n >= in_flight else 0, address, nbytes))
    seconds = done[-1] / (model.timing.user_clock_khz * 1e3)
    return len(addresses) * nbytes / seconds / (model.timing.peak_gb_per_s * 1e9)


def stream_efficiency(model: MemoryModel) -> float:
    """Efficiency of an endless stream: what the model itself allows."""
    return model_efficiency([BEAT_BYTES * n for n in range(50_000)], BEAT_BYTES, model)


def random_efficiency(model: MemoryModel, nbytes: int = BEAT_BYTES) -> float:
    """Efficiency of uniformly random aligned accesses of `nbytes`."""
    source = random.Random(1)
    addresses = [source.randrange(CHANNEL_BYTES) // nbytes * nbytes for _ in range(20_000)]
    return model_efficiency(addresses, nbytes, model)


def limit_beats_per_cycle(model: MemoryModel) -> float:
    """Beats per user cycle that one channel of the model can stream, at most one."""
    timing: HbmTiming = model.timing
    peak = timing.peak_gb_per_s * 1e9 / (timing.user_clock_khz * 1e3) / BEAT_BYTES
    return min(1.0, peak * stream_efficiency(model))


def run() -> list[dict]:
    """Rows of `make bench`."""
    model = MemoryModel()
    limit = limit_beats_per_cycle(model)
    rows: list[tuple[str, float, str, float | None, str]] = [
        ("mem.hbm.stream_efficiency", stream_efficiency(model), "fraction of peak", 0.9, "higher"),
        ("mem.hbm.random64_efficiency", random_efficiency(model), "fraction of peak", None, "higher"),
    ]
    for fifo, target in ((64, None), (128, 0.95)):  # the shallow one is there to show what depth buys
        counts = stream(CHANNELS, fifo)
        fraction = counts["beats"] / counts["cycles"]
        least = target and target * limit
        rows.append((f"mem.stream.beat_fraction.fifo{fifo}", fraction, "beats/cycle", least, "higher"))
        rows.append((f"mem.stream.of_hbm_limit.fifo{fifo}", fraction / limit, "fraction", target, "higher"))
    fixed = stream(CHANNELS, 128, model=MemoryModel("fixed", 32))
    rows.append(
        ("mem.stream.beat_fraction.fixed32", fixed["beats"] / fixed["cycles"], "beats/cycle", 0.95, "higher")
    )
    port = resources(
        ReadChannel(addr_bits=CHANNEL_ADDR_BITS, data_bits=512, fifo_beats=128), "read_channel_128", "xcup"
    )
    rows.append(("mem.read_channel.lut", port.lut, "LUT", None, "lower"))
    rows.append(("mem.read_channel.bram", port.bram, "BRAM36", None, "lower"))
    names = ("id", "value", "unit", "target", "better")
    return [dict(zip(names, row)) for row in rows]
