"""Closed forms from measured cycles: exact on exact data, refusing what they cannot mean."""

import json
import math

import pytest

from sim import measured
from sim.measured import CALIBRATION, CalibrationError, cached_token_terms, fit, fit_layer, unit_times


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


def test_a_layer_of_the_engine_costs_what_was_measured_beside_its_weights(calibration):
    from sim.api import simulate
    from sim.describe.workload import Workload

    found = fit_layer("w2s24")
    made_up = {"kv_words": 1.5, "drained": 2.0, "kv_heads": 100.0, "hidden": 1.0, "layer": 900.0}
    assert found.per == pytest.approx(made_up)
    assert found.worst_residual < 1e-9
    small = simulate("u280", "llama-2-7b", "fpga", Workload(batch=1, input_tokens=64, output_tokens=4))
    ideal = simulate(
        "u280", "llama-2-7b", "fpga", Workload(batch=1, input_tokens=64, output_tokens=4),
        overrides={"fpga.engine": "published"},
    )  # fmt: skip
    # 64 to 67 cached tokens, whose words take longer than their bytes; the head at 1.01 of its bytes and 60 cycles.
    beside = 900 + 32 * 100 + 4096 + 1.5 * 65.5 * cached_token_terms(32, 32, 128)["kv_words"]
    more = (small.time_per_output_token_s - ideal.time_per_output_token_s) * 225e6 / 32
    assert 0 <= beside - more < 0.05 * beside
    named = [a["device"] for a in small.assumptions if a["device"].startswith("rtl/")]
    assert named == ["rtl/engine_layer/test, w2s24", "rtl/mv_core/test"]
    assert small.breakdown["vector work"] > 0.1
    assert "vector work" not in ideal.breakdown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["rows"].clear(), "no decoder layer of w4 weights .*run `make calibrate`"),
        (lambda t: t["rows"][6].pop("drained"), "row 4096 lacks drained: run `make calibrate`"),
        (lambda t: t["rows"].__delitem__(slice(7, 24)), "needs more than 5 layers, got 1: run"),
    ],
)
def test_layer_tables_that_cannot_be_used_are_refused(calibration, layer_table, change, message):
    table = layer_table()
    change(table)
    (calibration / "layer.json").write_text(json.dumps(table))
    with pytest.raises(CalibrationError, match=message):
        fit_layer("w4")


def test_queries_that_share_keys_take_the_drain_longer_than_the_words():
    one, four = cached_token_terms(32, 32, 128), cached_token_terms(32, 8, 128)
    assert one == {"kv_words": pytest.approx(32 * (9 + 8) / 256), "drained": 0}
    assert four["kv_words"] == one["kv_words"] / 4
    assert four["drained"] == pytest.approx(32 / 16 - 8 * 17 / 256)
    assert cached_token_terms(9, 3, 64)["kv_words"] == pytest.approx(3 * (5 + 4) / 256)


def test_no_term_of_a_layer_is_below_zero(calibration, layer_table):
    table = layer_table()
    for row in table["rows"]:
        row["cycles"] -= 950
    (calibration / "layer.json").write_text(json.dumps(table))
    found = fit_layer("w8")
    assert found.per["layer"] == 0
    assert all(v >= 0 for v in found.per.values())


def test_the_committed_layers_are_described_within_six_percent():
    for weights in ("w8", "w4", "w2", "w2s24"):
        found = fit_layer(weights)
        assert found.worst_residual < 0.06, weights
        assert "held" in found.method or "hold" in found.method


def test_dense_attention_uses_the_fit_and_sparf_the_block_times(calibration):
    from sim.describe.base import load
    from sim.describe.devices import Csd
    from sim.devices.csd import attention_unit

    drive = load(Csd, "instcsd")
    named = [attention_unit(drive, sparse).provenance()[0]["device"] for sparse in (False, True)]
    assert named == ["rtl/attention_head/test", "rtl/storage_unit_sparf/test"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("times"),
            "the table of storage_unit_sparf lacks times of its blocks: run `make calibrate`",
        ),
        (lambda t: t["times"].pop("slots"), "its times differ in slots: run `make calibrate`"),
        (lambda t: t.update(block="other"), "no block times of storage_unit_sparf .*run `make calibrate`"),
    ],
)
def test_block_times_that_are_missing_name_the_verb(calibration, sparf_table, change, message):
    table = sparf_table()
    change(table)
    (calibration / "sparf.json").write_text(json.dumps(table))
    with pytest.raises(CalibrationError, match=message):
        unit_times("storage_unit_sparf")


def committed_sparf_runs():
    """Batches on the RTL that fill the unit and select more than the window."""
    table = json.loads((CALIBRATION / "storage_unit_sparf-8-channels.json").read_text())
    full = [r for r in table["rows"] if r["commands"] >= 16 and r["k"] > r["window"]]
    return table["clock_mhz"], full


@pytest.mark.parametrize("run", committed_sparf_runs()[1], ids=lambda r: r["name"])
def test_the_rtl_of_a_sparf_batch_is_one_of_the_drawn_batches_within_three_percent(run):
    """The RTL's selection is one draw; where reads take long, draws differ by more than the recurrence errs."""
    from golden.storage.layout import Geometry
    from sim.devices.csd import SPARF_BLOCK
    from sim.devices.storage_unit import FlashBehind, Selection, followed_cycles

    mhz = committed_sparf_runs()[0]
    heads, tokens, head_size = run["shape"]
    # The share of token pages that the run read, from its bytes less its channel pages.
    missed = math.comb(head_size - run["m"], run["r"]) / math.comb(head_size, run["r"])
    channel_pages = head_size // run["m"] * (1 - missed) * math.ceil(tokens * run["m"] / 2048)
    share = (run["bytes"] / 4096 / heads - channel_pages) / 2 / (tokens / 16)
    selection = Selection(
        head_size, run["r"], run["m"], run["k"] / tokens, share, run_groups=max(1, run["run_tokens"] // 16)
    )
    waits = (round(us * mhz) for us in (run["read_ns"] / 1e3, 0.3, 1.0))
    flash = FlashBehind(8, Geometry().arrays, *waits, page=4096 * mhz / 1400)
    times = unit_times(SPARF_BLOCK).times
    drawn = [followed_cycles(selection, tokens, heads, flash, times, seed) for seed in range(6)]
    assert 0.97 * min(drawn) <= run["cycles"] <= 1.03 * max(drawn)
    assert max(drawn) < 1.2 * min(drawn), "a spread that says nothing"


def test_the_recurrence_of_the_committed_table_is_within_a_percent_of_the_rtl():
    found = unit_times("storage_unit_sparf")
    assert found.points >= 4
    assert found.worst_residual <= 0.01
    assert "page by page" in found.provenance()["value"]


def test_sparf_batches_beyond_those_followed_continue_their_line():
    from sim.devices.storage_unit import FlashBehind, Selection, followed_cycles, sparf_cycles

    times = unit_times("storage_unit_sparf").times
    selection, flash = Selection(128, 16, 2, 0.125, 0.4), FlashBehind(8, 16, 142, 86, 285, 833.8)
    assert sparf_cycles(selection, 512, 64, flash, times) == pytest.approx(
        followed_cycles(selection, 512, 64, flash, times), rel=0.03
    )
    assert sparf_cycles(selection, 4096, 16, flash, times) == pytest.approx(
        followed_cycles(selection, 4096, 16, flash, times), rel=0.05
    )
    between = sparf_cycles(selection, 1536, 16, flash, times)
    assert between == pytest.approx(followed_cycles(selection, 1536, 16, flash, times), rel=0.1)
    ladder = [sparf_cycles(selection, tokens, 16, flash, times) for tokens in (16, 100, 500, 3000, 1e6)]
    assert ladder == sorted(ladder)


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
