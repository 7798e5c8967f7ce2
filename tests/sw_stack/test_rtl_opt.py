"""An OPT-shaped decoder on the Verilated engine: logits equal to golden to the bit, cycles as predicted."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from golden.spec.engine import ENGINE_CONFIGS
from golden.spec.memory import MemoryModel
from sw_stack.compile.memory import MemoryTiming
from sw_stack.device.rtl import RtlDevice
from sw_stack.device.timing import TimingDevice
from tests.sw_stack.machines import OPT, MakeMachine
from tests.sw_stack.test_compile import prompt

MEMORY = {"20": MemoryModel("fixed", latency_cycles=20), "hbm": MemoryModel()}
LAYER = dataclasses.replace(OPT, layers=1, vocab=64)
OPT_125M = dataclasses.replace(OPT, hidden=768, heads=12, kv_heads=12, head_size=64, ffn=3072, vocab=8192)


@pytest.mark.parametrize(
    ("shape", "engine", "memory", "steps"),
    [
        (LAYER, "tiny", "20", (1, 1)),
        pytest.param(OPT, "tiny", "20", (37, 1, 1), marks=pytest.mark.slow),
        pytest.param(OPT_125M, "small", "hbm", (17, 1), marks=pytest.mark.slow),
    ],
)
def test_opt_is_exact_and_predicted(
    machine: MakeMachine, shape, engine: str, memory: str, steps: tuple[int, ...]
) -> None:
    """Prefill and decode, across a tile of slots where the prompt is long; every step within two percent."""
    made = machine(shape, ENGINE_CONFIGS[engine], context=96)
    timing = TimingDevice(made.image, MemoryTiming.of(MEMORY[memory]))
    rtl, predicted = made.session(RtlDevice(made.image, MEMORY[memory])), made.session(timing)
    cache = made.golden.new_cache()
    try:
        for seed, count in enumerate(steps):
            ids = prompt(shape.vocab, count, seed)
            expected = made.golden.forward(ids, cache, last_only=True)[0]
            assert torch.equal(rtl.forward(ids), expected)
            assert torch.equal(predicted.forward(ids), expected)
            # All runs of a step: one refresh more or less is more than two percent of so short a head.
            m, p = rtl.cycles, predicted.cycles
            assert abs(p / m - 1) <= 0.02, f"{p} cycles predicted, {m} measured"
            rtl.runs.clear()
            predicted.runs.clear()
    finally:
        rtl.device.close()
