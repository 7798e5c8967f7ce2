"""The flash side as Verilog under Verilator, behind modelled flash channels."""

from functools import partial

import pytest

from hw.flow import cocotb_run
from hw.storage.nfc.front import FlashFront

pytestmark = pytest.mark.rtl


@pytest.mark.slow
def test_eight_channels_and_two_kernels():
    assert cocotb_run.run(partial(FlashFront), "flash_front", "tests.rtl.nfc_front_bench") == 4


@pytest.mark.slow
def test_more_seeds():
    seeds = " ".join(map(str, range(2, 12)))
    assert (
        cocotb_run.run(
            partial(FlashFront), "flash_front", "tests.rtl.nfc_front_bench", extra_env={"FRONT_SEEDS": seeds}
        )
        == 22
    )
