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


def test_measured_layers_take_the_place_of_products_and_are_named(calibration, cycle_table):
    from sim.api import simulate
    from sim.describe.workload import Workload

    work = Workload(batch=1, input_tokens=64, output_tokens=4)
    products = simulate("u280", "llama-2-7b", "fpga", work)
    (calibration / "layer.json").write_text(json.dumps(cycle_table("engine_layer", 1.01, 20_000.0, 225.0)))
    measured._fit.cache_clear()
    layers = simulate("u280", "llama-2-7b", "fpga", work)
    # 32 layers of 20,000 cycles, in place of 60 for each of four products and one head, and for the LM head.
    slower = 32 * (20_000 - 5 * 60) - 60
    assert (layers.time_per_output_token_s - products.time_per_output_token_s) * 225e6 == pytest.approx(
        slower
    )
    named = [a["device"] for a in layers.assumptions if a["device"].startswith("rtl/")]
    assert named == ["rtl/engine_layer/test"]


def test_measured_sparf_batches_serve_sparf_and_not_dense(calibration, cycle_table):
    from sim.devices.csd import SPARF_BLOCKS, UNIT_BLOCKS

    (calibration / "sparf.json").write_text(json.dumps(cycle_table("storage_unit_sparf", 1.08, 900.0)))
    assert fit(SPARF_BLOCKS, "bytes").block == "storage_unit_sparf"
    assert fit(UNIT_BLOCKS, "bytes").block == "attention_head"


def test_what_a_batch_pays_once_is_told_from_what_each_command_pays(calibration, cycle_table):
    def row(heads, tokens):
        size = heads * tokens * 512
        cycles = 0.03 * size + 400 * heads + 2_000
        shape = {"name": f"{heads} x {tokens}", "cycles": cycles, "bound_cycles": 0.02 * size, "bytes": size}
        return {**shape, "commands": heads}

    data = cycle_table("unit", 1.0, 0.0)
    data["rows"] = [row(h, t) for h in (2, 8, 40) for t in (256, 1024)]
    (calibration / "unit.json").write_text(json.dumps(data))
    found = fit(("unit",), "bytes")
    assert (found.slope, found.fixed_cycles, found.start_cycles) == pytest.approx((0.03, 400, 2_000))
    assert found.worst_residual < 1e-9
    assert "+ 2000.0 per batch" in found.provenance()["value"]
