"""Devices behind one protocol, lockstep, predicted cycles, and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from golden.spec import KVStrataError
from golden.spec.engine import SMALL, TINY, Unit
from sw_stack.cli import app
from sw_stack.compile.program import step_registers
from sw_stack.compile.schedule import MemoryTiming, schedule
from sw_stack.device.golden import GoldenDevice
from sw_stack.device.timing import TimingDevice
from sw_stack.runtime.lockstep import Lockstep
from sw_stack.runtime.machine import Setup
from sw_stack.runtime.profile import timeline
from tests.sw_stack.machines import SHAPE, MakeMachine


def prompt(n: int) -> list[int]:
    return np.random.default_rng(n).integers(0, SHAPE.vocab, n).tolist()


# --- lockstep -------------------------------------------------------------------------------------------
def test_lockstep_passes_where_the_device_is_right(machine: MakeMachine) -> None:
    made = machine(context=64)
    pair = Lockstep(made.session(), made.golden, made.image.norm_exponents)
    for ids in (prompt(18), [1], [2]):
        _, difference = pair.forward(ids)
        assert difference is None


@pytest.mark.parametrize("layer", [0, 1])
def test_lockstep_names_the_first_wrong_layer(machine: MakeMachine, layer: int) -> None:
    """One wrong weight code in a layer: the report names that layer, and the golden side is untouched."""
    made = machine(context=64)
    device = GoldenDevice(made.image)
    matrix = made.image.map.matrices[f"layers.{layer}.o"]
    device.state.channels[2, matrix.base + 2, 7] ^= 0xFF
    pair = Lockstep(made.session(device), made.golden, made.image.norm_exponents)
    expected, difference = pair.forward(prompt(6))
    assert difference is not None
    assert (difference.tensor, difference.layer) == ("residual stream", layer)
    assert f"residual stream of layer {layer} differs first at index" in str(difference)
    clean = made.golden.forward(prompt(6), made.golden.new_cache(), last_only=True)[0]
    assert torch.equal(expected, clean)


# --- timing ---------------------------------------------------------------------------------------------
def test_the_timing_device_computes_and_predicts(machine: MakeMachine) -> None:
    made = machine(context=64)
    device = TimingDevice(made.image)
    session = made.session(device)
    expected = made.golden.forward(prompt(17), made.golden.new_cache(), last_only=True)[0]
    assert torch.equal(session.forward(prompt(17)), expected)
    assert [name for name, _ in session.runs] == ["prefill", "decode", "head"]
    assert all(result.cycles > 0 for _, result in session.runs)
    assert device.last is not None


def test_a_schedule_respects_queues_and_tokens(machine: MakeMachine) -> None:
    made = machine(context=64)
    program = made.programs.programs["decode"]
    registers = {int(r): v for r, v in step_registers(made.image.map, 40, 1).items()}
    result = schedule(program, SMALL, registers)
    ends = {s.index: s.end for s in result.slots}
    for unit in Unit:
        starts = [s.start for s in result.slots if s.unit is unit]
        assert starts == sorted(starts)
        assert 0 <= result.busy_share(unit) <= 1
    given: dict[tuple[int, int], list[int]] = {}
    taken: dict[tuple[int, int], int] = {}
    for index, instruction in enumerate(program.instructions[:-1]):
        for other in (u for u in Unit if instruction.wait >> u & 1):
            pair = (other, instruction.unit)
            source = given[pair][taken.get(pair, 0)]
            taken[pair] = taken.get(pair, 0) + 1
            slot = next(s for s in result.slots if s.index == index)
            assert slot.start >= ends[source]
        for other in (u for u in Unit if instruction.signal >> u & 1):
            given.setdefault((instruction.unit, other), []).append(index)
    assert schedule(program, SMALL, registers, MemoryTiming(400)).cycles > result.cycles
    macs = sum(m.rows * m.inner for m in made.image.map.matrices.values() if m.name != "head")
    assert result.cycles > macs / SMALL.macs_per_cycle


def test_a_timeline_has_a_track_per_unit(machine: MakeMachine) -> None:
    made = machine(engine=TINY, context=64)
    program = made.programs.programs["decode"]
    registers = {int(r): v for r, v in step_registers(made.image.map, 0, 1).items()}
    events = timeline(schedule(program, TINY, registers), 225.0, "decode")["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == len(program.instructions) - 1
    assert {e["tid"] for e in spans} == {int(u) + 1 for u in Unit}
    assert json.dumps(events)


# --- command line ---------------------------------------------------------------------------------------
def fails(*arguments: str) -> str:
    """The sentence of a command that must fail without a traceback of its own."""
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, KVStrataError), result.output
    return str(result.exception)


def test_images_go_through_the_verbs(machine: MakeMachine, tmp_path: Path) -> None:
    folder = str(machine(context=64).image.directory)
    run = CliRunner().invoke(app, ["compile", folder, "--json", "--out", str(tmp_path / "programs")])
    rows = json.loads(run.stdout)
    assert [row["program"] for row in rows] == ["decode", "prefill", "head"]
    assert all((tmp_path / "programs" / f"{r['program']}.bin").stat().st_size == r["bytes"] for r in rows)
    lines = json.loads(
        CliRunner().invoke(app, ["disasm", str(tmp_path / "programs" / "head.bin"), "--json"]).stdout
    )
    assert lines[-1].split()[1] == "HALT"
    trace = tmp_path / "trace.json"
    profile = CliRunner().invoke(app, ["profile", folder, "--position", "9", "--trace", str(trace), "--json"])
    assert json.loads(profile.stdout)["cycles"] > 0
    assert json.loads(trace.read_text())["traceEvents"]


def test_bad_input_is_one_sentence(machine: MakeMachine, tmp_path: Path) -> None:
    image = machine(context=64).image
    assert "compile takes an image directory or --config" in fails("compile")
    assert "must say model_type llama or opt" in fails(
        "compile", "--config", str(config(tmp_path, model_type="bloom"))
    )
    assert "a model configuration is a JSON file" in fails("compile", "--config", str(tmp_path / "none.json"))
    assert "an engine is one of tiny, small, u280; got 'huge'" in fails(
        "compile", "--config", str(config(tmp_path)), "--engine", "huge"
    )
    assert "a program is one of decode, prefill, head; got 'x'" in fails(
        "disasm", str(image.directory), "--program", "x"
    )
    assert "an image directory or a program file is needed" in fails("disasm", str(tmp_path / "none"))
    assert "the memory map holds a context of 64 tokens; got 65" in fails(
        "profile", str(image.directory), "--position", "64"
    )
    (image.directory / "aux.bin").write_bytes(b"")
    assert "aux.bin of an image for this map has" in fails("profile", str(image.directory))
    junk = tmp_path / "junk.bin"
    junk.write_bytes(bytes(31))
    assert "a program is whole instructions of 32 bytes; got 31 bytes" in fails("disasm", str(junk))
    junk.write_bytes(b"\x77" * 32)
    assert "instruction 0 is illegal: no instruction has opcode 0x77" in fails("disasm", str(junk))


def test_opt_compiles_from_its_config(tmp_path: Path) -> None:
    shape = {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "ffn_dim": 96,
        "vocab_size": 64,
    }
    path = config(tmp_path, model_type="opt", **shape)
    arguments = ["compile", "--config", str(path), "--engine", "tiny", "--context", "64", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert [p["program"] for p in json.loads(result.stdout)] == ["decode", "prefill", "head"]


def config(folder: Path, **changes: object) -> Path:
    """A config.json of Llama-2-7B's shape."""
    stored = {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(stored | changes))
    return path


def test_setups_that_do_not_exist_are_refused() -> None:
    with pytest.raises(KVStrataError, match="a device is one of golden, rtl, timing; got 'board'"):
        Setup(device="board")
    with pytest.raises(KVStrataError, match="a placement is one of engine, csd, engine.csd; got 'gpu'"):
        Setup(placement="gpu")
