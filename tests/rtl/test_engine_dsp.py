"""The row pair on DSP48E2 cascades against the same pair written as arithmetic, cycle by cycle under Verilator."""

import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
from amaranth import Const

from hw.engine.array import DOT_BITS, WHOLE, LanePair, _add
from hw.flow.verilator import build_harness
from hw.flow.verilog import Design, emit

pytestmark = [pytest.mark.rtl, pytest.mark.slow]

HERE = Path(__file__).parent
POSITIONS = 16
STIMULUS = {"shared": 8 * POSITIONS, "acts": 16 * POSITIONS, "planes": 16 * POSITIONS, "patterns": 3 * POSITIONS,
            "correction": DOT_BITS, "wide": 1}  # fmt: skip
"""Random inputs of both pairs, in bits; `shared` comes first."""


def bits(name, start=0, width=None):
    """A part of a field of the stimulus, in Verilog."""
    fields = list(STIMULUS)
    at = sum(STIMULUS[other] for other in fields[: fields.index(name)]) + start
    return f"stimulus[{at} +: {width or STIMULUS[name]}]"


def inputs():
    """What both forms of a pair get, by port."""
    low, mid, high = (bits("patterns", i * POSITIONS, POSITIONS) for i in range(3))
    # A 2:4 step has the lowest plane alone, a narrow one two.
    masks = ("1'b1", "~sparse", "wide", "wide")
    return {
        "clk": "clk", "rst": "1'b0", "load": "load", "valid": "valid", "sparse": "sparse", "wide": "wide",
        "acts": bits("acts"),
        "patterns": f"{{{high} & ~{mid}, {mid}, {low}}}",  # 6 and 7 are none: the upper bits are never set together
        "correction": f"{bits('correction')} & {{{DOT_BITS}{{~late[{LanePair.latency - 2}]}}}}",  # of dense steps
        **{f"planes__{p}__0": f"{bits('planes', p * WHOLE, WHOLE)} & {{{WHOLE}{{{masks[p]}}}}}" for p in range(4)},
    }  # fmt: skip


def shared(width):
    """What the activations of a dense step are to all pairs, `width` bits a position; -4 in a 2:4 step."""
    acts = ((bits("shared", 8 * j, 8), bits("shared", 8 * j + 7, 1)) for j in reversed(range(POSITIONS)))
    return ", ".join(f"{{{width - 8}{{{sign} & ~loaded}}}}, loaded ? 8'hfc : {act}" for act, sign in acts)


def twins(change=lambda text: text):
    """Both builds side by side with the same inputs; `change` edits the one of primitives."""
    plain = emit(partial(LanePair, POSITIONS), "plain_pair").text
    device = change(emit(LanePair(POSITIONS, primitives=True), "device_pair").text)
    ports, size = (
        ", ".join(f".{port}({value})" for port, value in inputs().items()),
        -(-sum(STIMULUS.values()) // 8),
    )
    top = f"""module pair_twins(input clk, input load, input valid, input sparse, input [{8 * size - 1}:0] stimulus,
    output differ);
wire [{2 * DOT_BITS - 1}:0] plain_dots, device_dots;
reg loaded;
reg [{LanePair.latency - 2}:0] late;
wire wide = {bits("wide")} & ~sparse;
always @(posedge clk) if (load) loaded <= sparse;
always @(posedge clk) late <= {{late, loaded}};
plain_pair plain({ports}, .shared({{{shared(WHOLE)}}}), .dots(plain_dots));
device_pair device({ports}, .shared({{{shared(9)}}}), .dots(device_dots));
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


REAL_ADD = _add
MUTANTS = {
    "an uncorrected offset of biased activations": (
        "LanePair._correction",
        lambda self, m, weights, sparse: ([Const(0, 2), Const(0, 2)], sparse),
    ),
    "an unresolved overlap of packed fields": ("_parity", lambda m, index, operands: Const(0, 1)),
    "a dropped borrow between packed fields": ("_add", lambda a, b, carry: REAL_ADD(a, b, Const(0, 1))),
}


@pytest.mark.parametrize("name", list(MUTANTS))
def test_a_mutant_is_noticed(monkeypatch, name):
    target, mutant = MUTANTS[name]
    monkeypatch.setattr(f"hw.engine.array.{target}", mutant)
    assert "results differ" in compare(*twins()).stderr
