"""The real model on the Verilated engine: tokens and logits equal to golden, cycles as predicted."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from golden.exact_decoder import ExactDecoder
from golden.lambda_window import LambdaWindow
from golden.llama import load_model
from golden.loaders import Checkpoint
from golden.ops import argmax_lowest
from golden.spec import KVStrataError
from golden.spec.engine import Unit
from golden.spec.memory import MemoryModel
from sw_stack.compile.memory import MemoryTiming
from sw_stack.compile.program import step_registers
from sw_stack.compile.schedule import schedule
from sw_stack.device.rtl import RtlDevice
from sw_stack.report.readme import HARDWARE_TEXT, with_hardware_text
from sw_stack.runtime.generate import DeviceRun, on_device
from sw_stack.runtime.machine import Setup, memory_model, open_session
from sw_stack.runtime.session import Session

PROMPT = "Once upon a time, in a small village by the sea, there lived an"
MEMORIES = ("2", "20", "random", "hbm")


def predicted(session: Session, memory: str) -> list[int]:
    """Cycles of the last forward pass's runs."""
    assert isinstance(session.device, RtlDevice)
    timing, found = MemoryTiming.of(memory_model(memory)), []
    for name, _ in session.runs:
        program = session.programs.programs[name]
        tokens = max(1, program.tokens)
        start = session.length - tokens
        registers = {int(r): v for r, v in step_registers(session.programs.map, start, tokens).items()}
        found.append(schedule(program, session.programs.map.engine, registers, timing).cycles)
    return found


def test_two_real_layers_and_the_head_are_exact_and_predicted(two_layers: Checkpoint) -> None:
    """Two decode steps of the cut model on `tiny`: logits to the bit, cycles of the last step and of the head."""
    setup = Setup("tiny", "rtl", context=32, memory="20")
    session, golden = (
        open_session(two_layers, setup),
        open_session(two_layers, dataclasses.replace(setup, device="golden")),
    )
    try:
        logits = session.forward([28, 411])
        assert torch.equal(logits, golden.forward([28, 411]))
        measured = [result.cycles for _, result in session.runs]
    finally:
        session.device.close()
    assert measured[1:] == predicted(session, "20")[1:]


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORIES)
def test_two_real_layers_on_small_at_any_memory(two_layers: Checkpoint, memory: str) -> None:
    """Prefill of 16, then decode; per unit and program the prediction is within two percent."""
    setup = Setup("small", "rtl", context=64, memory=memory)
    ids = load_model(None).tokenizer.encode(PROMPT)  # type: ignore[union-attr]
    session, golden = (
        open_session(two_layers, setup),
        open_session(two_layers, dataclasses.replace(setup, device="golden")),
    )
    try:
        for _ in range(3):
            session.runs.clear()
            logits = session.forward(ids)
            assert torch.equal(logits, golden.forward(ids))
            ids = [int(argmax_lowest(logits))]
        measured = [result.cycles for _, result in session.runs]
    finally:
        session.device.close()
    if memory != "random":
        for m, p in zip(measured, predicted(session, memory), strict=True):
            assert abs(p / m - 1) <= 0.02, f"{p} predicted, {m} measured with memory {memory}"


@pytest.mark.slow
def test_a_lambda_window_on_rtl_is_exact_and_predicted(two_layers: Checkpoint) -> None:
    """Past the ring's end, with sinks handed over: logits of the golden decoder, each program's cycles as predicted."""
    window = LambdaWindow(2, 32)
    session = open_session(two_layers, Setup("small", "rtl", context=64, memory="20", window=window))
    golden = ExactDecoder(two_layers, window=window)
    cache, ids = golden.new_cache(), load_model(None).tokenizer.encode(2 * PROMPT)[:31]  # type: ignore[union-attr]
    assert session.programs.map.slots == 64
    try:
        for _ in range(4):
            session.runs.clear()
            logits = session.forward(ids)
            assert torch.equal(logits, golden.forward(ids, cache, last_only=True)[0])
            assert [name for name, _ in session.runs[-2:]] == ["decode", "head"]
            measured = [result.cycles for _, result in session.runs[-2:]]
            session.runs = session.runs[-2:]
            for m, p in zip(measured, predicted(session, "20"), strict=True):
                assert abs(p / m - 1) <= 0.005, f"{p} predicted, {m} measured at {session.length} tokens"
            ids = [int(argmax_lowest(logits))]
    finally:
        session.device.close()


@pytest.mark.slow
def test_every_operation_of_a_real_layer_ends_when_predicted(two_layers: Checkpoint) -> None:
    """Instruction by instruction: start and end of all units against the RTL's own trace, per class within 2%."""
    setup = Setup("small", "rtl", context=64, memory="20")
    session = open_session(two_layers, setup)
    assert isinstance(session.device, RtlDevice)
    try:
        session.forward(list(range(5)))
        session.device.engine.profile()
        session._run_pass([7])
        events = session.device.engine.events()
    finally:
        session.device.close()
    program = session.programs.programs["decode"]
    registers = {int(r): v for r, v in step_registers(session.programs.map, session.length - 1, 1).items()}
    slots = schedule(program, session.programs.map.engine, registers, MemoryTiming(20)).slots
    sums: dict[str, list[int]] = {}
    for unit in Unit:
        for slot, event in zip(
            (s for s in slots if s.unit is unit), (e for e in events if e.unit is unit), strict=True
        ):
            total = sums.setdefault(slot.op.name, [0, 0])
            total[0] += slot.end - slot.start
            total[1] += event.end + 1 - event.start
    for name, (p, m) in sums.items():
        assert abs(p / m - 1) <= 0.02, f"{name}: {p} cycles predicted, {m} measured"


@pytest.mark.slow
def test_the_whole_model_writes_the_golden_text() -> None:
    """16-token prompt, 32 new tokens, 30 layers and the LM head on RTL; the check names the first wrong logit."""
    setup = Setup("small", "rtl", context=64, memory="hbm")
    checkpoint = load_model(None)
    run = on_device(checkpoint, setup, PROMPT, 32, chat=False)
    golden = on_device(checkpoint, dataclasses.replace(setup, device="golden"), PROMPT, 32, chat=False)
    run.require_equal(golden)
    assert run.prompt_tokens == 16
    assert len(run.tokens) == 32
    wrong = golden.logits.clone()
    wrong[3, 17] += 1
    with pytest.raises(KVStrataError, match="logit 17 of step 3 is"):
        run.require_equal(dataclasses.replace(golden, logits=wrong))


def made(device: str = "rtl") -> dict[str, object]:
    """A saved run."""
    run = DeviceRun(
        Setup(device=device), "a", False, 1, [5], " b", 1.0, 1.0, 10, [4], torch.zeros(1, 3).long()
    )
    return {**run.to_json(), "equal_to_golden": True}


def test_readme_shows_checked_text_of_the_rtl_alone() -> None:
    page = f"x\n{HARDWARE_TEXT[0]}\nstale\n{HARDWARE_TEXT[1]}\ny"
    shown = with_hardware_text(page, json.loads(json.dumps(made())))
    assert "> a **b**" in shown
    assert "stale" not in shown
    assert "--device rtl" in shown
    with pytest.raises(KVStrataError, match="got device 'golden', checked True"):
        with_hardware_text(page, made("golden"))
    with pytest.raises(KVStrataError, match="got device 'rtl', checked None"):
        with_hardware_text(page, {**made(), "equal_to_golden": None})


def test_a_memory_has_a_known_name() -> None:
    with pytest.raises(
        KVStrataError, match="a memory is hbm, random or a fixed latency in cycles; got 'ddr'"
    ):
        Setup(memory="ddr")
    with pytest.raises(KVStrataError, match="a random memory has no predicted cycles"):
        MemoryTiming.of(MemoryModel("random"))
