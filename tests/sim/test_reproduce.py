"""Reproduction: the targets hold, the calibrated rows are few, and the committed page is the model's."""

from pathlib import Path

import pytest

from sim import others, reproduce
from sim.describe.base import load
from sim.describe.workload import Tuning


@pytest.fixture(scope="module")
def outcomes():
    return reproduce.reproduce()


def test_targets(outcomes):
    stats = reproduce.summary(outcomes)
    assert stats["calibration_rows"] <= 4
    assert stats["predicted_rows"] >= 25
    assert stats["mean_abs_error_pct"] <= 10
    assert stats["worst_abs_error_pct"] <= 25


def test_every_large_miss_is_explained(outcomes):
    for outcome in outcomes:
        assert abs(outcome.error) <= 0.10 or outcome.row.note, outcome.row.what
        assert abs(outcome.error) <= 0.25 or outcome.row.kind == "contradicted", outcome.row.what


def test_contradictions_are_shown_not_hidden(outcomes):
    stats = reproduce.summary(outcomes)
    assert stats["worst_abs_error_pct_with_contradicted"] > stats["worst_abs_error_pct"]


def test_the_calibrated_parameters_are_the_only_ones_of_the_framework():
    tuning, default = load(Tuning, "instinfer").model_dump(), Tuning().model_dump()
    changed = {k for k in default if tuning[k] != default[k]} - {"name", "description", "source"}
    assert changed == {"layer_overhead_us", "page_cache_us_per_io"}


def test_other_systems_are_met_without_a_parameter_of_their_own():
    errors = [abs(o.error) for o in reproduce.reproduce(others.rows())]
    assert sum(errors) / len(errors) < 0.16
    assert max(errors) < 0.35


def test_no_schedule_of_vllm_gives_the_contradicted_row():
    bounds = reproduce._recompute_bounds()
    assert bounds["lockstep"] <= bounds["lockstep_peak"] < bounds["recomp_low"]
    assert bounds["recomp_high"] < bounds["block"] < bounds["vllm"]


def test_the_committed_page_is_current(outcomes):
    beyond = reproduce.reproduce(others.rows())
    assert Path("docs/reproduction.md").read_text() == reproduce.markdown(outcomes, beyond), (
        "run `kvstrata reproduce --write docs/reproduction.md`"
    )
