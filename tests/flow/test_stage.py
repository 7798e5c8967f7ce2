"""Stages: run once per set of inputs, whole or not at all, and never read across spec versions."""

import json

import pytest

from golden.spec import KVStrataError
from sw_stack.chain import stage


@pytest.fixture(autouse=True)
def _own_build(tmp_path, monkeypatch):
    monkeypatch.setenv("KVSTRATA_BUILD", str(tmp_path))


def test_runs_once_per_inputs():
    calls = []
    produce = lambda _: calls.append(1) or {"n": len(calls)}  # noqa: E731
    first = stage.run_stage("s", {"a": "1"}, produce)
    again = stage.run_stage("s", {"a": "1"}, produce)
    other = stage.run_stage("s", {"a": "2"}, produce)
    assert (first.result, again.result, other.result) == ({"n": 1}, {"n": 1}, {"n": 2})
    assert (first.fresh, again.fresh, other.fresh) == (True, False, True)


def test_failing_stage_leaves_nothing(tmp_path):
    def produce(directory):
        (directory / "half.bin").write_text("half")
        raise KVStrataError("no")

    with pytest.raises(KVStrataError, match="no"):
        stage.run_stage("s", {}, produce)
    assert [path for path in (tmp_path / "chain" / "s").iterdir() if path.suffix != ".lock"] == []


def test_other_spec_version_is_refused():
    found = stage.run_stage("s", {}, lambda _: {})
    path = found.directory / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "spec_version": "0"}))
    with pytest.raises(
        KVStrataError, match=r"result.json has spec version '0', this is '1': run make clean sim"
    ):
        stage.read_result(path)


def test_truncated_result_is_refused():
    found = stage.run_stage("s", {}, lambda _: {})
    path = found.directory / "result.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(KVStrataError, match="a stage result is a whole JSON file"):
        stage.read_result(path)


def test_source_key_follows_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "a.py").write_text("x = 1\n")
    before = stage.source_key("pkg")
    assert stage.source_key("pkg") == before
    (tmp_path / "pkg" / "a.py").write_text("x = 2\n")
    assert stage.source_key("pkg") != before
