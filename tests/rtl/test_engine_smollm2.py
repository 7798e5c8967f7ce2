"""A layer of the real model at its true shape on the `small` engine: prefill, decode, every memory latency."""

import dataclasses

import pytest
import torch

from golden.loaders import load
from golden.spec.engine import SMALL
from golden.spec.memory import MemoryModel
from sw_stack.device.rtl import RtlDevice
from tests.sw_stack.machines import make_machine

pytestmark = [pytest.mark.rtl, pytest.mark.slow]

PROMPT = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411]
STEPS = [407, 19712, 8182, 30]
MODELS = {
    "latency 2": MemoryModel("fixed", latency_cycles=2),
    "latency 20": MemoryModel("fixed", latency_cycles=20),
    "random": MemoryModel("random", latency_cycles=120, stall_percent=20, seed=3),
    "hbm": MemoryModel(),
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    torch.set_num_threads(1)
    checkpoint = load()
    one = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, layers=1))
    return make_machine(tmp_path_factory.mktemp("smollm2"), one, SMALL, "w4", "kv4", context=64)


@pytest.fixture(scope="module")
def expected(machine):
    """Golden logits after the prompt and after each step."""
    cache = machine.golden.new_cache()
    logits = [machine.golden.forward(PROMPT, cache, last_only=True)[0]]
    return logits + [machine.golden.forward([token], cache)[0] for token in STEPS]


@pytest.mark.parametrize("name", list(MODELS))
def test_a_real_layer_is_exact_at_any_latency(machine, expected, name):
    """9 query and 3 KV heads of 64, hidden 576, FFN 1,536, and the head of 49,152 rows: all logits equal."""
    device = RtlDevice(machine.image, MODELS[name])
    try:
        session = machine.session(device)
        assert torch.equal(session.forward(PROMPT), expected[0])
        for token, logits in zip(STEPS, expected[1:]):
            assert torch.equal(session.forward([token]), logits)
    finally:
        device.close()
