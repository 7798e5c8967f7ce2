"""The memory masters proved: regions and stability for all time, coverage and credit over every short history."""

import pytest

from hw.flow.formal import ProofFailed, prove
from tests.hw.formal import memory_proofs as proofs

# name: (harness, depth, induction)
PROOFS = {
    "region": (proofs.RegionProof, 5, True),
    "coverage": (proofs.CoverageProof, 4, True),
    "read_channel": (lambda: proofs.ReadChannelProof(abort=False), 6, True),
    "read_mux": (proofs.ReadMuxProof, 8, False),
    "write_mux": (proofs.WriteMuxProof, 8, False),
    "read_channel_abort": (lambda: proofs.ReadChannelProof(abort=True), 8, False),
    "write_channel": (proofs.WriteChannelProof, 8, False),
}
DEEP = {
    "read_channel_abort": (lambda: proofs.ReadChannelProof(abort=True), 11, False),
    "write_channel": (proofs.WriteChannelProof, 11, False),
}


@pytest.mark.parametrize("name", PROOFS)
def test_proved(name):
    make, depth, induction = PROOFS[name]
    prove(make(), name, depth=depth, induction=induction)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_proved_deeper(name):
    make, depth, induction = DEEP[name]
    prove(make(), name, depth=depth, induction=induction)


def test_a_region_that_moves_fails_the_proof():
    with pytest.raises(ProofFailed, match="moving_region: an assertion fails in the first"):
        prove(proofs.UncheckedRegionProof(), "moving_region", depth=6)


def test_a_generator_that_skips_a_beat_fails_the_proof():
    dut = proofs.SkippingGenerator(
        addr_bits=proofs.ADDR_BITS, data_bits=512, levels=2, max_burst=proofs.MAX_BURST
    )
    with pytest.raises(ProofFailed, match="skipping: an assertion fails in the first"):
        prove(proofs.CoverageProof(dut), "skipping", depth=6, induction=False)
