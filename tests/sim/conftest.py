"""Fixtures: measured cycles of a made-up RTL run, so that these tests do not depend on what has been calibrated."""

import dataclasses
import json

import pytest

from sim import measured
from sim.measured import cached_token_terms


def table(block, slope, fixed, clock_mhz=285.0):
    """A calibration table whose rows follow slope and fixed cycles exactly."""
    rows = [
        {"name": f"s{b}", "shape": {}, "bound_cycles": b, "cycles": slope * b + fixed, "bytes": 39 * b}
        for b in (400, 1600, 6400)
    ]
    return {"spec_version": "1", "block": block, "config": "test", "clock_mhz": clock_mhz, "rows": rows}


LAYER = {"kv_words": 1.5, "drained": 2.0, "kv_heads": 100.0, "hidden": 1.0, "layer": 900.0}
"""Cycles of the made-up layers beside those of their weights."""


def layers():
    """A table of decoder layers that follow LAYER exactly, of every weight format."""
    shapes = [
        (4096, 32, 32, 128),
        (4096, 32, 8, 128),
        (5120, 40, 40, 2048),
        (2048, 16, 16, 128),
        (576, 9, 3, 2048),
        (3072, 24, 4, 512),
    ]
    rows = []
    for weights, bits in (("w8", 8.5), ("w4", 5.0), ("w2", 2.5), ("w2s24", 1.875)):
        for hidden, heads, kv_heads, context in shapes:
            per_token = cached_token_terms(heads, kv_heads, hidden // heads)
            terms = {term: amount * context for term, amount in per_token.items()}
            terms |= {"kv_heads": kv_heads, "hidden": hidden}
            stream = 12 * hidden**2 * bits / 8 / 1908
            cycles = stream + LAYER["layer"] + sum(LAYER[name] * value for name, value in terms.items())
            fixed = {"name": f"{hidden}", "weights": weights, "shape": [hidden, heads, kv_heads, context]}
            rows.append(
                {
                    **fixed,
                    "cycles": cycles,
                    "bound_cycles": stream,
                    "weight_cycles": stream,
                    "bytes": 1,
                    **terms,
                }
            )
    header = {"spec_version": "1", "block": "engine_layer", "config": "test", "clock_mhz": 225.0}
    return {**header, "method": "made up", "rows": rows}


def sparf():
    """A table of made-up block times, beside one run that the recurrence would meet."""
    from golden.storage.batch import UnitTimes

    times = {f.name: 20 for f in dataclasses.fields(UnitTimes)}
    times |= {
        name: value for name, value in (("slots", 8), ("ahead", 4), ("ring_beats", 1020)) if name in times
    }
    rows = table("storage_unit_sparf", 1.08, 900.0)
    return rows | {
        "times": times,
        "rows": [row | {"recurrence_cycles": row["cycles"]} for row in rows["rows"]],
    }


@pytest.fixture
def sparf_table():
    """`sparf`, for tests that write tables of their own."""
    return sparf


@pytest.fixture
def layer_table():
    """`layers`, for tests that write tables of their own."""
    return layers


@pytest.fixture
def cycle_table():
    """`table`, for tests that write tables of their own."""
    return table


@pytest.fixture
def calibration(tmp_path, monkeypatch):
    """A calibration directory with the least that schemes need; returns its path."""
    (tmp_path / "layer.json").write_text(json.dumps(layers()))
    (tmp_path / "sparf.json").write_text(json.dumps(sparf()))
    (tmp_path / "attention.json").write_text(json.dumps(table("attention_head", 1.02, 200.0)))
    (tmp_path / "matrix.json").write_text(json.dumps(table("mv_core", 1.01, 60.0, 225.0)))
    monkeypatch.setattr(measured, "CALIBRATION", tmp_path)
    return tmp_path
