"""The row pair on DSP48E2 cascades against the same pair written as arithmetic, cycle by cycle under Verilator."""

import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
from amaranth import Const

from hw.engine import array
from hw.engine.array import DOT_BITS, LanePair
from hw.flow.verilator import build_harness
from hw.flow.verilog import Design, emit

pytestmark = [pytest.mark.rtl, pytest.mark.slow]

HERE = Path(__file__).parent
POSITIONS = 16
STIMULUS = {"shared": 8 * POSITIONS, "acts": 16 * POSITIONS, "planes": 16 * POSITIONS, "patterns": 3 * POSITIONS,
            "correction": DOT_BITS}  # fmt: skip
"""Random inputs of both pairs, in bits; `shared` comes first."""


def twins(change=lambda text: text):
    """Both builds side by side with the same inputs; `change` edits the one of primitives."""
    plain = emit(partial(LanePair, POSITIONS), "plain_pair").text
    device = change(emit(LanePair(POSITIONS, primitives=True), "device_pair").text)
    ports = [".clk(clk)", ".rst(1'b0)", ".load(load)", ".valid(valid)", ".sparse(sparse)"]
    total = 0
    for name, width in STIMULUS.items():
        bits = f"stimulus[{total} +: {width}]"
        if name == "patterns":  # 6 and 7 are none: the upper two bits are never set together
            low, mid, high = (f"stimulus[{total + i * POSITIONS} +: {POSITIONS}]" for i in range(3))
            bits = f"{{{high} & ~{mid}, {mid}, {low}}}"
        elif name == "planes":  # a 2:4 step has the lowest plane alone
            bits = f"stimulus[{total} +: {width}] & {{{{{3 * width // 4}{{~sparse}}}}, {{{width // 4}{{1'b1}}}}}}"
        elif name == "shared":  # what the activations of a dense step are to all pairs
            position = "stimulus[{0} + 7] & ~loaded, loaded ? 8'hfc : stimulus[{0} +: 8]"
            bits = ", ".join(position.format(total + 8 * j) for j in reversed(range(POSITIONS)))
            bits = f"{{{bits}}}"
        ports.append(f".{name}({bits})")
        total += width
    size = -(-total // 8)
    top = f"""module pair_twins(input clk, input load, input valid, input sparse, input [{8 * size - 1}:0] stimulus,
    output differ);
wire [{2 * DOT_BITS - 1}:0] plain_dots, device_dots;
reg loaded;
always @(posedge clk) if (load) loaded <= sparse;
plain_pair plain({", ".join(ports)}, .dots(plain_dots));
device_pair device({", ".join(ports)}, .dots(device_dots));
assign differ = plain_dots != device_dots;
endmodule
"""
    text = "\n".join([plain, device, (HERE / "dsp48e2.v").read_text(), top])
    return Design("pair_twins", text, {}), size


def compare(design, size):
    defines = {"STIMULUS_BYTES": size, "LATENCY": LanePair.latency, "POSITIONS": POSITIONS}
    program = build_harness(design, [HERE / "dsp_pair.cpp"], defines=defines)
    return subprocess.run([program], capture_output=True, text=True, check=False)


def test_cascades_compute_what_the_arithmetic_does():
    result = compare(*twins())
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 10_000


def test_a_cascade_with_a_missing_register_is_noticed():
    result = compare(*twins(lambda text: re.sub(r"\.AREG\(32'd2\)", ".AREG(32'd1)", text, count=1)))
    assert "results differ" in result.stderr


REAL_ADD = array._add
MUTANTS = {
    "an unresolved overlap of packed fields": ("_parity", lambda m, index, operands: Const(0, 1)),
    "a dropped borrow between packed fields": ("_add", lambda a, b, carry: REAL_ADD(a, b, Const(0, 1))),
}


@pytest.mark.parametrize("name", list(MUTANTS))
def test_a_mutant_is_noticed(monkeypatch, name):
    monkeypatch.setattr(array, *MUTANTS[name])
    assert "results differ" in compare(*twins()).stderr
