"""The stream library proved: for all time where induction closes, else for every reachable FIFO state (bounded)."""

import pytest

from hw.flow.formal import ProofFailed, prove
from tests.hw.formal import stream_proofs as proofs

FOR_ALL_TIME = {
    "skid_buffer": (proofs.SkidProof, 6),
    "fork": (proofs.ForkProof, 5),
    "stream_arbiter": (proofs.ArbiterProof, 6),
    "gearboxes": (proofs.GearProof, 8),
    "credits": (proofs.CreditProof, 6),
    "tokens": (proofs.TokenProof, 5),
    "handover": (proofs.HandoverProof, 6),
}
BOUNDED = {
    "lut_fifo_2": (lambda: proofs.lut_fifo(2), 12),
    "block_fifo_3": (lambda: proofs.block_fifo(3), 11),
}


@pytest.mark.parametrize("name", FOR_ALL_TIME)
def test_proved_for_all_time(name):
    make, depth = FOR_ALL_TIME[name]
    prove(make(), name, depth=depth)


@pytest.mark.parametrize("name", BOUNDED)
def test_proved_for_every_pointer_position(name):
    """A FIFO of depth d passes every pair of pointers within 2d + 4 cycles from reset, stalls included."""
    make, depth = BOUNDED[name]
    prove(make(), name, depth=depth, induction=False)


@pytest.mark.slow
def test_odd_depth_fifo_proved_deeper():
    prove(proofs.lut_fifo(3), "lut_fifo_3", depth=14, induction=False)


@pytest.mark.parametrize(
    ("name", "make"),
    [("lossy_skid", proofs.LossySkidProof), ("unlocked_arbiter", proofs.UnlockedArbiterProof)],
)
def test_a_broken_block_fails_its_proof(name, make):
    with pytest.raises(ProofFailed, match=f"{name}: an assertion fails in the first"):
        prove(make(), name, depth=8)
