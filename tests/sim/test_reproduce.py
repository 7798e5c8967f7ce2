"""Reproduction: the targets hold, the calibrated rows are few, and the committed page is the model's."""

from pathlib import Path

import pytest

from sim import reproduce
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
        if abs(outcome.error) > 0.25:
            assert outcome.row.kind == "contradicted"
            assert outcome.row.note


def test_contradictions_are_shown_not_hidden(outcomes):
    stats = reproduce.summary(outcomes)
    assert stats["worst_abs_error_pct_with_contradicted"] > stats["worst_abs_error_pct"]


def test_the_calibrated_parameters_are_the_only_ones_of_the_framework():
    tuning, default = load(Tuning, "instinfer").model_dump(), Tuning().model_dump()
    changed = {k for k in default if tuning[k] != default[k]} - {"name", "description", "source"}
    assert changed == {"layer_overhead_us", "page_cache_us_per_io"}


def test_the_committed_page_is_current(outcomes):
    assert Path("docs/reproduction.md").read_text() == reproduce.markdown(outcomes), (
        "run `kvstrata reproduce --write docs/reproduction.md`"
    )
