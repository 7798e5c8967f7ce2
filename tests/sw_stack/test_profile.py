"""Profiles of predicted and of measured runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from golden.spec import KVStrataError
from golden.spec.engine import TINY, Unit
from sw_stack.cli import app
from sw_stack.runtime.profile import run_profile, timeline, window
from tests.sw_stack.machines import MakeMachine


def test_a_measured_profile_equals_the_predicted_one(machine: MakeMachine) -> None:
    """Unit by unit: same operations, same busy cycles, stalls that add up to the idle time before the last one."""
    made = machine(engine=TINY, context=64)
    program = made.programs.programs["decode"]
    rtl, predicted = (
        run_profile(made.image, program, 20, device, "20", None, Path("none")) for device in ("rtl", "timing")
    )
    assert rtl.cycles == predicted.cycles
    assert [(s.index, s.start, s.end) for s in rtl.slots] == [
        (s.index, s.start, s.end) for s in predicted.slots
    ]
    assert rtl.busy == predicted.busy
    for unit in Unit:
        slots = [s for s in rtl.slots if s.unit is unit]
        assert rtl.busy[unit] + sum(rtl.stalls(unit).values()) == max(s.end for s in slots)
        assert set(rtl.stalls(unit)) <= {u.name.lower() for u in Unit} | {"fetch"}
    assert json.dumps(timeline(rtl, 225.0, "decode"))


def test_a_window_of_cycles_is_checked(machine: MakeMachine) -> None:
    assert window("10:20") == (10, 20)
    for text in ("10", "20:10", "a:b", "5:5", ""):
        with pytest.raises(
            KVStrataError, match=f"a window of cycles is first:last with first below last; got '{text}'"
        ):
            window(text)
    folder = str(machine(engine=TINY, context=64).image.directory)
    result = CliRunner().invoke(app, ["profile", folder, "--wave", "1:5"])
    assert isinstance(result.exception, KVStrataError)
    assert "a waveform comes from device rtl; got 'timing'" in str(result.exception)
    result = CliRunner().invoke(app, ["profile", folder, "--device", "board"])
    assert "a profile comes from device timing or rtl; got 'board'" in str(result.exception)


@pytest.mark.slow
def test_a_waveform_of_chosen_cycles(machine: MakeMachine, tmp_path: Path) -> None:
    """The file grows with the window, and the run's cycles stay what they are."""
    made = machine(engine=TINY, context=64)
    program, sizes = made.programs.programs["decode"], []
    for last in (110, 1100):
        file = tmp_path / f"{last}.vcd"
        result = run_profile(made.image, program, 0, "rtl", "2", (100, last), file)
        sizes.append(file.stat().st_size)
    assert result.cycles == run_profile(made.image, program, 0, "timing", "2", None, file).cycles
    assert 0 < sizes[0] < sizes[1]
    assert "$timescale" in file.read_text()[:1000]
