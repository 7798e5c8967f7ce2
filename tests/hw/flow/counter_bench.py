"""cocotb tests of the counter; EXPECT tells what the last one demands."""

import os

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles


@cocotb.test()
async def counts(dut):
    Clock(dut.clk, 10, unit="ns").start()
    dut.rst.value = 1
    dut.en.value = 0
    await ClockCycles(dut.clk, 2)
    dut.rst.value = 0
    dut.en.value = 1
    await ClockCycles(dut.clk, 6)
    got = dut.o.value.to_unsigned()
    assert got == int(os.environ["EXPECT"]), f"after 5 enabled edges got {got}"
