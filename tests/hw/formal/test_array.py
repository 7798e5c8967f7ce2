"""The multipliers' operands proved: what the DSPs choose and add is what the packings say, for every input.

Together with `tests/rtl/test_engine_dsp.py`, which drives the cascades against sums of products, one position at a time
too, this says that the array on DSPs is the array that the engine instantiates.
"""

import pytest
from amaranth import Cat, Mux

from hw.flow.formal import ProofFailed, prove
from tests.hw.formal.array_proofs import OperandProof


def test_operands_are_proved_for_every_input():
    prove(OperandProof(), "operands", depth=1, induction=False)


def test_a_missing_sign_bit_fails_the_proof():
    def broken(acts, sparse):
        return Cat(Mux(sparse, 0xFC, acts)[:8], 0)

    with pytest.raises(ProofFailed, match="signless: an assertion fails in the first"):
        prove(OperandProof(broken), "signless", depth=1, induction=False)
