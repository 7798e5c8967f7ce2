"""The vector unit as Verilog under Verilator, against plain integers."""

from functools import partial

import pytest

from golden.spec.engine import SMALL, TINY
from hw.engine.sfu.unit import VectorUnit
from hw.flow import cocotb_run

pytestmark = pytest.mark.rtl


def test_vector_unit_of_eight_lanes():
    assert cocotb_run.run(partial(VectorUnit, TINY), "vector_unit", "tests.rtl.sfu_bench") == 9


@pytest.mark.slow
def test_vector_unit_of_sixteen_lanes_at_length():
    settings = {"SFU_CONFIG": "small", "SFU_CASES": "300"}
    assert (
        cocotb_run.run(partial(VectorUnit, SMALL), "vector_unit", "tests.rtl.sfu_bench", extra_env=settings)
        == 9
    )
