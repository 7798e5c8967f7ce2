"""Timing closes on something real: pieces of the array, placed and routed on an open device."""

import pytest

from hw.engine.drain import ScaleLane
from hw.engine.lane import Lane, Multipliers
from hw.flow.synth import place_and_route_ecp5

pytestmark = pytest.mark.slow

FMAX_MHZ = 80
"""A 40 nm device with 4-input LUTs; the board's is of 16 nm with 6-input ones and clocks at 225 MHz."""


@pytest.mark.parametrize(
    ("name", "make"),
    [("output_scale", ScaleLane), ("lane_of_two_vectors", lambda: Lane(2, Multipliers.SCALE_IN_DSP))],
)
def test_a_piece_of_the_array_closes_on_ecp5(name, make):
    placed = place_and_route_ecp5(make(), name, size="25k")
    assert placed.fmax_mhz > FMAX_MHZ
    assert 0 < placed.dsp <= 3
