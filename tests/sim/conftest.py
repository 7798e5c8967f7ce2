"""Fixtures: measured cycles of a made-up RTL run, so that these tests do not depend on what has been calibrated."""

import json

import pytest

from sim import measured


def table(block, slope, fixed, clock_mhz=285.0):
    """A calibration table whose rows follow slope and fixed cycles exactly."""
    rows = [
        {"name": f"s{b}", "shape": {}, "bound_cycles": b, "cycles": slope * b + fixed, "bytes": 39 * b}
        for b in (400, 1600, 6400)
    ]
    return {"spec_version": "1", "block": block, "config": "test", "clock_mhz": clock_mhz, "rows": rows}


@pytest.fixture
def cycle_table():
    """`table`, for tests that write tables of their own."""
    return table


@pytest.fixture
def calibration(tmp_path, monkeypatch):
    """A calibration directory with both blocks; returns its path."""
    (tmp_path / "attention.json").write_text(json.dumps(table("attention_head", 1.02, 200.0)))
    (tmp_path / "matrix.json").write_text(json.dumps(table("mv_core", 1.01, 60.0, 225.0)))
    monkeypatch.setattr(measured, "CALIBRATION", tmp_path)
    return tmp_path
