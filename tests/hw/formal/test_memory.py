"""The memory masters proved: regions and stability for all time, coverage and credit over every short history."""

import pytest

from hw.flow.formal import ProofFailed, prove
from tests.hw.formal import memory_proofs as proofs

PROOFS = {
    "region": (proofs.RegionProof, 5, True),
    "coverage": (proofs.CoverageProof, 12, False),
    "read_channel": (lambda: proofs.ReadChannelProof(abort=False), 6, True),
    "read_channel_abort": (lambda: proofs.ReadChannelProof(abort=True), 11, False),
    "write_channel": (proofs.WriteChannelProof, 11, False),
    "read_mux": (proofs.ReadMuxProof, 8, False),
}


@pytest.mark.parametrize("name", PROOFS)
def test_proved(name):
    make, depth, induction = PROOFS[name]
    prove(make(), name, depth=depth, induction=induction)


def test_a_region_that_moves_fails_the_proof():
    with pytest.raises(ProofFailed, match="moving_region: an assertion fails in the first"):
        prove(proofs.UncheckedRegionProof(), "moving_region", depth=6)
