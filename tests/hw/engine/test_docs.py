"""Tables of docs/engine.md that follow from code stand there as the code gives them."""

from pathlib import Path

import pytest

from golden.spec.engine import U280, weight_stream
from golden.spec.formats import WEIGHT_FORMATS
from hw.engine.compose import DSP_BUDGET, compose
from hw.timing import array_utilisation, systolic_utilisation

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "engine.md").read_text()
SIZE, ROWS, INNER = 128, 4096, 4096


def comparison():
    """Use of the multipliers for 4,096 x 4,096 by M vectors, in percent."""
    names = list(WEIGHT_FORMATS)
    lines = [
        f"| vectors M | systolic {SIZE} x {SIZE} | " + " | ".join(names) + " |",
        "|" + "---|" * (len(names) + 2),
    ]
    for vectors in (1, 16):
        ours = [
            array_utilisation(U280, weight_stream(n, WEIGHT_FORMATS[n].group), ROWS, INNER, vectors)
            for n in names
        ]
        values = [systolic_utilisation(SIZE, ROWS, INNER, vectors), *ours]
        lines.append(f"| {vectors} | " + " | ".join(f"{100 * v:.2f}%" for v in values) + " |")
    return "\n".join(lines)


def test_the_systolic_comparison_is_what_the_closed_forms_give():
    assert comparison() in PAGE, comparison()


def test_a_systolic_array_uses_what_its_closed_form_says():
    """The published utilisations of a 128 x 128 array at one vector and at sixteen."""
    assert round(100 * systolic_utilisation(SIZE, ROWS, INNER, 1), 2) == 0.74
    assert round(100 * systolic_utilisation(SIZE, ROWS, INNER, 16), 1) == 11.8


@pytest.mark.slow
def test_the_resource_table_is_what_synthesis_gives():
    """And the engine fits its board: DSPs as published, memories inside the device."""
    total = compose(U280)["total"]
    for name, value in (("LUT", total.lut), ("DSP", total.dsp), ("FF", total.ff), ("URAM", total.uram)):
        assert f"| {name} | {value:,} |" in PAGE, (name, value)
    assert f"| BRAM36 | {total.bram:g} |" in PAGE
    assert f"| logic levels | {total.logic_levels} |" in PAGE
    assert total.dsp <= DSP_BUDGET
    assert total.latches == 0
    assert total.bram <= 2016
    assert total.uram <= 960
