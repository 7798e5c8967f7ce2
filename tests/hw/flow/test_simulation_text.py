"""Verilog for simulation: every rule on a line of its kind, and designs that a proof finds equal before and after."""

import re

import pytest
from amaranth import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from golden.spec import KVStrataError
from hw.engine.decoder import ChannelPlanes
from hw.flow import simulation_text
from hw.flow.simulation_text import for_simulation, register_inputs
from hw.flow.verilog import Design, emit
from hw.flow.yosys import run_script
from hw.lib.memories import TypedMemory


class Mixture(wiring.Component):
    """One of everything that a rule looks for: enables, resets, fields, extensions, places, masks, sums, a memory."""

    def __init__(self) -> None:
        super().__init__(
            {
                "en": In(1),
                "word": In(64),
                "short": In(48),
                "place": In(3),
                "a": In(signed(5)),
                "b": In(signed(6)),
                "held": Out(8),
                "parts": Out(data.StructLayout({"low": 4, "high": 4})),
                "wide": Out(12),
                "low": Out(6),
                "crumbs": Out(16),
                "read": Out(8),
                "same": Out(2),
                "halved": Out(9),
                "kept": Out(4),
                "beyond": Out(8),
            }
        )

    def elaborate(self, platform):
        m = Module()
        chosen = self.word.word_select(self.place, 8)
        shifted = (self.word[:16] >> self.place)[:9]
        inner = Signal(signed(5), reset_less=True)
        m.d.sync += inner.eq(self.a)
        with m.If(self.en):
            m.d.sync += [self.held.eq(chosen), self.parts.low.eq(chosen[:4])]
            m.d.sync += self.beyond.eq(self.short.word_select(self.place, 8))
            m.d.sync += [self.halved.eq((shifted >> 1) + shifted[0]), self.kept.eq(shifted[3:])]
            with m.If(self.a == 3):
                m.d.sync += self.parts.high.eq(self.parts.high + 1)
            with m.Else():
                m.d.sync += self.low.eq(self.a * self.b + self.b + inner)
        m.d.sync += [
            self.wide.eq(inner),
            self.crumbs.eq(((self.word[:16] >> 2) & 0x3333) << 1 | (self.word[16:32] & 0x0F0F)),
            self.same.eq(Cat(~self.a[4] & self.en, (~self.a[4]).replicate(1) & ~self.en)),
        ]
        m.submodules.memory = memory = TypedMemory(8, 8)
        m.d.comb += [
            memory.w.addr.eq(self.place),
            memory.w.data.eq(Mux(self.en, chosen, Const(5, 8))),
            memory.w.en.eq(self.en),
            memory.r[0].addr.eq(self.word[:3]),
            memory.r[0].en.eq(1),
            self.read.eq(memory.r[0].data),
        ]
        return m


def prove_equal(text, rewritten, folder):
    """Every register and output of both texts holds the same value in every cycle, or KVStrataError."""
    script = []
    for name, content in (("gold", text), ("gate", rewritten)):
        (folder / f"{name}.v").write_text(content)
        script += [
            f"read_verilog {name}.v",
            "hierarchy -top top",
            "proc",
            "flatten",
            "memory_map",
            "opt_clean",
        ]
        script += [f"design -stash {name}"]
    script += [f"design -copy-from {name} -as {name} top" for name in ("gold", "gate")]
    script += ["equiv_make gold gate equiv", "hierarchy -top equiv", "opt_expr", "opt_clean", "equiv_struct"]
    run_script("\n".join([*script, "equiv_simple", "equiv_induct", "equiv_status -assert"]), folder)


@pytest.mark.parametrize(
    "make",
    [Mixture, pytest.param(lambda: ChannelPlanes(2), marks=pytest.mark.slow)],
    ids=["mixture", "channel planes"],
)
def test_a_rewritten_design_is_proved_equal(make, tmp_path):
    text = emit(make(), "top").text
    prove_equal(text, for_simulation(text), tmp_path)


def test_the_proof_notices_a_wrong_rewriting(tmp_path):
    text = emit(Mixture(), "top").text
    wrong = for_simulation(text).replace("held  <= ", "held  <= 8'h01 ^ ", 1)
    assert wrong != for_simulation(text)
    with pytest.raises(KVStrataError, match="Yosys refused the design: ERROR: Found .* unproven"):
        prove_equal(text, wrong, tmp_path)


def test_every_rule_finds_its_kind():
    text = for_simulation(emit(Mixture(), "top").text)
    assert "held  <= " in text
    assert "always @*" not in text.split("module \\top.memory")[0].split("held  <= ")[0]
    assert "+: 8];" in text
    assert "< 48 ? short [" in text
    assert "{ 7{ inner[4] } }, inner }" in text
    assert "& 14'h3333) << 1;" in text
    assert re.search(
        r"if \(en\) begin\n +\\\$\d+  = word\[15:0\] +>> +place;\n(?: .*;\n)* +halved  <= ", text
    )


# --- rule by rule ---------------------------------------------------------------------------------------------
def module(*lines):
    return "".join(f"  {line}\n" for line in lines)


def test_equal_values_are_one():
    before = module(
        "wire \\$1 ;", "wire \\$2 ;", "wire [1:0] \\$3 ;",
        "assign \\$1  = ~ a[3];", "assign \\$2  = ~ a[3];", "assign \\$3  = ~ a[3];", "assign o = { \\$2 , \\$1  };",
    )  # fmt: skip
    after = simulation_text.merge_equal(before)
    assert "assign o = { \\$1 , \\$1  };" in after
    assert "\\$2 " not in after
    assert "assign \\$3 " in after, "a wider value is another one"


def test_a_sum_is_as_wide_as_its_readers():
    before = module(
        "wire [9:0] \\$1 ;", "wire [10:0] \\$2 ;", "wire [10:0] \\$3 ;",
        "assign \\$1  = a + b;", "assign \\$2  = \\$1  + c;", "assign \\$3  = a - b;",
        "assign o = \\$2 [7:0];", "assign p = \\$3  == 11'h003;",
        "wire [4:0] \\$4 ;", "wire [8:0] \\$5 ;", "assign \\$4  = a + b;", "assign \\$5  = { c, \\$4  } + d;",
        "assign q = \\$5 [2:0];",
    )  # fmt: skip
    after = simulation_text.narrow_sums(before)
    assert "wire [7:0] \\$1 ;" in after
    assert "wire [7:0] \\$2 ;" in after
    assert "wire [10:0] \\$3 ;" in after, "a comparison reads every bit"
    assert "wire [4:0] \\$4 ;" in after, "an item of a concatenation has its width"
    assert "wire [2:0] \\$5 ;" in after


def test_a_place_is_an_index_unless_it_can_be_half_inside_the_word():
    lines = ["reg [{top}:0] word = 64'h0;", "wire [7:0] \\$1 ;", "wire [5:0] \\$2 ;", "assign \\$2  = p[2:0] * 6'h08;",
             "assign \\$1  = word >> \\$2 ;"]  # fmt: skip
    inside, half, beyond = (
        module(*(line.replace("{top}", top) for line in lines)) for top in ("63", "62", "55")
    )
    assert "assign \\$1  = word [\\$2 +: 8];" in simulation_text.index_words(inside)
    assert simulation_text.index_words(half) == half
    assert "assign \\$1  = \\$2 < 56 ? word [\\$2 +: 8] : 8'h0;" in simulation_text.index_words(beyond)


@pytest.mark.parametrize("q", ["q", "\\port.q ", "\\q$2 "])
def test_only_a_next_state_that_nothing_else_reads_is_clocked(q):
    process = ["reg \\$1 ;", "always @(posedge clk)", f"  {q} <= \\$1 ;", "always @* begin",
               "  if (\\$auto$verilog_backend.cc:1:dump_module$1 ) begin end", f"  \\$1  = {q};", "  if (en) begin",
               "    \\$1  = d;", "  end", "  if (rst) begin", "    \\$1  = 1'h0;", "  end", "end"]  # fmt: skip
    after = simulation_text.clock_next_states(module(*process))
    assert after == module(
        "always @(posedge clk) begin", "  if (rst) begin", f"    {q.strip()}  <= 1'h0;", "  end else begin",
        "    if (en) begin", f"      {q.strip()}  <= d;", "    end", "  end", "end",
    )  # fmt: skip
    read = module(*process, "assign o = \\$1 ;")
    assert simulation_text.clock_next_states(read) == read


def register(name, value, condition="en"):
    return [
        "always @(posedge clk) begin",
        f"  if ({condition}) begin",
        f"    {name}  <= {value};",
        "  end",
        "end",
    ]


def test_a_value_is_computed_where_its_registers_want_it():
    values = [
        "wire [3:0] \\$1 ;",
        "wire [3:0] \\$2 ;",
        "assign \\$1  = a + b;",
        "assign \\$2  = { \\$1 [0], \\$1  };",
    ]
    after = simulation_text.sink_values(module(*values, *register("p", "\\$2 "), *register("q", "\\$1 ")))
    both = ["\\$1  = a + b;", "\\$2  = { \\$1 [0], \\$1  };", "p  <= \\$2 ;", "q  <= \\$1 ;"]
    assert after == module(
        "reg [3:0] \\$1 ;", "reg [3:0] \\$2 ;",
        "always @(posedge clk) begin", "  if (en) begin", *(f"    {line}" for line in both), "  end", "end",
    )  # fmt: skip


@pytest.mark.parametrize(
    "reader", [["assign out = \\$1 ;"], register("q", "\\$1 ", "go"), register("q", "d", "\\$1 ")]
)
def test_a_value_that_anything_else_reads_stays_where_it_is(reader):
    before = module("wire \\$1 ;", "assign \\$1  = a & b;", *register("p", "{ \\$1 , \\$1  }"), *reader)
    assert simulation_text.sink_values(before) == before


def test_registered_inputs_keep_the_ports_of_the_design():
    design = Design("top", "module top(clk, rst, a, b, o);\nendmodule\n",
                    {"a": ("i", 4, False), "b": ("i", 1, False), "o": ("o", 2, False)})  # fmt: skip
    text = register_inputs(design, design.text, {"a"})
    assert "module top_inside(clk, rst, a, b, o);" in text
    assert "always @(posedge clk) a_late <= a;" in text
    for pin in (".a(a_late)", ".b(b)", ".o(o)", ".rst(rst_late)"):
        assert pin in text
