"""The committed cycle tables are what the RTL takes today, to the cycle."""

import json

import pytest

from golden.spec import KVStrataError
from sw_stack.rtl import calibrate

TABLES = {table.block: table for table in calibrate.TABLES}


@pytest.mark.rtl
@pytest.mark.parametrize(
    "block",
    [
        "attention_head",
        *(pytest.param(block, marks=pytest.mark.slow) for block in TABLES if block != "attention_head"),
    ],
)
def test_committed_cycles_are_measured_again(block):
    table = calibrate.check_committed(TABLES[block])
    assert all(0 < row["bound_cycles"] <= row["cycles"] for row in table["rows"])


def _copy(tmp_path, monkeypatch, change):
    table = TABLES["attention_head"]
    stored = json.loads(table.path.read_text())
    change(stored)
    monkeypatch.setattr(calibrate, "DIRECTORY", tmp_path)
    table.path.write_text(json.dumps(stored))
    return table, stored


def test_drifted_cycles_are_named(tmp_path, monkeypatch):
    def slower(stored):
        stored["rows"][1]["cycles"] += 1

    table, stored = _copy(tmp_path, monkeypatch, slower)
    honest = json.loads(json.dumps(stored))
    honest["rows"][1]["cycles"] -= 1
    monkeypatch.setattr(calibrate.Table, "measure", lambda *_: honest)
    wanted = r"one-kernel.json: dense head, 1 queries, 64 tokens x 128 takes \d+ cycles .* make calibrate"
    with pytest.raises(KVStrataError, match=wanted):
        calibrate.check_committed(table)


def test_other_spec_version_is_refused(tmp_path, monkeypatch):
    table, _ = _copy(tmp_path, monkeypatch, lambda stored: stored.update(spec_version="0"))
    with pytest.raises(KVStrataError, match="measured under another spec version: run make calibrate"):
        calibrate.committed(table)
