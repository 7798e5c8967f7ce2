"""The whole engine under Verilator: compiled decoders against the golden decoder, faults, aborts and resets."""

import dataclasses

import numpy as np
import pytest
import torch

from golden.spec import KVStrataError
from golden.spec.engine import INSTRUCTION_BYTES, TINY, WORD_BYTES, Error, Op, Reg, State, Unit, encode
from golden.spec.memory import MemoryModel
from sw_stack.device.protocol import DeviceFault
from sw_stack.device.rtl import SCRATCH, RtlDevice
from tests.sw_stack.machines import SHAPE, make_machine

pytestmark = pytest.mark.rtl

ONE_LAYER = dataclasses.replace(SHAPE, layers=1)
MODELS = {
    "latency 2": MemoryModel("fixed", latency_cycles=2),
    "latency 20": MemoryModel("fixed", latency_cycles=20),
    "random": MemoryModel("random", latency_cycles=90, stall_percent=30, seed=5),
    "hbm": MemoryModel(),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    made = {}

    def get(weights="w4", kv="kv4", shape=ONE_LAYER, engine=TINY):
        key = weights, kv, shape, engine
        if key not in made:
            made[key] = make_machine(tmp_path_factory.mktemp("image"), shape, engine, weights, kv)
        return made[key]

    return get


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, SHAPE.vocab, count).tolist()


def check(machine, model, prompt, steps):
    """Prefill and decode steps, every logit equal; cycles of each run."""
    device = RtlDevice(machine.image, model)
    try:
        session, cache = machine.session(device), machine.golden.new_cache()
        ids = tokens(prompt)
        expected = machine.golden.forward(ids, cache, last_only=True)[0]
        assert torch.equal(session.forward(ids), expected)
        for token in tokens(steps, 1):
            assert torch.equal(session.forward([token]), machine.golden.forward([token], cache)[0])
        return [result.cycles for _, result in session.runs]
    finally:
        device.close()


def test_bits_do_not_depend_on_memory(machines):
    """16 tokens of prefill and decode steps; only cycles differ between latencies."""
    cycles = {name: check(machines(), model, 19, 2) for name, model in MODELS.items()}
    assert len({tuple(c) for c in cycles.values()}) == len(MODELS)


@pytest.mark.parametrize(("weights", "kv"), [("w8", "kv8"), ("w2", "kv4")])
def test_formats(machines, weights, kv):
    check(machines(weights, kv), MODELS["latency 20"], 17, 2)


def test_two_to_four_weights_and_wide_heads(machines):
    shape = dataclasses.replace(ONE_LAYER, hidden=128, heads=2, kv_heads=2, head_size=64, ffn=256)
    check(machines("w2s24", "kv4", shape), MODELS["random"], 17, 2)


def test_a_corrupted_weight_changes_the_bits(machines):
    """The comparison can fail: one inverted word of a projection is seen."""
    machine = machines()
    device = RtlDevice(machine.image, MODELS["latency 2"])
    try:
        path = device.engine._path("channel.bin")
        image = np.array(machine.image.channel(0)).reshape(-1).copy()
        start = (machine.programs.map.matrices["layers.0.gate"].base + 1) * WORD_BYTES
        image[start : start + WORD_BYTES] ^= 0xFF
        path.write_bytes(image.tobytes())
        device.engine.map_channel(0, path)
        expected = machine.golden.forward([3], machine.golden.new_cache())[0]
        assert not torch.equal(machine.session(device).forward([3]), expected)
    finally:
        device.close()


@pytest.fixture
def device(machines):
    made = RtlDevice(machines().image, MODELS["latency 20"])
    yield made
    made.close()


def run_words(device, *words):
    raw = b"".join(word.to_bytes(INSTRUCTION_BYTES, "little") for word in words)
    device.engine.write_aux(SCRATCH, np.frombuffer(raw, np.uint8))
    return device.engine.run(SCRATCH // WORD_BYTES, {})


HALT = encode(Op.HALT, interrupt=1)
READ = {"addr": 0, "count": 1, "vectors": 1}
FAULTS = {
    "unknown opcode": (0x99, Error.ILLEGAL_INSTRUCTION),
    "reserved bit of HALT": (encode(Op.HALT) | 1 << 200, Error.ILLEGAL_INSTRUCTION),
    "follows several": (
        encode(Op.MATRIX, count=1, steps=1, group_steps=1, vectors=2, follows=1),
        Error.SHAPE,
    ),
    "counts several": (encode(Op.QUANT, count=32, vectors=2, counted=1), Error.SHAPE),
    "codes that nobody counts": (
        encode(Op.MATRIX, count=1, steps=1, group_steps=1, vectors=1, follows=1),
        Error.WATCHDOG,
    ),
    "reserved bit": (encode(Op.READ, **READ) | 1 << 31, Error.ILLEGAL_INSTRUCTION),
    "no vectors": (encode(Op.MATRIX, count=1, steps=1, group_steps=1), Error.SHAPE),
    "too many vectors": (encode(Op.MATRIX, count=1, steps=1, group_steps=1, vectors=17), Error.SHAPE),
    "activations": (
        encode(Op.MATRIX, count=1, steps=1, group_steps=1, vectors=1, addr=TINY.act_words),
        Error.ADDRESS,
    ),
    "outputs": (
        encode(Op.MATRIX, count=1, steps=1, group_steps=1, vectors=1, dst=TINY.vb_words),
        Error.ADDRESS,
    ),
    "scales": (encode(Op.MATRIX, count=1, steps=1, group_steps=1, vectors=2, table=63), Error.ADDRESS),
    "turned too far": (
        encode(Op.MATRIX, count=1, steps=1, group_steps=1, vectors=1, turn=TINY.turns),
        Error.SHAPE,
    ),
    "keys turned too far": (encode(Op.APPEND_K, count=1, bits=4, head_size=32, turn=TINY.turns), Error.SHAPE),
    "load past the channel": (encode(Op.LOAD, addr=(1 << 28) // 64 - 1, count=2, runs=1), Error.ADDRESS),
    "empty load": (encode(Op.LOAD, addr=0, count=0, runs=1), Error.SHAPE),
    "unaligned read": (encode(Op.READ, **{**READ, "addr": 4}), Error.ADDRESS),
    "token that nobody gives": (encode(Op.READ, **READ, wait=1 << Unit.LOAD), Error.WATCHDOG),
    "words that nobody loads": (
        encode(Op.MATRIX, count=1, steps=1, group_steps=1, vectors=1),
        Error.WATCHDOG,
    ),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_faults_stop_with_code_and_address_and_leave_the_engine_usable(device, machines, name):
    word, code = FAULTS[name]
    good = encode(Op.READ, **READ, dst=8)
    device.engine.set(Reg.WATCHDOG, 500)
    result = run_words(device, good, good, word, HALT)
    assert (result.state, result.error, result.error_pc) == (State.STOPPED, code, 2)
    machine = machines()
    expected = machine.golden.forward([3], machine.golden.new_cache())[0]
    assert torch.equal(machine.session(device).forward([3]), expected)


@pytest.mark.parametrize("response", [2, 3])
def test_a_bus_error_is_a_fault_with_a_sentence(machines, response):
    machine = machines()
    base = machine.programs.map.matrices["layers.0.gate"].base * WORD_BYTES
    model = MemoryModel("fixed", latency_cycles=9, error_address=base, error_response=response)
    device = RtlDevice(machine.image, model)
    try:
        with pytest.raises(DeviceFault, match=r"\(bus\): a memory answered with an error") as fault:
            machine.session(device).forward([3])
        assert fault.value.code is Error.BUS
    finally:
        device.close()


@pytest.mark.parametrize("cycle", [3, 60, 400, 1000, 1500])
def test_an_abort_leaves_the_engine_usable(device, machines, cycle):
    machine = machines()
    session = machine.session(device)
    program = machine.programs.programs["decode"]
    from sw_stack.compile.program import step_registers

    registers = {int(r): v for r, v in step_registers(machine.programs.map, 0, 1).items()}
    result = device.engine.run(program.word, registers, abort_at=cycle)
    assert (result.state, result.error) == (State.STOPPED, Error.ABORTED)
    expected = machine.golden.forward([3], machine.golden.new_cache())[0]
    assert torch.equal(session.forward([3]), expected)


def test_a_reset_in_mid_traffic_leaves_the_engine_usable(device, machines):
    machine = machines()
    session = machine.session(device)
    device.engine.set(Reg.PROGRAM, machine.programs.programs["prefill"].word)
    device.engine.set(Reg.CONTROL, 1)
    for _ in range(300):
        device.engine.set(Reg.SCALAR, 0)
    device.engine.reset()
    expected = machine.golden.forward([3], machine.golden.new_cache())[0]
    assert torch.equal(session.forward([3]), expected)


def test_bad_commands_are_sentences(device):
    with pytest.raises(KVStrataError, match="cannot read memory image"):
        device.engine.map_aux(device.engine._path("missing"))
    with pytest.raises(KVStrataError, match="unknown or incomplete command: jump"):
        device.engine.command("jump 3")
