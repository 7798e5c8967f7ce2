"""Memory masters as Verilog under Verilator, against the HBM model and a third-party AXI model."""

import pytest

from hw.flow import cocotb_run
from tests.rtl.mem_duts import Copier, striped_reader

pytestmark = pytest.mark.rtl


def test_striped_reader():
    assert cocotb_run.run(striped_reader(), "striped_reader", "tests.rtl.mem_reader_bench") > 20


def test_read_and_write_path():
    assert cocotb_run.run(Copier(), "copier", "tests.rtl.mem_copier_bench") > 20
