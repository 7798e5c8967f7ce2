"""The build layer: conversion, Verilation, cocotb, synthesis and proofs, and how each of them refuses."""

import subprocess
from functools import partial
from pathlib import Path

import pytest

from golden.spec import KVStrataError
from hw.flow import cache, cocotb_run, formal, synth, verilator
from hw.flow.verilog import emit
from tests.hw.flow.designs import Counter, PackedMultiplier

HERE = Path(__file__).parent


def test_verilog_depends_on_the_design_alone():
    first, second = emit(Counter(), "counter"), emit(Counter(), "counter")
    assert first == second
    assert first.key != emit(Counter(8), "counter").key
    assert str(cache.ROOT) not in first.text
    assert first.ports == {"en": ("i", 1, False), "o": ("o", 4, False)}


def test_a_recipe_is_named_by_its_arguments_and_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("KVSTRATA_BUILD", str(tmp_path))
    assert emit(partial(Counter, 8), "counter") == emit(Counter(8), "counter")
    assert emit(partial(Counter, 8), "counter").key != emit(partial(Counter, limit=5), "counter").key
    monkeypatch.setattr(Counter, "__init__", None)
    assert emit(partial(Counter, 8), "counter").ports["o"] == ("o", 4, False)


def test_a_recipe_of_unnameable_arguments_is_refused():
    with pytest.raises(ValueError, match="arguments must be values with a telling repr, got .*object at 0x"):
        emit(partial(Counter, object()), "counter")


@pytest.mark.rtl
def test_harness_runs_and_is_cached(tmp_path):
    source = tmp_path / "main.cpp"
    source.write_text(
        '#include "Vcounter.h"\n#include <cstdio>\n'
        "int main() { Vcounter d; d.rst = 0; d.en = 1; for (int i = 0; i < 5; ++i) { d.clk = 0; d.eval();"
        ' d.clk = 1; d.eval(); } printf("%d", d.o); }\n'
    )
    program = verilator.build_harness(emit(Counter(), "counter"), [source])
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "5"
    stamp = program.stat().st_mtime_ns
    assert verilator.build_harness(emit(Counter(), "counter"), [source]).stat().st_mtime_ns == stamp


@pytest.mark.rtl
def test_refused_harness_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("KVSTRATA_BUILD", str(tmp_path / "build"))
    source = tmp_path / "main.cpp"
    source.write_text("int main() { return nonsense; }\n")
    with pytest.raises(KVStrataError, match=r"Verilating counter failed: .*nonsense"):
        verilator.build_harness(emit(Counter(), "counter"), [source])
    assert [
        path.name for path in (tmp_path / "build" / "verilated").iterdir() if path.suffix != ".lock"
    ] == []


@pytest.mark.rtl
def test_cocotb_passes_and_fails():
    bench = "tests.hw.flow.counter_bench"
    assert cocotb_run.run(Counter(), "counter", bench, extra_env={"EXPECT": "5"}) == 1
    with pytest.raises(KVStrataError, match="after 5 enabled edges got 5"):
        cocotb_run.run(Counter(), "counter", bench, extra_env={"EXPECT": "6"})


def test_no_compiler_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    verilator.environment.cache_clear()
    try:
        with pytest.raises(verilator.ToolMissing, match="needs g\\+\\+ on PATH, and it was not found"):
            verilator.environment()
    finally:
        verilator.environment.cache_clear()


def test_packed_multiplier_is_one_dsp():
    assert synth.resources(PackedMultiplier(), "packed", "xcup").dsp == 1


def test_unknown_family_is_refused():
    counter = Counter()
    with pytest.raises(KVStrataError, match="a family is one of xcup, xc7, not 'ecp6'"):
        synth.resources(counter, "counter", "ecp6")
    emit(counter, "counter")  # a component that is built and never used is a warning, and warnings are errors


def test_proof_holds_and_fails():
    formal.prove(Counter(), "counter", depth=12)
    with pytest.raises(formal.ProofFailed, match="counter: an assertion fails in the first 12 cycles"):
        formal.prove(Counter(10), "counter", depth=12)
    with pytest.raises(KVStrataError, match="packed has no assertion to prove"):
        formal.prove(PackedMultiplier(), "packed")


def test_half_written_file_is_never_seen(tmp_path, monkeypatch):
    target = tmp_path / "table.json"
    cache.write_atomically(target, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cache.write_atomically(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
