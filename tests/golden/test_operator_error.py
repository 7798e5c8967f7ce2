"""The measured errors: the page's table is what is measured, and each stays within what the algorithm promises."""

import pathlib

import pytest

from golden import operator_error

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "formats.md"
PROMISED = {
    "exp2(-x)": 2**-14, "sigmoid": 2**-14, "SiLU": 2**-14, "1/L of softmax and scales": 2**-15, "1/sqrt(u)": 2**-15,
    "RMSNorm": 2**-12, "LayerNorm": 2**-12, "RoPE": 2**-13, "A8": 0.51, "KV4": 0.51, "KV8": 0.51,
    "matrix product": 0.76,
    "attention, KV4": 1 / 64, "attention, KV8": 1 / 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    return [m() for m in operator_error.MEASUREMENTS]


def test_errors_stay_within_their_promises(measured):
    assert {e.operator: e.value <= PROMISED[e.operator] for e in measured} == dict.fromkeys(PROMISED, True)
    assert all(e.value > 0 for e in measured)


def test_the_page_holds_the_measured_table(measured):
    rows = operator_error.table().splitlines()
    missing = [row for row in rows if row not in PAGE.read_text()]
    assert not missing, f"docs/formats.md section 11 must hold: {missing}"
