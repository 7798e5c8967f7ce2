"""The chain end to end, small: real model, golden, RTL, system model, report; and that no link can be faked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from golden.spec import SPEC_VERSION, KVStrataError
from hw.flow.cache import build_dir
from sw_stack.chain import rtl

PROGRAM = Path(sys.executable).parent / "kvstrata"
SMALL = ["--tokens", "3", "--perplexity-tokens", "256", "--engine", "tiny"]


def report(directory, *arguments):
    return subprocess.run(
        [PROGRAM, "report", *SMALL, "--output", directory, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("chain") / "report"


@pytest.fixture(scope="module")
def summary(directory):
    result = report(directory, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def operands(summary):
    key = summary["provenance"]["inputs of stage language"]
    return build_dir() / "chain" / "language" / key / "operands.safetensors"


@pytest.mark.rtl
def test_summary_holds_every_part(summary):
    assert set(summary) >= {"generated", "accuracy", "rtl", "system", "provenance"}
    assert [level["name"] for level in summary["generated"]["levels"]] == ["float", "W4 A8 KV4", "W4 A8 KV8"]
    assert all(1 < row["perplexity"] < 100 for row in summary["accuracy"]["rows"])
    assert len(summary["accuracy"]["text_sha256"]) == 64
    assert summary["provenance"]["spec_version"] == SPEC_VERSION
    assert {row["model"] for row in summary["system"]["rows"]} == {"opt-13b", "llama-2-7b"}
    assert {row["scheme"] for row in summary["system"]["rows"]} >= {
        "gpu-resident",
        "flexgen-ssd",
        "csd-dense",
        "fpga",
    }


@pytest.mark.rtl
def test_every_element_is_equal(summary):
    rows = summary["rtl"]["rows"]
    assert len(rows) == len(rtl.PRODUCTS) + 1
    for row in rows:
        assert row["bit_exact"], row
        assert 0 < row["bound_cycles"] <= row["cycles"]


@pytest.mark.rtl
def test_page_loads_nothing_from_outside(summary, directory):
    page = (directory / "index.html").read_text()
    for reference in ("src=", 'href="http', "@import", "url("):
        outside = [part[:60] for part in page.split(reference)[1:] if not part.startswith(("#", '"#'))]
        assert not outside, (reference, outside[:3])
    assert page.count("<svg") >= 4
    assert summary["generated"]["prompt"] in page


@pytest.mark.rtl
def test_timeline_is_a_chrome_trace(summary, directory):
    trace = json.loads((directory / "timeline.json").read_text())
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert slices
    assert all(event["dur"] >= 0 for event in slices)


@pytest.mark.rtl
def test_unchanged_inputs_run_nothing_again(summary, directory):
    second = report(directory, "--json")
    assert "loading the model" not in second.stderr
    assert "on the engine core" not in second.stderr
    assert json.loads(second.stdout) == summary


@pytest.mark.rtl
def test_one_wrong_weight_and_one_wrong_bit_of_an_outcome_are_found(operands, tmp_path):
    from safetensors.numpy import load_file, save_file

    stored = load_file(operands)
    stored["linear.o/codes"][7, 40] ^= 1
    stored["linear.head/y"][100] += 1
    save_file(stored, tmp_path / "operands.safetensors")
    rows = rtl.check(tmp_path / "operands.safetensors", "tiny")
    wrong = {row["name"].split()[-1]: row["first_difference"] for row in rows if not row["bit_exact"]}
    assert set(wrong) == {"linear.o", "linear.head"}
    assert wrong["linear.o"].startswith("element [7]: RTL ")
    assert wrong["linear.o"].endswith("(1 of 576 differ)")
    assert wrong["linear.head"].startswith("element [100]: RTL ")


@pytest.fixture(scope="module")
def vector_files(tmp_path_factory):
    from golden.vector_sets import write_all

    return write_all(tmp_path_factory.mktemp("vectors"), None, seeds=1)


@pytest.mark.rtl
def test_vector_files_go_through_the_rtl(vector_files):
    wanted = [p for p in vector_files if p.name.startswith(("product-w4", "product-w2s24", "storage-dense"))]
    rows = rtl.check_vectors(wanted, "small")
    assert [row["bit_exact"] for row in rows] == [True] * 6
    with pytest.raises(KVStrataError, match=r"are product-\* and storage-dense-\*, not a8-corners\.npz"):
        rtl.check_vectors([p for p in vector_files if p.name == "a8-corners.npz"])


def test_a_vector_file_of_another_spec_version_is_one_sentence(vector_files, tmp_path):
    import numpy as np

    with np.load(vector_files[0]) as file:
        arrays = dict(file)
    header = json.loads(arrays["header"].tobytes()) | {"spec_version": "0"}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(tmp_path / "old.npz", **arrays)
    result = subprocess.run(
        [PROGRAM, "check-rtl", "--vectors", tmp_path / "old.npz"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert f"a vector file must be of spec version {SPEC_VERSION}, " in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr


def test_missing_operands_are_one_sentence(tmp_path):
    with pytest.raises(KVStrataError, match="captured operands are a safetensors file, but"):
        rtl.check(tmp_path / "nothing.safetensors")


def test_a_model_without_a_tokenizer_is_one_sentence(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from golden import llama
    from sw_stack.chain import language

    monkeypatch.setattr(llama, "load_model", lambda _: SimpleNamespace(tokenizer=None))
    with pytest.raises(KVStrataError, match="needs a tokenizer, and the model holds none"):
        language.capture(tmp_path, "Why?")


def test_a_directory_that_holds_something_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = report(tmp_path)
    assert result.returncode == 1
    assert "exists and holds no report" in result.stderr.replace("\n", " ")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_changed_preset_changes_the_outcome(tmp_path):
    from sim.api import simulate
    from sim.describe.workload import Workload

    presets = Path(__file__).parents[2] / "sim" / "presets" / "machine"
    text = (presets / "reference.toml").read_text()
    assert 'csd = "instcsd"' in text
    (tmp_path / "slower.toml").write_text(text.replace('csd = "instcsd"', 'csd = "openssd"'))
    before, after = (
        simulate(machine, "llama-2-7b", "csd-dense", Workload(batch=4, input_tokens=512, output_tokens=64))
        for machine in ("reference", str(tmp_path / "slower.toml"))
    )
    assert (
        after.tokens_per_s < before.tokens_per_s / 1.5
    )  # four channels and PCIe 3.0 instead of eight and 4.0
