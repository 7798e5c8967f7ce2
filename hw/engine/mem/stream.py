"""Measuring the striped reader on the HBM model, as LOAD has it: the share of cycles with a beat of every channel."""

import json
import subprocess
import tempfile
from functools import partial
from pathlib import Path

from golden.spec import KVStrataError
from golden.spec.memory import CHANNEL_ADDR_BITS, MemoryModel
from hw.engine.mem.channels import BURSTS_AHEAD
from hw.engine.mem.striped import StripedReader
from hw.flow.verilator import build_harness
from hw.flow.verilog import emit

HARNESS = Path(__file__).with_name("stream_harness.cpp")


def stream(
    channels: int,
    fifo_beats: int,
    *,
    beats: int = 20_000,
    rows: int = 1,
    idle_percent: int = 0,
    model: MemoryModel | None = None,
) -> dict[str, float]:
    """Stream `rows` rows of `beats` 64-byte beats from every channel and return the harness's counts.

    `cycles` is first to last beat at the consumer, which takes a beat of all channels together. Every beat is
    compared with the memory.

    Raises KVStrataError with the harness's sentence for a wrong beat, an AXI violation or a hang.
    """
    reader = partial(
        StripedReader, channels, addr_bits=CHANNEL_ADDR_BITS, data_bits=512, fifo_beats=fifo_beats,
        max_bursts=BURSTS_AHEAD,
    )  # fmt: skip
    design = emit(reader, "striped_reader")
    program = build_harness(
        design, [HARNESS], include_dirs=[HARNESS.parent], defines={"KV_CHANNELS": channels}
    )
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as config:
        config.write((model or MemoryModel()).to_text())
        config.flush()
        command = [str(program), config.name, str(beats), str(rows), str(idle_percent)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise KVStrataError(f"streaming through {channels} channels failed: {result.stderr.strip()}")
    return json.loads(result.stdout)
