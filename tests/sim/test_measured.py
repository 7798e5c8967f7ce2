"""Closed forms from measured cycles: exact on exact data, refusing what they cannot mean."""

import json

import pytest

from sim import measured
from sim.measured import CalibrationError, fit


def test_the_fit_recovers_slope_and_fixed_cycles(calibration):
    found = fit(("attention_head",))
    assert found.slope == pytest.approx(1.02)
    assert found.fixed_cycles == pytest.approx(200.0)
    assert found.worst_residual < 1e-9
    assert found.cycles(1000, 3) == pytest.approx(1020 + 600)
    per_byte = fit(("attention_head",), "bytes")
    assert per_byte.slope == pytest.approx(1.02 / 39)
    assert per_byte.fixed_cycles == pytest.approx(200.0)


def test_the_fastest_configuration_of_a_block_is_used(calibration, cycle_table):
    (calibration / "better.json").write_text(
        json.dumps({**cycle_table("mv_core", 1.005, 70.0), "config": "better"})
    )
    assert fit(("mv_core",)).config == "better"


def test_a_fit_never_beats_its_bound(calibration, cycle_table):
    data = cycle_table("noisy", 1.0, 0.0)
    data["rows"][0]["cycles"] *= 1.2
    (calibration / "noisy.json").write_text(json.dumps(data))
    found = fit(("noisy",))
    assert found.slope >= 1
    assert found.fixed_cycles >= 0
    assert found.worst_residual > 0.01


def test_missing_cycles_name_the_verb(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "CALIBRATION", tmp_path)
    with pytest.raises(CalibrationError, match="no measured cycles of mv_core.*run `make calibrate`"):
        fit(("mv_core",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec_version": "0"}, "measured at spec '0', not '1': run `make calibrate`"),
        ({"rows": []}, "needs two measured shapes, got 0"),
        ({"rows": [{"name": "a", "cycles": 1, "bytes": 1}]}, "row a lacks bound_cycles"),
        (
            {"rows": [{"name": "a", "cycles": 5, "bytes": 1, "bound_cycles": 9}]},
            "0 < bound_cycles <= cycles.*got 9 and 5",
        ),
    ],
)
def test_stale_or_malformed_tables_are_refused(calibration, cycle_table, change, message):
    (calibration / "bad.json").write_text(json.dumps({**cycle_table("bad", 1.1, 5.0), **change}))
    with pytest.raises(CalibrationError, match=message):
        fit(("bad",))


def test_a_truncated_table_is_refused(calibration, cycle_table):
    (calibration / "bad.json").write_text(json.dumps(cycle_table("bad", 1.1, 5.0))[:-9])
    with pytest.raises(CalibrationError, match=r"bad.json is not valid JSON .*run `make calibrate`"):
        fit(("bad",))
