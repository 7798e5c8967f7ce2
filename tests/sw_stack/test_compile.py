"""Compiled programs on the golden device equal the golden decoder bit for bit, whatever order the units take."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from golden.config import DecoderConfig
from golden.loaders import Checkpoint
from golden.spec import KVStrataError
from golden.spec.engine import INSTRUCTION_BYTES, SMALL, TINY, U280, EngineConfig, Error, Op, Unit, decode
from sw_stack.compile.decoder import compile_model
from sw_stack.compile.program import step_registers
from sw_stack.device.golden import GoldenDevice
from sw_stack.device.protocol import DeviceFault
from sw_stack.pack.memory_map import MemoryMap
from tests.sw_stack.machines import OPT, SHAPE, MakeMachine

LLAMA_7B = DecoderConfig("llama-2-7b", layers=32, hidden=4096, heads=32, kv_heads=32, head_size=128, ffn=11008,
                       vocab=32000, context=4096, rope_base=1e4, norm_eps=1e-5)  # fmt: skip
OPT_6B7 = dataclasses.replace(OPT, name="opt-6.7b", layers=32, hidden=4096, heads=32, kv_heads=32, head_size=128,
                              ffn=16384, vocab=50272, context=2048, norm="rms")  # fmt: skip
GROUP3 = dataclasses.replace(SHAPE, hidden=192, heads=6, kv_heads=2, head_size=32, ffn=128)
GROUP3_WIDE = dataclasses.replace(GROUP3, head_size=64)
MHA = dataclasses.replace(SHAPE, hidden=128, heads=2, kv_heads=2, head_size=64)
OPT_GROUPED = dataclasses.replace(OPT, name="opt grouped", kv_heads=2, head_size=64, ffn=96)
WIDE = dataclasses.replace(SHAPE, layers=1, hidden=256, heads=2, kv_heads=1, head_size=128, ffn=256)


def prompt(vocab: int, n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, n).tolist()


@pytest.mark.parametrize(
    ("shape", "engine", "weights", "kv"),
    [
        (SHAPE, SMALL, "w4", "kv4"),
        pytest.param(SHAPE, SMALL, "w2", "kv8", marks=pytest.mark.slow),
        (SHAPE, SMALL, "w8", "kv4"),
        (MHA, SMALL, "w2s24", "kv4"),
        pytest.param(GROUP3, SMALL, "w4", "kv8", marks=pytest.mark.slow),
        pytest.param(WIDE, SMALL, "w4", "kv4", marks=pytest.mark.slow),
        pytest.param(SHAPE, TINY, "w4", "kv4", marks=pytest.mark.slow),
        (MHA, TINY, "w2", "kv8"),
        (SHAPE, U280, "w4", "kv4"),
        (GROUP3_WIDE, U280, "w2s24", "kv8"),
        pytest.param(MHA, U280, "w4", "kv4", marks=pytest.mark.slow),
        pytest.param(OPT, SMALL, "w4", "kv4", marks=pytest.mark.slow),
        (OPT_GROUPED, TINY, "w8", "kv8"),
        (OPT, U280, "w2s24", "kv4"),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_prefill_and_decode_equal_the_golden_decoder(
    machine: MakeMachine, shape: DecoderConfig, engine: EngineConfig, weights: str, kv: str
) -> None:
    made = machine(shape, engine, weights, kv, context=96)
    session, cache = made.session(seed=7), made.golden.new_cache()
    ids = prompt(shape.vocab, 37)
    assert torch.equal(session.forward(ids), made.golden.forward(ids, cache, last_only=True)[0])
    for token in prompt(shape.vocab, 3, seed=1):
        assert torch.equal(session.forward([token]), made.golden.forward([token], cache)[0])


@pytest.mark.parametrize("chunk", [1, 2, 8, 16])
def test_the_size_of_a_pass_changes_nothing(machine: MakeMachine, chunk: int) -> None:
    made = machine(dataclasses.replace(SHAPE, layers=1), chunk=chunk)
    ids = prompt(SHAPE.vocab, 17)
    expected = made.golden.forward(ids, made.golden.new_cache(), last_only=True)[0]
    assert torch.equal(made.session().forward(ids), expected)


def test_one_program_serves_every_length(machine: MakeMachine) -> None:
    """Across tiles of 32 slots, row blocks and up to the last slot of the map."""
    made = machine(TINY_CONTEXT, TINY, context=70)
    session, cache = made.session(), made.golden.new_cache()
    ids = prompt(TINY_CONTEXT.vocab, 70)
    session.forward(ids[:24])
    made.golden.forward(ids[:24], cache)
    for token in ids[24:]:
        assert torch.equal(session.forward([token]), made.golden.forward([token], cache)[0])
    with pytest.raises(KVStrataError, match="the memory map holds a context of 70 tokens; got 71"):
        session.forward([1])


TINY_CONTEXT = dataclasses.replace(SHAPE, layers=1, hidden=64, heads=2, kv_heads=1, ffn=64, vocab=64)


def test_the_real_model_cut_to_two_layers(machine: MakeMachine, two_layers: Checkpoint) -> None:
    made = machine(two_layers, SMALL, "w4", "kv4", context=64)
    session, cache = made.session(seed=3), made.golden.new_cache()
    assert two_layers.tokenizer is not None
    ids = two_layers.tokenizer.encode("Where should the KV cache live, and who should compute on it? The")[
        :17
    ]
    expected = made.golden.forward(ids, cache, last_only=True)[0]
    assert torch.equal(session.forward(ids), expected)
    token = int(expected.argmax())
    assert torch.equal(session.forward([token]), made.golden.forward([token], cache)[0])


def test_one_wrong_element_in_an_early_layer_changes_the_tokens(machine: MakeMachine) -> None:
    """The check must be able to fail: a flipped code bit of layer 0 reaches the logits."""
    made = machine(context=64)
    ids = prompt(SHAPE.vocab, 20)
    expected = made.golden.forward(ids, made.golden.new_cache(), last_only=True)[0]
    device = GoldenDevice(made.image)
    matrix = made.image.map.matrices["layers.0.q"]
    device.state.channels[0, matrix.base + 1, 0] ^= 3
    assert not torch.equal(made.session(device).forward(ids), expected)


def test_every_token_wait_is_needed_somewhere(machine: MakeMachine) -> None:
    """Dropping all waits of a program makes another order of the units give other bits (or fault)."""
    made = machine(context=64)
    ids = prompt(SHAPE.vocab, 16)
    expected = made.golden.forward(ids, made.golden.new_cache(), last_only=True)[0]
    session = made.session(seed=5)
    program = made.programs.programs["prefill"]
    raw = program.encoded().copy().reshape(-1, INSTRUCTION_BYTES)
    raw[:, 1] = 0  # wait and the low signal bits
    raw[:, 2] &= ~np.uint8(3)
    session.device.write_aux(program.base, raw.reshape(-1))
    try:
        wrong = not torch.equal(session.forward(ids), expected)
    except DeviceFault:
        wrong = True
    assert wrong


def test_waits_and_signals_pair_up(machine: MakeMachine) -> None:
    made = machine()
    for program in made.programs.programs.values():
        given: dict[tuple[int, int], int] = {}
        for instruction in program.instructions:
            if instruction.unit is None:
                continue
            for other in range(5):
                pair = (other, int(instruction.unit))
                given[pair] = given.get(pair, 0) - (instruction.wait >> other & 1)
                assert given[pair] >= 0, "a wait stands before its signal in program order"
            for other in range(5):
                pair = (int(instruction.unit), other)
                given[pair] = given.get(pair, 0) + (instruction.signal >> other & 1)
        assert not any(given.values())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [LLAMA_7B, OPT_6B7], ids=lambda x: x.name)
def test_7b_shapes_compile_into_a_megabyte_for_any_length(shape: DecoderConfig) -> None:
    memory_map = MemoryMap(shape, U280, "w2s24", "kv4", shape.context)
    programs = compile_model(memory_map, ((10, 1000),) * (2 * shape.layers + 1))
    assert programs.size_bytes <= 1 << 20
    for start in (0, 31, 1023, shape.context - 1):
        assert step_registers(memory_map, start, 1)
    for instruction in programs.programs["decode"].instructions:
        op, _ = decode(instruction.word())
        assert op is instruction.op


def test_faults_name_the_instruction_and_leave_the_device_usable(machine: MakeMachine) -> None:
    made = machine()
    session = made.session()
    program = made.programs.programs["decode"]
    good = program.encoded()
    bad = good.copy()
    bad[5 * INSTRUCTION_BYTES] = 0x77
    session.device.write_aux(program.base, bad)
    with pytest.raises(
        DeviceFault, match="stopped at instruction 5 .illegal_instruction.: no instruction has opcode"
    ):
        session.forward([1])
    hang = good.copy()
    hang[1] |= 1 << 1  # the first instruction waits for a token of MATRIX
    session.device.write_aux(program.base, hang)
    with pytest.raises(DeviceFault, match="every unit waits for a token that nobody will give") as fault:
        session.forward([1])
    assert fault.value.code is Error.WATCHDOG
    session.device.write_aux(program.base, good)
    expected = made.golden.forward([1], made.golden.new_cache())[0]
    assert torch.equal(session.forward([1]), expected)


def test_bad_tokens_and_shapes_are_refused(machine: MakeMachine) -> None:
    session = machine().session()
    with pytest.raises(KVStrataError, match="a token id must be 0 to 159; got 160"):
        session.forward([160])
    with pytest.raises(KVStrataError, match="a step needs at least one token; got none"):
        session.forward([])
    with pytest.raises(KVStrataError, match="widths must be multiples of 32; got hidden 100"):
        MemoryMap(dataclasses.replace(SHAPE, hidden=100), SMALL, "w4", "kv4", 64)
    with pytest.raises(KVStrataError, match="a pass has 1 to 16 tokens; got 17"):
        compile_model(MemoryMap(SHAPE, SMALL, "w4", "kv4", 64), ((10, 1),) * 5, chunk=17)
    many = dataclasses.replace(SHAPE, heads=64, kv_heads=2, hidden=2048)
    with pytest.raises(
        KVStrataError, match="the array passes 16 vectors; the query heads of one value block are 32"
    ):
        compile_model(MemoryMap(many, SMALL, "w4", "kv4", 64), ((10, 1),) * 5)


def test_disassembly_names_every_instruction(machine: MakeMachine) -> None:
    from sw_stack.compile.disasm import disassemble

    program = machine().programs.programs["decode"]
    lines = disassemble(program.encoded())
    assert len(lines) == len(program.instructions)
    assert lines[0].split()[1] == "READ"
    assert lines[-1].split()[1] == Op.HALT.name
    assert all("wait" in line for line, i in zip(lines, program.instructions) if i.wait)


@pytest.mark.parametrize("rotates", [True, False])
def test_values_wait_until_the_last_queries_are_quantised(machine: MakeMachine, rotates: bool) -> None:
    """Both find extremes in the same registers; the array must have waited for every token up to that QUANT's."""
    shape = SHAPE if rotates else OPT
    wide = dataclasses.replace(shape, layers=1, hidden=768, heads=12, kv_heads=12, head_size=64, vocab=64)
    program = machine(wide, SMALL, context=64).programs.programs["decode"].instructions
    notes = [i.note for i in program]
    scores = next(n for n, note in enumerate(notes) if "keys of head" in note)
    values = next(n for n, i in enumerate(program) if i.op is Op.MATRIX and "values of heads" in i.note)
    quantised = max(n for n, note in enumerate(notes) if note.endswith("queries") and n < values)
    assert scores < quantised, "no query is late in this shape"
    given = [i.signal >> Unit.MATRIX & 1 for i in program[: quantised + 1] if i.unit is Unit.VECTOR]
    taken = [i.wait >> Unit.VECTOR & 1 for i in program[: values + 1] if i.unit is Unit.MATRIX]
    assert given[-1]
    assert sum(taken) >= sum(given)
