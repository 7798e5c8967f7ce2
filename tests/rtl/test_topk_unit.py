"""The default top-k unit as Verilog under Verilator."""

from functools import partial

import pytest

from hw.flow import cocotb_run
from hw.storage.topk.unit import TopK

pytestmark = pytest.mark.rtl
BENCH = "tests.rtl.topk_unit_bench"


def test_scores_of_several_kinds():
    env = {"TOPK_SIZES": "17 600", "TOPK_LISTS": "gauss,two values,saturated"}
    assert cocotb_run.run(partial(TopK), "topk", BENCH, extra_env=env) == 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_scores_of_every_kind_up_to_32k(seed):
    env = {"TOPK_SIZES": "1 4 17 333 600 4096 32767 32768", "TOPK_SEED": str(seed)}
    assert cocotb_run.run(partial(TopK), "topk", BENCH, extra_env=env) == 4
