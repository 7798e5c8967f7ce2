"""The multipliers' operands proved: what the DSPs choose and add is what the packings say, for every input. So is what
an accumulator keeps when it is rescaled.

Together with `tests/rtl/test_engine_dsp.py`, which drives the cascades against sums of products, one position at a time
too, this says that the array on DSPs is the array that the engine instantiates.
"""

import pytest
from amaranth import Cat, Mux

from hw.flow.formal import ProofFailed, prove
from tests.hw.formal.array_proofs import DecayProof, OperandProof


def test_operands_are_proved_for_every_input():
    prove(OperandProof(), "operands", depth=1, induction=False)


def test_a_missing_sign_bit_fails_the_proof():
    def broken(acts, sparse):
        return Cat(Mux(sparse, 0xFC, acts)[:8], 0)

    with pytest.raises(ProofFailed, match="signless: an assertion fails in the first"):
        prove(OperandProof(broken), "signless", depth=1, induction=False)


def test_the_rescaling_of_an_accumulator_is_proved_for_every_input():
    prove(DecayProof(), "decay", depth=1, induction=False)


def test_a_reach_that_ignores_48_places_fails_the_proof():
    def broken(decay, first):
        return Cat(first | decay[4], first | decay[5])

    with pytest.raises(ProofFailed, match="short: an assertion fails in the first"):
        prove(DecayProof(broken), "short", depth=1, induction=False)
