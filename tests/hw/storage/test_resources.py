"""The resource table of docs/storage.md is what Yosys gives, and within what the published unit takes."""

import re
from pathlib import Path

import pytest

from hw.storage.compose import compose, resource_groups
from sw_stack.report.resources import table_ii_sum

PAGE = Path(__file__).parents[3] / "docs" / "storage.md"


def table():
    """{(row, source): (LUT, FF, BRAM, DSP)} of the documentation."""
    rows = re.findall(
        r"^\| (.+?) \| (.+?) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| (\d+) \|$", PAGE.read_text(), re.M
    )
    return {
        (row, source): (int(lut.replace(",", "")), int(ff.replace(",", "")), float(bram), int(dsp))
        for row, source, lut, ff, bram, dsp in rows
    }


def test_the_whole_unit_takes_no_more_than_the_published_one():
    rows = table()
    ours, published = rows["sum", "here"], rows["sum", "published"]
    assert all(a <= b for a, b in zip(ours, published))
    assert published == tuple(table_ii_sum()[name] for name in ("lut", "ff", "bram", "dsp"))
    for source in ("here", "published"):
        parts = [values for (row, origin), values in rows.items() if origin == source and row != "sum"]
        assert tuple(map(sum, zip(*parts))) == rows["sum", source]


@pytest.mark.slow
def test_the_table_is_what_synthesis_gives():
    rows = table()
    for row, found in resource_groups().items():
        assert rows[row, "here"] == (found.lut, found.ff, found.bram, found.dsp), row


@pytest.mark.slow
def test_no_path_inside_a_block_is_longer_than_six_levels():
    deep = {name: part.logic_levels for name, (part, _) in compose().items() if part.logic_levels > 6}
    assert not deep
